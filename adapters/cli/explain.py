"""`kairos explain`: why a request waited, where it went, and what was predicted against what happened."""

import json
from typing import Annotated

import typer

from kairos.scheduler_core.errors import InputError, KairosError


def register(app: typer.Typer) -> None:
    """Add `explain`."""
    app.command()(explain)


def explain(
    request_id: Annotated[str, typer.Argument(help="As it was sent to the service.")],
    url: Annotated[str, typer.Option(help="Of the running service.", envvar="KAIROS_URL")] = "http://127.0.0.1:8011",
    key: Annotated[
        str | None, typer.Option(help="Bearer key, where the service wants one.", envvar="KAIROS_KEY")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say in plain words why a request waited, where it went, and what was predicted against what happened.

    Example: kairos explain req-17 --url http://127.0.0.1:8011
    """
    from urllib.parse import quote

    import httpx

    try:
        address = f"{url.rstrip('/')}/requests/{quote(request_id, safe='')}/explanation"
        answer = httpx.get(address, headers={"authorization": f"Bearer {key}"} if key else {}, timeout=30)
        told = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as problem:
        raise KairosError(f"no Kairos answers at {url} ({problem}); start `kairos serve`, or give --url") from None
    if not answer.is_success:
        raise (InputError if answer.is_client_error else KairosError)(told["detail"])
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(f"request {request_id}")
    for sentence in told["text"]:
        typer.echo(f"  {sentence}")
