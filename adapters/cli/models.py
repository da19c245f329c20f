"""`kairos train | evaluate | predict`: how long steps take. `kairos models`: those of a control plane."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import typer

from kairos.adapters.cli.control import DEFAULT_URL, Json, Key, Url, ask, print_json
from kairos.adapters.cli.terminal import percent, tracked
from kairos.scheduler_core.errors import InputError, UnknownNameError
from kairos.scheduler_core.telemetry import StepKind

Telemetry = Annotated[list[Path], typer.Argument(help="CSV, CSV.gz or Parquet files, or folders of them.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(train)
    app.command()(evaluate)
    app.command()(predict)
    registry = typer.Typer(no_args_is_help=True, help="The models of a running control plane.")
    registry.command("list")(list_models)
    registry.command()(show)
    registry.command()(promote)
    registry.command()(rollback)
    app.add_typer(registry, name="models")


def train(
    telemetry: Telemetry,
    out: Annotated[Path | None, typer.Option(help="Where to write the model; default: model.kairos.")] = None,
    registry: Annotated[
        str | None, typer.Option(help="Address of a control plane that keeps it as a challenger, instead of a file.")
    ] = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Fit the predictors of every profile found; print held-back errors against the prior.

    Example: kairos train telemetry/ --out model.kairos
    """
    from kairos.predictors.artifact import dump, save
    from kairos.predictors.training import by_profile
    from kairos.predictors.training import train as train_all

    read = _read(telemetry)
    learned = list(tracked(train_all(read.steps), len(by_profile(read.steps)), "training"))
    if out is None and registry is None:
        out = Path("model.kairos")
    if out is not None:
        save(learned, out)
    kept = [] if registry is None else ask(registry, key, "POST", "/models", content=dump(learned))["models"]
    models = [(entry.profile.profile_id, model) for entry in learned for model in entry.models.values()]
    if as_json:
        rows = [
            {"profile": name, "kind": m.kind, "source": m.source, **msgspec.structs.asdict(m.held_back)}
            for name, m in models
        ]
        told = {"model": None if out is None else str(out), "registered": kept, "rows": rows}
        print_json(told | {"excluded": read.excluded})
        return
    typer.echo(f"{'median error on held-back operating points':58} {'kind':8} {'kairos':>7} {'prior':>7}  learned from")
    for name, m in models:
        ours, prior = percent(m.held_back.median_ape, 2), percent(m.held_back.prior_median_ape, 2)
        typer.echo(f"{name[-58:]:58} {m.kind:8} {ours:>7} {prior:>7}  {m.source}")
    _say_excluded(read.excluded)
    if out is not None:
        typer.echo(f"wrote {out}: {len(learned)} profiles")
    for model_id in kept:
        typer.echo(f"registered {model_id}; later steps judge it")


def evaluate(
    telemetry: Telemetry,
    model: Annotated[Path | None, typer.Option(help="Score this model instead of cross-validating.")] = None,
    as_json: Json = False,
) -> None:
    """Errors, coverage and pinball loss per profile and kind, beside prior, linear, lookup table and random forest.

    Without --model every step is predicted by a model that did not see its operating point (5 folds).

    Example: kairos evaluate telemetry/decode.csv.gz --model model.kairos
    """
    from kairos.predictors.artifact import load
    from kairos.predictors.evaluate import cross_validate, score_model, summary

    predictors = None if model is None else load(model)
    read = _read(telemetry)
    scored = cross_validate(read.steps) if predictors is None else score_model(predictors, read.steps)
    rows = [row for group in tracked(scored, len(read.steps), "evaluating") for row in group]
    totals = summary(rows)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "summary": totals, "excluded": read.excluded}, indent=2))
        return
    names = ("prior", "linear", "lookup", "forest")
    heads = "".join(f"{name:>9}" for name in ("kairos", *names, "p95", "bias", "in p90"))
    typer.echo(f"{'median error':50} {'kind':8}{'n':>7}{heads}")
    for row in rows:
        kind = row["kind"] + (" *" if row["noisy"] else "")
        errors = [row["median_ape"], *(row["baselines"].get(name, {}).get("median_ape") for name in names)]
        figures = [*errors, row["p95_ape"], row["bias"], row["coverage"]["p90"]]
        cells = "".join(f"{percent(value, 2):>9}" for value in figures)
        typer.echo(f"{row['profile'][-50:]:50} {kind:8}{row['n']:>7}{cells}")
    for total in totals:
        kind = total["kind"] + (" *" if total["noisy"] else "")
        cells = "".join(f"{percent(total.get(name), 2):>9}" for name in ("kairos", *names))
        typer.echo(f"{'median over profiles':50} {kind:8}{total['profiles']:>7}{cells}")
    if any(total["noisy"] for total in totals):
        typer.echo("* flagged noisy by their source, reported apart")
    _say_excluded(read.excluded)


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of `kairos predict`: a step by its sums."""

    profile: str
    n_requests: Annotated[int, msgspec.Meta(ge=0)] = 1
    new_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    cached_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    batch_size: Annotated[int, msgspec.Meta(ge=0)] = 0
    sum_context_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def kind(self) -> StepKind:
        """What kind of step this is."""
        if self.new_tokens and self.batch_size:
            return "mixed"
        return "prefill" if self.new_tokens else "decode"


def predict(
    model: Annotated[Path, typer.Option(help="A model that `kairos train` wrote.")],
    profile: Annotated[str | None, typer.Option(help="Profile id; without it, JSON lines are read from stdin.")] = None,
    n_requests: Annotated[int, typer.Option(min=1, help="Prompts in the step.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=0, help="Prompt tokens computed in the step.")] = 0,
    cached_tokens: Annotated[int, typer.Option(min=0, help="Their KV already there.")] = 0,
    batch_size: Annotated[int, typer.Option(min=0, help="Requests in decode.")] = 0,
    sum_context_tokens: Annotated[int, typer.Option(min=0, help="Sum of their contexts.")] = 0,
    as_json: Json = False,
) -> None:
    """One prediction from arguments, or one for each JSON line on stdin, with its quantiles and where they come from.

    Example: kairos predict --model model.kairos --profile h100_llama-70b_fp8_4_1_vllm --new-tokens 4096
    """
    from kairos.predictors.artifact import load

    predictors = load(model)
    if profile is None:
        queries = _queries(sys.stdin)
        as_json = True
    else:
        queries = iter([Query(profile, n_requests, new_tokens, cached_tokens, batch_size, sum_context_tokens)])
    for query in queries:
        if not query.new_tokens and not query.batch_size:
            raise InputError("a step needs new_tokens (prefill), batch_size (decode) or both; all are 0")
        predictor = predictors.profile(query.profile)
        sums = {name: getattr(query, name) for name in Query.__struct_fields__ if name != "profile"}
        lower_s, median_s, upper_s = (float(quantile[0]) for quantile in predictor.predict_step(**sums))
        source = predictor.models[query.kind].source
        if as_json:
            answer = {"profile": query.profile, "kind": query.kind, **sums}
            answer |= {"lower_s": lower_s, "median_s": median_s, "upper_s": upper_s, "source": source}
            typer.echo(json.dumps(answer))
        else:
            typer.echo(f"{median_s * 1e3:.2f} ms (10 % {lower_s * 1e3:.2f}, 90 % {upper_s * 1e3:.2f}); {source}")


def _queries(lines: Iterable[str]) -> Iterator[Query]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield msgspec.json.decode(line, type=Query)
        except msgspec.MsgspecError as error:
            raise InputError(f"line {number} of stdin: {error}; give {', '.join(Query.__struct_fields__)}") from None


Profile = Annotated[str, typer.Argument(help="Id of a profile.")]
ModelId = Annotated[str, typer.Argument(help="PROFILE_ID@VERSION, as `kairos models list` prints it.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept.")]


def list_models(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Print every model: whether it serves, its age, and what the gate said of it.

    Example: kairos models list --url http://127.0.0.1:8011
    """
    told = ask(url, key, "GET", "/models")
    if as_json:
        print_json(told)
        return
    for model in told["models"]:
        state = "serving" if model["serving"] else model["state"]
        typer.echo(f"{model['id']}  {state}, {model['age_s'] / 3600:.1f} h old")
        for kind, verdict in model["report"].get("gate", {}).items():
            typer.echo(f"    {kind}: {verdict['sentence']}")
    for training in told["trainings"]:
        typer.echo(f"training {training['id']} ({training['cause']}): {training['error'] or training['state']}")


def show(model_id: ModelId, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Print one model: what it learned from, and each check of the gate with its limit.

    Example: kairos models show h100_llama-70b_fp8_4_1_vllm@3
    """
    models = {model["id"]: model for model in ask(url, key, "GET", "/models")["models"]}
    if model_id not in models:
        raise UnknownNameError("model", model_id, models)
    model = models[model_id]
    if as_json:
        print_json(model)
        return
    state = "serving" if model["serving"] else model["state"]
    typer.echo(f"{model_id}: {state}, trained {model['trained_at']} on steps up to {model['last_step']}")
    for kind, source in model["report"].get("sources", {}).items():
        typer.echo(f"  {kind}: {source}")
    for kind, verdict in model["report"].get("gate", {}).items():
        typer.echo(f"  gate, {kind}: {verdict['word']}; {verdict['sentence']}")
        for name, check in verdict["checks"].items():
            word = "passed" if check["passed"] else "FAILED"
            typer.echo(f"    {name:20} {check['value']:10.4g}  limit {check['limit']:<8.4g} {word}")


def promote(model_id: ModelId, url: Url = DEFAULT_URL, key: Key = None, reason: Reason = "by hand") -> None:
    """Let a model serve its profile, whatever the gate says of it.

    Example: kairos models promote h100_llama-70b_fp8_4_1_vllm@3
    """
    told = ask(url, key, "POST", f"/models/{quote(model_id, safe='@')}/promote", {"reason": reason})
    typer.echo(f"{told['profile_id']}: {told['serving']} serves")


def rollback(profile_id: Profile, url: Url = DEFAULT_URL, key: Key = None, reason: Reason = "by hand") -> None:
    """Let the model serve again that served before.

    Example: kairos models rollback h100_llama-70b_fp8_4_1_vllm
    """
    told = ask(url, key, "POST", "/models/rollback", {"profile_id": profile_id, "reason": reason})
    typer.echo(f"{told['profile_id']}: {told['serving'] or 'the configuration'} serves")


def _read(paths: list[Path]) -> Any:
    """The telemetry, with what an operator should know said on stderr."""
    from kairos.adapters.telemetry_files import read_telemetry

    read = read_telemetry(paths)
    for note in read.notes:
        typer.echo(f"kairos: {note}", err=True)
    if not read.steps:
        raise InputError("no step telemetry in these files (request latency alone does not tell step times)")
    return read


def _say_excluded(excluded: dict[str, int]) -> None:
    if excluded:
        typer.echo("left out: " + ", ".join(f"{n} {flag}" for flag, n in excluded.items()))
