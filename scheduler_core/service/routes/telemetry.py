"""`POST /telemetry/steps`, `/requests` and `/samples`: batches into the store, acknowledged once they are committed.

Who sends `prefer: respond-async` is answered 202 at once, and what the database does not take is kept in memory.
"""

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import msgspec
from anyio import to_thread
from msgspec.structs import replace
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kairos.scheduler_core.errors import BusyError, FieldsError
from kairos.scheduler_core.service.bodies import (
    UNDECODABLE,
    content_coding,
    media_type,
    read_body,
    unreadable,
    unzipped,
)
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.problems import decode_problem, problem_of, problem_response
from kairos.scheduler_core.service.schemas import (
    FieldProblem,
    Problem,
    RequestsBody,
    RowsBody,
    SamplesBody,
    StepsBody,
    TelemetryAnswer,
)
from kairos.scheduler_core.service.store.queries.telemetry import (
    RequestBatch,
    SampleBatch,
    StepBatch,
    Stored,
    TelemetryBatch,
)
from kairos.scheduler_core.service.store.writer import Writer
from kairos.scheduler_core.telemetry import RequestRow, SampleRow, StepRow, excluded_by

BATCH_ID_HEADER = "x-kairos-batch-id"
JSON_LINES = ("application/x-ndjson", "application/jsonl")
_SHOWN = 1_000
"""How many rows that were rejected are named."""

_encoder = msgspec.json.Encoder()
_rows_decoder = msgspec.json.Decoder(list[msgspec.Raw] | RowsBody)

Row = TypeVar("Row", StepRow, RequestRow, SampleRow)


def telemetry_routes(
    writer: Writer,
    metrics: Metrics,
    max_body_bytes: int,
    requests_stored: Callable[[Sequence[RequestRow]], None] = lambda rows: None,
) -> list[Route]:
    """The routes over one writer; the OpenAPI document describes them in `openapi.py`.

    Args:
        requests_stored: told of requests once they are committed, by the writer's thread.
    """
    metrics.telemetry_queue.set_function(lambda: writer.waiting_rows)
    kinds: list[Kind[Any]] = [
        Kind("steps", Rows(StepRow, StepsBody), StepBatch, lambda row: excluded_by(row.flag)),
        Kind("requests", Rows(RequestRow, RequestsBody), RequestBatch, stored=requests_stored),
        Kind("samples", Rows(SampleRow, SamplesBody), SampleBatch),
    ]
    return [
        Route(f"/telemetry/{kind.name}", TelemetryEndpoint(kind, writer, metrics, max_body_bytes), methods=["POST"])
        for kind in kinds
    ]


@dataclass(slots=True)
class Read(Generic[Row]):
    """What a body holds."""

    batch_id: str | None
    rows: list[Row]
    problems: list[FieldProblem] = field(default_factory=list)
    """Of the rejected rows, at most `_SHOWN`."""
    rejected: int = 0


class Rows(Generic[Row]):
    """Reads bodies with rows of one kind: all at once where nothing is wrong, otherwise row by row."""

    def __init__(self, row: type[Row], body: type[StepsBody | RequestsBody | SamplesBody]) -> None:
        self._row: msgspec.json.Decoder[Row] = msgspec.json.Decoder(row)
        self._body = msgspec.json.Decoder(list[row] | body)  # type: ignore[valid-type]  # known when it runs

    def from_json(self, body: bytes) -> Read[Row]:
        """An array of rows, or an object with them in `rows`.

        Raises:
            UNDECODABLE: it is neither.
        """
        try:
            whole = self._body.decode(body)
        except msgspec.ValidationError:
            parts = _rows_decoder.decode(body)
            if isinstance(parts, RowsBody):
                return self._one_by_one(parts.batch_id, enumerate(parts.rows))
            return self._one_by_one(None, enumerate(parts))
        return Read(None, whole) if isinstance(whole, list) else Read(whole.batch_id, whole.rows)

    def from_lines(self, body: bytes) -> Read[Row]:
        """A row a line; empty lines are passed over."""
        try:
            return Read(None, self._row.decode_lines(body))
        except UNDECODABLE:
            lines = enumerate(body.split(b"\n"))
            return self._one_by_one(None, ((number, line) for number, line in lines if line.strip()))

    def _one_by_one(self, batch_id: str | None, parts: Iterable[tuple[int, bytes | msgspec.Raw]]) -> Read[Row]:
        read: Read[Row] = Read(batch_id, [])
        for number, part in parts:
            try:
                read.rows.append(self._row.decode(part))
            except UNDECODABLE as error:
                read.rejected += 1
                if len(read.problems) < _SHOWN:
                    read.problems += _named(number, decode_problem(bytes(part), error))
        return read


def _named(number: int, problem: Problem) -> list[FieldProblem]:
    """What is wrong with a row, with its place in the body."""
    if not problem.errors:
        return [FieldProblem(f"[{number}]", problem.detail.replace("the body is", "is", 1))]
    return [FieldProblem(f"[{number}].{p.path}".rstrip("."), p.message) for p in problem.errors]


@dataclass(frozen=True, slots=True)
class Kind(Generic[Row]):
    """A kind of rows: how it is read, and how it is stored."""

    name: str
    rows: Rows[Row]
    batch_of: Callable[[str, bytes, list[Row]], TelemetryBatch[Row]]
    """Id, digest, rows."""
    excluded_by: Callable[[Row], str | None] = lambda row: None
    """Which flag leaves a row out."""
    stored: Callable[[Sequence[Row]], None] = lambda rows: None
    """Told of rows once they are committed."""


class TelemetryEndpoint(Generic[Row]):
    """The ASGI application behind a route."""

    def __init__(self, kind: Kind[Row], writer: Writer, metrics: Metrics, max_body_bytes: int) -> None:
        self._kind: Kind[Row] = kind
        self._writer = writer
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the batch, have it stored, answer."""
        headers = Headers(scope=scope)
        if refusal := unreadable(headers, ("application/json", *JSON_LINES), ("identity", "gzip")):
            response = problem_response(refusal)
        else:
            body = await read_body(receive)
            if body is None:
                return
            response = await self._answer(headers, body)
        await response(scope, receive, send)

    async def _answer(self, headers: Headers, body: bytes) -> Response:
        try:
            read, digest = await to_thread.run_sync(self._read, headers, body)
        except UNDECODABLE as error:
            return problem_response(decode_problem(body, error))
        self._count("rejected", read.rejected)
        if read.rejected and not read.rows:
            first = f"{read.problems[0].path}: {read.problems[0].message}"
            detail = f"none of {read.rejected} rows can be stored; the first: {first}"
            return problem_response(problem_of(422, detail, read.problems))
        batch_id = _batch_id(headers, read.batch_id)
        rows, excluded = self._without_excluded(read.rows)
        self._count("excluded", sum(excluded.values()))
        answer = TelemetryAnswer(batch_id, 0, read.rejected, excluded, False, read.problems)
        keep = _prefers_async(headers)
        future = self._put(self._kind.batch_of(batch_id, digest, rows), keep)
        if keep:
            answer = replace(answer, buffered=len(rows))
        else:
            stored = await asyncio.wrap_future(future)
            answer = replace(answer, stored=stored.rows, duplicate=stored.duplicate)
        return Response(_encoder.encode(answer), 202 if keep else 200, media_type="application/json")

    def _without_excluded(self, rows: list[Row]) -> tuple[list[Row], dict[str, int]]:
        """The rows that are stored, and how many a flag leaves out."""
        flags = [self._kind.excluded_by(row) for row in rows]
        excluded = Counter(flag for flag in flags if flag)
        return [row for row, flag in zip(rows, flags, strict=True) if not flag] if excluded else rows, dict(excluded)

    def _put(self, batch: TelemetryBatch[Row], keep: bool) -> "Future[Stored]":
        """Have it written, and count what becomes of it."""
        try:
            future = self._writer.put(batch, keep=keep)
        except BusyError:
            self._count("refused", batch.row_count)
            raise
        future.add_done_callback(lambda ended: self._ended(ended, batch, keep))
        return future

    def _ended(self, future: "Future[Stored]", batch: TelemetryBatch[Row], keep: bool) -> None:
        if future.cancelled() or future.exception():
            self._count("dropped" if keep else "refused", batch.row_count)
        elif future.result().duplicate:
            self._count("duplicate", batch.row_count)
        else:
            self._count("stored", batch.row_count)
            self._kind.stored(batch.rows)

    def _count(self, outcome: str, rows: int) -> None:
        if rows:
            self._metrics.telemetry_rows.labels(self._kind.name, outcome).inc(rows)

    def _read(self, headers: Headers, body: bytes) -> tuple[Read[Row], bytes]:
        """The rows, and a digest of what was sent."""
        if content_coding(headers) == "gzip":
            body = unzipped(body, self._max_body_bytes)
        rows = self._kind.rows
        read = rows.from_lines(body) if media_type(headers) in JSON_LINES else rows.from_json(body)
        return read, blake2b(body, digest_size=16).digest()


def _prefers_async(headers: Headers) -> bool:
    """Whether the sender would rather be answered at once (RFC 7240)."""
    wishes = ",".join(headers.getlist("prefer")).lower().split(",")
    return any(wish.partition(";")[0].strip() == "respond-async" for wish in wishes)


def _batch_id(headers: Headers, in_body: str | None) -> str:
    """The id of a batch, from header or body; a new one where neither has it.

    Raises:
        FieldsError: it is empty, too long, or not the same in both.
    """
    in_header = headers.get(BATCH_ID_HEADER)
    if in_header is not None and not re.fullmatch(r"[^\x00-\x1f]{1,256}", in_header):
        raise FieldsError([(BATCH_ID_HEADER, "needs 1 to 256 characters")])
    if in_header is not None and in_body is not None and in_header != in_body:
        raise FieldsError([("batch_id", f"is '{in_body}', the header {BATCH_ID_HEADER} says '{in_header}'; send one")])
    return in_header or in_body or uuid.uuid4().hex
