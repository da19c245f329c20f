"""What somebody sends is in no log, trace, metric or database: not a prompt, not a key; ids in their columns alone."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from service.snapshots import call, decode, prefill, settings_of, snapshot, waits
from service.test_tracing import collecting, running
from sqlalchemy import select
from store.rows import decode_step, request
from store.test_store import away

from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.logging import JsonLines, Text
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Table

PROMPT, KEY, WRONG_KEY, ID = "Dear-diary-prompt", "key-0123456789-0123456789-0123456789", "wrong-key-77", "acme-id-4711"
ID_COLUMNS = {"request_id", "tenant", "batch_id", "instance_id", "data_plane", "session", "subject", "name"}
"""Where ids and names that somebody sent may be; a body of a decision or a reservation is about its own requests."""
ID_TABLES = {"decisions", "reservations", "instances", "experiments", "experiment_reports", "strategies", "events"}
FAILING = {
    "prefill": "service.recording:Failing",
    "prefill_placement": "late",
    "decode_placement": "headroom",
    "decode": "continuous",
}


class Said(logging.Handler):
    """What the service's log would say, in both formats."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += [JsonLines().format(record), Text().format(record)]


@pytest.fixture
def said() -> Iterator[Said]:
    handler = Said()
    root = logging.getLogger()
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)


def bodies(schema: dict[str, Any], document: dict[str, Any]) -> list[bytes]:
    """Bodies of a route: its fields with markers for text, a field that it does not have, and what is no JSON."""
    made = filled(schema, document, 0)
    whole = made if isinstance(made, dict) else {"rows": made}
    return [
        json.dumps(made).encode(),
        json.dumps(whole | {"prompt": PROMPT}).encode(),
        json.dumps({name: PROMPT for name in whole}).encode(),
        f'{{"prompt": "{PROMPT}'.encode(),
        f'["{PROMPT}"]'.encode(),
    ]


def filled(schema: dict[str, Any], document: dict[str, Any], depth: int, name: str = "") -> Any:
    """A value of the shape of a schema, with a marker for every id."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    options = schema.get("anyOf", [])
    if options:
        return filled(options[0], document, depth, name)
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object" and depth < 6:
        return {part: filled(of, document, depth + 1, part) for part, of in schema.get("properties", {}).items()}
    if schema.get("type") == "array" and depth < 6:
        return [filled(schema.get("items", {}), document, depth + 1, name)]
    return {"string": ID if name in ID_COLUMNS else "word", "integer": 1, "number": 1.5, "boolean": False}.get(
        schema.get("type", "")
    )


def send_everything(app: FastAPI) -> int:
    """Every route with markers wherever something can be sent; how many requests were sent."""
    headers = {"authorization": f"Bearer {KEY}", "x-kairos-batch-id": ID, "x-prompt": PROMPT}
    document = call(app, "GET", "/openapi.json", headers=headers).json()
    sent = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = "/".join(ID if part.startswith("{") else part for part in path.split("/"))
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            for body in [b""] if schema is None else bodies(schema, document):
                for sent_with in (headers, headers | {"authorization": f"Bearer {WRONG_KEY}"}):
                    call(
                        app, method, f"{where}?prompt={PROMPT}&limit={PROMPT}", content=body,
                        headers={"content-type": "application/json"} | sent_with,
                    )  # fmt: skip
                    sent += 1
    known = [waits(f"{ID}-{n}", tenant=ID, session_id=PROMPT) if n else waits(ID, tenant=ID) for n in range(2)]
    for json_body in (
        snapshot(prefill(), decode(), waiting=[waits(ID, tenant=ID)]),
        snapshot(prefill(), decode(), waiting=[waits(ID, tenant=ID)], strategy="failing"),
        snapshot(prefill(), decode(), waiting=known),
        snapshot(prefill(), waiting=[waits(ID)], strategy=PROMPT),
        snapshot(prefill(), waiting=[waits(ID)], state=PROMPT),
    ):
        call(app, "POST", "/schedule", json=json_body, headers=headers)
    for to, row in (("steps", decode_step()), ("requests", request(tenant=ID, request_id=ID, ttft_target_ms=1))):
        for rows in ([row], [row | {"prompt": PROMPT}], [row, PROMPT]):
            call(
                app, "POST", f"/telemetry/{to}", json=rows, headers=headers | {"x-kairos-batch-id": f"{ID}-{sent}-{to}"}
            )
    call(app, "GET", "/bug", headers=headers)
    call(app, "GET", f"/{PROMPT}", headers=headers)
    call(app, "PUT", f"/strategies/{PROMPT}", headers=headers)
    return sent


def kept(store: Store) -> list[tuple[str, str, str]]:
    """Everything in the database as text: table, column, value."""
    found = []
    with store.read() as connection:
        for table in Table.metadata.sorted_tables:
            for row in connection.execute(select(table)).mappings():
                found += [(table.name, column, repr(value)) for column, value in row.items()]
    return found


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_no_marker_that_was_sent_through_every_route_and_fault_is_anywhere(
    store: Store, server: str, said: Said
) -> None:
    keys = {"operator": {"key": KEY, "role": "operate"}}
    url = store.engine.url.render_as_string(hide_password=False)
    with collecting() as collector:
        settings = settings_of(
            store={"url": url}, access={"keys": keys}, strategies={"failing": FAILING},
            tracing={"otlp_endpoint": collector.address},
        )  # fmt: skip
        with running(create_app(settings)) as app:

            @app.get("/bug")
            def bug() -> None:
                raise RuntimeError(PROMPT)

            sent = send_everything(app)
            with away(store, server):
                send_everything(app)
            metrics = call(app, "GET", "/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        logged, traced = "\n".join(said.lines), collector.raw

    assert sent > 20
    assert "RuntimeError" in logged
    assert "policy Failing failed" in logged
    assert b"POST /schedule" in traced
    for marker in (PROMPT, KEY, WRONG_KEY, ID):
        assert marker not in logged
        assert marker.encode() not in traced
    for marker in (PROMPT, KEY, WRONG_KEY):
        assert marker not in metrics
        assert [place for place in kept(store) if marker in place[2]] == []
    assert {column for table, column, value in kept(store) if ID in value and table not in ID_TABLES} <= ID_COLUMNS
