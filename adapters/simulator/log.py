"""The files of one run: requests.csv, steps.csv, events.parquet, summary.json (docs/files.md)."""

import csv
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kairos.adapters.simulator.evidence import Meta, Summary, run_metrics
from kairos.adapters.simulator.run import Run, StepRow
from kairos.adapters.simulator.tables import STATUSES, IntArray, RequestTable
from kairos.scheduler_core.slo import BoolArray, FloatArray

REQUEST_COLUMNS = [
    "request_id",
    "arrival_s",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "slo_class",
    "tenant",
    "ttft_target_s",
    "tpot_target_s",
    "prefill_instance",
    "decode_instance",
    "prefill_start_s",
    "first_token_s",
    "decode_ready_s",
    "last_token_s",
    "ttft_s",
    "tpot_s",
    "max_itl_s",
    "ttft_met",
    "tpot_met",
    "slo_met",
    "status",
    "model",
]
STEP_COLUMNS = (
    "instance",
    "kind",
    "start_s",
    "end_s",
    "request_ids",
    "new_tokens",
    "batch_size",
    "sum_context_tokens",
)


def write_run(run: Run, folder: Path, meta: Meta) -> Summary:
    """Write all files of a run that kept its steps into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_requests(run.requests, folder)
    _write_csv(folder / "steps.csv", STEP_COLUMNS, map(_step_row, run.steps, _ids(run)))
    pq.write_table(_events(run), folder / "events.parquet", compression="zstd")
    summary = Summary(meta, run_metrics(run.requests, run.decision_us, run.gaps))
    (folder / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary)) + b"\n")
    return summary


def write_requests(table: RequestTable, folder: Path) -> None:
    """Write requests.csv."""
    _write_csv(folder / "requests.csv", REQUEST_COLUMNS, _request_rows(table))


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _request_rows(table: RequestTable) -> Iterable[Sequence[object]]:
    w = table.workload
    return zip(
        w.request_id,
        _numbers(w.arrival_s),
        w.prompt_tokens.tolist(),
        table.cached_tokens.tolist(),
        w.output_tokens.tolist(),
        w.slo_class,
        w.tenant,
        _numbers(w.ttft_target_s),
        _numbers(w.tpot_target_s),
        _instances("prefill", table.prefill_instance),
        _instances("decode", table.decode_instance),
        *map(
            _numbers,
            (
                table.prefill_start_s,
                table.first_token_s,
                table.decode_ready_s,
                table.last_token_s,
                table.ttft_s,
                table.tpot_s,
                table.max_itl_s,
            ),
        ),
        *map(_booleans, (table.ttft_met, table.tpot_met, table.slo_met)),
        [STATUSES[code] for code in table.status],
        w.model,
        strict=True,
    )


def _numbers(values: FloatArray) -> list[object]:
    return ["" if not np.isfinite(value) else value for value in values.tolist()]


def _booleans(values: BoolArray) -> list[str]:
    return ["true" if value else "false" for value in values]


def _instances(kind: str, indices: IntArray) -> list[str]:
    return ["" if index < 0 else f"{kind}-{index}" for index in indices]


def _ids(run: Run) -> Iterable[str]:
    names = [str(request_id) for request_id in run.requests.workload.request_id]
    return (" ".join(names[row] for row in step.request_ids) for step in run.steps)


def _step_row(step: StepRow, request_ids: str) -> Sequence[object]:
    return (
        f"{step.kind}-{step.instance}",
        step.kind,
        step.start_s,
        step.end_s,
        request_ids,
        sum(step.tokens) if step.kind == "prefill" else 0,
        len(step.request_ids),
        step.sum_context_tokens,
    )


def _events(run: Run) -> pa.Table:
    """Every event by time; `step` numbers the rows of steps.csv from 0, `request_id` names the rows of requests.csv."""
    steps, table = run.steps, run.requests
    lengths = np.array([len(step.request_ids) for step in steps], dtype=np.int64)
    member = np.fromiter(chain.from_iterable(step.request_ids for step in steps), np.int64, int(lengths.sum()))
    tokens = np.fromiter(chain.from_iterable(step.tokens for step in steps), np.int64, int(lengths.sum()))
    number = np.repeat(np.arange(len(steps)), lengths)
    start_s = np.array([step.start_s for step in steps])
    end_s = np.array([step.end_s for step in steps])
    is_prefill = np.array([step.kind == "prefill" for step in steps], dtype=bool)
    instance = np.array([f"{step.kind}-{step.instance}" for step in steps], dtype=object)
    size = np.array([sum(step.tokens) for step in steps], dtype=np.int64)
    columns: list[list[np.ndarray[tuple[int], np.dtype[np.generic]]]] = [[], [], [], [], [], []]

    def add(time_s: FloatArray, event: str, rows: IntArray, where: object, step: object, amount: IntArray) -> None:
        n = len(time_s)
        values = (time_s, np.full(n, event, dtype=object), rows, where, step, amount)
        for column, value in zip(columns, values, strict=True):
            column.append(np.broadcast_to(np.asarray(value), (n,)))

    none = np.int64(-1)
    rows = np.arange(len(table.workload))
    add(table.workload.arrival_s, "arrival", rows, "", none, table.workload.prompt_tokens)
    refused = np.flatnonzero(table.status == STATUSES.index("rejected"))
    add(table.workload.arrival_s[refused], "reject", refused, "", none, np.zeros(len(refused), dtype=np.int64))
    started = np.flatnonzero(np.isfinite(table.prefill_start_s))
    where = np.array(_instances("prefill", table.prefill_instance[started]), dtype=object)
    add(table.prefill_start_s[started], "dispatch", started, where, none, table.cached_tokens[started])
    step_numbers = np.arange(len(steps))
    add(start_s, "step_start", np.full(len(steps), -1), instance, step_numbers, size)
    add(end_s, "step_end", np.full(len(steps), -1), instance, step_numbers, size)
    chunk = is_prefill[number] if len(number) else np.zeros(0, dtype=bool)
    for name, times in (("chunk_start", start_s), ("chunk_end", end_s)):
        add(times[number[chunk]], name, member[chunk], instance[number[chunk]], number[chunk], tokens[chunk])
    first = np.flatnonzero(np.isfinite(table.first_token_s))
    add(table.first_token_s[first], "first_token", first, "", none, np.ones(len(first), dtype=np.int64))
    ready = np.flatnonzero(np.isfinite(table.decode_ready_s))
    if len(ready):
        prompt = table.workload.prompt_tokens[ready]
        add(run.kv_transfer_start_s[ready], "kv_transfer_start", ready, "", none, prompt)
        to = np.array(_instances("decode", table.decode_instance[ready]), dtype=object)
        add(table.decode_ready_s[ready], "kv_transfer_end", ready, to, none, prompt)
    decode = ~chunk
    at = number[decode]
    add(end_s[at], "token", member[decode], instance[at], at, tokens[decode])
    done = np.flatnonzero(table.status == STATUSES.index("finished"))
    whole = np.isfinite(table.last_token_s[done])  # prefill alone ends with the first token
    finish_s = np.where(whole, table.last_token_s[done], table.first_token_s[done])
    add(finish_s, "finish", done, "", none, np.where(whole, table.workload.output_tokens[done], 1))

    time_s, event, row, place, step, amount = (np.concatenate(column) for column in columns)
    order = np.argsort(time_s, kind="stable")
    ids = np.array([str(request_id) for request_id in table.workload.request_id] + [""], dtype=object)
    return pa.table(
        {
            "time_s": time_s[order],
            "event": pa.array(event[order], pa.string()).dictionary_encode(),
            "request_id": pa.array(ids[row[order]], pa.string()).dictionary_encode(),
            "instance": pa.array(place[order], pa.string()).dictionary_encode(),
            "step": step[order],
            "tokens": amount[order],
        }
    )
