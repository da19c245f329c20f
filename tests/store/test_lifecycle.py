"""From telemetry to a model that serves, and back, on both databases; killed at any instant, nothing is half-made."""

import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from made_telemetry import PROFILE, decode_s, decode_steps, prefill_steps
from service.models.made_life import ID, Life
from service.snapshots import scheduler_of, settings_of
from sqlalchemy import delete, update

from kairos.predictors.artifact import ProfileModels, dump
from kairos.predictors.training import train
from kairos.scheduler_core.errors import ConflictError, StoreError
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.models import lifecycle
from kairos.scheduler_core.service.models.artifacts import add_challenger
from kairos.scheduler_core.service.models.book import Book
from kairos.scheduler_core.service.models.lifecycle import LEASE, LEASE_S, LostLeaseError
from kairos.scheduler_core.service.store.queries import models as queries
from kairos.scheduler_core.service.store.queries.events import add_event, latest_events
from kairos.scheduler_core.service.store.queries.leases import take_lease
from kairos.scheduler_core.service.store.revisions import upgrade
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Model, Step


@lru_cache
def learned(factor: float = 1.0) -> ProfileModels:
    """A model of decode steps that take `factor` times as long."""
    return next(iter(train([decode_steps(factor=factor)])))


def started(store: Store, **training: Any) -> Life:
    """A profile whose first model, which somebody uploaded, serves by the word of the gate."""
    life = Life(store, **training)
    life.steps(500)
    upload(store, 1.0)
    life.steps(2_500)
    return life


def upload(store: Store, factor: float) -> None:
    with store.write() as connection:
        add_challenger(connection, learned(factor), queries.last_step(connection))


def events(store: Store) -> list[str]:
    with store.read() as connection:
        return [event.kind for event in latest_events(connection, 100)]


def book_of(store: Store) -> Book:
    settings = settings_of()
    return Book(store, settings, scheduler_of(settings), Metrics())


# -- training and gate -----------------------------------------------------------------------------------------------


def test_a_first_model_serves_once_later_steps_have_shown_that_it_is_better(store: Store) -> None:
    life = Life(store)
    life.steps(2_000)
    life.train()
    before = life.serving
    life.steps(2_500)

    assert (before, life.serving, life.gate(1)) == (0, 1, "promote")


def test_a_bad_challenger_is_refused_and_the_champion_goes_on(store: Store) -> None:
    life = started(store)
    upload(store, factor=1.1)
    life.steps(8_500)

    assert (life.serving, life.gate(2)) == (1, "keep")
    assert "challenger_judged" in events(store)


def test_drift_trains_a_challenger_that_is_promoted_and_then_rolled_back_in_one_call(store: Store) -> None:
    life = started(store)
    life.steps(20_500)
    life.steps(3_000, factor=1.1)
    with store.read() as connection:
        (asked,) = queries.trainings(connection, 5)
    life.steps(8_500, factor=1.1)
    after = life.serving
    with store.write() as connection:
        queries.roll_back(connection, ID, "by hand")

    assert (asked.cause, asked.state, asked.profiles) == ("drift", "done", [ID])
    assert (after, life.serving) == (2, 1)


def test_with_promotion_by_hand_the_gate_only_says_what_it_thinks(store: Store) -> None:
    life = started(store, promote="manual")

    assert (life.serving, life.gate(1)) == (0, "promote")


def test_a_promoted_model_that_is_worse_is_taken_back_by_itself(store: Store) -> None:
    life = started(store)
    upload(store, factor=1.1)
    with store.write() as connection:
        queries.promote_model(connection, ID, 2, "a mistake")
    life.work()
    mistaken = life.serving
    life.steps(8_500)

    assert (mistaken, life.serving) == (2, 1)
    assert "model_rolled_back" in events(store)


def test_what_was_rolled_back_to_is_not_judged_again(store: Store) -> None:
    life = started(store)
    upload(store, factor=1.1)
    with store.write() as connection:
        queries.promote_model(connection, ID, 2, "a mistake")
        queries.roll_back(connection, ID, "by hand")
    life.work()
    life.steps(8_500)

    assert life.serving == 1


def test_kinds_that_pass_one_after_the_other_serve_together(store: Store) -> None:
    life = Life(store)
    life.steps(500)
    (both,) = train([prefill_steps(), decode_steps()])
    with store.write() as connection:
        add_challenger(connection, both, queries.last_step(connection))
    life.steps(2_500)
    decode_alone = life.serving
    life.prefill_steps(2_500)
    book = book_of(store)
    book.look()

    assert (decode_alone, life.serving) == (2, 1)
    assert dict(book.serving.served[ID].origins) == {"prefill": 1, "decode": 1}


def test_a_challenger_that_cannot_be_read_is_refused(store: Store) -> None:
    life = started(store)
    upload(store, 1.1)
    with store.write() as connection:
        connection.execute(update(Model).where(Model.version == 2).values(artifact=b"damaged"))
    life.steps(8_500)

    assert (life.serving, life.gate(2)) == (1, "keep")


def test_steps_that_a_model_has_learned_from_do_not_judge_it_when_the_watch_comes_to_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "PAGE_STEPS", 1_500)
    life = Life(store)
    with store.write() as connection:
        queries.ask_training(connection, "request", None)
    life.steps(4_000)  # the training comes after the first page, and reads them all
    before = life.serving
    life.steps(2_100)

    assert (before, life.serving, life.gate(1)) == (0, 1, "promote")


@pytest.mark.parametrize("watched", [8_500, 4_000])
def test_steps_that_were_watched_before_the_process_saw_the_challenger_judge_it_too(store: Store, watched: int) -> None:
    life = started(store)
    with store.read() as connection:
        last_step = queries.last_step(connection)
    life.steps(watched)
    with store.write() as connection:
        add_challenger(connection, learned(1.1), last_step)
    life.work()
    life.steps(9_000 - watched)

    assert (life.serving, life.gate(2)) == (1, "keep")


def test_only_the_newest_challenger_waits(store: Store) -> None:
    life = started(store)
    for factor in (1.1, 1.2):
        upload(store, factor)

    assert [row.state for row in life.models] == ["judged", "superseded", "challenger"]


def test_a_training_by_number_of_steps_is_asked_for_once(store: Store) -> None:
    life = Life(store, after_rows=1_500)
    life.steps(1_000)
    before = len(life.models)
    life.steps(1_000)
    life.steps(1_000)

    assert (before, len(life.models)) == (0, 1)


def test_a_training_by_the_clock_comes_when_it_is_due(store: Store) -> None:
    life = Life(store, every_s=1e-3)
    life.steps(500)

    with store.read() as connection:
        assert queries.trainings(connection, 5)[-1].cause == "schedule"


def test_a_training_without_steps_has_failed_and_says_why(store: Store) -> None:
    life = Life(store)
    life.train()

    with store.read() as connection:
        (training,) = queries.trainings(connection, 5)
    assert (training.state, training.error) == (
        "failed",
        "InputError: no step telemetry of any profile; send some first",
    )


# -- restarts and replicas -------------------------------------------------------------------------------------------


def test_another_process_goes_on_where_the_last_one_was(store: Store) -> None:
    life = started(store)
    life.steps(12_000)
    life = life.restarted()
    life.steps(8_500)
    life = life.restarted()
    life.steps(2_000, factor=1.1)

    with store.read() as connection:
        causes = [row.cause for row in queries.trainings(connection, 5)]
    assert causes == ["drift"]


def test_whoever_has_lost_the_lease_writes_nothing(store: Store) -> None:
    life = started(store)
    with store.write() as connection:
        assert take_lease(connection, LEASE, "me", -1.0)
        assert take_lease(connection, LEASE, "another", LEASE_S)

    with pytest.raises(LostLeaseError):
        life.work()
    assert [row.version for row in life.models] == [1]


def test_a_training_whose_process_died_is_done_again_and_after_three_times_has_failed(store: Store) -> None:
    with store.write() as connection:
        asked = queries.ask_training(connection, "request", None)
    states = []
    for _ in range(queries.MOST_ATTEMPTS):
        with store.write() as connection:
            queries.begin_training(connection)
        with store.write() as connection:
            queries.take_up_trainings(connection)
            states.append(queries.training(connection, asked.id).state)

    assert states == ["waiting", "waiting", "failed"]


def test_the_same_training_asked_for_twice_is_one(store: Store) -> None:
    with store.write() as connection:
        first = queries.ask_training(connection, "request", None)
        again = queries.ask_training(connection, "drift", [ID])

    assert first.id == again.id


# -- rolling back ----------------------------------------------------------------------------------------------------


def test_rollbacks_go_further_back_and_end_with_the_configuration(store: Store) -> None:
    for factor in (1.0, 1.1, 1.2):
        upload(store, factor)
    with store.write() as connection:
        for version in (1, 2, 3):
            queries.promote_model(connection, ID, version, "test")
        back = [queries.roll_back(connection, ID, "test") for _ in range(3)]

    assert back == [2, 1, None]
    with store.write() as connection, pytest.raises(ConflictError, match="nothing is left"):
        queries.roll_back(connection, ID, "test")


def test_a_profile_that_nothing_was_promoted_for_cannot_be_rolled_back(store: Store) -> None:
    with store.write() as connection, pytest.raises(ConflictError, match="no model was ever promoted"):
        queries.roll_back(connection, "nobody", "test")


# -- the book --------------------------------------------------------------------------------------------------------


def test_what_is_promoted_serves_with_its_correction(store: Store) -> None:
    life = started(store)
    life.steps(500, factor=1.2)
    book = book_of(store)
    book.look()
    served = book.serving.predictor(PROFILE)

    assert book.serving.served[ID].model_id == f"{ID}@1"
    assert served.decode_step_s(16, 30_000) == pytest.approx(1.2 * decode_s(16, 30_000), rel=0.03)


def test_the_scheduler_answers_with_the_promoted_model_of_a_configured_profile(store: Store) -> None:
    life = started(store)
    settings = settings_of(
        profiles={"even": {k: getattr(PROFILE, k) for k in ("gpu", "model", "precision", "tp", "ep", "engine")}}
    )
    scheduler = scheduler_of(settings)
    before = scheduler.profiles.find("even").version
    Book(store, settings, scheduler, Metrics()).look()

    assert (before, scheduler.profiles.find("even").version) == ("prior", f"{ID}@1")
    assert life.serving == 1


def test_step_times_of_the_configuration_are_corrected_by_telemetry(store: Store) -> None:
    linear = {"linear": {"prefill": {"b_s": 1e-3}, "decode": {"a_s": 5e-3, "b_s": 2e-5, "c_s": 3e-8}}}
    parts = {k: getattr(PROFILE, k) for k in ("gpu", "model", "precision", "tp", "ep", "engine")}
    settings = settings_of(
        profiles={"even": parts | {"step_times": linear}}, training={"after_rows": None, "every_s": None}
    )
    life = Life(store, settings)
    life.steps(1_000, factor=1.5)
    scheduler = scheduler_of(settings)
    Book(store, settings, scheduler, Metrics()).look()
    known = scheduler.profiles.find("even")

    assert known.version == "linear"
    assert known.step_times.decode_step_s(16, 30_000) == pytest.approx(1.5 * decode_s(16, 30_000), rel=0.03)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-40], lambda b: b"", lambda b: b.replace(b"predictors", b"predictorz")]
)
def test_a_promoted_model_that_is_damaged_leaves_the_last_good_one_serving_and_is_told(
    store: Store, damage: Any
) -> None:
    upload(store, 1.0)
    with store.write() as connection:
        queries.promote_model(connection, ID, 1, "test")
    book = book_of(store)
    book.look()
    upload(store, 1.1)
    with store.write() as connection:
        artifact = queries.model_artifact(connection, ID, 2)
        connection.execute(update(Model).where(Model.version == 2).values(artifact=damage(artifact)))
        queries.promote_model(connection, ID, 2, "test")
    book.look()
    book.look()

    assert book.serving.served[ID].version == 1
    assert f"{ID}@2" in book.serving.troubles[0]
    assert events(store).count("model_unreadable") == 1


def test_a_model_of_another_feature_schema_is_not_served(store: Store) -> None:
    upload(store, 1.0)
    with store.write() as connection:
        magic, _, body = queries.model_artifact(connection, ID, 1).split(b"\n", 2)
        other = b"\n".join([magic, b"0" * 16, body])
        connection.execute(update(Model).values(artifact=other))
        queries.promote_model(connection, ID, 1, "test")
    book = book_of(store)
    book.look()

    assert book.serving.served == {}
    assert "was trained on features" in book.serving.troubles[0]


def test_a_small_file_that_claims_to_be_huge_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kairos.predictors.artifact._MOST_BYTES", 10_000)
    upload(store, 1.0)
    with store.write() as connection:
        head = dump([]).rsplit(b"\n", 1)[0]
        bomb = head + b"\n" + zlib.compress(b"\0" * 10**6)
        connection.execute(update(Model).values(artifact=bomb))
        queries.promote_model(connection, ID, 1, "test")
    book = book_of(store)
    book.look()

    assert "is damaged" in book.serving.troubles[0]


def test_with_the_database_away_what_served_goes_on_serving(tmp_path: Path) -> None:
    path = tmp_path / "kairos.db"
    store = Store(f"sqlite:///{path}")
    upgrade(store)
    started(store)
    book = book_of(store)
    book.look()
    store.close()
    path.write_bytes(b"no database any more" * 1_000)

    with pytest.raises(StoreError):
        book.look()
    assert book.serving.served[ID].version == 1


def test_metrics_count_trainings_and_alarms_and_tell_the_age(store: Store) -> None:
    book = book_of(store)
    book.look()
    started(store).train()
    with store.write() as connection:
        add_event(connection, "drift", f"{ID} decode", {"series": "slower"})
    book.look()
    told = book._metrics.exposition().decode()

    assert 'kairos_trainings_total{outcome="done"} 1.0' in told
    assert f'kairos_drift_alarms_total{{kind="decode",profile="{ID}"}} 1.0' in told
    assert f'kairos_model_age_seconds{{profile="{ID}"}}' in told


def test_retention_of_old_steps_does_not_stop_the_watch(store: Store) -> None:
    life = started(store)
    with store.write() as connection:
        connection.execute(delete(Step))
    life.steps(500)

    with store.read() as connection:
        assert not queries.work_waits(connection)
