"""Reads telemetry files: CSV, CSV.gz and Parquet with the columns of docs/files.md; writes CSV.

A file's columns say what it holds. Rows that cannot serve are left out, counted and named, never silently.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from kairos.adapters.control_plane import row_of
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import TelemetryError
from kairos.scheduler_core.slo import BoolArray, FloatArray
from kairos.scheduler_core.telemetry import (
    PHASES,
    RequestRecord,
    RequestRow,
    StepKind,
    StepRecord,
    StepRow,
    Steps,
    excluded_by,
)

T = TypeVar("T")

_PROFILE = {"gpu": "", "model": "", "precision": "", "tp": 1, "ep": 1, "engine": ""}
_TEXT = ("source", "run", "gpu", "model", "precision", "engine", "kind", "flag", "prev_phase", "next_phase", "trace")
_PREFILL = ("n_requests", "new_tokens", "cached_tokens")
_DECODE = ("batch_size", "sum_context_tokens")
_NEEDED: dict[StepKind, tuple[str, ...]] = {
    "prefill": ("gpu", "model", "latency_ms", *_PREFILL),
    "decode": ("gpu", "model", "latency_ms", *_DECODE),
    "mixed": ("gpu", "model", "latency_ms", *_PREFILL, *_DECODE),
}
_AT_LEAST_ONE = ("n_requests", "new_tokens", "batch_size", "tp", "ep")
_STEP_COLUMNS = {
    *_PROFILE,
    *_PREFILL,
    *_DECODE,
    *("source", "run", "dp", "kind", "seq", "latency_ms", "flag"),
    *("mean_context_tokens", "prev_phase", "next_phase", "queued_requests"),
}
_REQUEST_NUMBERS = (
    *("input_tokens", "prefix_hit_ratio", "kv_cache_usage", "requests_running", "requests_waiting"),
    *("prefill_tokens_in_flight", "decode_tokens_in_flight"),
)
_REQUEST_COLUMNS = {*_REQUEST_NUMBERS, "trace", "seq", "gpu", "model", "tp", "ttft_ms", "tpot_ms"}


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What was read: steps by profile and kind, requests, and what was left out."""

    steps: list[Steps]
    """Sorted by profile id and kind."""
    requests: list[RequestRecord]
    excluded: dict[str, int]
    """Rows left out, by flag; `invalid`: a number missing, negative, NaN or infinite."""
    notes: list[str]
    """What an operator should know: the first invalid row of a file, files of a folder that hold something else."""
    runs: list[str]
    """Names of the recordings; `Steps.run` holds places in this list."""


def read_telemetry(paths: Sequence[Path]) -> Telemetry:
    """Everything in the files and folders of `paths`.

    Raises:
        TelemetryError: a path that is not there, a file that cannot be read or parsed, an unknown or missing column,
            or nothing usable in all of them.
    """
    excluded: Counter[str] = Counter()
    notes: list[str] = []
    requests: list[RequestRecord] = []
    parts: dict[tuple[Profile, StepKind], list[Steps]] = {}
    runs: dict[str, int] = {}
    for path in telemetry_files(paths, notes):
        table = _table(path)
        kind = _kind(table.column_names)
        if kind == "request":
            requests += _requests(path, table, excluded, notes)
            continue
        for steps in _steps(path, kind, table, runs, excluded, notes):
            parts.setdefault((steps.profile, steps.kind), []).append(steps)
    if not parts and not requests:
        left_out = ", ".join(f"{n} {flag}" for flag, n in sorted(excluded.items())) or "no rows"
        raise TelemetryError(f"nothing usable in {', '.join(map(str, paths))}: {left_out}; give measured steps")
    ordered = sorted(parts.items(), key=lambda item: (item[0][0].profile_id, item[0][1]))
    return Telemetry(
        [Steps.joined(group) for _, group in ordered], requests, dict(sorted(excluded.items())), notes, list(runs)
    )


def write_steps(folder: Path, profile: Profile, records: Sequence[StepRecord]) -> list[Path]:
    """Write steps of a profile, a file a kind (`prefill.csv`, ...); the files, which replace what was there.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, needed in _NEEDED.items():
        rows = [msgspec.structs.asdict(row_of(record, profile)) for record in records if record.kind == kind]
        if not rows:
            continue
        columns = [*_PROFILE, *(name for name in needed if name not in _PROFILE), "prev_phase", "run"]
        written.append(folder / f"{kind}.csv")
        with written[-1].open("w", newline="") as out:
            writer = csv.DictWriter(out, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return written


def step_rows(read: Telemetry) -> list[StepRow]:
    """The steps that were read, as they are sent and stored.

    Raises:
        TelemetryError: a number that no step has.
    """
    rows = [
        {
            **msgspec.structs.asdict(steps.profile),
            **dict(zip(("latency_ms", *_PREFILL, *_DECODE), numbers, strict=True)),
            "prev_phase": PHASES[phase],
            "run": read.runs[run],
            "flag": "noisy" if noisy else "",
        }
        for steps in read.steps
        for numbers, phase, run, noisy in zip(
            zip(
                (1e3 * steps.step_s).tolist(),
                *(getattr(steps, name).astype(np.int64).tolist() for name in (*_PREFILL, *_DECODE)),
                strict=True,
            ),
            steps.prev_phase.tolist(),
            steps.run.tolist(),
            steps.noisy.tolist(),
            strict=True,
        )
    ]
    return _checked(rows, list[StepRow])


def request_rows(read: Telemetry) -> list[RequestRow]:
    """The requests that were read, as they are sent and stored.

    Raises:
        TelemetryError: a number that no request has.
    """
    rows = [
        {
            **msgspec.structs.asdict(request.profile),
            **{name: getattr(request, name) for name in _REQUEST_NUMBERS},
            "ttft_ms": None if request.ttft_s is None else 1e3 * request.ttft_s,
            "tpot_ms": None if request.tpot_s is None else 1e3 * request.tpot_s,
            "trace": request.run,
        }
        for request in read.requests
    ]
    return _checked(rows, list[RequestRow])


def _checked(rows: list[dict[str, Any]], wanted: type[T]) -> T:
    try:
        return msgspec.convert(rows, wanted)
    except msgspec.ValidationError as error:
        raise TelemetryError(f"a row that was read cannot be stored: {error}") from None


def telemetry_files(paths: Sequence[Path], notes: list[str]) -> Iterable[Path]:
    """The files of `paths`, those of a folder by name; what is something else is said in `notes`.

    Raises:
        TelemetryError: a path that is not there, or a folder without telemetry.
    """
    for path in paths:
        if not path.exists():
            raise TelemetryError(f"no such telemetry file or folder: {path}")
        if not path.is_dir():
            yield path
            continue
        inside = sorted(p for p in path.iterdir() if p.name.endswith((".csv", ".csv.gz", ".parquet")))
        known = [p for p in inside if p.name.startswith(("prefill", "decode", "mixed", "request_latency"))]
        if not known:
            raise TelemetryError(
                f"no prefill, decode, mixed or request_latency file (.csv, .csv.gz, .parquet) in {path}"
            )
        notes += [f"{p.name}: not step or request telemetry, left out" for p in inside if p not in known]
        yield from known


def _table(path: Path) -> Any:
    """The file as a pyarrow table; numbers as float64, text without nulls."""
    try:
        if path.suffix == ".parquet":
            table = pa.parquet.read_table(path)
            types = {name: pa.string() if name in _TEXT else pa.float64() for name in table.column_names}
            table = table.cast(pa.schema(list(types.items())))
        else:
            numbers = (_STEP_COLUMNS | _REQUEST_COLUMNS) - set(_TEXT)
            types = {name: pa.float64() for name in numbers} | {name: pa.string() for name in _TEXT}
            table = pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=types))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise TelemetryError(f"cannot read {path}: {reason}; give a whole CSV, CSV.gz or Parquet file") from error
    _check_columns(path, table.column_names)
    if table.num_rows == 0:
        raise TelemetryError(f"{path} has a header but no rows")
    return table


def _kind(columns: Sequence[str]) -> StepKind | Literal["request"]:
    if "input_tokens" in columns:
        return "request"
    if "new_tokens" in columns:
        return "mixed" if "batch_size" in columns else "prefill"
    return "decode"


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    kind = _kind(columns)
    known = _REQUEST_COLUMNS if kind == "request" else _STEP_COLUMNS
    needed = _REQUEST_NUMBERS if kind == "request" else _NEEDED[kind]
    for column in columns:
        if column not in known:
            near = get_close_matches(column, known, n=1)
            hint = f". Did you mean '{near[0]}'?" if near else f"; {kind} telemetry has {', '.join(sorted(known))}"
            raise TelemetryError(f"unknown column '{column}' in {path}{hint}")
    missing = [column for column in needed if column not in columns]
    if missing:
        raise TelemetryError(f"{path} lacks the column(s) {', '.join(missing)} that {kind} telemetry needs")
    if len(set(columns)) < len(columns):
        raise TelemetryError(f"{path} has a column twice; columns: {', '.join(columns)}")


def _number(table: Any, name: str, default: float | None = None) -> FloatArray:
    """A column as (n,) floats, NaN where empty; `default` where the file has no such column."""
    if name not in table.column_names:
        return np.full(table.num_rows, default, np.float64)
    column: FloatArray = table[name].to_numpy(zero_copy_only=False).astype(np.float64)
    return column


def _text(table: Any, name: str) -> list[str]:
    if name not in table.column_names:
        return [""] * table.num_rows
    return ["" if value is None else value for value in table[name].to_pylist()]


def _usable(
    path: Path, numbers: dict[str, FloatArray], flags: Sequence[str], excluded: Counter[str], notes: list[str]
) -> BoolArray:
    """Which rows serve; counts and names those that do not."""
    keep = np.ones(len(flags), np.bool_)
    for row, flag in enumerate(flags):
        if reason := excluded_by(flag):
            keep[row] = False
            excluded[reason] += 1
    bad = np.zeros(len(flags), np.bool_)
    named = ""
    for name, values in numbers.items():
        lowest = 1.0 if name in _AT_LEAST_ONE else 0.0
        wrong = keep & ~(np.isfinite(values) & (values >= lowest) & ((values > 0) | (name != "latency_ms")))
        if wrong.any() and not named:
            row = int(np.flatnonzero(wrong)[0])
            value = "missing or NaN" if np.isnan(values[row]) else f"{values[row]:g}"
            named = f"{path.name}: row {row + 1} has {name} {value}"
        bad |= wrong
    if bad.any():
        excluded["invalid"] += int(bad.sum())
        notes.append(f"{named}; left out {int(bad.sum())} row(s) with a number missing, negative, NaN or infinite")
    return keep & ~bad


def _steps(
    path: Path, kind: StepKind, table: Any, runs: dict[str, int], excluded: Counter[str], notes: list[str]
) -> Iterable[Steps]:
    numbers = {name: _number(table, name) for name in _NEEDED[kind] if name not in _PROFILE}
    numbers |= {name: _number(table, name, 1.0) for name in ("tp", "ep")}
    flags = _text(table, "flag")
    keep = _usable(path, numbers, flags, excluded, notes)
    names = ("gpu", "model", "precision", "engine")
    keys = list(zip(*(_text(table, name) for name in names), numbers["tp"], numbers["ep"], strict=True))
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in np.flatnonzero(keep).tolist():
        groups.setdefault(keys[row], []).append(row)

    zero = np.zeros(table.num_rows)
    run = np.array([runs.setdefault(name, len(runs)) for name in _text(table, "run")], np.int64)
    phase = np.array([_phase(path, name) for name in _text(table, "prev_phase")], np.int64)
    noisy = np.array(["noisy" in flag.split(";") for flag in flags], np.bool_)
    for (gpu, model, precision, engine, tp, ep), rows in groups.items():
        yield Steps(
            profile=Profile(gpu, model, precision, int(tp), int(ep), engine),
            kind=kind,
            step_s=numbers["latency_ms"] / 1e3,
            **{name: numbers.get(name, zero) for name in (*_PREFILL, *_DECODE)},
            prev_phase=phase,
            run=run,
            noisy=noisy,
            ended_at_s=zero,
        ).take(np.array(rows))


def _phase(path: Path, name: str) -> int:
    if name not in PHASES:
        raise TelemetryError(
            f"unknown prev_phase '{name}' in {path}; use one of {', '.join(PHASES[1:])} or leave it empty"
        )
    return PHASES.index(name)


def _requests(path: Path, table: Any, excluded: Counter[str], notes: list[str]) -> list[RequestRecord]:
    numbers = {name: _number(table, name) for name in _REQUEST_NUMBERS} | {"tp": _number(table, "tp", 1.0)}
    gpus, models, traces = (_text(table, name) for name in ("gpu", "model", "trace"))
    keep = _usable(path, numbers, [""] * table.num_rows, excluded, notes)
    ttft_s = _number(table, "ttft_ms", np.nan) / 1e3
    tpot_s = _number(table, "tpot_ms", np.nan) / 1e3
    return [
        RequestRecord(
            input_tokens=int(numbers["input_tokens"][row]),
            prefix_hit_ratio=float(numbers["prefix_hit_ratio"][row]),
            kv_cache_usage=float(numbers["kv_cache_usage"][row]),
            requests_running=int(numbers["requests_running"][row]),
            requests_waiting=int(numbers["requests_waiting"][row]),
            prefill_tokens_in_flight=int(numbers["prefill_tokens_in_flight"][row]),
            decode_tokens_in_flight=int(numbers["decode_tokens_in_flight"][row]),
            ttft_s=None if np.isnan(ttft_s[row]) else float(ttft_s[row]),
            tpot_s=None if np.isnan(tpot_s[row]) else float(tpot_s[row]),
            profile=Profile(gpus[row], models[row], tp=int(numbers["tp"][row])),
            run=traces[row],
        )
        for row in np.flatnonzero(keep).tolist()
    ]
