"""What the report says, and what it does with results that lack something."""

import copy
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from report.made_results import HOSTILE, STRATEGIES, made_results
from typer.testing import CliRunner

from kairos.adapters.cli.report import register
from kairos.adapters.report import read_file, render, write_report
from kairos.adapters.report.findings import verdict_word
from kairos.adapters.report.results import Interval
from kairos.scheduler_core.drawing.text import number_of_percent, seconds, signed
from kairos.scheduler_core.errors import InputError

ONE = {"traces": ["azure2023_conv"], "targets": ["fixed:2"], "loads": [0.9]}
TWO = {"engine-default": 0.9, "kairos": 1.6}
SMALL = made_results(**ONE, strategies=TWO)


class Page(HTMLParser):
    """The visible text, section by section, and every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._in, self._hidden = "", 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag == "style"
        if tag == "section":
            self._in = dict(attrs)["id"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.sections[self._in] = self.sections.get(self._in, "") + data.replace("\xa0", " ")

    @property
    def text(self) -> str:
        return "".join(self.sections.values())


def headings(html: str) -> list[str]:
    found = re.findall(r"<h[12][^>]*>(.*?)</h[12]>", html, re.DOTALL)
    return [unescape(re.sub("<[^>]*>", "", heading)).replace("\xa0", " ") for heading in found]


def changed(**meta: Any) -> dict[str, Any]:
    results = copy.deepcopy(SMALL)
    results["meta"] |= meta
    return results


def with_difference(low: float | None, mean: float, high: float | None) -> dict[str, Any]:
    results = copy.deepcopy(SMALL)
    for pair in results["pairs"]:
        pair["difference_pp"] = {"mean": mean, "low": low, "high": high}
    return results


# -- the findings


def test_one_cell_is_said_with_its_difference_in_the_first_heading() -> None:
    assert headings(render(with_difference(18.0, 20.1, 22.2)))[0] == (
        "kairos keeps more requests in time than engine-default: +20.1 points"
    )


def test_an_interval_that_holds_0_is_no_difference_shown() -> None:
    html = render(with_difference(-0.2, 0.4, 1.0))

    assert headings(html)[0] == "No difference shown between kairos and engine-default in 1 cell"
    assert "◐ no difference shown" in Page(html).sections["verdicts"]


def test_without_intervals_there_is_no_verdict() -> None:
    html = render(with_difference(None, 26.4, None))

    assert headings(html)[0] == (
        "No verdict, too short for an interval: kairos minus engine-default is +26.4 points in the mean"
    )
    assert "No pair has an interval" in Page(html).sections["verdicts"]


def test_a_strategy_that_loses_is_said_to_lose() -> None:
    html = render(with_difference(-5.0, -4.0, -3.0))

    assert headings(html)[0] == "kairos keeps fewer requests in time than engine-default: −4.0 points"
    assert "✕ worse" in Page(html).sections["verdicts"]


def test_where_the_best_strategy_is_behind_another_stays_in_sight() -> None:
    results = made_results(**ONE, strategies={"fcfs": 0.5, "kairos": 1.6, "rival": 1.2})
    for cell in results["cells"]:
        if cell["strategy"] == "rival":  # one point ahead here, but kairos is ahead at load 0.5
            cell["metrics"]["slo_attainment"] = {"mean": 0.99, "low": 0.985, "high": 0.995, "n": 24}
    easy = copy.deepcopy([c for c in results["cells"] if c["strategy"] != "fcfs"])
    for cell, share in zip(easy, (1.0, 0.5), strict=True):
        cell["load"] = 0.5
        cell["metrics"]["slo_attainment"] = {"mean": share, "low": share, "high": share, "n": 24}
    results["cells"] += easy
    place = {"trace": "azure2023_conv", "target": "fixed:2", "load": 0.9}
    pair = {"a": "rival", "b": "kairos", "metric": "slo_attainment", "difference_pp": {"mean": 2, "low": 1, "high": 3}}
    results["pairs"] = [p for p in results["pairs"] if p["a"] != "kairos" or p["b"] != "rival"] + [{**place, **pair}]

    said = Page(render(results)).sections["verdicts"]

    assert "kairos loses in 1 cell, by an interval that excludes 0" in said
    assert "rival is ahead, −2.0 points (−3.0 to −1.0) for kairos" in said


def test_a_pair_reads_the_same_whichever_way_round_it_was_written() -> None:
    turned = copy.deepcopy(SMALL)
    for pair in turned["pairs"]:
        d = pair["difference_pp"]
        pair["a"], pair["b"] = pair["b"], pair["a"]
        pair["difference_pp"] = {"mean": -d["mean"], "low": -d["high"], "high": -d["low"]}

    assert headings(render(turned)) == headings(render(SMALL))


def test_a_run_above_the_bound_is_reported_as_an_error_of_one_of_them() -> None:
    results = copy.deepcopy(SMALL)
    for bound in results["bounds"]:
        bound["ttft_attainment"] = 0.5

    assert "kairos is above the bound" in Page(render(results)).text


def test_several_cells_say_how_many_verdicts_come_from_chance() -> None:
    html = render(made_results())  # 3 traces x 3 targets x 5 loads, 4 strategies against the baseline

    assert "Of 180 intervals at 95 %, about 9 would exclude 0 by chance alone." in Page(html).text


def test_the_load_carried_with_90_percent_in_time_is_named() -> None:
    results = made_results(traces=["t"], targets=["fixed:2"], loads=[0.5, 0.7, 0.9], strategies=TWO)
    for cell in results["cells"]:
        share = 0.95 if cell["strategy"] == "kairos" and cell["load"] < 0.8 else 0.5
        cell["metrics"]["slo_attainment"] = share

    said = Page(render(results)).sections["load"]

    assert "With 90 % in time kairos carries more load than engine-default" in said
    assert "90 % in time: kairos up to load 0.7; engine-default at no load run" in said


def test_prompt_quarters_are_named_and_their_differences_are_in_points() -> None:
    results = copy.deepcopy(SMALL)
    for cell in results["cells"]:
        share = 0.9 if cell["strategy"] == "kairos" else 0.4
        cell["metrics"]["by_prompt_quartile"] = {f"q{i}": {"slo_attainment": share - 0.1 * i} for i in (1, 2, 3, 4)}
        cell["metrics"]["by_class"] = cell["metrics"]["by_tenant"] = {}

    said = Page(render(results)).sections["parts"]

    assert "q4, longest quarter" in said
    assert said.count("+50.0") >= 4


def test_the_window_says_who_held_the_instance_and_how_many_were_late_behind() -> None:
    # a runs 0..4 s. b and c arrive meanwhile, due at 2 and 9 s; d arrives after a has ended.
    def request(name: str, arrival_s: float, due_s: float, start_s: float, met: bool) -> dict[str, Any]:
        times = {"arrival_s": arrival_s, "deadline_s": due_s, "start_s": start_s, "first_token_s": start_s + 1}
        return {"request_id": name, **times, "prompt_tokens": 123_192, "ttft_met": met}

    window = {
        "trace": "t",
        "strategy": "fcfs",
        "instance": "prefill-0",
        "start_s": 0.0,
        "end_s": 10.0,
        "blocker": "a",
        "steps": [
            {"start_s": s, "end_s": s + 1, "request_ids": [who], "new_tokens": 1}
            for s, who in [(0, "a"), (1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "c"), (6, "d")]
        ],
        "requests": [
            request("a", 0, 2, 0, False),
            request("b", 1, 2, 4, False),
            request("c", 1, 9, 5, True),
            request("d", 5, 9, 6, True),
        ],
    }
    results = {**SMALL, "timelines": [window]}

    said = Page(render(results)).sections["timeline"]

    assert "a (123\u202f192 tokens) held prefill-0 for 4.00 s; 2 waited behind it, 1 late" in said


def test_windows_of_other_requests_are_not_called_the_same_arrivals() -> None:
    results = copy.deepcopy(SMALL)
    assert "The same arrivals, requests late" in Page(render(results)).sections["timeline"]

    results["timelines"][1]["requests"].pop()

    assert "The same seconds on one instance, requests late" in Page(render(results)).sections["timeline"]


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 2.0, "better"), (-2.0, -0.1, "worse"), (0.0, 2.0, "no difference shown"), (None, None, "too short")],
)
def test_the_interval_alone_decides_the_word(low: float | None, high: float | None, word: str) -> None:
    assert verdict_word(Interval(1.0, low, high)).startswith(word)


# -- the numbers


def test_every_number_of_the_strategy_table_is_there_as_text() -> None:
    results = made_results()
    said = Page(render(results)).sections["strategies"]

    for cell in results["cells"]:
        if cell["load"] == 0.9:
            m = cell["metrics"]
            for metric in ("ttft_attainment", "tpot_attainment", "slo_attainment"):
                low, high = number_of_percent(m[metric]["low"]), number_of_percent(m[metric]["high"])
                assert f"{number_of_percent(m[metric]['mean'])} {low} to {high}" in said
            assert seconds(m["ttft_s"]["p99"]["mean"]).replace("\xa0", " ") in said
            assert seconds(m["worst_wait_s"]["mean"]).replace("\xa0", " ") in said


def test_every_pair_is_there_with_its_interval() -> None:
    said = Page(render(SMALL)).sections["details"]

    for pair in SMALL["pairs"]:
        d = pair["difference_pp"]
        assert f"{signed(d['mean'])} {signed(d['low'])} to {signed(d['high'])}" in said


def test_a_number_that_is_missing_is_a_dash_and_never_none_or_nan() -> None:
    results = copy.deepcopy(SMALL)
    for cell in results["cells"]:
        cell["metrics"] |= {"goodput_per_s": None, "worst_wait_s": {"mean": float("nan")}, "tpot_s": {"p99": None}}

    said = Page(render(results)).text

    assert "–" in said
    assert not re.search(r"\b(None|nan|NaN|inf)\b", said)


# -- one file


def test_the_file_loads_nothing_and_runs_nothing() -> None:
    page = Page(render(made_results()))

    assert not {"script", "link", "iframe", "img", "object", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")]
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    page = Page(render(made_results()))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    referred = {(a["href"] or "")[1:] for _, a in page.tags if "href" in a} | {
        a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a
    }

    assert len(ids) == len(set(ids))
    assert referred <= set(ids)


def test_every_drawing_is_named_or_hidden_from_who_cannot_see_it() -> None:
    page = Page(render(made_results()))
    drawings = [a for tag, a in page.tags if tag == "svg" and a.get("class") != "at"]

    assert drawings
    for a in drawings:
        assert a.get("aria-hidden") == "true" or (
            a.get("role") == "img" and (a.get("aria-label") or a["aria-labelledby"])
        )


def test_a_large_comparison_stays_under_1_mb_and_says_what_made_room() -> None:
    many = {**STRATEGIES, **{f"policy-{i}+late": 0.5 + 0.1 * i for i in range(7)}}
    results = made_results(traces=["one", "two", "three", "four"], strategies=many)

    html = render(results)

    assert len(html.encode()) < 1_000_000
    assert "Left out to keep this file under 1 MB; results.json has it." in Page(html).sections["details"]
    assert "Left out to keep" not in Page(render(SMALL)).text


def test_hostile_names_are_text_in_every_place_a_name_can_be() -> None:
    results = made_results(
        traces=HOSTILE[:2], targets=HOSTILE[2:3], strategies={n: 0.6 + 0.1 * i for i, n in enumerate(HOSTILE)},
        tenants=HOSTILE,
    )  # fmt: skip
    results["meta"] |= {"notes": HOSTILE, "command": HOSTILE, "config": HOSTILE, "sentences": HOSTILE}
    for window in results["timelines"]:
        window |= {"instance": HOSTILE[0], "rule": HOSTILE[1]}
        window["requests"][0]["request_id"] = HOSTILE[2]

    page = Page(render(results))

    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    for name in HOSTILE[:5]:
        assert name in page.text
    assert "⟨U+202E⟩gnp.exe" in page.text
    assert "\u202e" not in page.text
    assert "n" * 10_000 in page.text


# -- what may be missing


@pytest.mark.parametrize(
    ("without", "section", "why"),
    [
        ("distributions", "latency", "Left out: the results hold no distributions of TTFT or TPOT."),
        ("predicted_vs_actual", "prediction", "Predicted against actual is left out"),
    ],
)
def test_an_addition_that_is_absent_from_the_cells_is_said_to_be_absent(without: str, section: str, why: str) -> None:
    results = copy.deepcopy(SMALL)
    for cell in results["cells"]:
        del cell[without]

    assert why in Page(render(results)).sections[section]


def test_the_fixed_part_alone_makes_a_report_that_says_what_is_left_out() -> None:
    place = {"trace": "t", "target": "fixed:2", "load": 0.9}
    number = {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 20}
    cells = [{**place, "strategy": s, "metrics": {"ttft_attainment": number}} for s in ("fcfs", "kairos")]

    page = Page(render({"meta": {}, "cells": cells, "bounds": [], "pairs": []}))

    assert "no pair was recorded: no verdict" in page.text
    assert "no bound was recorded" in page.sections["verdicts"]
    assert "every trace was run at one load" in page.sections["load"]
    assert "no attainment by prompt length, class or tenant" in page.sections["parts"]
    assert "the results hold no timeline" in page.sections["timeline"]
    assert "no cell holds them" in page.sections["prediction"]
    assert "not recorded" in page.sections["details"]


def test_one_strategy_alone_is_shown_without_a_verdict() -> None:
    html = render(made_results(**ONE, strategies={"fcfs": 0.9}))

    assert headings(html)[0] == "fcfs alone was run: nothing to compare it with"


def test_prefill_alone_has_no_columns_of_decode() -> None:
    said = Page(render(made_results(**ONE, strategies=TWO, stages="prefill"))).sections["strategies"]

    assert "TTFT alone was simulated" in said
    assert "goodput, req/s" not in said


def test_a_trace_without_a_load_is_called_as_recorded() -> None:
    results = copy.deepcopy(SMALL)
    for part in ("cells", "bounds", "pairs", "timelines"):
        for row in results[part]:
            row["load"] = None

    assert "as recorded" in Page(render(results)).sections["strategies"]


def test_notes_and_synthetic_traces_stand_at_the_top() -> None:
    said = Page(render(changed(notes=["preempt is not applied: control is gateway"]))).sections[""]

    assert "preempt is not applied: control is gateway" in said
    assert "Synthetic, not recorded traffic: azure2023_conv." in said


def test_a_baseline_without_a_cell_is_replaced_and_said_so() -> None:
    assert "The baseline nobody has no cell" in Page(render(changed(baseline="nobody"))).text


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "missing required field `cells`"),
        ({"cells": []}, "results.json has no cell"),
        ({"cells": [{"trace": "t", "strategy": "s", "metrics": 3}]}, "`$.cells[0].metrics`"),
        ({"cells": [{"trace": "t", "strategy": "s", "metrics": {"by_class": {"a": "b"}}}]}, "got `str`"),
    ],
)
def test_results_that_cannot_be_read_are_refused_with_the_place(results: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        render(results)


# -- the command


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["report", *arguments])


def test_the_command_writes_what_the_function_writes(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(SMALL))
    write_report(SMALL, tmp_path / "expected.html")

    ended = run(str(tmp_path / "results.json"), "--out", str(tmp_path / "new" / "report.html"), "--json")

    written = tmp_path / "new" / "report.html"
    assert written.read_text() == (tmp_path / "expected.html").read_text()
    assert json.loads(ended.stdout) == {"report": str(written), "bytes": written.stat().st_size}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), ("{", "is not JSON"), ("[]", "no JSON object")]
)
def test_a_file_that_is_no_results_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(InputError, match=message):
        read_file(path)
