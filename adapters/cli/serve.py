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
    from kairos.adapters.simulator.replay import replay_on
    from kairos.scheduler_core.config_file import load_settings
    from kairos.scheduler_core.service.app import create_app
    from kairos.scheduler_core.service.logging import configure_logging
    from kairos.scheduler_core.service.server import run_server

    settings = load_settings(config)
    configure_logging(settings.service.log_format)
    told = {"host": host, "port": port}
    service = settings.service.model_copy(update={name: value for name, value in told.items() if value is not None})
    run_server(create_app(settings, replay_on(settings)), service, lambda: load_settings(config))
