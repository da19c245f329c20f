"""Readers of public trace formats, one function a format: path and text in, `Trace` out.

Each format's page is named in docs/traces.md. Foreign column names occur in this file and nowhere else.
"""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kairos.adapters.traces.files import (
    Table,
    at_least_one,
    json_object,
    note,
    note_order,
    parse_cells,
    read_json_lines,
    read_table,
    read_text,
    stem,
)
from kairos.adapters.traces.trace import SYNTHETIC, Trace, block_tokens_of
from kairos.scheduler_core.errors import TraceError
from kairos.scheduler_core.slo import BoolArray, FloatArray

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")


def read_mooncake(path: Path, text: str) -> Trace:
    """Mooncake's JSON lines: `timestamp` in ms, `input_length`, `output_length`, `hash_ids`."""
    objects = read_json_lines(path, text)
    table = _table(path, objects, MOONCAKE_FIELDS)
    notes: dict[str, int] = {}
    arrival_s = table.arrivals_s("timestamp") / 1000
    note_order(arrival_s, notes)
    prompt_tokens = table.lengths("input_length", notes)
    block_ids, block_tokens = None, 0
    if any("hash_ids" in fields for _, fields in objects):
        block_ids = [_integers(path, line, fields.get("hash_ids", [])) for line, fields in objects]
        block_tokens, misfits = block_tokens_of(prompt_tokens, block_ids, str(path))
        note(notes, f"number of hash_ids does not fit the prompt in blocks of {block_tokens} tokens", misfits)
    return Trace(
        name=stem(path),
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=table.lengths("output_length", notes),
        block_ids=block_ids,
        block_tokens=block_tokens,
        notes=notes,
    )


def read_azure(path: Path, text: str) -> Trace:
    """Azure's LLM inference traces of 2023 and 2024: a date, context tokens, generated tokens; time from the first."""
    table = read_table(path, text, AZURE_COLUMNS)
    notes: dict[str, int] = {}
    dates = parse_cells(table, "TIMESTAMP", _date, "is not a date like 2023-11-16 18:15:46.6805900")
    first = min(dates)
    arrival_s = np.array([(date - first).total_seconds() for date in dates])
    note_order(arrival_s, notes)
    return Trace(
        name=stem(path),
        arrival_s=arrival_s,
        prompt_tokens=table.lengths("ContextTokens", notes),
        output_tokens=table.lengths("GeneratedTokens", notes),
        notes=notes,
    )


def read_burstgpt(path: Path, text: str) -> Trace:
    """BurstGPT's CSV, with or without session columns. Failed requests (no response tokens) are left out.

    `type` is model/log type: in `model` the name would bind requests to instances that serve ChatGPT.
    """
    table = read_table(path, text, BURSTGPT_COLUMNS)
    notes: dict[str, int] = {}
    arrival_s = table.arrivals_s("Timestamp")
    prompt_tokens, output_tokens = table.tokens("Request tokens"), table.tokens("Response tokens")
    answered = output_tokens != 0
    note(notes, "failed request (0 response tokens), left out", int(np.sum(~answered)))
    if not answered.any():
        raise TraceError(f"{path}: every request failed (0 response tokens); a trace needs at least one request")
    note_order(arrival_s[answered], notes)
    types = [f"{m}/{log}" for m, log in zip(table.columns["Model"], table.columns["Log Type"], strict=True)]
    sessions = table.columns.get("Session ID")
    return Trace(
        name=stem(path),
        arrival_s=arrival_s[answered] - arrival_s[answered].min(),
        prompt_tokens=at_least_one(prompt_tokens[answered], "Request tokens", notes),
        output_tokens=output_tokens[answered],
        session_id=_kept(sessions, answered) if sessions is not None else None,
        type=_kept(types, answered),
        notes=notes,
    )


def read_bench(path: Path, text: str, seed: int) -> Trace:
    """The result of `vllm bench serve --save-detailed` or `sglang.bench_serving --output-details`.

    Failed requests are left out. A file without start times (SGLang's, older vLLM's) says only the rate: arrivals are
    drawn with it as the tools draw them, Poisson or with vLLM's burstiness, and the trace counts as synthetic.
    """
    result = _bench_result(path, text)
    inputs, outputs = result.get("input_lens"), result.get("output_lens")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise TraceError(
            f"{path}: has no input_lens and output_lens of equal length; run vllm bench serve with --save-detailed,"
            " sglang.bench_serving with --output-details"
        )
    starts = result.get("start_times") or None
    if starts is not None and (not isinstance(starts, list) or len(starts) != len(inputs)):
        raise TraceError(f"{path}: start_times must be a list as long as input_lens ({len(inputs)})")
    notes: dict[str, int] = {}
    arrival_s = _drawn_arrivals_s(path, result, len(inputs), seed) if starts is None else None
    columns = {"input_lens": inputs, "output_lens": outputs} | ({} if starts is None else {"start_times": starts})
    table = Table(path, {name: list(map(str, cells)) for name, cells in columns.items()}, [1] * len(inputs))
    if arrival_s is None:
        arrival_s = table.numbers("start_times")
    else:
        note(notes, f"arrival drawn from the file's request_rate with seed {seed}", len(inputs))
    prompt_tokens, output_tokens = table.tokens("input_lens"), table.tokens("output_lens")
    answered = output_tokens != 0
    note(notes, "failed request (0 output tokens), left out", int(np.sum(~answered)))
    if not answered.any():
        raise TraceError(f"{path}: every request failed (0 output tokens); a trace needs at least one request")
    note_order(arrival_s[answered], notes)
    return Trace(
        name=stem(path),
        arrival_s=arrival_s[answered] - arrival_s[answered].min(),
        prompt_tokens=at_least_one(prompt_tokens[answered], "input_lens", notes),
        output_tokens=output_tokens[answered],
        type=[SYNTHETIC] * int(answered.sum()) if starts is None else None,
        synthetic=starts is None,
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class _ClientWindow:
    """A stretch of a ServeGen client's day: renewal arrivals of one law."""

    start_s: float
    end_s: float
    rate_per_s: float
    law: str
    shape: float


def read_servegen(path: Path, seed: int, start_s: float, duration_s: float) -> Trace:
    """Requests drawn from ServeGen's published statistics of one service, or of one client of it.

    Each client sends by a renewal process with the published gap law and rate of every window; lengths are drawn from
    the published histograms, input and output independently (their correlation is not published). `type` says which.

    Args:
        path: the folder of a service (chunk-N-trace.csv, chunk-N-dataset.json), or one chunk-N-trace.csv.
        start_s: from where in the published time.
        duration_s: how much of it.
    """
    files = sorted(path.glob("chunk-*-trace.csv")) if path.is_dir() else [path]
    if not files:
        raise TraceError(f"{path}: holds no chunk-N-trace.csv; give the folder of one ServeGen service")
    arrivals, prompts, outputs, types = [], [], [], []
    for file in files:
        client = file.name.removesuffix("-trace.csv").removeprefix("chunk-")
        rng = np.random.default_rng([seed, int(client) if client.isdecimal() else 0])
        arrival_s = _renewals(_client_windows(file, start_s, start_s + duration_s), rng)
        if not len(arrival_s):
            continue
        lengths = _client_lengths(file.with_name(f"chunk-{client}-dataset.json"))
        prompt, output = _drawn_lengths(lengths, arrival_s, rng)
        arrivals.append(arrival_s - start_s)
        prompts.append(prompt)
        outputs.append(output)
        types += [f"{SYNTHETIC}/client{client}"] * len(arrival_s)
    if not arrivals:
        raise TraceError(
            f"{path}: nothing is published from {start_s:g} to {start_s + duration_s:g} s; choose another time"
        )
    arrival_s = np.concatenate(arrivals)
    order = np.argsort(arrival_s, kind="stable")
    notes = {f"drawn from published statistics with seed {seed}": len(order)}
    prompt_tokens = at_least_one(np.concatenate(prompts)[order], "input_tokens", notes)
    return Trace(
        name=path.name if path.is_dir() else stem(path),
        arrival_s=arrival_s[order],
        prompt_tokens=prompt_tokens,
        output_tokens=at_least_one(np.concatenate(outputs)[order], "output_tokens", notes),
        type=[types[row] for row in order],
        synthetic=True,
        notes=notes,
    )


def _table(path: Path, objects: Sequence[tuple[int, dict[str, Any]]], needed: Sequence[str]) -> Table:
    """JSON objects as cells, so that one set of checks serves all formats."""
    for line, fields in objects:
        missing = [name for name in needed if name not in fields]
        if missing:
            raise TraceError(f"{path}, line {line}: '{missing[0]}' is missing; needed: {', '.join(needed)}")
    columns = {name: [str(fields[name]) for _, fields in objects] for name in needed}
    return Table(path, columns, [line for line, _ in objects])


def _integers(path: Path, line: int, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise TraceError(f"{path}, line {line}: hash_ids must be a list of integers, is {str(value)[:40]}")
    return tuple(value)


def _date(cell: str) -> datetime:
    date = datetime.fromisoformat(cell.strip())
    return date.replace(tzinfo=UTC) if date.tzinfo is None else date


def _kept(cells: Sequence[str], keep: BoolArray) -> list[str]:
    return [cell for cell, kept in zip(cells, keep.tolist(), strict=True) if kept]


def _bench_result(path: Path, text: str) -> dict[str, Any]:
    """The one result in a file: a JSON object (vLLM), or JSON lines, one a run (SGLang appends)."""
    if "\n{" in text.strip():
        runs = read_json_lines(path, text)
        if len(runs) > 1:
            raise TraceError(f"{path}: holds {len(runs)} runs; keep the line of one")
        return runs[0][1]
    return json_object(str(path), text)


def _drawn_arrivals_s(path: Path, result: dict[str, Any], count: int, seed: int) -> FloatArray:
    try:
        rate_per_s, burstiness = float(result["request_rate"]), float(result.get("burstiness") or 1.0)
    except (KeyError, TypeError, ValueError):
        raise TraceError(
            f"{path}: has neither start_times nor a numeric request_rate, so arrivals are unknown"
        ) from None
    if not rate_per_s > 0 or not (burstiness > 0 and math.isfinite(burstiness)):
        raise TraceError(f"{path}: request_rate {rate_per_s:g} and burstiness {burstiness:g} must be above 0")
    gaps_s = np.random.default_rng(seed).gamma(burstiness, 1 / (rate_per_s * burstiness), count)
    arrival_s: FloatArray = np.cumsum(gaps_s) - gaps_s[0]
    return arrival_s


def _client_windows(path: Path, start_s: float, end_s: float) -> list[_ClientWindow]:
    """The windows of a client that overlap start..end: rows of time, rate, CV, law, shape, scale."""
    header = "start_s,rate_per_s,cv,law,shape,scale"
    table = read_table(path, f"{header}\n{read_text(path)}", header.split(","))
    starts = table.numbers("start_s")
    step_s = float(np.diff(starts).min()) if len(starts) > 1 else end_s - start_s
    if not step_s > 0:
        raise TraceError(f"{path}: the times of its rows do not ascend")
    windows = []
    rows = zip(starts, table.numbers("rate_per_s"), table.columns["law"], table.numbers("shape"), strict=True)
    for row, (at_s, rate_per_s, law, shape) in enumerate(rows):
        first, last = max(at_s, start_s), min(at_s + step_s, end_s)
        if law not in ("", "Gamma", "Weibull"):
            table.fail(row, "law", "is not a gap law; known: Gamma, Weibull, or empty for none")
        if law and not (shape > 0 and rate_per_s >= 0):
            table.fail(row, "shape", "must be above 0, with a rate of 0 or more")
        if law and rate_per_s > 0 and first < last:
            windows.append(_ClientWindow(first, last, rate_per_s, law, shape))
    return windows


def _renewals(windows: Sequence[_ClientWindow], rng: np.random.Generator) -> FloatArray:
    """Arrivals whose gaps, measured in expected arrivals, have mean 1: a gap goes on from one window into the next."""
    arrivals: list[float] = []
    ahead = rng.uniform() * _unit_gap(windows[0], rng) if windows else 0.0
    for window in windows:
        expected = window.rate_per_s * (window.end_s - window.start_s)
        while ahead < expected:
            arrivals.append(window.start_s + ahead / window.rate_per_s)
            ahead += _unit_gap(window, rng)
        ahead -= expected
    return np.array(arrivals)


def _unit_gap(window: _ClientWindow, rng: np.random.Generator) -> float:
    if window.law == "Gamma":
        return float(rng.gamma(window.shape) / window.shape)
    return float(rng.weibull(window.shape) / math.gamma(1 + 1 / window.shape))


Histogram = tuple[FloatArray, FloatArray]
"""Lengths and their probabilities, each (k,)."""


def _client_lengths(path: Path) -> dict[float, tuple[Histogram, Histogram]]:
    """From when on which histograms of input and output lengths hold; empty ones are left out."""
    lengths = {}
    for at, fields in json_object(str(path), read_text(path)).items():
        try:
            inputs, outputs = (_histogram(fields[name]) for name in ("input_tokens", "output_tokens"))
            if len(inputs[0]) and len(outputs[0]):
                lengths[float(at)] = inputs, outputs
        except (KeyError, TypeError, ValueError, SyntaxError):
            raise TraceError(
                f"{path}, time {at}: needs input_tokens and output_tokens, each a text like '{{39: 0.25, 40: 0.75}}'"
            ) from None
    if not lengths:
        raise TraceError(f"{path}: every histogram is empty, so lengths are unknown; leave this client out")
    return dict(sorted(lengths.items()))


def _histogram(text: str) -> Histogram:
    pairs = ast.literal_eval(text)
    values = np.array(list(pairs), dtype=np.float64)
    weights = np.array(list(pairs.values()), dtype=np.float64)
    if len(values) and not (np.all(weights >= 0) and weights.sum() > 0 and np.all(values >= 0)):
        raise ValueError("not a distribution")
    return values, weights / weights.sum() if len(values) else weights


def _drawn_lengths(
    lengths: dict[float, tuple[Histogram, Histogram]], arrival_s: FloatArray, rng: np.random.Generator
) -> tuple[Any, Any]:
    """Input and output tokens of each arrival, (n,) int64, from the histograms that hold then."""
    starts = np.array(list(lengths))
    held = np.maximum(np.searchsorted(starts, arrival_s, side="right") - 1, 0)
    prompt, output = (np.zeros(len(arrival_s), dtype=np.int64) for _ in range(2))
    for index, start in enumerate(lengths):
        rows = np.flatnonzero(held == index)
        for drawn, (values, weights) in zip((prompt, output), lengths[start], strict=True):
            drawn[rows] = rng.choice(values, size=len(rows), p=weights).astype(np.int64)
    return prompt, output
