"""The managed form over a database: announcements, events, expiry, restarts, replicas, the live fleet."""

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from command_line import kairos
from fastapi.testclient import TestClient
from service.snapshots import settings_of
from serving import served
from sqlalchemy import select
from store.test_service import on

from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.managed.ledger import reservation_of, write_reservations
from kairos.scheduler_core.service.managed.reservation import Reservation
from kairos.scheduler_core.service.store.queries.reservations import reservations_named
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Request
from kairos.scheduler_core.service.store.tables import Reservation as Stored


def fleet(client: TestClient | httpx.Client, prefills: int = 2, decodes: int = 2, **fields: Any) -> None:
    """Instances without an address: they take requests at once."""
    for role, count in (("prefill", prefills), ("decode", decodes)):
        for n in range(count):
            told = {"role": role, "profile": "even"} | fields
            client.put(f"/instances/{role}-{n}", json=told).raise_for_status()


@pytest.fixture
def serve(store: Store, url: str) -> Iterator[Callable[..., TestClient]]:
    """Services over the database, in process."""
    open_clients: list[TestClient] = []

    def start(**sections: Any) -> TestClient:
        client = TestClient(create_app(settings_of(store={"url": url}, **sections)), raise_server_exceptions=False)
        client.__enter__()
        open_clients.append(client)
        return client

    yield start
    for client in open_clients:
        client.__exit__()


@pytest.fixture
def client(serve: Callable[..., TestClient]) -> TestClient:
    """A service with two instances of each role."""
    client = serve(decisions={"sample_share": 1.0})
    fleet(client)
    return client


def asked(request_id: str = "a", prompt_tokens: int = 1_000, **fields: Any) -> dict[str, Any]:
    return {"request_id": request_id, "prompt_tokens": prompt_tokens} | fields


def reported(client: TestClient | httpx.Client, request_id: str, event: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(f"/requests/{request_id}/events", json={"event": event} | fields)
    answer.raise_for_status()
    told: dict[str, Any] = answer.json()
    return told


def until(holds: Callable[[], bool], within_s: float = 10.0) -> float:
    """Seconds until something holds."""
    began_s = time.monotonic()
    while not holds():
        assert time.monotonic() - began_s < within_s
        time.sleep(0.002)
    return time.monotonic() - began_s


def on_instance(client: TestClient | httpx.Client, instance_id: str) -> int:
    count: int = client.get(f"/instances/{instance_id}").json()["reservations"]
    return count


# -- announcements ---------------------------------------------------------------------------------------------------


def test_a_reservation_is_load_at_once_and_the_next_request_goes_elsewhere(client: TestClient) -> None:
    first = client.post("/requests", json=asked("a", 2_000)).json()
    second = client.post("/requests", json=asked("b", 1_000)).json()
    third = client.post("/requests", json=asked("c", 1_000)).json()

    assert [told["prefill_instance"] for told in (first, second, third)] == ["prefill-0", "prefill-1", "prefill-1"]
    assert third["predicted_ttft_s"] == pytest.approx(2.0)  # behind b, alone 1 s
    assert {first["decode_instance"], second["decode_instance"]} == {"decode-0", "decode-1"}
    assert (first["stored"], first["model_version"], first["strategy"]) == (True, "linear", "kairos@1")


def test_the_same_announcement_is_answered_as_before_and_another_is_refused(client: TestClient) -> None:
    first = client.post("/requests", json=asked())
    reported(client, "a", "first_token")
    again = client.post("/requests", json=asked())
    other = client.post("/requests", json=asked(prompt_tokens=999))

    assert (again.status_code, again.json()) == (201, first.json())
    assert other.status_code == 409
    assert on_instance(client, first.json()["decode_instance"]) == 1


@pytest.mark.parametrize(
    ("strategy", "status", "reason"),
    [("on-arrival", 503, "lost_on_arrival"), ("tenant-share", 429, "over_tenant_share")],
)
def test_what_is_not_admitted_says_when_to_come_back(
    serve: Callable[..., TestClient], strategy: str, status: int, reason: str
) -> None:
    policies = {
        "prefill": "fcfs",
        "prefill_placement": "least-work",
        "decode_placement": "headroom",
        "decode": "capped",
    }
    client = serve(strategies={"s": policies | {"admission": strategy}}, active="s")
    fleet(client, 1)
    client.post("/requests", json=asked("a", 9_000)).raise_for_status()
    refused = client.post("/requests", json=asked("b", 3_000))
    explained = client.get("/requests/b/explanation")

    assert (refused.status_code, refused.json()["type"]) == (status, reason)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert on_instance(client, "prefill-0") == 1
    until(lambda: client.get("/requests/b/explanation").status_code == 200)
    explained = client.get("/requests/b/explanation").json()
    assert f"It was not taken: {reason} (status {status})" in explained["text"][0]


def test_a_model_that_nothing_serves_is_refused_for_good_and_a_fleet_that_drains_for_now(client: TestClient) -> None:
    unknown = client.post("/requests", json=asked("a", model="other/model"))
    for n in range(2):
        client.post(f"/instances/prefill-{n}/drain").raise_for_status()
    drained = client.post("/requests", json=asked("b"))

    assert (unknown.status_code, "retry-after" in unknown.headers) == (404, False)
    assert (drained.status_code, drained.headers["retry-after"]) == (503, "2")


def test_there_is_a_limit_of_reservations(serve: Callable[..., TestClient]) -> None:
    client = serve(managed={"most_reservations": 1})
    fleet(client)
    client.post("/requests", json=asked("a")).raise_for_status()

    assert client.post("/requests", json=asked("b")).status_code == 429
    client.delete("/requests/a").raise_for_status()
    assert client.post("/requests", json=asked("b")).status_code == 201


def test_a_class_that_does_not_exist_is_named(client: TestClient) -> None:
    refused = client.post("/requests", json=asked(slo_class="defalt"))

    assert refused.status_code == 422
    assert "Did you mean 'default'?" in refused.json()["errors"][0]["message"]


# -- events ----------------------------------------------------------------------------------------------------------


def test_a_finished_request_is_telemetry_with_its_prediction(client: TestClient, store: Store) -> None:
    now_s = time.time()
    place = client.post("/requests", json=asked(tenant="acme", arrival_s=now_s - 5.0)).json()
    reported(client, "a", "prefill_started", at_s=now_s - 4.5)
    reported(client, "a", "first_token", at_s=now_s - 3.0)
    reported(client, "a", "tokens", at_s=now_s - 2.5, output_tokens=11)
    told = reported(client, "a", "finished", at_s=now_s - 2.0, output_tokens=21)
    reported(client, "a", "finished", at_s=now_s - 2.0, output_tokens=21)
    client.delete("/requests/a").raise_for_status()

    assert (told["stage"], told["ended"], told["stored"]) == ("ended", "finished", True)
    with store.read() as connection:
        [row] = connection.execute(select(Request.__table__)).all()
    assert (row.request_id, row.tenant, row.status, row.output_tokens) == ("a", "acme", 0, 21)
    assert (row.ttft_s, row.wait_s, row.tpot_s) == (pytest.approx(2.0), pytest.approx(0.5), pytest.approx(0.05))
    assert row.predicted_ttft_s == pytest.approx(place["predicted_ttft_s"])
    assert (row.prefill_instance, row.decode_instance) == (place["prefill_instance"], place["decode_instance"])
    until(lambda: client.get("/requests/a/explanation").json().get("decisions") is not None)
    text = client.get("/requests/a/explanation").json()["text"]
    assert "It was sent to prefill-0 and decode-0, with nobody before it" in text[0]
    assert "first token after 2.00 s" in text[-1]


def test_load_moves_with_the_request(client: TestClient) -> None:
    home = client.post("/requests", json=asked()).json()
    places = [home["prefill_instance"], home["decode_instance"]]
    steps = [[on_instance(client, place) for place in places]]
    for event in ("prefill_started", "first_token", "transferred", "failed"):
        reported(client, "a", event)
        steps.append([on_instance(client, place) for place in places])

    assert steps == [[1, 1], [1, 1], [0, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize("seconds", [-100.0, 100.0])
def test_an_event_before_the_arrival_or_in_the_future_is_refused(client: TestClient, seconds: float) -> None:
    client.post("/requests", json=asked()).raise_for_status()
    refused = client.post("/requests/a/events", json={"event": "first_token", "at_s": time.time() + seconds})

    assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, "at_s")


def test_nobody_hears_of_requests_that_were_not_announced(client: TestClient) -> None:
    told = client.post("/requests/x/events", json={"event": "finished"})
    released = client.delete("/requests/x")

    assert (told.status_code, released.status_code) == (404, 404)


def test_a_reservation_of_which_nothing_is_heard_expires(client: TestClient, store: Store) -> None:
    home = client.post("/requests", json=asked(ttl_s=0.2)).json()
    client.post("/requests", json=asked("b", ttl_s=60)).raise_for_status()
    until(lambda: on_instance(client, home["prefill_instance"]) == 0)
    late = reported(client, "a", "tokens", output_tokens=5)

    assert (late["stage"], late["ended"]) == ("decode", None)  # heard of again, it is load again
    assert on_instance(client, home["decode_instance"]) == 1
    with store.read() as connection:
        assert connection.execute(select(Request.__table__)).all() == []


def test_a_key_of_a_tenant_announces_and_reports_for_that_tenant_only(serve: Callable[..., TestClient]) -> None:
    secrets = {name: f"{name}-secret-of-at-least-thirty-two-characters" for name in ("operator", "acme", "globex")}
    keys: dict[str, Any] = {name: {"key": secrets[name], "role": "schedule", "tenant": name} for name in secrets}
    keys["operator"] = {"key": secrets["operator"], "role": "operate"}
    client = serve(access={"keys": keys})
    client.headers["authorization"] = f"Bearer {secrets['operator']}"
    fleet(client)
    client.headers["authorization"] = f"Bearer {secrets['acme']}"
    client.post("/requests", json=asked()).raise_for_status()
    for_others = client.post("/requests", json=asked("b", tenant="globex"))
    client.headers["authorization"] = f"Bearer {secrets['globex']}"
    of_others = client.post("/requests/a/events", json={"event": "finished"})

    assert (for_others.status_code, of_others.status_code) == (403, 404)


# -- the live fleet --------------------------------------------------------------------------------------------------


def test_what_is_left_on_a_removed_instance_ends_as_instance_gone(
    serve: Callable[..., TestClient], store: Store
) -> None:
    client = serve(managed={"drain_s": 0.0})
    fleet(client, 1, 1)
    client.post("/requests", json=asked()).raise_for_status()
    removed = client.delete("/instances/prefill-0")
    until(lambda: client.get("/instances/prefill-0").status_code == 404)
    until(lambda: reported(client, "a", "prefill_started")["stage"] == "ended")

    assert (removed.status_code, removed.json()["state"]) == (202, "draining")
    assert reported(client, "a", "prefill_started")["ended"] == "instance_gone"
    with store.read() as connection:
        assert connection.execute(select(Request.status)).scalar_one() == 2


def test_an_instance_that_drains_keeps_what_it_has_and_gets_nothing_new(client: TestClient) -> None:
    home = client.post("/requests", json=asked()).json()["prefill_instance"]
    drained = client.post(f"/instances/{home}/drain").json()
    places = {client.post("/requests", json=asked(f"b-{n}")).json()["prefill_instance"] for n in range(3)}
    put = client.put(f"/instances/{home}", json={"role": "prefill", "profile": "even"}).json()

    assert (drained["state"], drained["reservations"]) == ("draining", 1)
    assert home not in places
    assert put["state"] == "active"


def test_an_instance_with_an_address_gets_traffic_once_it_is_well(
    serve: Callable[..., TestClient], engine: "Engine"
) -> None:
    client = serve(managed={"health_every_s": 0.05})
    fleet(client, 1, 0, url=engine.url)
    new = client.get("/instances/prefill-0").json()["state"]
    early = client.post("/requests", json=asked()).status_code
    engine.well = True
    until(lambda: client.get("/instances/prefill-0").json()["state"] == "active")
    taken = client.post("/requests", json=asked())
    engine.well = False
    until(lambda: client.get("/instances/prefill-0").json()["state"] == "unhealthy")

    assert (new, early, taken.status_code) == ("new", 503, 201)
    assert taken.json()["prefill_url"] == engine.url
    assert client.post("/requests", json=asked("b")).status_code == 503


def test_instances_of_the_configuration_with_an_address_are_there_from_the_start(
    serve: Callable[..., TestClient], engine: "Engine"
) -> None:
    engine.well = True
    sections = {
        "fleet": {
            "prefill": [{"profile": "even"}, {"profile": "even", "url": engine.url, "chunk_tokens": 512}],
            "decode": [{"profile": "even", "url": engine.url, "kv_tokens": 9_000}],
        },
        "managed": {"health_every_s": 0.05, "drain_s": 0.0},
    }
    client = serve(**sections)
    told = {i["instance_id"]: i for i in client.get("/instances").json()["instances"]}
    client.delete("/instances/prefill-1").raise_for_status()
    until(lambda: client.get("/instances/prefill-1").status_code == 404)
    after = serve(**sections).get("/instances").json()["instances"]

    assert list(told) == ["prefill-1", "decode-0"]
    assert (told["prefill-1"]["source"], told["prefill-1"]["told"]["chunk_tokens"]) == ("configuration", 512)
    assert [i["instance_id"] for i in after] == ["decode-0"]


class Engine:
    """What answers at an address."""

    url = ""
    well = False


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that is not well until a test says so."""
    made = Engine()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if made.well and self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()


# -- faults and replicas ---------------------------------------------------------------------------------------------


def test_reservations_survive_a_restart(serve: Callable[..., TestClient], url: str) -> None:
    first = TestClient(create_app(settings_of(store={"url": url})))
    with first:
        fleet(first)
        before = first.post("/requests", json=asked()).json()
        reported(first, "a", "first_token")
    second = serve()

    assert on_instance(second, before["decode_instance"]) == 1
    assert on_instance(second, before["prefill_instance"]) == 0
    assert second.post("/requests", json=asked()).json() == before
    assert second.post("/requests", json=asked(prompt_tokens=3)).status_code == 409


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_reservation_at_one_replica_is_load_at_the_other_within_a_second(url: str, store: Store) -> None:
    with (
        served(on(url)) as (one, _),
        served(on(url)) as (two, _),
        httpx.Client(base_url=one) as here,
        httpx.Client(base_url=two) as there,
    ):
        fleet(here)
        until(lambda: len(there.get("/instances").json()["instances"]) == 4)
        took_s = []
        for n in range(20):
            place = here.post("/requests", json=asked(f"r-{n}")).json()["prefill_instance"]
            before = on_instance(here, place)
            took_s.append(until(lambda place=place, before=before: on_instance(there, place) == before))
        same = there.post("/requests", json=asked("r-0"))
        other = there.post("/requests", json=asked("r-0", 5))
        ended = reported(there, "r-0", "finished", output_tokens=1)
        until(lambda: reported(here, "r-0", "tokens", output_tokens=1)["stage"] == "ended")

    assert sorted(took_s)[len(took_s) // 2] < 1.0  # a busy machine may hold one of them up
    assert (same.status_code, other.status_code, ended["ended"]) == (201, 409, "finished")
    with store.read() as connection:
        assert len(connection.execute(select(Request.id)).all()) == 1


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_two_replicas_that_take_the_same_id_agree(serve: Callable[..., TestClient]) -> None:
    one, two = serve(), serve()
    fleet(one)
    until(lambda: len(two.get("/instances").json()["instances"]) == 4)
    # the second one has not heard of it yet, or has: either way its answer is the first one's
    first = one.post("/requests", json=asked("a", 2_000)).json()
    second = two.post("/requests", json=asked("a", 2_000)).json()
    refused = two.post("/requests", json=asked("a", 2_001))

    assert first == second
    assert refused.status_code == 409


def test_while_the_database_is_away_reservations_are_taken_and_stored_later(
    serve: Callable[..., TestClient], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    fleet(client)
    with store.write() as connection:
        connection.exec_driver_sql("ALTER TABLE reservations RENAME TO elsewhere")
    away = client.post("/requests", json=asked()).json()
    again = client.post("/requests", json=asked()).json()
    with store.write() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO reservations")

    assert (away["stored"], again) == (False, away)
    assert on_instance(client, away["prefill_instance"]) == 1
    until(lambda: client.post("/requests", json=asked()).json()["stored"])
    with store.read() as connection:
        assert connection.scalars(select(Stored.request_id)).all() == ["a"]


def test_an_ended_reservation_is_forgotten_and_a_live_one_is_not(client: TestClient, store: Store, url: str) -> None:
    for name in ("a", "b"):
        client.post("/requests", json=asked(name, tenant="acme")).raise_for_status()
    reported(client, "a", "finished")
    ended = kairos("db", "forget", "--url", url, "--tenant", "acme")

    assert ended.code == 0
    with store.read() as connection:
        assert connection.scalars(select(Stored.request_id)).all() == ["b"]


def test_ten_thousand_reservations_do_not_make_an_announcement_slow(
    serve: Callable[..., TestClient], store: Store
) -> None:
    few = serve()
    fleet(few)
    model = few.post("/requests", json=asked("model")).json()
    with store.read() as connection:
        made = reservation_of(reservations_named(connection, ["model"])[0])
    many = [
        Reservation(msgspec.structs.replace(made.terms, request_id=f"made-{n}"), made.progress) for n in range(10_000)
    ]

    def fifty(client: TestClient, name: str) -> float:
        began_s = time.thread_time()
        for n in range(50):
            client.post("/requests", json=asked(f"{name}-{n}")).raise_for_status()
        return time.thread_time() - began_s

    fifty(few, "warm")
    few_s = fifty(few, "few")
    with store.write() as connection:
        write_reservations(connection, many)
    until(lambda: on_instance(few, model["prefill_instance"]) > 10_000)
    many_s = min(fifty(few, "many"), fifty(few, "more"))

    assert many_s < 3 * few_s


def test_two_announcements_of_one_id_become_the_first_that_was_written(client: TestClient, store: Store) -> None:
    client.post("/requests", json=asked()).raise_for_status()
    with store.read() as connection:
        first = reservation_of(reservations_named(connection, ["a"])[0])
    same = Reservation(msgspec.structs.replace(first.terms, prefill_instance="prefill-9"), first.progress)
    other = Reservation(msgspec.structs.replace(first.terms, digest="other"), first.progress)
    with store.write() as connection:
        done = write_reservations(connection, [same, other])

    assert done.reservations == [first, first]
    assert done.ended == []
