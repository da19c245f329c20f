"""What commands that speak to a running control plane share: where it is, who asks, and its errors in one line."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kairos.scheduler_core.errors import InputError, KairosError

Url = Annotated[str, typer.Option(help="Address of the control plane.", envvar="KAIROS_URL")]
Key = Annotated[str | None, typer.Option(help="Bearer key, where it wants one.", envvar="KAIROS_KEY")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DEFAULT_URL = "http://127.0.0.1:8011"


def ask(url: str, key: str | None, method: str, path: str, body: Any = None, content: bytes | None = None) -> Any:
    """The answer of a route to a JSON body, or to bytes.

    Raises:
        InputError: the control plane refuses what was asked (status 4xx).
        KairosError: it is not there, or fails.
    """
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    if content is not None:
        headers["content-type"] = "application/octet-stream"
    try:
        answer = httpx.request(
            method, f"{url.rstrip('/')}{path}", json=body, content=content, headers=headers, timeout=300.0
        )
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        raise KairosError(f"no control plane answers at {url} ({problem}); start one with kairos serve") from None
    if answer.is_success:
        return answer.json()
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = f"{url} answered {answer.status_code}, which is no answer of a control plane"
    raise (InputError if answer.is_client_error else KairosError)(detail)


def read_document(path: Path) -> Any:
    """A JSON or YAML file.

    Raises:
        InputError: it is neither.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError) as problem:
        raise InputError(f"{path}: is neither JSON nor YAML ({' '.join(str(problem).split())})") from None


def print_json(answer: Any) -> None:
    """An answer for machines."""
    typer.echo(json.dumps(answer, indent=2))
