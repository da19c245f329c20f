"""Traces by OpenTelemetry: a span for each request, sent by OTLP over HTTP. Imported only where it is configured.

Spans wait in a queue of a bounded length and are exported by a thread of their own: a collector that is away costs
spans, which are counted, and nothing else.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Thread

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import kairos
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.schedule import Decided

_log = logging.getLogger(__name__)

_QUEUED_SPANS = 4_096
_BATCH_SPANS = 512
_BATCH_S = 0.5
"""How long a span waits for others."""
_EXPORT_TIMEOUT_S = 2.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Exporter(SpanProcessor):
    """Hands spans to a collector."""

    def __init__(self, endpoint: str, metrics: Metrics, queued_spans: int = _QUEUED_SPANS) -> None:
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
        self._counted = metrics.spans
        self._queue: Queue[ReadableSpan | None] = Queue(queued_spans)
        self._away = False
        self._thread = Thread(target=self._run, name="kairos-traces", daemon=True)

    def routes(self) -> Sequence[BaseRoute]:
        """None."""
        return ()

    def start(self) -> None:
        """Begin to export."""
        self._thread.start()

    def lost(self) -> str | None:
        """What operators are to know now."""
        return f"spans are dropped: {self._endpoint} does not take them" if self._away else None

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span, or count it as dropped."""
        try:
            self._queue.put_nowait(span)
        except Full:
            self._counted.labels("dropped").inc()

    def stop(self) -> None:
        """Export what waits, if the collector takes it in time."""
        with suppress(Full):  # then it is away, and the thread ends with the process
            self._queue.put(None, timeout=_EXPORT_TIMEOUT_S)
        self._thread.join(2 * _EXPORT_TIMEOUT_S)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            due_s = time.monotonic() + _BATCH_S
            while batch[-1] is not None and len(batch) < _BATCH_SPANS and (left_s := due_s - time.monotonic()) > 0:
                try:
                    batch.append(self._queue.get(timeout=left_s))
                except Empty:
                    break
            ended = batch[-1] is None
            self._export([span for span in batch if span is not None])

    def _export(self, spans: list[ReadableSpan]) -> None:
        if not spans:
            return
        away = self._exporter.export(spans) is not SpanExportResult.SUCCESS
        self._counted.labels("failed" if away else "exported").inc(len(spans))
        if away and not self._away:
            _log.warning("spans are dropped until the collector takes them", extra={"collector": self._endpoint})
        elif self._away and not away:
            _log.info("spans are exported again", extra={"collector": self._endpoint})
        self._away = away


class Tracing:
    """The ASGI middleware that opens and closes the spans; it goes on traces that callers began (W3C traceparent)."""

    def __init__(self, app: ASGIApp, exporter: Exporter) -> None:
        self._app = app
        provider = TracerProvider(
            resource=Resource.create({"service.name": "kairos", "service.version": kairos.__version__}),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(exporter)
        self._tracer = provider.get_tracer("kairos")
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request within a span of its own."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        carried = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT}
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._tracer.start_as_current_span(
            method,
            self._propagator.extract(carried),
            SpanKind.SERVER,
            {"http.request.method": method},
            record_exception=False,  # its message may quote what was sent
            set_status_on_exception=False,
        ) as span:
            try:
                await self._app(scope, receive, noting)
            finally:
                route = _route_of(scope)
                span.update_name(f"{method} {route}".rstrip())
                span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)


_CONTEXT = (b"traceparent", b"tracestate")


def _route_of(scope: Scope) -> str:
    """The path of the route that took a request, with names in place of ids; empty where none did."""
    if "route" in scope:
        return str(scope["route"].path)
    if "endpoint" not in scope:
        return ""
    # all that FastAPI's router notes of a route that is not its own
    routes = (route for route in scope["router"].routes if getattr(route, "endpoint", None) is scope["endpoint"])
    return next((route.path for route in routes), "")


def note_decision(decided: Decided) -> None:
    """Put what was decided, in numbers, on the span of its request."""
    answer, snapshot = decided.answer, decided.snapshot
    trace.get_current_span().set_attributes(
        {
            "kairos.strategy": answer.strategy,
            "kairos.decision_id": answer.decision_id,
            "kairos.decision_s": decided.decision_s,
            "kairos.instances": len(snapshot.instances),
            "kairos.waiting_requests": len(snapshot.waiting),
            "kairos.resident_requests": len(snapshot.resident),
            "kairos.rejected_requests": len(answer.rejected),
        }
    )
