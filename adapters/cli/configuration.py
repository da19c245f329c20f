"""`kairos config check | schema`."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `config` and its commands."""
    config = typer.Typer(no_args_is_help=True, help="Check the configuration.")
    config.command()(check)
    config.command()(schema)
    app.add_typer(config, name="config")


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A kairos.yaml.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the settings in force as JSON.")] = False,
) -> None:
    """Validate a configuration file, with the KAIROS_... variables that are set now.

    Example: kairos config check examples/kairos.yaml
    """
    from kairos.scheduler_core.config_file import load_settings

    settings = load_settings(file)
    if as_json:
        typer.echo(settings.model_dump_json(indent=2))
        return
    instances = Counter[str]()
    for role, _, group in settings.fleet.groups():
        instances[role] += group.count
    counts = ", ".join(f"{count} {role}" for role, count in instances.items())
    strategies = ", ".join(settings.strategies)
    typer.echo(f"{file}: valid: {counts} instances; strategies {strategies}; active {settings.active}")


def schema() -> None:
    """Print the JSON schema of kairos.yaml, for editors that check while one types.

    Example: kairos config schema > kairos.schema.json
    """
    from kairos.scheduler_core.config import Settings

    typer.echo(json.dumps(Settings.model_json_schema(), indent=2))
