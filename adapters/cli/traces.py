"""`kairos trace generate | convert | describe`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kairos.adapters.traces import Description, Trace

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write; gzip if it ends in .gz.")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="kairos, mooncake, azure, burstgpt, servegen or bench; found by looks if absent."),
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn; the same seed gives the same trace.", min=0)]


def register(app: typer.Typer) -> None:
    """Add `trace` and its commands."""
    trace = typer.Typer(no_args_is_help=True, help="Make, convert and describe traces.")
    trace.command()(generate)
    trace.command()(convert)
    trace.command()(describe)
    app.add_typer(trace, name="trace")


def generate(
    output: Output,
    like: Annotated[str, typer.Option(help="The real trace to imitate.")] = "mooncake_conversation",
    duration: Annotated[float, typer.Option(help="Seconds of arrivals.")] = 600.0,
    seed: Seed = 0,
    rate: Annotated[float | None, typer.Option(help="Requests per second; scales time, so bursts stay.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a synthetic trace from the published statistics of a real one.

    Names: mooncake_conversation, azure2023_code, azure2023_conv, servegen_r1.

    Example: kairos trace generate --like azure2023_code --duration 600 --seed 0 -o synthetic_code.csv.gz
    """
    from kairos.adapters.traces.generate import generate as draw

    _write(draw(like, duration, seed, rate), output, as_json)


def convert(
    source: Annotated[Path, typer.Argument(metavar="TRACE", help="A file, or the folder of a ServeGen service.")],
    output: Output,
    format: Format = None,
    start: Annotated[float, typer.Option(help="Leave out what arrives before this second; it becomes 0.", min=0)] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Keep so many seconds (ServeGen: a day if absent).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Turn a public trace (Mooncake, Azure, BurstGPT, ServeGen, vLLM or SGLang bench output) into Kairos's format.

    Example: kairos trace convert conversation_trace.jsonl -o mooncake.csv.gz
    """
    from kairos.adapters.traces import read_any

    _write(read_any(source, format, seed=seed, start_s=start, duration_s=duration), output, as_json)


def describe(
    source: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace in any known format.")],
    format: Format = None,
    as_json: Json = False,
) -> None:
    """Say what a trace is like: rate, burstiness, lengths, shareable prefixes.

    Example: kairos trace describe mooncake.csv.gz
    """
    from kairos.adapters.traces import describe as figures_of
    from kairos.adapters.traces import read_any

    description = figures_of(read_any(source, format))
    _say_notes(description.notes)
    typer.echo(_json(description) if as_json else _text(description))


def _write(trace: "Trace", output: Path, as_json: bool) -> None:
    from kairos.adapters.traces import write_trace

    write_trace(trace, output)
    _say_notes(trace.notes)
    span_s = float(trace.arrival_s.max() - trace.arrival_s.min())
    if as_json:
        facts = {"path": str(output), "name": trace.name, "requests": len(trace), "span_s": span_s}
        typer.echo(json.dumps(facts | {"synthetic": trace.synthetic, "notes": trace.notes}))
    else:
        kind = f"SYNTHETIC requests, {trace.name}," if trace.synthetic else "requests"
        typer.echo(f"{output}: {len(trace):,} {kind} in {span_s:,.1f} s")


def _say_notes(notes: dict[str, int]) -> None:
    for treatment, rows in notes.items():
        typer.echo(f"note: {rows:,} rows: {treatment}", err=True)


def _json(description: "Description") -> str:
    from dataclasses import asdict

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(asdict(description)), indent=2)


def _text(d: "Description") -> str:
    lines = [
        f"{d.name}{' (SYNTHETIC)' if d.synthetic else ''}: {d.requests:,} requests in {d.span_s:,.1f} s",
        f"  rate                     {d.rate_per_s:.3g} requests/s, CV of gaps {d.gap_cv:.2f}",
        f"  dispersion (Poisson: 1)  {d.idc_1s:.1f} per second, {d.idc_60s:.1f} per minute",
        f"  peaks                    {d.peak_per_s} in a second; busiest minute {d.peak_minute_over_mean:.2f} x mean",
    ]
    for label, q in (("input tokens", d.input_tokens), ("output tokens", d.output_tokens)):
        lines.append(f"  {label:24} p50 {q.p50:,.0f}  p90 {q.p90:,.0f}  p99 {q.p99:,.0f}  max {q.max:,.0f}")
    if not math.isnan(d.block_hit_share):
        lines.append(f"  prefix blocks            {d.block_hit_share:.1%} hit with an unlimited cache")
    return "\n".join(lines)
