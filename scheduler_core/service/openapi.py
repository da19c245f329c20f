"""The OpenAPI document: FastAPI's, with the route that msgspec reads and writes, its schemas and examples."""

import json
from importlib.resources import files
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kairos.scheduler_core.service.problems import PROBLEM_TYPE, problem_of
from kairos.scheduler_core.service.schemas import Answer, FieldProblem, Problem, Snapshot


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the bodies that msgspec reads and writes."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    schemas, components = msgspec.json.schema_components(
        [Snapshot, Answer, Problem], ref_template="#/components/schemas/{name}"
    )
    snapshot, answer, problem = schemas
    document["components"]["schemas"].update(components)
    example = json.loads(files("kairos.scheduler_core.service").joinpath("example.json").read_text("utf-8"))
    responses: dict[str, Any] = {
        "200": {
            "description": "The decisions.",
            "content": {"application/json": {"schema": answer, "example": example["answer"]}},
        }
    }
    for meaning, shown in _PROBLEMS.items():
        responses[str(shown.status)] = {
            "description": meaning,
            "content": {PROBLEM_TYPE: {"schema": problem, "example": msgspec.to_builtins(shown)}},
        }
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
            "responses": responses,
        }
    }
    return document


_PROBLEMS = {
    "The body is no JSON.": problem_of(400, "the body is no valid JSON: Input data was truncated"),
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
"""What may go wrong, with an example of each."""
