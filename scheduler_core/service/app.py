"""The control plane as a FastAPI application: routes, the errors' one shape, and its OpenAPI document."""

import ipaddress
import json
from importlib.resources import files
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

import kairos
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.errors import ConfigError, KairosError
from kairos.scheduler_core.service.problems import PROBLEM_TYPE, on_bug, on_http_error, on_kairos_error
from kairos.scheduler_core.service.routes.overview import overview_router
from kairos.scheduler_core.service.routes.schedule import schedule_router
from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.schemas import Answer, FieldProblem, Problem, Snapshot


def create_app(settings: Settings) -> FastAPI:
    """The application over one configuration; models and policies are loaded here.

    Raises:
        ConfigError, UnknownPolicyError, SchemaError: a strategy or a model of the configuration cannot be loaded.
    """
    strategies = {name: choice.as_strategy(name).check() for name, choice in settings.strategies.items()}
    scheduler = Scheduler(settings, strategies)
    app = FastAPI(title="Kairos", version=kairos.__version__, summary="Which request runs next, where, in which batch.")
    app.include_router(schedule_router(scheduler, settings.service.max_body_bytes), tags=["decisions"])
    app.include_router(overview_router(scheduler), tags=["overview"])
    app.add_exception_handler(KairosError, on_kairos_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(_openapi(app))
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
    return app


def require_loopback(host: str) -> None:
    """Pass an address that only this machine can reach.

    Raises:
        ConfigError: others can, and there are no keys to tell them apart.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(f"host '{host}' is open to other machines, and the service has no keys yet; use 127.0.0.1")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the bodies that msgspec reads and writes."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    schemas, components = msgspec.json.schema_components(
        [Snapshot, Answer, Problem], ref_template="#/components/schemas/{name}"
    )
    snapshot, answer, problem = schemas
    document["components"]["schemas"].update(components)
    example = json.loads(files("kairos.scheduler_core.service").joinpath("example.json").read_text("utf-8"))
    operation = document["paths"]["/schedule"]["post"]
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": snapshot, "example": example["snapshot"]}},
    }
    operation["responses"] = {
        "200": {
            "description": "The decisions.",
            "content": {"application/json": {"schema": answer, "example": example["answer"]}},
        }
    }
    for status, (meaning, title, detail, fields) in _PROBLEMS.items():
        shown = msgspec.to_builtins(Problem(title, status, detail, fields))
        operation["responses"][str(status)] = {
            "description": meaning,
            "content": {PROBLEM_TYPE: {"schema": problem, "example": shown}},
        }
    return document


_PROBLEMS: dict[int, tuple[str, str, str, list[FieldProblem]]] = {
    400: ("The body is no JSON.", "Bad Request", "the body is no valid JSON: Input data was truncated", []),
    404: (
        "No such strategy or policy.",
        "Not Found",
        "unknown strategy 'kairo'. Did you mean 'kairos'? Installed: engine-default, kairos, paper, tuned",
        [],
    ),
    413: (
        "More requests or bytes than the limits allow.",
        "Content Too Large",
        "the snapshot holds 20001 requests, the limit is 20000; send fewer",
        [],
    ),
    415: (
        "The body is not application/json.",
        "Unsupported Media Type",
        "content type is 'text/plain'; send application/json",
        [],
    ),
    422: (
        "A field does not fit; `errors` has its path.",
        "Unprocessable Content",
        "waiting[3].prompt_tokens: expected `int` >= 1",
        [FieldProblem("waiting[3].prompt_tokens", "expected `int` >= 1")],
    ),
}
