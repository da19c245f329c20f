"""What a data plane runs, from what it last pulled."""

from collections.abc import Sequence

import msgspec
import pytest
from dataplane.made_answers import BLOCK_S, CHALLENGER, CHAMPION, KEY, answer, schedule_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos.adapters.dataplane import arms as arms_module
from kairos.adapters.dataplane.arms import Active, Arms
from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.service.experiments.design import RAMP_UP, Design
from kairos.scheduler_core.strategy import parse_strategy

CONFIGURED = parse_strategy("fcfs+late+least-requests+continuous")
DAY_S = 24 * 3600.0
DESIGNS: Sequence[Design] = ("switchback", "pools", "sticky")

always = settings(deadline=None)  # the machine may be busy
times = st.floats(0.0, 10 * 3600.0)


def hearing(*answers: Active, now_s: float = 0.0) -> Arms:
    """A data plane that has pulled these."""
    arms = Arms(CONFIGURED, KEY)
    for active in answers:
        arms.pulled(active, now_s)
    return arms


def test_until_the_control_plane_is_heard_the_configured_strategy_runs() -> None:
    assert Arms(CONFIGURED, KEY).of_pool(0.0).strategy == CONFIGURED


def test_the_active_strategy_runs_with_its_parameters_under_its_version() -> None:
    strategy = hearing(answer()).of_pool(0.0).strategy

    assert (strategy.name, strategy.text) == (CHAMPION, "edf(lost_last=true)+late+least-requests+slack(h=0.9)")


@always
@given(
    now_s=times,
    pool=st.sampled_from([0, 1]),
    design=st.sampled_from(["switchback", "pools"]),
    heard=st.floats(0, 0.999),
)
def test_while_the_control_plane_is_heard_the_arm_is_the_schedules(
    now_s: float, pool: int, design: Design, heard: float
) -> None:
    schedule = schedule_of(design, stages=RAMP_UP)
    arms = hearing(answer(schedule, design), now_s=now_s - heard * BLOCK_S)

    scheduled = schedule.strategy_at(now_s, pool if design == "pools" else 0)
    arm = arms.of_pool(now_s, pool)
    assert (arm.strategy.name, arm.challenger) == (scheduled, scheduled == CHALLENGER)


@always
@given(now_s=times, away_s=st.floats(BLOCK_S + 1e-3, DAY_S), design=st.sampled_from(DESIGNS), session=st.text())
def test_when_the_control_plane_is_away_for_more_than_a_block_only_the_champion_runs(
    now_s: float, away_s: float, design: Design, session: str
) -> None:
    arms = hearing(answer(schedule_of(design), design), now_s=now_s - away_s)

    assert not any(arms.of_pool(now_s, pool).challenger for pool in (0, 1))
    assert not arms.of_session(arms.session_hash(session), now_s).challenger
    assert arms.running(now_s) is None


def test_once_it_is_heard_again_the_same_arms_go_on() -> None:
    active = answer(schedule_of())
    arms = hearing(active)
    at_s = next(slot.start_s for slot in schedule_of().slots if slot.arms == "B" and slot.start_s > 2 * BLOCK_S)

    assert not arms.of_pool(at_s).challenger
    arms.pulled(active, at_s)
    assert arms.of_pool(at_s).challenger


@always
@given(generations=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_whatever_order_answers_come_in_the_newest_generation_holds(generations: list[int]) -> None:
    arms = hearing(*(answer(generation=generation, champion=f"s@{generation + 1}") for generation in generations))

    assert arms.generation == max(generations)
    assert arms.of_pool(0.0).strategy.name == f"s@{max(generations) + 1}"


def test_an_experiment_that_was_stopped_does_not_come_back_with_a_late_answer() -> None:
    arms = hearing(answer(schedule_of()), answer(generation=4), answer(schedule_of()))

    assert arms.running(0.0) is None


@always
@given(place=st.integers(0, 10**6), wrong=st.integers(1, 127))
def test_a_schedule_with_any_byte_changed_is_refused_and_the_champion_runs(place: int, wrong: int) -> None:
    active = answer(schedule_of(max_hours=1.0))
    assert active.experiment is not None
    text = bytearray(active.experiment.schedule.encode())
    text[place % len(text)] ^= wrong
    changed = msgspec.structs.replace(active.experiment, schedule=text.decode())
    arms = Arms(CONFIGURED, KEY)

    with pytest.raises(InputError):
        arms.pulled(msgspec.structs.replace(active, experiment=changed), 0.0)

    assert arms.of_pool(10.0).strategy.name == arms.of_pool(310.0).strategy.name == CHAMPION
    assert arms.refused == 1


def test_a_schedule_signed_with_another_key_is_refused() -> None:
    with pytest.raises(InputError, match="does not carry our signature"):
        hearing(answer(schedule_of(), key=b"another"))


def test_a_schedule_of_other_strategies_than_the_answer_names_is_refused() -> None:
    with pytest.raises(InputError, match="the champion runs alone"):
        hearing(answer(schedule_of(challenger="s3@1")))


def test_a_strategy_that_is_not_installed_here_leaves_the_one_in_force() -> None:
    arms = hearing(answer())
    newer = msgspec.structs.replace(
        answer(generation=4, champion="s9@1"), policies={**answer().policies, "prefill": _unknown()}
    )

    with pytest.raises(InputError, match="unknown prefill policy"):
        arms.pulled(newer, 0.0)

    assert arms.of_pool(0.0).strategy.name == CHAMPION


def _unknown() -> object:
    return type(answer().policies["prefill"])("of-another-release")


@always
@given(session=st.text(min_size=1), before_s=times, after_s=times)
def test_a_session_keeps_its_arm_for_life_through_every_stage(session: str, before_s: float, after_s: float) -> None:
    active = answer(schedule_of("sticky", stages=RAMP_UP), "sticky")
    arms = hearing(active)
    key = arms.session_hash(session)

    first_s, later_s = sorted((before_s, after_s))
    arms.pulled(active, first_s)
    began = arms.of_session(key, first_s)
    arms.pulled(active, later_s)
    assert arms.of_session(key, later_s) == began


@always
@given(session=st.text(min_size=1), before_s=times, after_s=times)
def test_a_data_plane_that_starts_anew_never_takes_a_session_from_the_challenger(
    session: str, before_s: float, after_s: float
) -> None:
    active = answer(schedule_of("sticky", stages=RAMP_UP), "sticky")
    first_s, later_s = sorted((before_s, after_s))
    before, after = hearing(active, now_s=first_s), hearing(active, now_s=later_s)
    key = before.session_hash(session)

    assert after.of_session(key, later_s).challenger >= before.of_session(key, first_s).challenger


def test_outside_all_slots_no_session_gets_an_arm() -> None:
    active = answer(schedule_of("sticky"), "sticky")
    arms = hearing(active, now_s=-1.0)
    keys = [arms.session_hash(f"session {n}") for n in range(100)]

    before = [arms.of_session(key, -1.0).challenger for key in keys]

    assert not any(before)
    assert any(arms.of_session(key, 1.0).challenger for key in keys)


def test_each_stage_of_sticky_gives_the_challenger_its_share_of_new_sessions() -> None:
    active = answer(schedule_of("sticky", max_hours=20.0), "sticky")
    arms, replica = hearing(active), hearing(active)
    keys = [arms.session_hash(f"session {n}") for n in range(4_000)]

    challengers = [arms.of_session(key, 10.0).challenger for key in keys]

    assert challengers == [replica.of_session(key, 10.0).challenger for key in keys]
    assert sum(challengers) / len(keys) == pytest.approx(0.5, abs=0.04)


def test_memory_of_sessions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms_module, "SESSIONS", 10)
    arms = hearing(answer(schedule_of("sticky"), "sticky"))

    for n in range(100):
        arms.of_session(arms.session_hash(str(n)), 10.0)

    assert len(arms._sessions) == 10


@always
@given(session=st.text(min_size=8))
def test_a_sessions_hash_depends_on_the_key_and_does_not_show_the_session(session: str) -> None:
    ours, others = Arms(CONFIGURED, KEY).session_hash(session), Arms(CONFIGURED, b"other").session_hash(session)

    assert ours != others
    assert session not in ours


def test_sessions_fall_into_two_equal_pools_for_good() -> None:
    arms = hearing(answer(schedule_of("pools"), "pools"))
    pools = [arms.pool_of(arms.session_hash(f"session {n}")) for n in range(4_000)]

    assert sum(pools) / len(pools) == pytest.approx(0.5, abs=0.04)
    for pool, session in zip(pools, range(20), strict=False):
        assert arms.of_session(arms.session_hash(f"session {session}"), 10.0) == arms.of_pool(10.0, pool)
