"""Kairos's own trace format: CSV or CSV.gz with the columns of the data pack (docs/traces.md)."""

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

from kairos.adapters.traces.files import Table, note, note_order, parse_cells, read_table, stem
from kairos.adapters.traces.trace import LABELS, SYNTHETIC, Trace, block_tokens_of
from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.errors import TraceError

NEEDED = ("arrival_s", "input_tokens", "output_tokens")
COLUMNS = (*NEEDED, "hash_ids", *LABELS, "request_id")


def parse_trace(path: Path, text: str) -> Trace:
    """The trace in a file's text, in file order.

    Raises:
        TraceError: says the row, column and value that cannot be used, and how to mend it.
    """
    table = read_table(path, text, NEEDED, COLUMNS)
    notes: dict[str, int] = {}
    arrival_s = table.arrivals_s("arrival_s")
    note_order(arrival_s, notes)
    prompt_tokens = table.lengths("input_tokens", notes)
    output_tokens = table.lengths("output_tokens", notes)
    block_ids, block_tokens = None, 0
    if any(table.columns.get("hash_ids", ())):
        block_ids = parse_cells(table, "hash_ids", _block_ids, "is not a list of integers with spaces between")
        block_tokens, misfits = block_tokens_of(prompt_tokens, block_ids, str(path))
        note(notes, f"number of hash_ids does not fit the prompt in blocks of {block_tokens} tokens", misfits)
    labels = {name: list(cells) for name in LABELS if any(cells := table.columns.get(name, ()))}
    name = stem(path)
    return Trace(
        name=name,
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        request_id=_request_ids(table) if "request_id" in table.columns else None,
        block_ids=block_ids,
        block_tokens=block_tokens,
        **labels,
        synthetic=name.startswith(SYNTHETIC) or all(t.startswith(SYNTHETIC) for t in labels.get("type", [""])),
        notes=notes,
    )


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace in Kairos's format, gzip if the name ends in .gz; read_trace gives the same requests back."""
    columns: dict[str, Sequence[object]] = {
        "arrival_s": trace.arrival_s.tolist(),
        "input_tokens": trace.prompt_tokens.tolist(),
        "output_tokens": trace.output_tokens.tolist(),
    }
    if trace.block_ids is not None:
        columns["hash_ids"] = [" ".join(map(str, ids)) for ids in trace.block_ids]
    columns |= {name: values for name in LABELS if (values := getattr(trace, name)) is not None}
    if trace.request_id is not None:
        columns["request_id"] = trace.request_id
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    raw = text.getvalue().encode()
    try:
        # mtime=0: the same trace gives the same bytes
        path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written ({error.strerror or error}); check the folder") from None


def _block_ids(cell: str) -> tuple[int, ...]:
    return tuple(map(int, cell.split()))


def _request_ids(table: Table) -> list[RequestId]:
    cells = table.columns["request_id"]
    first: dict[str, int] = {}
    for row, cell in enumerate(cells):
        if not cell:
            table.fail(row, "request_id", "is missing; give every row an id, or leave the column out")
        if first.setdefault(cell, row) != row:
            table.fail(row, "request_id", f"occurs already in row {first[cell] + 1}; ids must differ")
    try:
        numbers = list(map(int, cells))
    except ValueError:
        return list(cells)
    return [*numbers] if [str(number) for number in numbers] == list(cells) else list(cells)
