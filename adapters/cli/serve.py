"""`kairos serve`."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `serve`."""
    app.command()(serve)


def serve(
    config: Annotated[Path, typer.Option(help="A kairos.yaml.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: service.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; default: service.port.", min=0, max=65535)] = None,
) -> None:
    """Run the control plane: `POST /schedule`, its pages at /docs.

    Example: kairos serve --config examples/kairos.yaml --port 8011
    """
    import uvicorn

    from kairos.adapters.simulator.replay import replay_on
    from kairos.scheduler_core.config import load_settings
    from kairos.scheduler_core.service.access import require_loopback
    from kairos.scheduler_core.service.app import create_app

    settings = load_settings(config)
    address = host or settings.service.host
    app = create_app(settings, replay_on(settings))
    if not app.state.keys.required:
        require_loopback(address)
    uvicorn.run(app, host=address, port=settings.service.port if port is None else port, access_log=False)
