"""Traces: what a collector gets of each request, and that one that is away costs spans and nothing else."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from service.snapshots import call, prefill, settings_of, snapshot, waits

from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.tracing import Exporter

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """An OTLP collector: what it got, decoded."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.raw = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.raw += body
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def attributes(self, name: str) -> dict[str, Any]:
        """Of the one span of a name."""
        (span,) = [span for span in self.spans if span.name == name]
        return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    Thread(target=collector.server.serve_forever, daemon=True).start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        collector.server.server_close()


def traced(endpoint: str) -> FastAPI:
    return create_app(settings_of(tracing={"otlp_endpoint": endpoint}))


@contextmanager
def running(app: FastAPI) -> Iterator[FastAPI]:
    """An application between its start and its end."""
    with asyncio.Runner() as runner:
        lifespan = app.router.lifespan_context(app)
        runner.run(lifespan.__aenter__())
        yield app
        runner.run(lifespan.__aexit__(None, None, None))


def test_each_request_is_a_span_with_its_route_and_status_under_the_callers_trace() -> None:
    with collecting() as collector:
        with running(traced(collector.address)) as app:
            call(app, "GET", "/strategies", headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
            call(app, "GET", "/nowhere/geheim")
        (span,) = [span for span in collector.spans if span.name == "GET /strategies"]

        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
        assert collector.attributes("GET /strategies") == {
            "http.request.method": "GET",
            "http.route": "/strategies",
            "http.response.status_code": 200,
        }
        assert collector.attributes("GET") == {
            "http.request.method": "GET",
            "http.route": "",
            "http.response.status_code": 404,
        }
        assert b"geheim" not in collector.raw


@pytest.mark.parametrize("waiting", [2, 1_000])
def test_a_decision_is_on_the_span_of_its_request_in_numbers(waiting: int) -> None:
    body = snapshot(prefill(), waiting=[waits(f"geheim-{n}", tenant="geheim") for n in range(waiting)])
    with collecting() as collector:
        with running(traced(collector.address)) as app:
            answer = call(app, "POST", "/schedule", json=body).json()
        told = collector.attributes("POST /schedule")

        assert (told["kairos.waiting_requests"], told["kairos.instances"]) == (waiting, 1)
        assert (told["kairos.strategy"], told["kairos.decision_id"]) == ("kairos", answer["decision_id"])
        assert told["kairos.decision_s"] > 0
        assert b"geheim" not in collector.raw


def test_a_failure_is_a_span_with_its_status_and_without_its_message() -> None:
    with collecting() as collector:
        app = traced(collector.address)

        @app.get("/bug")
        def bug() -> None:
            raise RuntimeError("geheim")

        with running(app):
            call(app, "GET", "/bug")

        assert collector.attributes("GET /bug")["http.response.status_code"] == 500
        assert b"geheim" not in collector.raw


def test_a_request_that_is_refused_is_a_span_too() -> None:
    keys = {"reader": {"key": "k" * 32, "role": "read"}}
    with collecting() as collector:
        with running(
            create_app(settings_of(tracing={"otlp_endpoint": collector.address}, access={"keys": keys}))
        ) as app:
            call(app, "GET", "/strategies")

        assert collector.attributes("GET")["http.response.status_code"] == 401


def test_without_a_collector_requests_are_answered_as_before_and_spans_are_counted() -> None:
    with running(traced("http://127.0.0.1:1")) as app:
        statuses = {call(app, "GET", "/strategies").status_code for _ in range(10)}
        ends_s = time.monotonic() + 10
        while not call(app, "GET", "/readyz").json()["lost"] and time.monotonic() < ends_s:
            time.sleep(0.05)
        lost = call(app, "GET", "/readyz").json()["lost"]
        metrics = call(app, "GET", "/metrics").text

    assert statuses == {200}
    assert lost == ["spans are dropped: http://127.0.0.1:1 does not take them"]
    assert 'kairos_spans_total{outcome="failed"}' in metrics


def test_more_spans_than_the_queue_holds_are_dropped_and_counted() -> None:
    metrics = Metrics()
    exporter = Exporter("http://127.0.0.1:1", metrics, queued_spans=3)  # not started: nothing leaves the queue

    for _ in range(5):
        exporter.on_end(object())  # type: ignore[arg-type]  # not looked at before it is exported

    assert metrics.registry.get_sample_value("kairos_spans_total", {"outcome": "dropped"}) == 2


def test_without_an_endpoint_the_sdk_is_not_loaded() -> None:
    program = "import sys, kairos.scheduler_core.service.app, kairos.scheduler_core.service.server\n"
    ended = subprocess.run(
        [sys.executable, "-c", program + "print('opentelemetry.sdk' in sys.modules)"], capture_output=True, text=True
    )

    assert ended.stdout == "False\n"
