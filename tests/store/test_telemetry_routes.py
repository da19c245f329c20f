"""`POST /telemetry/...`: what is stored, what is refused and how it is named; the same on both databases."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from service.snapshots import call, settings_of
from sqlalchemy import func, select
from store.rows import decode_step, prefill_step, request, sample

from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.store.queries.telemetry import read_steps
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Batch, InstanceSample, Recording, Request, Step, Table


@contextmanager
def serving(store: Store, **settings: Any) -> Iterator[FastAPI]:
    """A service on a database; what stays open goes with the process."""
    url = store.engine.url.render_as_string(hide_password=False)
    yield create_app(settings_of(store={"url": url} | settings))


@pytest.fixture
def app(store: Store) -> Iterator[FastAPI]:
    with serving(store) as app:
        yield app


def post(app: FastAPI, rows: Any, to: str = "steps", **headers: str) -> httpx.Response:
    """A batch; `batch="b"` names it."""
    named = {"x-kairos-batch-id": headers.pop("batch")} if "batch" in headers else {}
    sent = {"content-type": "application/json"} | named | {name.replace("_", "-"): v for name, v in headers.items()}
    content = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    return call(app, "POST", f"/telemetry/{to}", content=content, headers=sent)


def count(store: Store, table: type[Table] = Step) -> int:
    with store.read() as connection:
        return connection.scalars(select(func.count()).select_from(table)).one()


def test_steps_are_stored_and_come_back_as_they_were_measured(app: FastAPI, store: Store) -> None:
    answer = post(app, [decode_step(), prefill_step(), decode_step(latency_ms=13.5, flag="noisy", run="r2")])
    (decode, prefill), last = read_steps(store)

    assert answer.json() == {
        "batch_id": answer.json()["batch_id"],
        "stored": 3,
        "rejected": 0,
        "excluded": {},
        "duplicate": False,
        "errors": [],
        "buffered": 0,
    }
    assert decode.profile == Profile("H100", "acme/llama-8b", tp=2, engine="vllm")
    assert (decode.kind, decode.step_s.tolist(), decode.batch_size.tolist()) == ("decode", [0.0125, 0.0135], [4, 4])
    assert (decode.noisy.tolist(), len(set(decode.run.tolist()))) == ([False, True], 2)
    assert (decode.prev_phase.tolist(), decode.sum_context_tokens.tolist()) == ([3, 3], [4000, 4000])
    assert (prefill.kind, prefill.n_requests.tolist(), prefill.cached_tokens.tolist()) == ("prefill", [1], [64])
    assert read_steps(store, after=last) == ([], last)


def test_requests_are_stored_with_the_prediction_beside_the_outcome(app: FastAPI, store: Store) -> None:
    assert post(app, [request(), request(tpot_ms=None, request_id="r-2")], to="requests").json()["stored"] == 2
    with store.read() as connection:
        columns = (
            Request.request_id,
            Request.predicted_ttft_s,
            Request.ttft_s,
            Request.predicted_tpot_s,
            Request.tpot_s,
        )
        rows = connection.execute(select(*columns).order_by(Request.id)).all()

    assert [tuple(row) for row in rows] == [
        ("r-1", 0.06, 0.0645, 0.01, 0.011),
        ("r-2", 0.06, 0.0645, 0.01, None),
    ]


def test_samples_are_stored_with_what_is_not_known_left_empty(app: FastAPI, store: Store) -> None:
    assert post(app, [sample(), sample(instance="prefill-0", ttft_ms=0.0)], to="samples").json()["stored"] == 2
    with store.read() as connection:
        decode, prefill = connection.execute(select(InstanceSample.__table__).order_by(InstanceSample.id)).all()

    assert (decode.instance, decode.at_s, decode.itl_s, decode.output_tokens) == ("decode-0", 1.7e9, 0.0125, 480)
    assert (decode.ttft_s, decode.kv_expired, prefill.ttft_s) == (None, None, 0.0)


def test_json_lines_gzip_and_an_object_say_the_same_as_an_array(app: FastAPI, store: Store) -> None:
    rows = [decode_step(), prefill_step()]
    lines = b"\n".join(json.dumps(row).encode() for row in rows) + b"\n\n"
    answers = [
        post(app, rows),
        post(app, {"rows": rows, "batch_id": "in-body"}),
        post(app, lines, content_type="application/x-ndjson"),
        post(app, gzip.compress(json.dumps(rows).encode()), content_encoding="gzip"),
        post(
            app, gzip.compress(lines, mtime=0), content_type="application/jsonl; charset=utf-8", content_encoding="gzip"
        ),
    ]

    assert [answer.json()["stored"] for answer in answers] == [2] * 5
    assert answers[1].json()["batch_id"] == "in-body"
    assert (count(store), count(store, Recording)) == (10, 1)


@pytest.mark.parametrize(("to", "row"), [("steps", decode_step()), ("requests", request()), ("samples", sample())])
def test_the_same_batch_again_is_answered_as_before_and_stored_once(
    app: FastAPI, store: Store, to: str, row: dict[str, Any]
) -> None:
    first = post(app, [row, row], to, batch="b-1").json()
    again = post(app, [row, row], to, batch="b-1").json()

    assert (first["duplicate"], again["duplicate"]) == (False, True)
    assert first["stored"] == again["stored"] == 2
    assert count(store, {"steps": Step, "requests": Request, "samples": InstanceSample}[to]) == 2


def test_an_id_with_other_content_is_refused(app: FastAPI, store: Store) -> None:
    post(app, [decode_step()], batch="b-1")
    answer = post(app, [decode_step(latency_ms=99)], batch="b-1")

    assert answer.status_code == 409
    assert answer.json()["detail"] == "batch 'b-1' was stored with other content; send this under another id"
    assert count(store) == 1


def test_batches_without_an_id_are_stored_each(app: FastAPI, store: Store) -> None:
    ids = {post(app, [decode_step()]).json()["batch_id"] for _ in range(2)}

    assert len(ids) == count(store) == 2


def test_rows_that_do_not_fit_are_named_and_the_others_stored(app: FastAPI, store: Store) -> None:
    rows = [decode_step(), decode_step(latency_ms=-1), decode_step(batch_size=0), decode_step(gpuu="x"), prefill_step()]
    answer = post(app, rows)

    assert answer.status_code == 200
    assert (answer.json()["stored"], answer.json()["rejected"]) == (2, 3)
    assert answer.json()["errors"] == [
        {"path": "[1].latency_ms", "message": "expected `float` > 0.0"},
        {
            "path": "[2]",
            "message": "a step needs n_requests and new_tokens (prefill), batch_size (decode) or all three",
        },
        {"path": "[3].gpuu", "message": "unknown field; /openapi.json names all"},
    ]
    assert count(store) == 2


def test_a_broken_line_is_named_and_the_others_stored(app: FastAPI, store: Store) -> None:
    lines = [json.dumps(decode_step()), "{", json.dumps(decode_step(latency_ms=1e400)), "", json.dumps(prefill_step())]
    answer = post(app, "\n".join(lines).encode(), content_type="application/x-ndjson").json()

    assert (answer["stored"], answer["rejected"]) == (2, 2)
    assert [(e["path"], e["message"][:18]) for e in answer["errors"]] == [
        ("[1]", "is no valid JSON: "),
        ("[2].latency_ms", "is not a finite nu"),
    ]


def test_steps_whose_flag_leaves_them_out_are_counted_and_not_stored(app: FastAPI, store: Store) -> None:
    answer = post(app, [decode_step(flag=flag) for flag in ("", "sweep;outlier", "suspect", "noisy", "outlier")]).json()

    assert (answer["stored"], answer["excluded"]) == (2, {"outlier": 2, "suspect": 1})
    assert count(store) == 2


@pytest.mark.parametrize(
    ("row", "path"),
    [
        (decode_step(latency_ms=0), "[0].latency_ms"),
        (decode_step(latency_ms="fast"), "[0].latency_ms"),
        (decode_step(latency_ms=None), "[0].latency_ms"),
        (decode_step(batch_size=2**40), "[0].batch_size"),
        (decode_step(sum_context_tokens=-1), "[0].sum_context_tokens"),
        (decode_step(gpu=""), "[0].gpu"),
        (decode_step(model="a\x00b"), "[0].model"),
        (decode_step(model="m" * 129), "[0].model"),
        (decode_step(prev_phase="lunch"), "[0].prev_phase"),
        (decode_step(tp=0), "[0].tp"),
        (prefill_step(n_requests=0), "[0]"),
        ({"model": "m", "latency_ms": 1.0, "batch_size": 1}, "[0].gpu"),
        ("a step", "[0]"),
    ],
)
def test_a_step_that_cannot_be_is_refused_by_name(row: Any, path: str) -> None:
    answer = post(REFUSING, [row])

    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert [error["path"] for error in answer.json()["errors"]] == [path]


@pytest.mark.parametrize(
    ("row", "path"),
    [
        (request(input_tokens=-1), "[0].input_tokens"),
        (request(prefix_hit_ratio=1.5), "[0].prefix_hit_ratio"),
        (request(ttft_ms=0), "[0].ttft_ms"),
        (request(predicted_ttft_ms=-3), "[0].predicted_ttft_ms"),
        (request(prompt="Dear diary"), "[0].prompt"),
        (request(tenant="a\nb"), "[0].tenant"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_name(row: Any, path: str) -> None:
    answer = post(REFUSING, [row], to="requests")

    assert answer.status_code == 422
    assert [error["path"] for error in answer.json()["errors"]] == [path]
    assert "diary" not in answer.text


@pytest.mark.parametrize(
    ("row", "path"),
    [
        (sample(kv_cache_usage=1.01), "[0].kv_cache_usage"),
        (sample(interval_s=0), "[0].interval_s"),
        (sample(preemptions=-1), "[0].preemptions"),
        (sample(instance=""), "[0].instance"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_by_name(row: Any, path: str) -> None:
    answer = post(REFUSING, [row], to="samples")

    assert (answer.status_code, [error["path"] for error in answer.json()["errors"]]) == (422, [path])


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b"", {}, 400, "no valid JSON"),
        (b"[{", {}, 400, "no valid JSON"),
        (b"7", {}, 422, "expected"),
        (b'{"rows": 7}', {}, 422, "rows"),
        (b'{"batch_id": "a"}', {}, 422, "rows: is missing"),
        (b'[{"gpu": "a", "model": "b", "latency_ms": NaN, "batch_size": 1}]', {}, 422, "[0].latency_ms: is not a fin"),
        (b"\xff\xfe", {}, 400, "no valid JSON"),
        (b"[" * 100_000, {}, 400, "no valid JSON"),
        (b"gpu,model\na,b", {"content_type": "text/csv"}, 415, "send application/json or application/x-ndjson"),
        (b"[]", {"content_encoding": "br"}, 415, "send identity or gzip"),
        (b"[]", {"content_encoding": "gzip"}, 422, "the body is not gzip"),
        (gzip.compress(b"[]" + b" " * 9000, mtime=0)[:-9], {"content_encoding": "gzip"}, 422, "the body is not gzip"),
        (gzip.compress(b" " * 200_000, mtime=0), {"content_encoding": "gzip"}, 413, "longer than 100000 bytes"),
        (b" " * 100_001, {}, 413, "longer than 100000 bytes"),
        (b"[]", {"batch": ""}, 422, "x-kairos-batch-id: needs 1 to 256 characters"),
        (b"[]", {"batch": "x" * 257}, 422, "x-kairos-batch-id: needs 1 to 256 characters"),
        (b'{"rows": [], "batch_id": "a"}', {"batch": "b"}, 422, "the header x-kairos-batch-id says 'b'"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_problem(body: bytes, headers: dict[str, str], status: int, says: str) -> None:
    answer = post(REFUSING, body, **headers)

    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert says in answer.json()["detail"]


def test_an_empty_batch_is_stored_as_one(app: FastAPI, store: Store) -> None:
    assert post(app, [], batch="nothing").json()["stored"] == 0
    assert post(app, [], batch="nothing").json()["duplicate"] is True
    assert (count(store), count(store, Batch)) == (0, 1)


def test_without_a_database_there_are_no_such_routes_and_readiness_says_so() -> None:
    app = create_app(settings_of())

    assert post(app, [decode_step()]).status_code == 404
    assert not [path for path in call(app, "GET", "/openapi.json").json()["paths"] if "telemetry" in path]
    assert call(app, "GET", "/readyz").json()["database"] == "none"


def test_readiness_says_that_the_database_is_there(app: FastAPI) -> None:
    assert call(app, "GET", "/readyz").json()["database"] == "ready"


class _Refusing:
    """Stands where the writer does, for batches that must not get so far."""

    def put(self, batch: object, *, keep: bool) -> None:
        raise AssertionError(f"{batch} should have been refused")


def _refusing() -> FastAPI:
    from kairos.scheduler_core.errors import KairosError
    from kairos.scheduler_core.service.bodies import Limits
    from kairos.scheduler_core.service.metrics import Metrics
    from kairos.scheduler_core.service.problems import on_kairos_error
    from kairos.scheduler_core.service.routes.telemetry import telemetry_routes

    app = FastAPI(routes=telemetry_routes(_Refusing(), Metrics(), 100_000))  # type: ignore[arg-type]
    app.add_exception_handler(KairosError, on_kairos_error)
    app.add_middleware(Limits, most_bytes=100_000, most_s=30.0)
    return app


REFUSING = _refusing()


def test_attainment_counts_what_was_stored_once(app: FastAPI) -> None:
    kept = request(ttft_target_ms=100, tpot_target_ms=20)
    missed = request(ttft_target_ms=50, tpot_target_ms=20)
    for _ in range(2):
        post(app, [kept, missed], to="requests", batch="b-1")
    metrics = call(app, "GET", "/metrics").text

    labels = 'promise="end_to_end",slo_class="default",tenant="acme"'
    assert f"kairos_slo_requests_total{{{labels}}} 2.0" in metrics
    assert f"kairos_slo_requests_met_total{{{labels}}} 1.0" in metrics
