"""`kairos explain`: why a request waited, where it went, and what was predicted against what happened."""

from typing import Annotated

import typer

from kairos.adapters.cli.control import DEFAULT_URL, Json, Key, Url, ask, print_json


def register(app: typer.Typer) -> None:
    """Add `explain`."""
    app.command()(explain)


def explain(
    request_id: Annotated[str, typer.Argument(help="As it was sent to the service.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Say in plain words why a request waited, where it went, and what was predicted against what happened.

    Example: kairos explain req-17 --url http://127.0.0.1:8011
    """
    from urllib.parse import quote

    told = ask(url, key, "GET", f"/requests/{quote(request_id, safe='')}/explanation")
    if as_json:
        print_json(told)
        return
    typer.echo(f"request {request_id}")
    for sentence in told["text"]:
        typer.echo(f"  {sentence}")
