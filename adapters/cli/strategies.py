"""`kairos strategies`: those of a configuration; of a running control plane their versions, and which is active."""

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from kairos.adapters.cli.control import DEFAULT_URL, Json, Key, Url, ask, print_json, read_document

Name = Annotated[str, typer.Argument(help="A strategy.")]


def register(app: typer.Typer) -> None:
    """Add `strategies` and its commands."""
    strategies = typer.Typer(invoke_without_command=True)
    strategies.callback()(of_configuration)
    strategies.command("list")(list_strategies)
    for command in (show, put, activate, rollback):
        strategies.command()(command)
    app.add_typer(strategies, name="strategies")


def of_configuration(
    context: typer.Context,
    fleet: Annotated[str, typer.Option(help="A kairos.yaml, or a built-in fleet.")] = "b300",
    as_json: Json = False,
) -> None:
    """List the strategies of a configuration, the active one marked; with a command, those of a control plane.

    Example: kairos strategies --fleet kairos.yaml
    """
    from kairos.adapters.simulator.scenario import settings_of, strategy_of

    if context.invoked_subcommand:
        return
    settings = settings_of(fleet)
    found = {name: strategy_of(settings, name).text for name in settings.strategies}
    if as_json:
        return print_json({"active": settings.active, "strategies": found})
    for name, text in found.items():
        typer.echo(f"{'*' if name == settings.active else ' '} {name:16} {text}")


def list_strategies(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """List strategies with their newest versions.

    Example: kairos strategies list
    """
    answer = ask(url, key, "GET", "/strategies")
    if as_json:
        return print_json(answer)
    for row in answer["strategies"]:
        typer.echo(f"{row['name']}@{row['version']}  {row['text']}")
    typer.echo(f"active: {answer['active']}")


def show(name: Name, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Show every version of a strategy, the newest first.

    Example: kairos strategies show kairos
    """
    answer = ask(url, key, "GET", f"/strategies/{quote(name, safe='')}")
    if as_json:
        return print_json(answer)
    for row in answer["versions"]:
        typer.echo(f"{row['name']}@{row['version']}  {row['created_at'] or 'of the configuration'}  {row['text']}")


def put(
    name: Name,
    policies: Annotated[Path, typer.Argument(help="YAML or JSON: a policy for each kind, as in kairos.yaml.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Keep a version of a strategy; it is used once it is activated.

    Example: kairos strategies put mine mine.yaml
    """
    answer = ask(url, key, "PUT", f"/strategies/{quote(name, safe='')}", read_document(policies))
    if as_json:
        return print_json(answer)
    for warning in answer["warnings"]:
        typer.echo(f"kairos: {warning}", err=True)
    typer.echo(f"{answer['name']}@{answer['version']}  {answer['text']}")


def activate(
    name: Annotated[str, typer.Argument(help="A strategy, its newest version, or NAME@VERSION.")],
    stop_experiment: Annotated[bool, typer.Option("--stop-experiment", help="End the experiment that runs.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Use a strategy from now on, on every data plane within two seconds.

    Example: kairos strategies activate mine@2
    """
    named, at, version = name.rpartition("@")
    if not (at and version.isdecimal()):
        named, version = name, ""
    body = {"name": named, "version": int(version) if version else None, "stop_experiment": stop_experiment}
    _say_active(ask(url, key, "PUT", "/strategies/active", body), as_json)


def rollback(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Use again what was active before.

    Example: kairos strategies rollback
    """
    _say_active(ask(url, key, "POST", "/strategies/rollback"), as_json)


def _say_active(answer: dict[str, object], as_json: bool) -> None:
    if as_json:
        return print_json(answer)
    typer.echo(f"active: {answer['name']}@{answer['version']}, generation {answer['generation']}")
