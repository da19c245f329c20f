"""`kairos report`."""

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `report`."""
    app.command()(report)


def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.json", help="What `kairos compare` wrote.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Say as JSON what was written.")] = False,
) -> None:
    """Write the report of a comparison: one HTML file that opens without a network.

    Example: kairos report out/results.json --out out/report.html
    """
    from kairos.adapters.report import read_file, write_report

    write_report(read_file(results), out)
    typer.echo(json.dumps({"report": str(out), "bytes": out.stat().st_size}) if as_json else str(out))
