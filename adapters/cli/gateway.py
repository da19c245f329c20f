"""`kairos gateway`."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `gateway`."""
    app.command()(gateway)


def gateway(
    config: Annotated[Path, typer.Option(help="A kairos.yaml whose fleet has addresses.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: gateway.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; default: gateway.port.", min=0, max=65535)] = None,
) -> None:
    """Run the OpenAI-compatible gateway in front of the engines of the fleet; SIGHUP reads the file again.

    Example: kairos gateway --config kairos.yaml --port 8000
    """
    import os

    from kairos.adapters.gateway.process import run_gateway
    from kairos.predictors.profiles import step_times_of
    from kairos.scheduler_core.config import Settings
    from kairos.scheduler_core.config_file import load_settings

    environment = dict(os.environ)
    if host is not None:
        environment["KAIROS_GATEWAY__HOST"] = host
    if port is not None:
        environment["KAIROS_GATEWAY__PORT"] = str(port)

    def load() -> Settings:
        return load_settings(config, environment)

    run_gateway(load, step_times_of)
