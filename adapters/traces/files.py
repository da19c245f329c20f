"""What every reader of a trace file needs: its text, its rows and its cells, with errors that say where."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from kairos.adapters.traces.trace import MAX_ARRIVAL_S, MAX_TOKENS, IntArray
from kairos.scheduler_core.errors import TraceError
from kairos.scheduler_core.slo import FloatArray

GZIP_MAGIC = b"\x1f\x8b"

# A prompt of a million tokens in blocks of 16 has more characters of ids than the csv module's default of 128 KiB.
csv.field_size_limit(2**26)


def stem(path: Path) -> str:
    """The file's name without its endings.

    >>> stem(Path("traces/azure2023_code.csv.gz"))
    'azure2023_code'
    """
    name = path.name.removesuffix(".gz")
    for ending in (".csv", ".jsonl", ".json"):
        name = name.removesuffix(ending)
    return name


def read_text(path: Path) -> str:
    """The text of a plain or gzip file.

    Raises:
        TraceError: it is missing, truncated, not gzip though named so, not text, or empty.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if raw.startswith(GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except EOFError:
            raise TraceError(f"{path}: the gzip data end too early; copy or download the file again") from None
        except (OSError, zlib.error) as error:
            raise TraceError(f"{path}: the gzip data are damaged ({error}); copy or download the file again") from None
    elif path.suffix == ".gz" and raw:
        raise TraceError(f"{path}: is named .gz but does not hold gzip data; rename or compress it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: is not text (byte {error.start} is not UTF-8); a trace is CSV or JSON") from None
    if "\0" in text:
        raise TraceError(f"{path}: is not text (a zero byte at {text.index(chr(0))}); a trace is CSV or JSON")
    if not text.strip():
        raise TraceError(f"{path}: is empty; a trace has a header and one row a request")
    return text


@dataclass(frozen=True, slots=True)
class Table:
    """The cells of a file as text: one list a column."""

    path: Path
    columns: Mapping[str, Sequence[str]]
    lines: Sequence[int]
    """The line of each row in the file."""

    def fail(self, row: int, column: str, problem: str) -> NoReturn:
        """Refuse a cell, saying where it stands."""
        value = self.columns[column][row]
        raise TraceError(
            f"{self.path}, row {row + 1} (line {self.lines[row]}), column {column}: '{value[:40]}' {problem}"
        )

    def numbers(self, column: str) -> FloatArray:
        """A column of finite numbers, (n,)."""
        cells = self.columns[column]
        try:
            numbers = np.array(list(map(float, cells)), dtype=np.float64)
        except ValueError:
            row = next(i for i, cell in enumerate(cells) if not _is_number(cell))
            self.fail(row, column, "is not a number" if cells[row].strip() else "is missing; every row needs a number")
        self.refuse(column, ~np.isfinite(numbers), "is not a finite number")
        return numbers

    def refuse(self, column: str, bad: np.ndarray[Any, np.dtype[np.bool_]], problem: str) -> None:
        """Refuse the first row of `bad`, (n,), if there is one."""
        if bad.any():
            self.fail(int(bad.argmax()), column, problem)

    def arrivals_s(self, column: str) -> FloatArray:
        """A column of arrival seconds from 0 on, (n,)."""
        seconds = self.numbers(column)
        self.refuse(column, seconds < 0, "is negative; arrivals are seconds from the start of the trace")
        self.refuse(column, seconds > MAX_ARRIVAL_S, "is too large; arrivals are seconds from the start of the trace")
        return seconds

    def lengths(self, column: str, notes: dict[str, int]) -> IntArray:
        """A column of token counts, (n,); 0 counts as 1 token, and `notes` says in how many rows."""
        return at_least_one(self.tokens(column), column, notes)

    def tokens(self, column: str) -> IntArray:
        """A column of token counts from 0 on, (n,)."""
        numbers = self.numbers(column)
        self.refuse(column, numbers < 0, "is negative; a length is a whole number of tokens")
        self.refuse(column, numbers != np.floor(numbers), "is not whole; a length is a whole number of tokens")
        self.refuse(column, numbers > MAX_TOKENS, f"is too large; a length is at most {MAX_TOKENS} tokens")
        return numbers.astype(np.int64)


def at_least_one(lengths: IntArray, column: str, notes: dict[str, int]) -> IntArray:
    """The lengths with every 0 counted as 1 token; `notes` says in how many rows."""
    note(notes, f"{column} 0, counted as 1 token", int(np.sum(lengths == 0)))
    return np.maximum(lengths, 1)


def note(notes: dict[str, int], treatment: str, rows: int) -> None:
    """Count a treatment, if it was needed."""
    if rows:
        notes[treatment] = notes.get(treatment, 0) + rows


def note_order(arrival_s: FloatArray, notes: dict[str, int]) -> None:
    """Count the rows that arrive before the row above them."""
    note(
        notes,
        "arrives before the row above, sorted by (arrival, file order) when run",
        int((np.diff(arrival_s) < 0).sum()),
    )


def read_table(path: Path, text: str, needed: Sequence[str], known: Sequence[str] | None = None) -> Table:
    """The rows of a CSV file with a header.

    Args:
        needed: columns without which the file cannot be used.
        known: all columns there may be; None: others are ignored.

    Raises:
        TraceError: the header or the number of cells in a row does not fit, or there is no row.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    rows, lines = [], []
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise TraceError(f"{path}, line {reader.line_num}: is not CSV ({error})") from None
    header = [name.strip() for name in rows.pop(0)]
    lines.pop(0)
    _check_header(path, header, needed, known)
    if not rows:
        raise TraceError(f"{path}: has a header and no rows; a trace needs at least one request")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise TraceError(
                f"{path}, line {line}: has {len(row)} cells, the header {len(header)}; give every row one cell a column"
            )
    return Table(path, dict(zip(header, zip(*rows, strict=True), strict=True)), lines)


def _check_header(path: Path, header: list[str], needed: Sequence[str], known: Sequence[str] | None) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise TraceError(f"{path}, header: column '{twice}' occurs {header.count(twice)} times; keep one")
    unknown = [name for name in header if known is not None and name not in known]
    if unknown:
        near = get_close_matches(unknown[0], [name for name in known or () if name not in header], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise TraceError(f"{path}, header: unknown column '{unknown[0]}'.{hint} Known: {', '.join(known or ())}")
    missing = [name for name in needed if name not in header]
    if missing:
        raise TraceError(f"{path}, header: column '{missing[0]}' is missing; needed: {', '.join(needed)}")


def read_json_lines(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its line number."""
    objects = []
    for line, row in enumerate(text.splitlines(), 1):
        if row.strip():
            objects.append((line, json_object(f"{path}, line {line}", row)))
    return objects


def json_object(where: str, text: str) -> dict[str, Any]:
    """One JSON object; `where` begins the error."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also too deep, or a number of thousands of digits
        raise TraceError(f"{where}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise TraceError(f"{where}: holds a {type(value).__name__} where a JSON object is expected")
    return value


def parse_cells(table: Table, column: str, parse: Callable[[str], Any], problem: str) -> list[Any]:
    """A column through `parse`; a cell that raises ValueError is refused with `problem`."""
    cells = table.columns[column]
    try:
        return list(map(parse, cells))
    except ValueError:
        for row, cell in enumerate(cells):
            try:
                parse(cell)
            except ValueError:
                table.fail(row, column, problem)
        raise


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
