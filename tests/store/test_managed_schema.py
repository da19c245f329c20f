"""`/requests` and `/instances` of a running service under schemathesis."""

import tempfile
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service.snapshots import settings_of
from serving import served
from store.test_service import on

from kairos.scheduler_core.service.app import create_app

_FOLDER = tempfile.TemporaryDirectory()
DOCUMENT = create_app(settings_of(store={"url": f"sqlite:///{_FOLDER.name}/kairos.db"})).openapi()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service as a process, with an instance of each role that stays: whatever is announced is admitted."""
    with served(on(f"sqlite:///{tmp_path_factory.mktemp('store')}/kairos.db")) as (address, _):
        for role in ("prefill", "decode"):
            told = {"role": role, "profile": "qwen3-32b-b300-tp4"}
            httpx.put(f"{address}/instances/the-{role}-instance-that-stays", json=told).raise_for_status()
        yield address


schema = schemathesis.openapi.from_dict(DOCUMENT).include(path_regex="^/(requests|instances)")


@schema.parametrize()
@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_the_schema_allows_or_forbids_is_answered_as_it_says(
    case: schemathesis.Case[Any], address: str
) -> None:
    # an id that is not known, an arrival that is to come, a class that is not configured: a schema cannot say so
    case.call_and_validate(base_url=address, excluded_checks=[positive_data_acceptance])
