"""The metrics by name: as Prometheus wants them, on their page, and in the dashboard and the rules."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from service.snapshots import call, decode, prefill, settings_of, snapshot, waits

import kairos
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.metrics import Metrics

ROOT = Path(kairos.__file__).parents[2]
FAMILIES: list[Metric] = list(Metrics().registry.collect())
OURS = [family for family in FAMILIES if family.name.startswith("kairos_")]
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"], "gauge": [""]}
SERIES = {family.name + suffix for family in FAMILIES for suffix in SUFFIXES[family.type]}
RULES: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "prometheus-rules.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana.json").read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


RECORDED = {rule["record"] for rule in rules() if "record" in rule}
EXPRESSIONS = [rule["expr"] for rule in rules()] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())
]


@pytest.mark.parametrize("family", OURS, ids=lambda family: family.name)
def test_a_name_says_what_is_counted_and_in_which_unit(family: Metric) -> None:
    assert re.fullmatch(r"kairos(_[a-z]+)+", family.name)
    assert not re.search(r"_(total|count|sum|bucket|info)$", family.name)
    assert not re.search(r"_(ms|s|us|milliseconds|percent)$", family.name)
    assert family.documentation.endswith(".")
    if family.type == "histogram":
        assert family.name.endswith(("_seconds", "_bytes", "_ratio", "_tokens"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_metric_is_on_the_page(family: Metric) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()

    name = family.name if family.type == "histogram" else family.name + SUFFIXES[family.type][0]
    assert f"`{name}`" in page


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_series_of_the_dashboard_and_the_rules_exists(expression: str) -> None:
    named = set(re.findall(r"\b(?:kairos|process)[_:][a-zA-Z0-9_:]+", expression))

    assert named
    assert named <= SERIES | RECORDED


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_label_of_the_dashboard_and_the_rules_exists(expression: str) -> None:
    known = {"le", "instance"}.union(
        *(wrapped._labelnames for wrapped in vars(Metrics()).values() if hasattr(wrapped, "_labelnames"))
    )
    grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(", ")}
    matched = set(re.findall(r'(\w+)(?:!=|=~|=)"', expression))

    assert grouped | matched <= known


def test_every_alert_says_what_is_wrong_and_how_bad() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]

    assert alerts
    assert all(rule["annotations"]["summary"].endswith(".") and rule["labels"]["severity"] for rule in alerts)
    assert {rule["labels"]["severity"] for rule in alerts} == {"page", "ticket"}


def test_the_dashboard_has_no_panel_over_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}

        assert not cells & taken
        taken |= cells


def test_a_decision_is_counted_with_its_time_queue_and_guards() -> None:
    app = create_app(settings_of(strategies={"broken": BROKEN}))
    body = snapshot(prefill(), decode(), waiting=[waits("a"), waits("b")], strategy="broken")

    call(app, "POST", "/schedule", json=body)
    families = text_string_to_metric_families(call(app, "GET", "/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    values = {(sample.name, *sample.labels.values()): sample.value for sample in samples}

    assert values["kairos_decision_seconds_count",] == 1
    assert values["kairos_waiting_requests",] == 2
    assert values["kairos_guard_activations_total", "fallback"] >= 1
    assert values["kairos_build_info", kairos.__version__] == 1


BROKEN = {
    "prefill": "service.recording:Failing",
    "prefill_placement": "late",
    "decode_placement": "headroom",
    "decode": "continuous",
}
