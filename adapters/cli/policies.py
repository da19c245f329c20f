"""`kairos policies`: what is there to choose from."""

import inspect
import json
from typing import Annotated, Any

import typer

from kairos.scheduler_core.plugins import POLICY_KINDS, installed, policy_class

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def register(app: typer.Typer) -> None:
    """Add `policies`."""
    app.command()(policies)


def policies(as_json: Json = False) -> None:
    """List the installed policies of each kind, third parties' included, with their parameters.

    Example: kairos policies
    """
    rows: list[dict[str, Any]] = []
    for kind in POLICY_KINDS:
        for name in sorted(installed(kind)):
            found = policy_class(kind, name)
            takes = inspect.signature(found).parameters.values()
            rows.append(
                {
                    "kind": kind,
                    "name": name,
                    "parameters": {p.name: None if p.default is p.empty else p.default for p in takes},
                    "says": (inspect.getdoc(found) or "").partition("\n")[0],
                }
            )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        parameters = ", ".join(f"{key}={value}" for key, value in row["parameters"].items())
        shown = f"{row['name']}({parameters})" if parameters else row["name"]
        typer.echo(f"{row['kind']:18} {shown}\n{'':18}   {row['says']}")
