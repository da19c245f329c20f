"""Which format a trace file has, and the reader of each by name."""

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from kairos.adapters.traces.files import read_text
from kairos.adapters.traces.kairos_csv import NEEDED, parse_trace
from kairos.adapters.traces.public_formats import (
    AZURE_COLUMNS,
    BURSTGPT_COLUMNS,
    MOONCAKE_FIELDS,
    read_azure,
    read_bench,
    read_burstgpt,
    read_mooncake,
    read_servegen,
)
from kairos.adapters.traces.trace import LABELS, Trace
from kairos.scheduler_core.errors import TraceError, UnknownNameError

Format = Literal["kairos", "mooncake", "azure", "burstgpt", "servegen", "bench"]
FORMATS: tuple[Format, ...] = get_args(Format)


def sniff(path: Path, text: str = "") -> Format | None:
    """The format that a file (its name and first line) or folder seems to have; None: none of ours."""
    first = text.lstrip().split("\n", 1)[0]
    columns = {name.strip() for name in first.split(",")}
    if path.is_dir() or path.match("chunk-*-trace.csv"):
        return "servegen"
    if columns.issuperset(AZURE_COLUMNS):
        return "azure"
    if columns.issuperset(BURSTGPT_COLUMNS):
        return "burstgpt"
    if first.startswith("{"):
        return "mooncake" if all(f'"{field}"' in first for field in MOONCAKE_FIELDS) else "bench"
    return "kairos" if columns.intersection(NEEDED) else None


def read_trace(path: Path) -> Trace:
    """A trace in Kairos's own format, in file order.

    Raises:
        TraceError: the file, row, column and value that cannot be used, and how to mend it.
    """
    text = "" if path.is_dir() else read_text(path)
    found = sniff(path, text)
    if found not in ("kairos", None):
        raise TraceError(f"{path}: looks like {found}, not like a trace of Kairos; see kairos trace convert --help")
    return parse_trace(path, text)


def read_any(
    path: Path,
    format: str | None = None,
    *,
    seed: int = 0,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> Trace:
    """A trace in any format we know, found by its looks unless `format` is given.

    Args:
        seed: for formats that hold statistics instead of arrivals (ServeGen, benches without start times).
        start_s: leaves out what arrives before; arrivals count from here.
        duration_s: leaves out what arrives this much later or after; None: keeps all (ServeGen: one day).

    Raises:
        TraceError: the file cannot be used.
        UnknownNameError: there is no such format.
    """
    if format is not None and format not in FORMATS:
        raise UnknownNameError("trace format", format, FORMATS)
    if (format or sniff(path)) == "servegen":
        return read_servegen(path, seed, start_s, 86_400.0 if duration_s is None else duration_s)
    text = read_text(path)
    found = format or sniff(path, text)
    if found is None:
        raise TraceError(f"{path}: does not look like any known format; known: {', '.join(FORMATS)} (see --format)")
    match found:
        case "mooncake":
            trace = read_mooncake(path, text)
        case "azure":
            trace = read_azure(path, text)
        case "burstgpt":
            trace = read_burstgpt(path, text)
        case "bench":
            trace = read_bench(path, text, seed)
        case _:
            trace = parse_trace(path, text)
    return trace if start_s == 0 and duration_s is None else window(trace, start_s, duration_s)


def window(trace: Trace, start_s: float, duration_s: float | None) -> Trace:
    """The requests that arrive from `start_s` on, for `duration_s`; arrivals count from `start_s`.

    Raises:
        TraceError: nothing arrives then.
    """
    end_s = np.inf if duration_s is None else start_s + duration_s
    rows = np.flatnonzero((trace.arrival_s >= start_s) & (trace.arrival_s < end_s))
    if not len(rows):
        raise TraceError(
            f"trace {trace.name}: nothing arrives from {start_s:g} to {end_s:g} s;"
            f" arrivals lie between {trace.arrival_s.min():g} and {trace.arrival_s.max():g} s"
        )
    lists = {
        name: [values[row] for row in rows]
        for name in (*LABELS, "request_id", "block_ids")
        if (values := getattr(trace, name)) is not None
    }
    return Trace(
        name=trace.name,
        arrival_s=trace.arrival_s[rows] - start_s,
        prompt_tokens=trace.prompt_tokens[rows],
        output_tokens=trace.output_tokens[rows],
        block_tokens=trace.block_tokens,
        synthetic=trace.synthetic,
        notes=trace.notes,
        **lists,
    )
