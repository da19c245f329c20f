"""The limits of every body, and the one shape of what pydantic refuses."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field
from service.snapshots import call, settings_of

from kairos.scheduler_core.service.app import create_app


class Inner(BaseModel):
    """A part of a body."""

    count: int = Field(gt=0)


class Body(BaseModel):
    """A body that pydantic reads."""

    parts: list[Inner]


def app_with_a_pydantic_route(**service: Any) -> FastAPI:
    """A service, and a route as other parts have."""
    app = create_app(settings_of(service=service))

    @app.post("/echo")
    def echo(body: Body, limit: int = 1) -> int:
        return len(body.parts) * limit

    return app


APP = app_with_a_pydantic_route(max_body_bytes=1_000, client_timeout_s=0.05)
JSON = {"content-type": "application/json"}


async def chunks(total: int) -> AsyncIterator[bytes]:
    for _ in range(total // 100):
        yield b" " * 100


async def slow() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.sleep(30)


@pytest.mark.parametrize("path", ["/echo", "/schedule"])
def test_a_body_over_the_limit_is_too_large_on_every_route_however_it_comes(path: str) -> None:
    announced = call(APP, "POST", path, content=b" " * 1_001, headers=JSON)
    streamed = call(APP, "POST", path, content=chunks(2_000), headers=JSON)

    assert [answer.status_code for answer in (announced, streamed)] == [413, 413]
    assert announced.json() == streamed.json()
    assert announced.headers["connection"] == streamed.headers["connection"] == "close"


@pytest.mark.parametrize("path", ["/echo", "/schedule"])
def test_a_client_that_does_not_finish_its_body_is_answered_408(path: str) -> None:
    answer = call(APP, "POST", path, content=slow(), headers=JSON)

    assert (answer.status_code, answer.headers["content-type"]) == (408, "application/problem+json")
    assert answer.headers["connection"] == "close"


def test_a_body_below_the_limits_is_read() -> None:
    assert call(APP, "POST", "/echo", json={"parts": [{"count": 1}]}).json() == 1


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"parts": [{"count": 1}, {"count": 0}]}', "parts[1].count"),
        (b'{"parts": [{"count": "geheim"}]}', "parts[0].count"),
        (b"{}", "parts"),
        (b"[]", ""),
        (b"null", ""),
    ],
)
def test_what_pydantic_refuses_is_a_problem_with_the_path_and_without_the_value(body: bytes, path: str) -> None:
    answer = call(APP, "POST", "/echo", content=body, headers=JSON)

    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert [error["path"] for error in answer.json()["errors"]] == [path]
    assert "geheim" not in answer.text


def test_a_wrong_query_is_named() -> None:
    answer = call(APP, "POST", "/echo?limit=many", json={"parts": []})

    assert [error["path"] for error in answer.json()["errors"]] == ["limit"]


def test_a_body_that_is_no_json_is_a_bad_request_there_too() -> None:
    answer = call(APP, "POST", "/echo", content=b'{"parts": [', headers=JSON)

    assert (answer.status_code, answer.json()["title"]) == (400, "Bad Request")
