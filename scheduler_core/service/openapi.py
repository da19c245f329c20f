"""The OpenAPI document: FastAPI's, with the route that msgspec reads and writes, its schemas and examples."""

import json
from importlib.resources import files
from itertools import chain
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kairos.scheduler_core.service.access import rule_for
from kairos.scheduler_core.service.decisions.explanation import Explanation
from kairos.scheduler_core.service.experiments.record import Record
from kairos.scheduler_core.service.experiments.shadow import ShadowRecord
from kairos.scheduler_core.service.problems import PROBLEM_TYPE, problem_of
from kairos.scheduler_core.service.schemas import (
    Answer,
    FieldProblem,
    Problem,
    RequestsBody,
    SamplesBody,
    Snapshot,
    StepsBody,
    TelemetryAnswer,
)
from kairos.scheduler_core.telemetry import RequestRow, SampleRow, StepRow


def openapi_of(app: FastAPI, *, telemetry: bool) -> dict[str, Any]:
    """FastAPI's document, with the bodies that msgspec reads and writes; with the routes for telemetry or without."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    example = json.loads(files("kairos.scheduler_core.service").joinpath("example.json").read_text("utf-8"))
    of_telemetry = {"steps": (StepsBody, StepRow), "requests": (RequestsBody, RequestRow)}
    of_telemetry |= {"samples": (SamplesBody, SampleRow)}
    types: list[type] = [Snapshot, Answer, Problem, TelemetryAnswer, *chain.from_iterable(of_telemetry.values())]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    snapshot, answer, problem, stored, *bodies = schemas
    document["paths"]["/schedule"] = {
        "post": {
            "tags": ["decisions"],
            "operationId": "schedule",
            "summary": "Decide for a snapshot of a fleet",
            "description": "Which request runs next, where, and in which batch. Nothing is kept: the same snapshot "
            "(and `state`) gives the same answer.",
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": snapshot, "example": example["snapshot"]}},
            },
            "responses": {
                "200": {
                    "description": "The decisions.",
                    "content": {"application/json": {"schema": answer, "example": example["answer"]}},
                }
            }
            | _problems(_SCHEDULE_PROBLEMS, problem),
        }
    }
    if telemetry:
        components |= msgspec.json.schema_components(
            [Record, ShadowRecord, Explanation], ref_template="#/components/schemas/{name}"
        )[1]
        for name, body, row in zip(of_telemetry, bodies[::2], bodies[1::2], strict=True):
            document["paths"][f"/telemetry/{name}"] = {"post": _telemetry(name, body, row, stored, problem)}
    else:
        for told in (TelemetryAnswer, *chain.from_iterable(of_telemetry.values())):
            del components[told.__name__]
    document["components"]["schemas"].update(components)
    _complete(document, problem)
    return document


def _complete(document: dict[str, Any], problem: Any) -> None:
    """Say of every operation what the service does for all of them: keys, limits, the shape of errors."""
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            if "HTTPValidationError" in str(answers.get("422")):
                answers |= _problems(_UNFIT, problem)
            if "requestBody" in operation:
                answers |= _problems(_BODY_PROBLEMS, problem) | answers
            if rule_for(method.upper(), path).role:
                operation["security"] = [{"key": []}, {}]
                answers |= _problems(_KEY_PROBLEMS, problem)
    for replaced in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(replaced, None)


def _telemetry(name: str, body: Any, row: Any, stored: Any, problem: Any) -> dict[str, Any]:
    """The operation that takes `name` (steps, requests or samples)."""
    rows = {"type": "array", "items": row}
    header = {
        "name": "x-kairos-batch-id",
        "in": "header",
        "description": "The same id again is answered as before, and nothing is stored twice.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[!-~]+$"},
    }
    prefer = {
        "name": "prefer",
        "in": "header",
        "description": "`respond-async`: answered 202 at once; what the database does not take is kept in memory.",
        "schema": {"type": "string", "enum": ["respond-async"]},
    }
    told = {"application/json": {"schema": stored}}
    return {
        "tags": ["telemetry"],
        "operationId": f"store_{name}",
        "summary": f"Store a batch of {name}",
        "description": "An array, an object with `rows` and `batch_id`, or JSON lines (`application/x-ndjson`); gzip "
        "is taken. Rows that do not fit are named, the others stored. It answers once they are committed.",
        "parameters": [header, prefer],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"anyOf": [rows, body]}}}},
        "responses": {
            "200": {"description": "What was stored.", "content": told},
            "202": {"description": "What will be stored once the database takes it.", "content": told},
        }
        | _problems(_TELEMETRY_PROBLEMS, problem),
    }


def _problems(problems: dict[str, Problem], schema: Any) -> dict[str, Any]:
    """What may go wrong, with an example of each."""
    return {
        str(shown.status): {
            "description": meaning,
            "content": {PROBLEM_TYPE: {"schema": schema, "example": msgspec.to_builtins(shown)}},
        }
        for meaning, shown in problems.items()
    }


_NO_JSON = {"The body is no JSON.": problem_of(400, "the body is no valid JSON: Input data was truncated")}
_UNFIT = {
    "A field does not fit; `errors` has its path.": problem_of(
        422, "count: input should be greater than 0", [FieldProblem("count", "input should be greater than 0")]
    )
}
_BODY_PROBLEMS = _NO_JSON | {
    "The body took too long to come.": problem_of(
        408, "the body did not come within 30 s (service.client_timeout_s); send it again"
    ),
    "More bytes than the limit allows.": problem_of(
        413, "the body is longer than 67108864 bytes; send less, or raise service.max_body_bytes"
    ),
}
_KEY_PROBLEMS = {
    "The service has keys, and none of them came along.": problem_of(
        401, "this service needs a key: send the header 'Authorization: Bearer KEY'"
    ),
    "The key's role may not do this.": problem_of(403, "the key 'gateway-1' has the role read; this needs schedule"),
}
_SCHEDULE_PROBLEMS = _NO_JSON | {
    "No such strategy or policy.": problem_of(
        404, "unknown strategy 'kairo'. Did you mean 'kairos'? Installed: engine-default, kairos, paper, tuned"
    ),
    "More requests or bytes than the limits allow.": problem_of(
        413, "the snapshot holds 20001 requests, the limit is 20000; send fewer"
    ),
    "The body is not application/json.": problem_of(415, "content type is 'text/plain'; send application/json"),
    "A field does not fit; `errors` has its path.": problem_of(
        422,
        "waiting[3].prompt_tokens: expected `int` >= 1",
        [FieldProblem("waiting[3].prompt_tokens", "expected `int` >= 1")],
    ),
}
_TELEMETRY_PROBLEMS = _NO_JSON | {
    "A batch of this id was stored with other content.": problem_of(
        409, "batch 'a-17' was stored with other content; send this under another id"
    ),
    "More bytes than the limit allows.": problem_of(
        413, "the body is longer than 67108864 bytes; send less, or raise service.max_body_bytes"
    ),
    "The body is of another type or compression.": problem_of(415, "content encoding is 'br'; send identity or gzip"),
    "No row fits; `errors` names each.": problem_of(
        422,
        "none of 1 rows can be stored; the first: [0].latency_ms: expected `float` > 0.0",
        [FieldProblem("[0].latency_ms", "expected `float` > 0.0")],
    ),
    "Too much waits to be stored; `Retry-After` says when to come back.": problem_of(
        429,
        "198000 rows of telemetry wait to be stored, and 5000 more are over the limit of 200000 "
        "(store.queued_rows); send it again in 2 s",
    ),
    "The database cannot be used now; nothing was stored.": problem_of(
        503, "the database sqlite:///kairos.db cannot be used: database or disk is full; nothing was written"
    ),
}
