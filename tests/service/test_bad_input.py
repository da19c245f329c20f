"""Whatever comes in, the answer is a problem with the path of the field; nothing ends in a 500."""

import inspect
import json
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from service.snapshots import call, decode, prefill, refused, settings_of, snapshot, waits

from kairos.scheduler_core import errors
from kairos.scheduler_core.errors import (
    BusyError,
    ConfigError,
    FieldsError,
    KairosError,
    NotAdmittedError,
    UnknownNameError,
)
from kairos.scheduler_core.service.access import require_loopback
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.problems import on_kairos_error


def resident(**fields: Any) -> dict[str, Any]:
    return {"request_id": "r", "instance_id": "decode-0", "context_tokens": 9, "first_token_s": 0.0} | fields


def paths(response: httpx.Response) -> list[str]:
    """Paths of the fields of a 422 problem."""
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return [error["path"] for error in response.json()["errors"]]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"waiting": []}, "instances"),
        (snapshot(prefill(role="router")), "instances[0].role"),
        (snapshot(prefill(control="none")), "instances[0].control"),
        (snapshot({"instance_id": "a", "role": "prefill"}), "instances[0].profile"),
        (snapshot(prefill(), prefill()), "instances[1].instance_id"),
        (snapshot(prefill(colour="red")), "instances[0].colour"),
        (snapshot(prefill(chunk_tokens=0)), "instances[0].chunk_tokens"),
        (snapshot(prefill(chunk_tokens=1), waiting=[waits("a", 9_000_000)]), "instances[0].chunk_tokens"),
        (snapshot(prefill(), waiting=[waits("a"), waits("a")]), "waiting[1].request_id"),
        (snapshot(decode(), resident=[resident()], waiting=[waits("r")]), "resident[0].request_id"),
        (snapshot(prefill(), waiting=[waits("a"), waits(1)]), "waiting[1].request_id"),
        (snapshot(prefill(), waiting=[waits("a", -5)]), "waiting[0].prompt_tokens"),
        (snapshot(prefill(), waiting=[waits("a", 2**70)]), "waiting[0].prompt_tokens"),
        (snapshot(prefill(), waiting=[waits("a", 10, cached_tokens=10)]), "waiting[0].prompt_tokens"),
        (snapshot(prefill(), waiting=[waits("a", 10, prefilled_tokens=5)]), "waiting[0].instance_id"),
        (snapshot(prefill(), waiting=[waits("a", instance_id="prefill-9")]), "waiting[0].instance_id"),
        (snapshot(prefill(), decode(), waiting=[waits("a", instance_id="decode-0")]), "waiting[0].instance_id"),
        (
            snapshot(prefill(), waiting=[waits("a", cached_tokens_by_instance={"prefill-9": 1})]),
            "waiting[0].cached_tokens_by_instance.prefill-9",
        ),
        (snapshot(prefill(), waiting=[waits("a", slo_class="defualt")]), "waiting[0].slo_class"),
        (snapshot(prefill(), waiting=[waits("a", ttft_target_s=0)]), "waiting[0].ttft_target_s"),
        (snapshot(prefill(), waiting=[waits("a") | {"arrival_s": "soon"}]), "waiting[0].arrival_s"),
        (
            snapshot(prefill(), running=[{"request_id": "a", "instance_id": "x", "arrival_s": 0, "prompt_tokens": 9}]),
            "running[0].instance_id",
        ),
        (snapshot(decode(), resident=[resident(first_token_s=None)]), "resident[0].first_token_s"),
        (snapshot(decode(), resident=[resident(output_tokens=0)]), "resident[0].arrival_s"),
        (
            snapshot(decode(), transferred=[{"request_id": "t", "context_tokens": 9, "instance_id": "x"}]),
            "transferred[0].instance_id",
        ),
        (snapshot(decode(), ended_steps=[{"instance_id": "decode-0", "seconds": 1}]), "ended_steps[0].batch_size"),
        (snapshot(prefill(), ended_steps=[{"instance_id": "prefill-0", "seconds": 1}]), "ended_steps[0].new_tokens"),
        (snapshot(prefill(), state="nonsense"), "state"),
        (snapshot(prefill(), state="äöü"), "state"),
    ],
)
def test_a_field_that_does_not_fit_is_named_by_its_path(body: dict[str, Any], path: str) -> None:
    assert path in paths(refused(body))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_named_by_its_path(number: str) -> None:
    body = json.dumps(snapshot(prefill(), waiting=[waits("a"), waits("b", arrival_s=-77.5)])).replace("-77.5", number)

    assert paths(refused(body.encode())) == ["waiting[1].arrival_s"]


def test_all_numbers_that_are_not_finite_are_named() -> None:
    body = b'{"instances": [], "now_s": NaN, "waiting": [{"arrival_s": Infinity}]}'

    assert paths(refused(body)) == ["now_s", "waiting[0].arrival_s"]


def test_several_problems_are_told_at_once() -> None:
    body = snapshot(prefill(), waiting=[waits("a", slo_class="x"), waits("b", instance_id="y")])

    assert paths(refused(body)) == ["waiting[0].slo_class", "waiting[1].instance_id"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"instances": [],}', b"\xff\xfe", b"[" * 100_000, b'{"instances": "\xff"}']
)
def test_a_body_that_is_no_json_is_a_bad_request(body: bytes) -> None:
    response = refused(body)

    assert response.status_code in (400, 422)
    assert response.json()["status"] == response.status_code


def test_a_body_of_another_shape_is_refused() -> None:
    assert refused(b"null").status_code == 422


@pytest.mark.parametrize(
    ("strategy", "status", "words"),
    [
        ("kairo", 404, "Did you mean 'kairos'?"),
        ("fcsf+late+headroom+slack", 404, "unknown prefill policy 'fcsf'. Did you mean 'fcfs'?"),
        ("fcfs+late", 422, "has 2 parts"),
        ("fcfs(x=1)+late+headroom+slack", 422, "has no parameter 'x'"),
        ("fcfs(lost_last=[)+late+headroom+slack", 422, "use true or false"),
        ("fcfs+late+headroom+slack(h=0)", 422, "h is 0"),
        ("os:system+late+headroom+slack", 422, "put it under a name in the configuration"),
    ],
)
def test_a_strategy_that_cannot_be_built_is_refused_with_what_would_do(strategy: str, status: int, words: str) -> None:
    response = refused(snapshot(prefill(), strategy=strategy))

    assert response.status_code == status
    assert words in response.json()["detail"]


def test_more_requests_than_the_limit_are_too_large() -> None:
    settings = settings_of(service={"max_requests": 2})

    response = refused(snapshot(prefill(), waiting=[waits(n) for n in range(3)]), settings)

    assert (response.status_code, response.json()["title"]) == (413, "Content Too Large")
    assert "holds 3 requests, the limit is 2" in response.json()["detail"]


def test_a_body_over_the_limit_is_too_large_by_its_header_or_as_it_comes() -> None:
    app = create_app(settings_of(service={"max_body_bytes": 1_000}))

    async def chunks() -> Any:
        for _ in range(5):
            yield b" " * 300

    announced = call(app, "POST", "/schedule", content=b" " * 1_001, headers={"content-type": "application/json"})
    streamed = call(app, "POST", "/schedule", content=chunks(), headers={"content-type": "application/json"})

    assert (announced.status_code, streamed.status_code) == (413, 413)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-encoding": "gzip"},
    ],
)
def test_another_content_type_or_encoding_is_unsupported(headers: dict[str, str]) -> None:
    assert refused(snapshot(prefill()), headers=headers).status_code == 415


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/schedule", 405), ("POST", "/nowhere", 404)])
def test_unknown_routes_and_methods_are_problems_too(method: str, path: str, status: int) -> None:
    response = call(create_app(settings_of()), method, path)

    assert response.status_code == response.json()["status"] == status
    assert response.headers["content-type"] == "application/problem+json"


def test_a_wrong_method_says_which_would_do() -> None:
    assert call(create_app(settings_of()), "GET", "/schedule").headers["allow"] == "POST"


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, KairosError)]


def made(kind: type[KairosError]) -> KairosError:
    if kind is FieldsError:
        return FieldsError([("waiting[0]", "is wrong")])
    if kind is BusyError:
        return BusyError("a queue is full", 3)
    if kind is NotAdmittedError:
        return NotAdmittedError(404, "no_instance_serves_model", None)
    return kind("thing", "nmae", ["name"]) if issubclass(kind, UnknownNameError) else kind("what happened")


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_has_the_status_that_the_tree_gives_it(kind: type[KairosError]) -> None:
    app = FastAPI()
    app.add_exception_handler(KairosError, on_kairos_error)

    @app.get("/")
    def fail() -> None:
        raise made(kind)

    response = call(app, "GET", "/")

    tree = dict(re.findall(r"(\w+Error) +(\d{3})", errors.__doc__ or ""))
    own = next(base.__name__ for base in kind.__mro__ if base.__name__ in tree)
    assert response.json()["status"] == response.status_code == int(tree[own])


def test_a_bug_is_a_problem_that_gives_nothing_away() -> None:
    app = create_app(settings_of())

    @app.get("/bug")
    def bug() -> None:
        raise RuntimeError("secret")

    response = call(app, "GET", "/bug")

    assert response.status_code == 500
    assert "secret" not in response.text


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org", ""])
def test_without_keys_the_server_binds_to_loopback_only(host: str) -> None:
    with pytest.raises(ConfigError, match=r"use 127\.0\.0\.1"):
        require_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_addresses_are_fine(host: str) -> None:
    require_loopback(host)
