"""`POST /telemetry/steps` and `/telemetry/requests`: batches into the store, acknowledged once they are committed."""

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Generic, TypeVar

import msgspec
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kairos.scheduler_core.errors import FieldsError
from kairos.scheduler_core.service.bodies import (
    UNDECODABLE,
    content_coding,
    media_type,
    read_body,
    unreadable,
    unzipped,
)
from kairos.scheduler_core.service.problems import decode_problem, problem_of, problem_response
from kairos.scheduler_core.service.schemas import (
    FieldProblem,
    Problem,
    RequestsBody,
    RowsBody,
    StepsBody,
    TelemetryAnswer,
)
from kairos.scheduler_core.service.store.queries.telemetry import RequestBatch, StepBatch
from kairos.scheduler_core.service.store.writer import Writer
from kairos.scheduler_core.telemetry import RequestRow, StepRow, excluded_by

BATCH_ID_HEADER = "x-kairos-batch-id"
JSON_LINES = ("application/x-ndjson", "application/jsonl")
_SHOWN = 1_000
"""How many rows that were rejected are named."""

_encoder = msgspec.json.Encoder()
_rows_decoder = msgspec.json.Decoder(list[msgspec.Raw] | RowsBody)

Row = TypeVar("Row", StepRow, RequestRow)


def telemetry_routes(writer: Writer, max_body_bytes: int) -> list[Route]:
    """The routes over one writer; the OpenAPI document describes them in `openapi.py`."""
    steps, requests = Rows(StepRow, StepsBody), Rows(RequestRow, RequestsBody)
    return [
        Route("/telemetry/steps", TelemetryEndpoint(steps, _step_batch, writer, max_body_bytes), methods=["POST"]),
        Route(
            "/telemetry/requests",
            TelemetryEndpoint(requests, _request_batch, writer, max_body_bytes),
            methods=["POST"],
        ),
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

    def __init__(self, row: type[Row], body: type[StepsBody] | type[RequestsBody]) -> None:
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


BatchOf = Callable[[str, bytes, list[Row]], tuple[StepBatch | RequestBatch, dict[str, int]]]
"""Id, digest and rows to what is stored, and what is left out, by flag."""


class TelemetryEndpoint(Generic[Row]):
    """The ASGI application behind a route."""

    def __init__(self, rows: Rows[Row], batch_of: BatchOf[Row], writer: Writer, max_body_bytes: int) -> None:
        self._rows: Rows[Row] = rows
        self._batch_of: BatchOf[Row] = batch_of
        self._writer = writer
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the batch, have it stored, answer."""
        headers = Headers(scope=scope)
        if refusal := unreadable(headers, ("application/json", *JSON_LINES), ("identity", "gzip")):
            response = problem_response(refusal)
        else:
            body = await read_body(headers, receive, self._max_body_bytes)
            if body is None:
                return
            response = await self._answer(headers, body)
        await response(scope, receive, send)

    async def _answer(self, headers: Headers, body: bytes) -> Response:
        try:
            read, digest = await to_thread.run_sync(self._read, headers, body)
        except UNDECODABLE as error:
            return problem_response(decode_problem(body, error))
        if read.rejected and not read.rows:
            first = f"{read.problems[0].path}: {read.problems[0].message}"
            detail = f"none of {read.rejected} rows can be stored; the first: {first}"
            return problem_response(problem_of(422, detail, read.problems))
        batch_id = _batch_id(headers, read.batch_id)
        batch, excluded = self._batch_of(batch_id, digest, read.rows)
        stored = await asyncio.wrap_future(self._writer.put(batch))
        answer = TelemetryAnswer(batch_id, stored.rows, read.rejected, excluded, stored.duplicate, read.problems)
        return Response(_encoder.encode(answer), media_type="application/json")

    def _read(self, headers: Headers, body: bytes) -> tuple[Read[Row], bytes]:
        """The rows, and a digest of what was sent."""
        if content_coding(headers) == "gzip":
            body = unzipped(body, self._max_body_bytes)
        lines = media_type(headers) in JSON_LINES
        return (self._rows.from_lines if lines else self._rows.from_json)(body), blake2b(body, digest_size=16).digest()


def _step_batch(batch_id: str, digest: bytes, rows: list[StepRow]) -> tuple[StepBatch, dict[str, int]]:
    excluded = Counter(reason for row in rows if (reason := excluded_by(row.flag)))
    kept = [row for row in rows if not excluded_by(row.flag)] if excluded else rows
    return StepBatch(batch_id, digest, kept), dict(excluded)


def _request_batch(batch_id: str, digest: bytes, rows: list[RequestRow]) -> tuple[RequestBatch, dict[str, int]]:
    return RequestBatch(batch_id, digest, rows), {}


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
