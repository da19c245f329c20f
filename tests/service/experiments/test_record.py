"""A record proves itself, and a changed one is found."""

from typing import Any

import msgspec
import pytest
from service.experiments.made_experiments import drawn_pairs, pairs, plan

from kairos.scheduler_core.service.experiments.design import Design
from kairos.scheduler_core.service.experiments.record import Record, record_of, verify
from kairos.scheduler_core.service.experiments.verdict import Breach, Ending


def made(design: Design = "switchback", ending: Ending | None = None) -> Record:
    of = plan(design, guards={"error rate": 0.01}, groups={"class chat": 0.08})
    return record_of(
        of, drawn_pairs(of, 40, 0.05, seed=1), ending, "2026-08-01T06:00:00Z", "2026-08-01T16:00:00Z", generation=18
    )


@pytest.mark.parametrize("design", ["switchback", "pools", "sticky"])
@pytest.mark.parametrize("ending", [None, Ending("user"), Ending("time"), Ending("guard", Breach("error rate", 1, 0))])
def test_a_record_follows_from_its_pairs_also_after_it_was_json(design: Design, ending: Ending | None) -> None:
    record = made(design, ending)
    stored = msgspec.json.decode(msgspec.json.encode(record), type=Record)

    assert stored == record
    assert verify(stored) is None


def change(tree: Any, path: tuple[str | int, ...], to: object) -> None:
    for step in path[:-1]:
        tree = tree[step]
    tree[path[-1]] = to


@pytest.mark.parametrize(
    ("path", "to", "names"),
    [
        (("verdict",), "worse", "verdict: the record says worse, its pairs give better"),
        (("sentence",), "B is wonderful.", "sentence: the record says B is wonderful., its pairs give B met"),
        (("difference_pp", "mean"), 12.0, "difference_pp.mean: the record says 12.0, its pairs give"),
        (("evidence", "log_e_better"), 9.0, "evidence.log_e_better: the record says 9.0"),
        (("n", "challenger_requests"), 1, "n.challenger_requests: the record says 1"),
        (("by_load", 2, "mean_pp"), 1.0, "by_load[2].mean_pp: the record says 1.0"),
        (("guards", 0, "breached"), True, "guards[0].breached: the record says True"),
        (("validity", "flags"), ["all is well"], "validity.flags"),
        (("pairs", 7, "d"), 0.5, "pairs[7].d: the record says 0.5"),
        (("coins",), "+" * 40, "coins: the record says +++"),
        (("estimand",), "the whole world", "estimand: the record says the whole world"),
    ],
)
def test_a_changed_figure_is_named(path: tuple[str | int, ...], to: object, names: str) -> None:
    tree = msgspec.json.decode(msgspec.json.encode(made()))
    change(tree, path, to)
    problem = verify(msgspec.convert(tree, Record))

    assert problem is not None
    assert problem.startswith(names)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("pairs", 3, "observed", "first", "met"), 12),
        (("pairs", 3, "observed", "second", "replayed"), 0.2),
        (("pairs", 0, "observed", "load"), 0.99),
        (("plan", "sigma"), 0.01),
        (("plan", "seed"), 8),
        (("plan", "requests_per_pair"), 100.0),
        (("plan", "alpha", "better"), 0.2),
    ],
)
def test_a_changed_observation_or_plan_no_longer_gives_the_figures(path: tuple[str | int, ...], to: object) -> None:
    tree = msgspec.json.decode(msgspec.json.encode(made()))
    change(tree, path, to)

    assert verify(msgspec.convert(tree, Record)) is not None


def test_a_pair_taken_out_is_noticed() -> None:
    tree = msgspec.json.decode(msgspec.json.encode(made()))
    del tree["pairs"][5]

    assert verify(msgspec.convert(tree, Record)) is not None


def test_a_record_says_what_it_measured() -> None:
    of = plan("sticky", shared_queue=True)
    record = record_of(of, pairs(of, 10, gain=0), None, "2026-08-01T06:00:00Z", None, generation=17)

    assert (record.unit, record.coins, record.estimand) == ("300 s block", "", "none: both arms wait in one queue")
    assert (made().unit, len(made().coins)) == ("pair of 300 s blocks", 40)
    assert [(stage.share, stage.pairs) for stage in made().stages] == [(0.5, 40)]
