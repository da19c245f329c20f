"""Strategies and experiments over HTTP and by command, and what schemathesis makes of their routes."""

import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from command_line import kairos
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service.snapshots import call, settings_of
from serving import served
from store.test_service import on

from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.store.session import Store

MINE = {"prefill": "fcfs", "prefill_placement": "late", "decode_placement": "headroom", "decode": {"name": "slack"}}
_FOLDER = tempfile.TemporaryDirectory()
APP = create_app(settings_of(store={"url": f"sqlite:///{_FOLDER.name}/kairos.db"}))


def test_a_version_never_changes_and_the_same_policies_are_the_same_version(store: Store, url: str) -> None:
    app = create_app(settings_of(store={"url": url}))
    put = [call(app, "PUT", "/strategies/mine", json=MINE | {"decode": d}).json() for d in ("slack", "slack", "capped")]
    shown = call(app, "GET", "/strategies/mine").json()["versions"]

    assert [answer["version"] for answer in put] == [1, 1, 2]
    assert [version["version"] for version in shown] == [2, 1]
    assert shown[1]["policies"] == put[0]["policies"]


def test_a_strategy_is_switched_and_rolled_back_with_rising_generations(store: Store, url: str) -> None:
    app = create_app(settings_of(store={"url": url}))
    call(app, "PUT", "/strategies/mine", json=MINE)
    answers = [
        call(app, "GET", "/strategies/active"),
        call(app, "PUT", "/strategies/active", json={"name": "mine"}),
        call(app, "POST", "/strategies/rollback"),
    ]

    told = [(answer.json()["name"], answer.json()["generation"]) for answer in answers]
    assert told == [("kairos", 1), ("mine", 2), ("kairos", 3)]


def test_a_restart_keeps_the_active_strategy_and_adds_no_version(store: Store, url: str) -> None:
    call(create_app(settings_of(store={"url": url})), "PUT", "/strategies/active", json={"name": "tuned"})
    again = create_app(settings_of(store={"url": url}))

    assert call(again, "GET", "/strategies/active").json()["name"] == "tuned"
    assert [s["version"] for s in call(again, "GET", "/strategies").json()["strategies"]] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("policies", "status", "says"),
    [
        (MINE | {"prefill": "fcf"}, 404, "Did you mean 'fcfs'"),
        (MINE | {"decode": {"name": "slack", "k": 1}}, 422, "slack"),
        (MINE | {"decode": "os:system"}, 422, "names a module"),
        ({"prefill": "fcfs"}, 422, "decode"),
    ],
)
def test_a_strategy_that_cannot_be_built_is_refused(policies: dict[str, Any], status: int, says: str) -> None:
    answer = call(APP, "PUT", "/strategies/mine", json=policies)

    assert (answer.status_code, says in answer.json()["detail"]) == (status, True)


def test_what_control_does_not_apply_is_a_warning() -> None:
    fleet = {"prefill": [{"profile": "even"}], "decode": [{"profile": "even", "control": "gateway"}]}
    app = create_app(settings_of(store={"url": f"sqlite:///{_FOLDER.name}/gateway.db"}, fleet=fleet))
    warnings = call(app, "PUT", "/strategies/mine", json=MINE).json()["warnings"]

    assert ["decode policy slack is not applied" in warning for warning in warnings] == [True]


def test_without_a_store_strategies_are_those_of_the_configuration() -> None:
    app = create_app(settings_of())

    assert call(app, "GET", "/strategies/active").json()["version"] == 0
    assert call(app, "PUT", "/strategies/active", json={"name": "tuned"}).status_code == 422
    assert call(app, "GET", "/experiments").status_code == 404


def test_commands_do_what_the_routes_do(tmp_path: Path) -> None:
    policies = tmp_path / "mine.yaml"
    policies.write_text("{prefill: fcfs, prefill_placement: late, decode_placement: headroom, decode: capped}")
    with served(on(f"sqlite:///{tmp_path}/kairos.db")) as (url, _):
        put = kairos("strategies", "put", "mine", policies, "--url", url)
        activated = kairos("strategies", "activate", "mine@1", "--url", url)
        rolled_back = kairos("strategies", "rollback", "--url", url)
        planned = kairos("experiments", "plan", "mine", "--url", url)
        unknown = kairos("experiments", "verify", "exp_09", "--url", url)
        asked = httpx.post(f"{url}/schedule", json={"instances": []})

    assert (put.code, put.stdout.split()[0]) == (0, "mine@1")
    assert activated.stdout == "active: mine@1, generation 2\n"
    assert rolled_back.stdout == "active: kairos@1, generation 3\n"
    assert (planned.code, "there is no history of kairos@1" in planned.stderr) == (2, True)
    assert (unknown.code, "unknown experiment 'exp_09'" in unknown.stderr) == (2, True)
    assert asked.json()["strategy"] == "kairos@1"


schema = schemathesis.openapi.from_asgi("/openapi.json", APP).include(path_regex="/(strategies|experiments)")


@schema.parametrize()
@settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_the_schema_allows_or_forbids_is_answered_as_it_says(case: schemathesis.Case[Any]) -> None:
    # what is there (a strategy, an experiment, a history) decides what is accepted, and a schema cannot say it
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
