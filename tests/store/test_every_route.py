"""Every route of a service with a database and keys, under schemathesis with the key of an operator."""

import tempfile
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import negative_data_rejection, not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service.snapshots import call, settings_of

from kairos.scheduler_core.service.access import rule_for
from kairos.scheduler_core.service.app import create_app

KEY = "k" * 40
_FOLDER = tempfile.TemporaryDirectory()
APP = create_app(
    settings_of(
        store={"url": f"sqlite:///{_FOLDER.name}/kairos.db"},
        access={"keys": {"operator": {"key": KEY, "role": "operate"}}},
    )
)
HEADERS = {"authorization": f"Bearer {KEY}"}
DOCUMENT: dict[str, Any] = call(APP, "GET", "/openapi.json", headers=HEADERS).json()
OPERATIONS = [(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations]


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=" ".join)
def test_without_a_key_every_route_but_health_is_answered_401(method: str, path: str) -> None:
    answer = call(APP, method, path)

    open_to_all = rule_for(method.upper(), path).role is None
    assert open_to_all == (path in ("/healthz", "/readyz"))
    assert open_to_all or answer.status_code == 401


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=" ".join)
def test_every_route_says_which_key_it_needs_and_how_it_refuses(method: str, path: str) -> None:
    operation = DOCUMENT["paths"][path][method]

    assert ("security" in operation) == ({"401", "403"} <= set(operation["responses"]))
    assert ("security" in operation) == (path not in ("/healthz", "/readyz"))


schema = schemathesis.openapi.from_asgi("/openapi.json", APP, headers=HEADERS)


@schema.parametrize()
@settings(
    max_examples=5,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_the_schema_allows_or_forbids_is_answered_as_it_says(case: schemathesis.Case[Any]) -> None:
    # fields depend on each other and on what is stored, which a schema cannot say; and rows of telemetry that do not
    # fit do not make the others be refused
    answer = case.call(headers=HEADERS)
    stated = [not_a_server_error] if answer.status_code == 503 else []  # a fleet without instances
    excluded = [positive_data_acceptance, negative_data_rejection, *stated]
    case.validate_response(answer, excluded_checks=excluded, headers=HEADERS)
