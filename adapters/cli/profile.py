"""`kairos profile engine | torch`: step times measured, as telemetry files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kairos.adapters.cli.control import Json, print_json
from kairos.adapters.cli.terminal import progress
from kairos.adapters.cli.torch_worker import Device, Dtype, ModelName, Name, Seed, Threads

if TYPE_CHECKING:
    from kairos.scheduler_core.domain import Profile
    from kairos.scheduler_core.telemetry import StepRecord

Out = Annotated[Path, typer.Option(help="A folder for the telemetry files, which replace what was there.")]
Repeats = Annotated[int, typer.Option(help="Measurements of a step, of which the median is kept.", min=1)]
PROMPTS = "16,64,128,256,512,1024,2048"
BATCHES = "1,2,4,8,16"
CONTEXTS = "128,512,1024,2048,4096"


def register(app: typer.Typer) -> None:
    """Add `profile` and its commands."""
    profile = typer.Typer(no_args_is_help=True, help="Measure step times, and write them as telemetry.")
    profile.command()(engine)
    profile.command("torch")(shape)
    app.add_typer(profile, name="profile")


def engine(
    url: Annotated[str, typer.Argument(help="Address of an engine with the OpenAI API that does nothing else now.")],
    model: Annotated[str, typer.Option(help="The model to ask for.")],
    gpu: Annotated[str, typer.Option(help="What telemetry calls its GPU.")],
    name: Annotated[str | None, typer.Option(help="For telemetry; default: the model's.")] = None,
    precision: Annotated[str, typer.Option(help="For telemetry.")] = "",
    tp: Annotated[int, typer.Option(help="For telemetry.", min=1)] = 1,
    engine: Annotated[str, typer.Option(help="For telemetry.")] = "vllm",
    prompts: Annotated[str, typer.Option(help="Prompt lengths.")] = PROMPTS,
    batches: Annotated[str, typer.Option(help="Streams at a time.")] = BATCHES,
    contexts: Annotated[str, typer.Option(help="Prompt lengths of those streams.")] = CONTEXTS,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="The engine's: longer prompts take several steps.", min=1)
    ] = None,
    repeats: Repeats = 5,
    key: Annotated[str, typer.Option(help="Bearer key for it.", envvar="KAIROS_PROFILE_KEY", show_envvar=True)] = "",
    out: Out = Path("profile"),
    as_json: Json = False,
) -> None:
    """Measure a running engine over HTTP: TTFT of single prompts, pace of streams that run together.

    Example: kairos profile engine http://127.0.0.1:8000 --model Qwen/Qwen3-32B --gpu H100 --chunk-tokens 8192
    """
    import asyncio

    from kairos.adapters.profiling.engine import EngineProfile, Sweep
    from kairos.scheduler_core.domain import Profile

    sweep = Sweep(_numbers(prompts), _numbers(batches), _numbers(contexts), repeats, chunk_tokens)
    with progress("requests", None) as answered:
        records = asyncio.run(EngineProfile(url, model, key).measure(sweep, answered))
    _write(out, Profile(gpu, name or model, precision, tp, 1, engine), records, as_json)


def shape(
    model: ModelName = "small",
    name: Name = None,
    device: Device = None,
    dtype: Dtype = "float32",
    threads: Threads = 1,
    seed: Seed = 0,
    new_tokens: Annotated[str, typer.Option(help="Prompt tokens of a step.")] = "16,64,128,256,512",
    batches: Annotated[str, typer.Option(help="Sequences in decode.")] = BATCHES,
    contexts: Annotated[str, typer.Option(help="Tokens in the KV cache of each.")] = f"0,{CONTEXTS}",
    repeats: Repeats = 5,
    out: Out = Path("profile"),
    as_json: Json = False,
) -> None:
    """Measure a model shape with torch on this machine: prefill by tokens and context, decode by batch and context.

    Example: kairos profile torch --model small --out profile
    """
    from kairos.adapters.torch_engine.build import ModelOptions, build, profile_of
    from kairos.adapters.torch_engine.measure import measured, points

    of_new, of_batches, of_contexts = _numbers(new_tokens), _numbers(batches), _numbers(contexts)
    slot_tokens = max(of_contexts) + max(of_new)
    built = build(ModelOptions(model, max(of_batches), slot_tokens, device, dtype, threads, seed))
    wanted = points(built, of_new, of_batches, of_contexts)
    with progress("rounds", 1 + repeats) as done:
        records = measured(built, wanted, repeats, done)
    _write(out, profile_of(built, name or built.shape.name), records, as_json)


def _numbers(text: str) -> list[int]:
    """Counts from a list with commas.

    >>> _numbers("1,16")
    [1, 16]
    """
    from kairos.scheduler_core.errors import ConfigError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ConfigError(f"cannot read '{text}'; write counts with commas, like 16,64,256")
    return numbers


def _write(out: Path, profile: "Profile", records: "Sequence[StepRecord]", as_json: bool) -> None:
    from collections import Counter

    from kairos.adapters.telemetry_files import write_steps

    files = [str(path) for path in write_steps(out, profile, records)]
    counts = Counter(record.kind for record in records)
    if as_json:
        print_json({"profile": profile.profile_id, "steps": counts, "files": files})
        return
    typer.echo(f"{profile.profile_id}: {', '.join(f'{n} {kind} steps' for kind, n in sorted(counts.items()))}")
    typer.echo(f"wrote {', '.join(files)}; now: kairos train {out}")
