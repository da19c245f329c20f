"""The OpenAPI document is complete and true: schemas, examples, and what schemathesis makes of them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service.snapshots import call, scheduler_of, settings_of

import kairos
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.schemas import Snapshot

ROOT = Path(kairos.__file__).parents[2]
APP = create_app(settings_of())
DOCUMENT: dict[str, Any] = call(APP, "GET", "/openapi.json").json()
OPERATION = DOCUMENT["paths"]["/schedule"]["post"]


def test_the_pages_are_there() -> None:
    assert call(APP, "GET", "/docs").status_code == 200


def test_the_route_is_described_with_its_bodies_and_problems() -> None:
    answers = OPERATION["responses"]

    assert OPERATION["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Snapshot"
    }
    assert answers["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Answer"}
    assert sorted(answers) == ["200", "400", "401", "403", "404", "408", "413", "415", "422"]
    assert all("application/problem+json" in answers[status]["content"] for status in answers if status != "200")


def test_every_reference_of_the_document_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    known = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}

    assert {part.split('"')[0] for part in text.split('"$ref": "')[1:]} <= known


def test_every_part_of_a_snapshot_forbids_unknown_fields() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    parts = [
        part["items"]["$ref"].rsplit("/", 1)[1]
        for part in schemas["Snapshot"]["properties"].values()
        if "items" in part
    ]

    assert len(parts) == 6
    assert all(schemas[name]["additionalProperties"] is False for name in ["Snapshot", *parts])


def test_the_example_answer_is_what_the_example_snapshot_gets() -> None:
    example = OPERATION["requestBody"]["content"]["application/json"]["example"]
    body = (ROOT / "examples" / "schedule.json").read_bytes()
    scheduler = scheduler_of(load_settings(ROOT / "examples" / "kairos.yaml", {}))

    answer = msgspec.to_builtins(scheduler.schedule(msgspec.json.decode(body, type=Snapshot), 0.0, body))

    assert json.loads(body) == example
    shown = OPERATION["responses"]["200"]["content"]["application/json"]["example"]
    assert answer | {"state": ""} == shown | {"state": ""}  # opaque, and longer than is worth reading


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/strategies"])
def test_the_other_routes_answer(path: str) -> None:
    assert call(APP, "GET", path).status_code == 200


def test_the_strategies_are_listed_with_the_active_one() -> None:
    listed = call(APP, "GET", "/strategies").json()

    assert listed["active"] == "kairos"
    assert {s["name"]: s["text"] for s in listed["strategies"]}["kairos"] == "on-time+late+headroom+envelope"


schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_the_schema_allows_or_forbids_is_answered_as_it_says(case: schemathesis.Case[Any]) -> None:
    # fields depend on each other (an instance named elsewhere, ...), which a schema cannot say: hence no check that
    # whatever fits the schema is accepted
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
