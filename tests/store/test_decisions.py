"""What is recorded of decisions, in what size, and how it is told again."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from command_line import kairos
from hypothesis import given, settings
from hypothesis import strategies as st
from service.snapshots import call, decode, prefill, settings_of, snapshot, waits
from serving import served
from sqlalchemy import select
from store.rows import request_row
from store.test_service import on

import kairos as kairos_package
from kairos.scheduler_core.config import DecisionSettings
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.decisions.record import (
    MOST_BYTES,
    Asked,
    DecisionRecord,
    Elsewhere,
    First,
    Queue,
    Rule,
    pack,
    unpack,
)
from kairos.scheduler_core.service.decisions.recorder import Recorder, in_sample
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.plane import Database
from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.schemas import Snapshot
from kairos.scheduler_core.service.store.changes import Changes
from kairos.scheduler_core.service.store.queries.decisions import decisions_of
from kairos.scheduler_core.service.store.queries.telemetry import RequestBatch, add_batch
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Decision
from kairos.scheduler_core.service.store.writer import Writer

ROOT = Path(kairos_package.__file__).parents[2]
FLEET = [prefill("p-0"), prefill("p-1"), decode("d-0"), decode("d-1")]


class Recorded:
    """A scheduler whose decisions a recorder looks at when told to."""

    def __init__(self, store: Store, **choices: Any) -> None:
        self.store, self.metrics = store, Metrics()
        self.database = Database(store, Writer(store, 100_000), Changes(store))
        all_settings = settings_of()
        self.scheduler = Scheduler(all_settings, {n: s.as_strategy(n) for n, s in all_settings.strategies.items()})
        chosen = DecisionSettings(**({"sample_share": 0.0} | choices))
        self.recorder = Recorder(self.database, chosen, lambda: self.scheduler.profiles, self.metrics)
        self.scheduler.watchers = (self.recorder.look,)

    def decide(self, *instances: dict[str, Any], **lists: Any) -> None:
        """Answer a snapshot."""
        content = msgspec.json.encode(snapshot(*(instances or FLEET), **lists))
        self.scheduler.schedule(msgspec.json.decode(content, type=Snapshot), time.time(), content)

    def rows(self) -> list[tuple[str, str, DecisionRecord]]:
        """Everything that was stored: id, why, record."""
        self.recorder.stop()
        with self.store.read() as connection:
            found = connection.execute(
                select(Decision.request_id, Decision.kept_for, Decision.body).order_by(Decision.id)
            )
            return [(str(row[0]), row[1], unpack(row[2])) for row in found]


@contextmanager
def recorded(store: Store, **choices: Any) -> Iterator[Recorded]:
    """A recorder that is stopped at the end."""
    made = Recorded(store, **choices)
    yield made
    made.database.writer.drain()


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_late_requests_are_kept_and_others_are_not(store: Store) -> None:
    with recorded(store) as made:
        made.decide(prefill("p-0"), waiting=[waits("quick", 1_000), waits("late", 11_000)])

        assert [(name, why) for name, why, _ in made.rows()] == [("late", "missed")]


def test_rejected_requests_are_kept_with_their_status(store: Store) -> None:
    with recorded(store) as made:
        made.decide(waiting=[waits("elsewhere", model="other/model")])
        [(name, why, record)] = made.rows()

    assert (name, why) == ("elsewhere", "rejected")
    assert (record.stage, record.status, record.code) == ("admission", 404, "no_instance_serves_model")


def test_what_a_failing_policy_touched_is_kept_with_its_failure(store: Store) -> None:
    with recorded(store) as made:
        made.scheduler.strategies = {"s": made.scheduler.strategy("fcfs+late+least-requests+continuous")}
        broken = msgspec.structs.replace(
            made.scheduler.strategies["s"],
            prefill=msgspec.structs.replace(made.scheduler.strategies["s"].prefill, name="store.test_decisions:Broken"),
        )
        made.scheduler.strategies = {"s": broken}
        made.decide(strategy="s", waiting=[waits("a"), waits("b")])
        rows = made.rows()

    assert [(name, why) for name, why, _ in rows] == [("a", "failed"), ("b", "failed")]
    assert rows[0][2].rule.failures == ["Broken: ZeroDivisionError"]


class Broken:
    """A prefill policy that fails."""

    def order(self, view: object) -> list[str]:
        """Nothing comes of it."""
        raise ZeroDivisionError


def test_a_request_that_waits_long_is_kept_once_it_does(store: Store) -> None:
    with recorded(store, long_wait_s=0.05) as made:
        lists = {"running": [waits("r", 5_000, instance_id="p-0")], "waiting": [waits("a", 100, slo_class="batch")]}
        made.decide(prefill("p-0"), **lists)
        time.sleep(0.06)
        made.recorder._forget()
        made.decide(prefill("p-0"), **(lists | {"now_s": 0.06}))
        made.decide(prefill("p-0"), **(lists | {"now_s": 0.07}))

        assert [(name, why) for name, why, _ in made.rows()] == [("a", "long_wait")]


def test_a_request_is_kept_when_it_comes_when_it_turns_and_when_it_starts(store: Store) -> None:
    ahead = {"running": [waits("r", 4_000, instance_id="p-0")]}
    with recorded(store, sample_share=1.0) as made:
        for now_s in (0.0, 1.0, 2.0):
            made.decide(prefill("p-0"), now_s=now_s, waiting=[waits("a", 6_000)], **ahead)
        made.decide(prefill("p-0", free_in_s=5.0), now_s=3.0, waiting=[waits("a", 6_000)])
        made.decide(prefill("p-0"), now_s=9.0, waiting=[waits("a", 6_000)])
        made.decide(prefill("p-0"), now_s=9.1, waiting=[waits("a", 6_000)])
        rows = [(why, record.on_time, record.step_tokens > 0) for name, why, record in made.rows() if name == "a"]

    assert rows == [("sampled", True, False), ("missed", False, False), ("missed", False, True)]


def test_of_one_request_no_more_than_eight_rows_are_kept(store: Store) -> None:
    with recorded(store, sample_share=1.0) as made:
        for n in range(40):
            made.decide(prefill("p-0", free_in_s=20.0 * (n % 2) + 0.5), waiting=[waits("a", 100)])

        assert len(made.rows()) == 8


def test_the_same_requests_are_in_the_sample_everywhere() -> None:
    chosen = [f"r-{n}" for n in range(20_000) if in_sample(f"r-{n}", 0.1)]

    assert len(chosen) == pytest.approx(2_000, rel=0.1)
    assert all(in_sample(request_id, 0.2) for request_id in chosen)  # a larger share holds the smaller one


# -- what a row says -------------------------------------------------------------------------------------------------


def test_a_row_says_what_waited_what_was_predicted_and_what_else_could_have_been(store: Store) -> None:
    with recorded(store, sample_share=1.0) as made:
        line = [waits(f"r-{n:02}", 100 * (n + 1), 0.001 * n) for n in range(40)]
        made.decide(strategy="fcfs+late+headroom+envelope", now_s=0.1, waiting=line)
        record = {name: record for name, _, record in made.rows()}["r-30"]

    assert (record.asked.prompt_tokens, record.queue.tokens.count, record.queue.tokens.most) == (3_100, 40, 4_000.0)
    assert (record.rule.policies, record.rule.model_version) == ("fcfs+late+headroom+envelope", "linear")
    assert len(record.first) == 8
    assert record.ahead_requests == 15  # every other one of the thirty before it
    # p-0 runs r-00, r-02, ... and is free for r-30 after 24.0 s, p-1 after 25.6 s at the latest then
    assert record.predicted_ttft_s == pytest.approx(0.07 + record.ahead_s + 3.1)
    assert [e.instance_id for e in record.elsewhere] == ["p-1" if record.instance_id == "p-0" else "p-0"]
    assert record.elsewhere[0].seconds >= record.predicted_ttft_s


def test_a_placement_is_told_with_the_other_decode_instances(store: Store) -> None:
    resident = [{"request_id": f"x-{n}", "instance_id": "d-0", "context_tokens": 9, "first_token_s": 0} for n in (1, 2)]
    with recorded(store, sample_share=1.0) as made:
        came = {"request_id": "a", "context_tokens": 1_001, "first_token_s": 0.0}
        made.decide(resident=resident, transferred=[came])
        [(name, _, record)] = made.rows()

    assert (name, record.stage, record.instance_id) == ("a", "decode", "d-1")
    assert [(e.instance_id, e.requests) for e in record.elsewhere] == [("d-0", 2)]


texts = st.text(max_size=300)
numbers = st.floats(0, 1e9)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(texts, texts, texts, st.lists(st.tuples(texts, numbers), max_size=30), st.lists(texts, max_size=9))
def test_a_row_takes_at_most_two_kilobytes_whatever_the_names(
    name: str, policies: str, instance: str, others: list[tuple[str, float]], failures: list[str]
) -> None:
    record = DecisionRecord(
        "prefill", Rule(name, policies, name, failures), Asked(1, 0, name), Queue(), instance, decode_instance_id=name
    )
    elsewhere = [Elsewhere(other, seconds, 3) for other, seconds in others]
    packed = pack(record, elsewhere, [First(other, seconds, seconds, True) for other, seconds in others])

    assert len(packed) <= MOST_BYTES
    again = unpack(packed)
    assert len(again.elsewhere) + again.elsewhere_rest.count == len(others)


# -- never in the way ------------------------------------------------------------------------------------------------


def test_rows_that_nobody_can_store_are_counted_and_the_oldest_go(tmp_path: Any) -> None:
    away = Store("postgresql://nobody@127.0.0.1:1/none")
    with recorded(away, sample_share=1.0, queued_rows=10) as made:
        made.decide(waiting=[waits(f"r-{n}") for n in range(30)])
        waiting = [row.request_id for row in made.recorder._rows]
        made.recorder.stop()

    assert len(waiting) == 10
    assert made.metrics.registry.get_sample_value("kairos_decisions_dropped_total") == 30.0
    away.close()


# -- told again ------------------------------------------------------------------------------------------------------


def test_what_happened_stands_beside_what_was_predicted(store: Store, url: str) -> None:
    with recorded(store, sample_share=1.0) as made:
        made.decide(prefill("p-0"), now_s=1_000.0, waiting=[waits("a", 500, 999.5), waits("b", 2_000, 999.9)])
        made.rows()
    with store.write() as connection:
        row = request_row(request_id="b", ttft_ms=2_000.0, predicted_ttft_ms=2_600.0, ttft_target_ms=10_000.0)
        add_batch(connection, RequestBatch("x", b"0" * 16, [row]))
    app = create_app(settings_of(store={"url": url}))

    told = call(app, "GET", "/requests/b/explanation").json()

    assert told["happened"]["ttft_s"] == 2.0
    assert [d["record"]["instance_id"] for d in told["decisions"]] == ["p-0"]
    text = " ".join(told["text"])
    assert "It had waited 0.10 s and was to run on p-0, behind 1 other, 0.50 s of work" in text
    assert "Before it: a (0.50 s)." in text
    assert "first token after 2.00 s (23 % earlier than the 2.60 s predicted), the target of 10.00 s was met" in text


def test_an_unsampled_request_is_told_apart_from_an_unknown_one(store: Store, url: str) -> None:
    app = create_app(settings_of(store={"url": url}, decisions={"sample_share": 0.0}))
    unsampled = call(app, "GET", "/requests/a/explanation")
    app = create_app(settings_of(store={"url": url}, decisions={"sample_share": 1.0}))
    unknown = call(app, "GET", "/requests/a/explanation")

    assert (unsampled.status_code, unsampled.json()["type"]) == (404, "not_sampled")
    assert (unknown.status_code, unknown.json()["type"]) == (404, "about:blank")


def test_a_running_service_records_and_the_command_explains(store: Store, url: str) -> None:
    with served(on(url) | {"KAIROS_DECISIONS__SAMPLE_SHARE": "1"}) as (address, _):
        fleet = prefill("p-0", profile="qwen3-32b-b300-tp4")
        body = {"instances": [fleet], "waiting": [waits("req/17", arrival_s=time.time() - 1.0)]}
        httpx.post(f"{address}/schedule", json=body).raise_for_status()
        for _ in range(100):
            ended = kairos("explain", "req/17", "--url", address)
            if ended.code == 0:
                break
            time.sleep(0.05)
        unknown = kairos("explain", "other", "--url", address)
    nobody = kairos("explain", "other", "--url", address)

    assert "and began on p-0: the policy put it first" in ended.stdout
    assert (unknown.code, nobody.code) == (2, 1)
    assert "no request 'other' is known here" in unknown.stderr
    assert "start one with kairos serve" in nobody.stderr


def test_a_stored_decision_is_found_by_its_request(store: Store) -> None:
    with recorded(store, sample_share=1.0) as made:
        made.decide(waiting=[waits("a", tenant="acme"), waits("b")])
        made.rows()
    with store.read() as connection:
        rows = decisions_of(connection, "a", None)
        of_others = decisions_of(connection, "a", "globex")

    assert [(row.request_id, row.tenant, row.kept_for) for row in rows] == [("a", "acme", "sampled")]
    assert of_others == []


@pytest.mark.parametrize(
    ("options", "left", "first"),
    [
        (["--request", "a"], [None, "b", "c"], ["", "b"]),
        (["--tenant", "acme"], [None, "b", "c"], ["", ""]),
        (["--all"], [None] * 3, ["", ""]),
        (["--request", "x"], ["a", "b", "c"], ["a", "b"]),
    ],
)
def test_forgetting_covers_decisions_and_their_alternatives(
    store: Store, url: str, options: list[str], left: list[str | None], first: list[str]
) -> None:
    with recorded(store, sample_share=1.0) as made:
        line = [waits("a", 10, tenant="acme"), waits("b", 20), waits("c", 30)]
        made.decide(prefill("p-0", free_in_s=1.0), strategy="fcfs+late+headroom+envelope", waiting=line)
        made.rows()

    ended = kairos("db", "forget", "--url", url, *options)

    assert ended.code == 0
    with store.read() as connection:
        rows = connection.execute(
            select(Decision.request_id, Decision.tenant, Decision.body).order_by(Decision.id)
        ).all()
    assert [row.request_id for row in rows] == left
    assert [f.request_id for f in unpack(rows[-1].body).first] == first
    assert (rows[0].tenant is None) == (left[0] is None)


def test_a_row_takes_the_documented_bytes(store: Store) -> None:
    page = (ROOT / "docs" / "decisions-and-reservations.md").read_text()
    found = re.search(r"\| decisions \| (\d+) \| (\d+) \|", page)
    assert found is not None
    before = table_bytes(store)
    with recorded(store, sample_share=1.0) as made:
        for n in range(40):
            made.decide(waiting=[waits(f"req-{n:04}-{k:08}", 100 + 7 * k, tenant=f"tenant-{k % 9}") for k in range(50)])
        rows = len(made.rows())

    a_row = (table_bytes(store) - before) / rows
    assert a_row == pytest.approx(int(found[1 if store.embedded else 2]), rel=0.25)


def table_bytes(store: Store) -> int:
    """What the decisions take on disk."""
    with store.read() as connection:
        if store.embedded:
            pages = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
            return int(connection.exec_driver_sql(pages).scalar_one())
        return int(connection.exec_driver_sql("SELECT pg_total_relation_size('decisions')").scalar_one())


def test_a_key_of_a_tenant_sees_that_tenants_requests_only(store: Store, url: str) -> None:
    with recorded(store, sample_share=1.0) as made:
        made.decide(waiting=[waits("a", tenant="acme"), waits("b", tenant="globex")])
        made.rows()
    secret = "a-secret-of-at-least-thirty-two-characters"
    keys = {"reader": {"key": secret, "role": "read", "tenant": "acme"}}
    app = create_app(settings_of(store={"url": url}, access={"keys": keys}))
    headers = {"authorization": f"Bearer {secret}"}

    own = call(app, "GET", "/requests/a/explanation", headers=headers)
    others = call(app, "GET", "/requests/b/explanation", headers=headers)

    assert (own.status_code, others.status_code) == (200, 404)
