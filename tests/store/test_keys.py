"""Keys in the database: made once, shown once, taken over and taken back by a service that runs."""

import json
import time
from collections.abc import Callable

import httpx
import pytest
from command_line import kairos
from serving import served
from sqlalchemy import select
from store.test_service import on

from kairos.scheduler_core.config import AccessSettings
from kairos.scheduler_core.errors import ConflictError, UnknownNameError
from kairos.scheduler_core.service.access import Caller, Keys
from kairos.scheduler_core.service.store.queries.keys import add_key, revoke_key
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import ApiKey

SEEN_WITHIN_S = 2.0


def made(store: Store, name: str = "gateway-1", tenant: str | None = None) -> str:
    with store.write() as connection:
        return add_key(connection, name, "schedule", tenant)


def test_a_key_is_found_by_itself_and_the_database_holds_its_digest_alone(store: Store) -> None:
    key = made(store, tenant="acme")
    keys = Keys(AccessSettings(), store)
    with store.read() as connection:
        rows = connection.execute(select(ApiKey.__table__)).all()

    assert keys.find(key.encode()) == Caller("gateway-1", "schedule", "acme")
    assert keys.find(key.encode()[:-1]) is None
    assert key not in str(rows)
    assert len(key) >= 43


def test_no_two_keys_are_alike(store: Store) -> None:
    assert made(store, "a") != made(store, "b")


def test_a_revoked_key_is_nobodys_and_keys_stay_needed(store: Store) -> None:
    key = made(store)
    with store.write() as connection:
        revoke_key(connection, "gateway-1")
    keys = Keys(AccessSettings(), store)

    assert (keys.find(key.encode()), keys.required) == (None, True)


def test_without_any_key_none_is_needed(store: Store) -> None:
    assert not Keys(AccessSettings(), store).required


def test_a_name_is_given_once_even_after_it_was_revoked(store: Store) -> None:
    made(store)
    with store.write() as connection:
        revoke_key(connection, "gateway-1")

    with pytest.raises(ConflictError, match="take another name"):
        made(store)


def test_a_key_that_never_was_cannot_be_revoked(store: Store) -> None:
    made(store)

    with store.write() as connection, pytest.raises(UnknownNameError, match="Did you mean 'gateway-1'"):
        revoke_key(connection, "gatewya-1")


def until(holds: Callable[[], bool]) -> float:
    """Seconds until it holds, or until ten are over."""
    began_s = time.monotonic()
    while not holds() and time.monotonic() - began_s < 10:
        time.sleep(0.02)
    return time.monotonic() - began_s


def test_a_running_service_takes_a_new_key_and_refuses_a_revoked_one_within_two_seconds(empty: Store, url: str) -> None:
    if not empty.embedded:
        assert kairos("db", "upgrade", "--url", url).code == 0
    with served(on(url)) as (address, _):

        def status(key: str | None = None) -> int:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return httpx.get(f"{address}/strategies", headers=headers).status_code

        before = status()
        told = kairos("keys", "add", "ui", "--role", "read", "--url", url, "--json")
        key = json.loads(told.stdout)["key"]
        closed_s = until(lambda: status() == 401)
        with_key = status(key)
        assert kairos("keys", "revoke", "ui", "--url", url).code == 0
        revoked_s = until(lambda: status(key) == 401)

    assert (before, with_key) == (200, 200)
    assert closed_s < SEEN_WITHIN_S
    assert revoked_s < SEEN_WITHIN_S


def test_the_keys_are_listed_without_what_only_their_holders_know(store: Store, url: str) -> None:
    key = made(store, tenant="acme")

    listed = kairos("keys", "list", "--url", url)
    as_json = json.loads(kairos("keys", "list", "--url", url, "--json").stdout)

    assert listed.stdout.startswith("gateway-1: schedule for tenant acme, made ")
    assert [(row["name"], row["role"], row["tenant"], row["revoked_at"]) for row in as_json] == [
        ("gateway-1", "schedule", "acme", None)
    ]
    assert key not in listed.stdout + str(as_json)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("add", "a", "--role", "reed"), "use read, schedule, operate"),
        (("add", "", "--role", "read"), "a name needs 1 to 128 printable characters"),
        (("add", "a", "--role", "read", "--tenant", "a\nb"), "--tenant needs 1 to 256 printable characters"),
        (("revoke", "nobody"), "unknown key 'nobody'"),
    ],
)
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_bad_input_ends_with_exit_code_2_and_one_line(
    arguments: tuple[str, ...], says: str, store: Store, url: str
) -> None:
    ended = kairos("keys", *arguments, "--url", url)

    assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert says in ended.stderr
