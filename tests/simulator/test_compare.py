"""Which runs a comparison needs, and when a kept one may be used again."""

from pathlib import Path

import numpy as np
import pytest

from kairos.adapters.loadgen import LiveRun
from kairos.adapters.report import write_report
from kairos.adapters.simulator.compare import Plan, add_live_runs, compare
from kairos.adapters.simulator.run import Knobs, simulate
from kairos.adapters.simulator.scenario import Scenario, fleet_of, settings_of, strategy_of, workload_of
from kairos.adapters.simulator.workload import first_requests
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


def test_what_a_live_fleet_did_stands_beside_what_was_compared(tmp_path: Path) -> None:
    strategies, place = ["engine-default", "kairos"], {"trace": "trace, live", "target": "fixed:2", "load": 4.0}
    made = scenario(tmp_path)
    results = compare(Plan([made], strategies, [0], Knobs()), tmp_path, "a test", jobs=1, progress=lambda done: None)
    sent, live = first_requests(workload_of(made), 10), {}
    for name in strategies:
        run = simulate(sent, fleet_of("b300"), strategy_of(settings_of("b300"), name))
        live[name] = LiveRun(run.requests, run.gaps, run.decision_us, np.zeros(len(sent)))

    add_live_runs(results, place, live, fleet_of("b300"))
    write_report(results, tmp_path / "report.html")

    assert [(cell["trace"], cell["strategy"]) for cell in results["cells"][2:]] == [
        ("trace, live", name) for name in strategies
    ]
    assert len(results["meta"]["sentences"]) == len(results["pairs"]) == 6
    assert [bound["trace"] for bound in results["bounds"]] == ["trace", "trace, live"]
    assert "trace, live" in (tmp_path / "report.html").read_text()
    assert sent.arrival_s[0] == 0.0
    assert len(sent) == 10
