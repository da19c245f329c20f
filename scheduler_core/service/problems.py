"""Errors as RFC 9457 problem details: one shape for everything that can go wrong on the way to an answer."""

import json
import math
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from fastapi import Path
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from kairos.scheduler_core.errors import BusyError, FieldsError, KairosError, NotAdmittedError
from kairos.scheduler_core.service.schemas import FieldProblem, Problem

PROBLEM_TYPE = "application/problem+json"

_encode = msgspec.json.Encoder().encode


def problem_of(status: int, detail: str, fields: Sequence[FieldProblem] = ()) -> Problem:
    """A problem with the title that RFC 9110 gives its status."""
    return Problem(_TITLES.get(status) or HTTPStatus(status).phrase, status, detail, list(fields))


_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
"""Python before 3.13 knows older names."""


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """The problem as an answer."""
    return Response(_encode(problem), problem.status, headers, PROBLEM_TYPE)


async def on_kairos_error(request: Request, error: Exception) -> Response:
    """Our own errors: each class knows its status."""
    assert isinstance(error, KairosError)
    fields = error.problems if isinstance(error, FieldsError) else []
    told = [FieldProblem(path, message) for path, message in fields]
    again_s = error.retry_after_s if isinstance(error, BusyError | NotAdmittedError) else None
    headers = None if again_s is None else {"retry-after": str(again_s)}
    problem = problem_of(error.http_status, str(error), told)
    return problem_response(msgspec.structs.replace(problem, type=error.problem_type), headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    detail = error.detail
    headers = dict(error.headers or {})
    if error.status_code in (404, 405):
        detail = f"{request.method} {request.url.path}: {error.detail.lower()}; /openapi.json names every route"
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request))) or headers["Allow"]
    return problem_response(problem_of(error.status_code, detail), headers)


def _methods(request: Request) -> set[str]:
    """What a path takes; each method is a route of its own, and the framework names that of the first alone."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in matching if route.path == matching[0].path for method in route.methods or ()}


async def on_unfit_request(request: Request, error: Exception) -> Response:
    """What pydantic refuses: a body that is no JSON (400), or fields that do not fit (422)."""
    assert isinstance(error, RequestValidationError)
    told = error.errors()
    if broken := next((problem for problem in told if problem["type"] == "json_invalid"), None):
        return problem_response(problem_of(400, f"the body is no valid JSON: {broken['ctx']['error']}"))
    return problem_response(_unfit([FieldProblem(_path(problem["loc"]), problem["msg"]) for problem in told]))


def _path(loc: Sequence[int | str]) -> str:
    """Where a field is, without saying of what (a body, a query, a path)."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[1:]).lstrip(".")


RequestIdPath = Annotated[
    str, Path(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$", description="Of the request.")
]


def problem_responses(**meanings: str) -> dict[int | str, dict[str, Any]]:
    """What may go wrong at a FastAPI route, for its `responses`: `s404="There is no such model."`."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {int(name[1:]): {"description": meaning, "content": content} for name, meaning in meanings.items()}


async def on_bug(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the server logs it, the caller learns only that it happened."""
    return problem_response(problem_of(500, "kairos failed on this request; its log says how"))


def decode_problem(body: bytes, error: Exception) -> Problem:
    """Why a body is not what a msgspec decoder wanted: broken JSON (400), or a field that does not fit (422)."""
    if isinstance(error, msgspec.ValidationError):
        message, _, place = str(error).partition(" - at `$")
        path = place.rstrip("`")
        if field := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", message, re.DOTALL):
            path = f"{path}.{field[2]}"
            message = "unknown field; /openapi.json names all" if "unknown" in field[1] else "is missing"
        return _unfit([FieldProblem(path.lstrip("."), message[:1].lower() + message[1:])])
    if numbers := _not_finite(body):
        return _unfit([FieldProblem(path, "is not a finite number") for path in numbers])
    return problem_of(400, f"the body is no valid JSON: {error}")


def _unfit(fields: list[FieldProblem]) -> Problem:
    detail = "; ".join(f"{field.path or 'the body'}: {field.message}" for field in fields)
    return problem_of(422, detail, fields)


def _not_finite(body: bytes) -> list[str]:
    """Paths of NaN and infinities (at most 100), which Python writes as JSON; empty if that is not it."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return []
    found: list[str] = []
    left: list[tuple[str, object]] = [("", document)]
    while left and len(found) < 100:
        path, value = left.pop()
        if isinstance(value, dict):
            left.extend((f"{path}.{key}".lstrip("."), item) for key, item in reversed(value.items()))
        elif isinstance(value, list):
            left.extend((f"{path}[{index}]", item) for index, item in reversed(list(enumerate(value))))
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(path)
    return found
