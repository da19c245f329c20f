"""Which runs a comparison needs, and when a kept one may be used again."""

from pathlib import Path

import pytest

from kairos.adapters.simulator.compare import Plan, compare
from kairos.adapters.simulator.run import Knobs
from kairos.adapters.simulator.scenario import Scenario
from kairos.scheduler_core.plugins import policy_class

POLICY = """
class Order:
    def order(self, view):
        return [w.request_id for w in {order}]
"""


def scenario(folder: Path) -> Scenario:
    trace = folder / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{n},20000,1\n" for n in range(30)))
    return Scenario(trace, "b300", "fixed:2", load=4.0)


def test_without_noise_all_seeds_are_one_run(tmp_path: Path) -> None:
    def runs(knobs: Knobs) -> int:
        return len(Plan([scenario(tmp_path)], ["kairos", "tuned"], range(5), knobs).runs())

    assert runs(Knobs()) == 2
    assert runs(Knobs(noise=0.1)) == 10
    assert runs(Knobs(predictor_error=0.1)) == 10


def test_a_policy_that_was_rewritten_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "rewritten_policy.py"
    plan = Plan(
        [scenario(tmp_path)],
        ["rewritten_policy:Order+late+least-requests+continuous"],
        [0],
        Knobs(stages="prefill", deferred_share=0.0),
    )

    def runs_kept(order: str) -> int:
        module.write_text(POLICY.format(order=order))
        policy_class.cache_clear()
        compare(plan, tmp_path / "out", "a test", jobs=1, progress=lambda done: None)
        return len(list((tmp_path / "out" / "runs").iterdir()))

    assert [runs_kept("view.waiting"), runs_kept("view.waiting"), runs_kept("reversed(view.waiting)")] == [1, 1, 2]
