"""The service on a database as a process, its settings, and its OpenAPI document under schemathesis."""

import os
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import schemathesis
from command_line import kairos
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service.snapshots import call, settings_of
from serving import CONFIG, SERVE, served
from sqlalchemy import func, select
from store.rows import decode_step, request

from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.store.revisions import head
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Step


def on(url: str) -> dict[str, str]:
    """The environment of a service on a database."""
    return {"KAIROS_STORE__URL": url, "PATH": "/usr/bin:/bin", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}


def send(address: str, batch_id: str) -> bool:
    """Have 100 steps stored; whether they were stored before."""
    body = {"batch_id": batch_id, "rows": [decode_step()] * 100}
    answer = httpx.post(f"{address}/telemetry/steps", json=body).raise_for_status().json()
    assert answer["stored"] == 100
    return bool(answer["duplicate"])


def test_a_kill_in_the_middle_of_ingest_loses_nothing_acknowledged_and_a_sender_makes_up_for_the_rest(
    empty: Store, url: str
) -> None:
    if not empty.embedded:
        assert kairos("db", "upgrade", "--url", url).code == 0
    sent: set[str] = set()
    acknowledged: set[str] = set()
    enough = Event()

    def sender(name: str) -> None:
        for number in count():
            batch_id = f"{name}-{number}"
            sent.add(batch_id)
            send(address, batch_id)
            acknowledged.add(batch_id)
            if len(acknowledged) >= 30:
                enough.set()

    with ThreadPoolExecutor(3) as pool, served(on(url)) as (address, process):
        senders = [pool.submit(sender, name) for name in "abc"]
        assert enough.wait(60)
        process.send_signal(signal.SIGKILL)
        failures = [type(ended.exception(60)) for ended in senders]
    with served(on(url)) as (address, _):
        there_before = {batch_id for batch_id in sent if send(address, batch_id)}
        more = httpx.post(f"{address}/telemetry/requests", json=[request()])

    assert all(issubclass(failure, httpx.TransportError) for failure in failures)
    assert there_before >= acknowledged
    assert more.json()["stored"] == 1
    with empty.read() as connection:
        assert connection.scalar(select(func.count()).select_from(Step)) == 100 * len(sent)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_shared_database_that_nobody_upgraded_ends_the_service_with_what_to_run(url: str) -> None:
    ended = subprocess.run(SERVE, capture_output=True, text=True, env={"KAIROS_STORE__URL": url}, timeout=60)

    assert ended.returncode == 1
    assert f"at revision none, this Kairos needs {head()}; run kairos db upgrade" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_address_is_shown_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "kairos.yaml"
    path.write_text(CONFIG.read_text() + "\nstore: {url: 'postgresql://a:geheim@h/x', queued_rows: 5}\n")
    told = kairos("config", "check", path, "--json")

    assert (told.code, "geheim" in told.stdout + told.stderr) == (0, False)
    assert "geheim" not in repr(load_settings(path, {}))
    assert load_settings(path, {"KAIROS_STORE__URL": "sqlite:///b.db"}).store.url.get_secret_value() == "sqlite:///b.db"  # type: ignore[union-attr]


def test_a_wrong_setting_of_the_store_is_named_without_its_address(tmp_path: Path) -> None:
    path = tmp_path / "kairos.yaml"
    path.write_text(CONFIG.read_text() + "\nstore: {url: 'postgresql://a:geheim@h/x', queued_rows: 0}\n")

    with pytest.raises(ConfigError, match=r"store.queued_rows") as raised:
        load_settings(path, {})
    assert "geheim" not in str(raised.value)


_FOLDER = tempfile.TemporaryDirectory()
APP = create_app(settings_of(store={"url": f"sqlite:///{_FOLDER.name}/kairos.db"}))
DOCUMENT: dict[str, Any] = call(APP, "GET", "/openapi.json").json()


@pytest.mark.parametrize("name", ["steps", "requests", "samples"])
def test_the_routes_are_described_with_their_bodies_and_problems(name: str) -> None:
    operation = DOCUMENT["paths"][f"/telemetry/{name}"]["post"]

    assert sorted(operation["responses"]) == [
        *("200", "202", "400", "401", "403", "408", "409", "413", "415", "422", "429", "503")
    ]
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/TelemetryAnswer"
    }


def test_every_reference_of_the_document_leads_somewhere() -> None:
    text = str(DOCUMENT)
    known = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}

    assert {part.split("'")[0] for part in text.split("'$ref': '")[1:]} <= known


schema = schemathesis.openapi.from_asgi("/openapi.json", APP).include(path_regex="/telemetry/")


@schema.parametrize()
@settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_the_schema_allows_or_forbids_is_answered_as_it_says(case: schemathesis.Case[Any]) -> None:
    # what a step needs depends on other fields, which a schema cannot say: hence no check that whatever fits the schema
    # is accepted; and rows that do not fit do not make the others be refused
    case.call_and_validate(excluded_checks=[positive_data_acceptance, schemathesis.checks.negative_data_rejection])
