"""`kairos experiments`: live comparisons of two strategies, and the proof of what they ended in."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from kairos.adapters.cli.control import DEFAULT_URL, Json, Key, Url, ask, print_json, read_document
from kairos.scheduler_core.errors import InputError

Challenger = Annotated[str, typer.Argument(help="A strategy, its newest version, or NAME@VERSION.")]
Design = Annotated[str, typer.Option(help="switchback, pools, sticky or shadow.")]
Hours = Annotated[float, typer.Option(help="When it ends at the latest.")]
Effect = Annotated[float, typer.Option(help="Points of attainment that are worth finding.")]
Given = Annotated[Path | None, typer.Option(help="YAML or JSON with further fields of POST /experiments/plan.")]
Id = Annotated[str, typer.Argument(help="An experiment.")]


def register(app: typer.Typer) -> None:
    """Add `experiments` and its commands."""
    experiments = typer.Typer(no_args_is_help=True, help="Live experiments between two strategies, with a verdict.")
    experiments.command("list")(list_experiments)
    for command in (plan, start, show, stop, verify):
        experiments.command()(command)
    app.add_typer(experiments, name="experiments")


def list_experiments(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """List the newest experiments.

    Example: kairos experiments list
    """
    answer = ask(url, key, "GET", "/experiments")
    if as_json:
        return print_json(answer)
    for row in answer["experiments"]:
        pair = f"{row['challenger']} against {row['champion']}"
        typer.echo(f"{row['id']}  {row['verdict']}  {row['design']}  {pair}  since {row['started_at']}")


def plan(
    challenger: Challenger,
    design: Design = "switchback",
    max_hours: Hours = 48.0,
    effect_pp: Effect = 2.0,
    given: Given = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Say how an experiment would be laid out and what it would cost; nothing starts.

    Example: kairos experiments plan mine --effect-pp 2
    """
    answer = _planned(challenger, design, max_hours, effect_pp, given, url, key)
    if as_json:
        return print_json(answer)
    _say_plan(answer)


def start(
    challenger: Annotated[str | None, typer.Argument(help="As for plan; left out with --plan.")] = None,
    design: Design = "switchback",
    max_hours: Hours = 48.0,
    effect_pp: Effect = 2.0,
    given: Given = None,
    plan: Annotated[Path | None, typer.Option(help="What `kairos experiments plan --json` printed.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Start an experiment: plan it, or take a plan that was made before.

    Example: kairos experiments start mine --effect-pp 2
    """
    if (challenger is None) == (plan is None):
        raise InputError("name a challenger, or give --plan FILE; one of the two")
    if plan is not None:
        planned = read_document(plan)
    else:
        planned = _planned(str(challenger), design, max_hours, effect_pp, given, url, key)
    answer = ask(url, key, "POST", "/experiments", {"plan": planned.get("plan", planned)})
    if as_json:
        return print_json(answer)
    typer.echo(f"{answer['id']} starts at {answer['starts_at']}")


def show(experiment_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Show how an experiment stands, or what it ended in.

    Example: kairos experiments show exp_01
    """
    _say_record(ask(url, key, "GET", f"/experiments/{quote(experiment_id, safe='')}"), as_json)


def stop(experiment_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """End an experiment; the champion is back at once.

    Example: kairos experiments stop exp_01
    """
    _say_record(ask(url, key, "POST", f"/experiments/{quote(experiment_id, safe='')}/stop"), as_json)


def verify(
    record: Annotated[str, typer.Argument(help="An experiment, or a file with its record.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Make every figure and word of a record again from its plan and observed pairs; fail at the first that differs.

    Example: kairos experiments verify exp_01
    """
    import msgspec

    from kairos.scheduler_core.service.experiments.record import Record
    from kairos.scheduler_core.service.experiments.record import verify as first_difference

    told = read_document(Path(record)) if Path(record).is_file() else None
    if told is None:
        told = ask(url, key, "GET", f"/experiments/{quote(record, safe='')}")
    if isinstance(told, dict) and told.get("design") == "shadow":
        raise InputError(f"{record} is a shadow: it ended in no verdict that could be verified")
    try:
        known = msgspec.convert(told, Record)
    except msgspec.ValidationError as problem:
        raise InputError(f"{record} is no record of an experiment: {problem}") from None
    if difference := first_difference(known):
        raise InputError(f"{known.id} does not follow from its pairs: {difference}")
    typer.echo(f"{known.id}: {known.verdict}; every figure follows from its plan and {len(known.pairs)} pairs")


def _planned(
    challenger: str, design: str, max_hours: float, effect_pp: float, given: Path | None, url: str, key: str | None
) -> Any:
    body = {"challenger": challenger, "design": design, "max_hours": max_hours, "effect_pp": effect_pp}
    further = read_document(given) if given else {}
    if not isinstance(further, dict):
        raise InputError(f"{given}: holds no fields")
    return ask(url, key, "POST", "/experiments/plan", body | further)


def _say_plan(answer: Any) -> None:
    plan = answer["plan"]
    for warning in answer["warnings"]:
        typer.echo(f"kairos: {warning}", err=True)
    if plan["design"] == "shadow":
        typer.echo(
            f"{plan['challenger']} looks on at {plan['share']:.0%} of the decisions of {plan['champion']}, acts on none"
        )
        return
    lengths = plan["lengths"]
    typer.echo(
        f"{plan['challenger']} against {plan['champion']}, {plan['design']}: blocks of {lengths['block_s']:.0f} s, of "
        f"which the first {lengths['burn_s']:.0f} and the last {lengths['tail_s']:.0f} s do not count"
    )
    typer.echo(f"typical difference {100 * plan['sigma']:.1f} points; time to find {answer['price']}")


def _say_record(record: Any, as_json: bool) -> None:
    if as_json:
        return print_json(record)
    typer.echo(f"{record['id']}  {record['verdict']}: {record['sentence']}")
    if record["design"] != "shadow":
        n, evidence = record["n"], record["evidence"]
        typer.echo(
            f"{n['pairs']} pairs ({n['void']} void), {n['champion_requests']} and {n['challenger_requests']} requests; "
            f"log e better {evidence['log_e_better']:.1f}, harm {evidence['log_e_harm']:.1f}, "
            f"needed {evidence['better_needs']:.1f}"
        )
        for flag in record["validity"]["flags"]:
            typer.echo(f"kairos: {flag}", err=True)
