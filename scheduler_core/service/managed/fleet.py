"""The live fleet: instances of the configuration that have an address, and those announced by REST."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import httpx

from kairos.scheduler_core.config import DecodeGroup, PrefillGroup, Settings
from kairos.scheduler_core.errors import NotFoundError
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.managed.schemas import InstanceBody
from kairos.scheduler_core.service.plane import Database
from kairos.scheduler_core.service.store.changes import announce
from kairos.scheduler_core.service.store.queries.instances import (
    InstanceRow,
    delete_instance,
    put_instance,
    stored_instances,
)

_log = logging.getLogger(__name__)

_ANSWER_WITHIN_S = 2.0
"""How long an engine may take to say that it is well."""

State = Literal["new", "active", "unhealthy", "draining"]
Source = Literal["configuration", "rest"]


@dataclass(frozen=True, slots=True)
class Member:
    """An instance of the fleet."""

    instance_id: str
    told: InstanceBody
    source: Source
    draining: bool = False
    gone_at_s: float | None = None


class LiveFleet:
    """Who is there, and who takes requests. What is stored is the same at every replica; health each checks itself."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database, self._every_s = database, settings.managed.health_every_s
        self._configured = {member.instance_id: member for member in _configured(settings)}
        self.members: Mapping[str, Member] = dict(self._configured)
        """By id, in index order; replaced whole."""
        self._good: dict[str, bool] = {}
        """Whether the last check was good, of those that were good once."""
        self._background = Background("kairos-health", self._check_again_and_again)

    def get(self, instance_id: str) -> Member:
        """The instance of that id.

        Raises:
            NotFoundError: there is none.
        """
        if instance_id not in self.members:
            raise NotFoundError(f"no instance '{instance_id}' is in the live fleet")
        return self.members[instance_id]

    def state_of(self, member: Member) -> State:
        """Whether it takes requests (active), or why not."""
        if member.draining:
            return "draining"
        if member.told.url is None:
            return "active"
        good = self._good.get(member.instance_id)
        return "new" if good is None else "active" if good else "unhealthy"

    def start(self) -> None:
        """Check health from now on."""
        self._background.start()

    def stop(self) -> None:
        """End the checks."""
        self._background.stop()

    # -- changes; each is committed when this returns

    def put(self, instance_id: str, told: InstanceBody) -> Member:
        """Take an instance in, or tell of one anew; one that drained takes requests again.

        Raises:
            StoreError: the database is away.
        """
        return self._store(Member(instance_id, told, "rest"))

    def drain(self, instance_id: str, gone_at_s: float | None = None) -> Member:
        """Give an instance no new requests; from `gone_at_s` on, or once it is empty, it is no member.

        Raises:
            NotFoundError, StoreError: there is none; the database is away.
        """
        return self._store(replace(self.get(instance_id), draining=True, gone_at_s=gone_at_s))

    def remove(self, instance_id: str) -> None:
        """Let it be no member. One of the configuration stays away until it is put again.

        Raises:
            StoreError: the database is away.
        """
        with self._database.store.write() as connection:
            if instance_id in self._configured:
                told = self._configured[instance_id].told
                put_instance(connection, InstanceRow(instance_id, "gone", _body(told, None)))
            else:
                delete_instance(connection, instance_id)
            announce(connection, "instances")
        self.look()

    def _store(self, member: Member) -> Member:
        state = "draining" if member.draining else "active"
        with self._database.store.write() as connection:
            put_instance(connection, InstanceRow(member.instance_id, state, _body(member.told, member.gone_at_s)))
            announce(connection, "instances")
        self.look()
        return self.get(member.instance_id)

    def look(self) -> None:
        """Take over what is stored.

        Raises:
            StoreError: the database is away.
        """
        with self._database.store.read() as connection:
            rows = stored_instances(connection)
        members = dict(self._configured)
        for row in rows:
            if row.state == "gone":
                members.pop(row.instance_id, None)
                continue
            told = InstanceBody.model_validate(row.body["told"])
            source: Source = "configuration" if row.instance_id in self._configured else "rest"
            members[row.instance_id] = Member(
                row.instance_id, told, source, row.state == "draining", row.body["gone_at_s"]
            )
        changed = [m.instance_id for m in members.values() if _url(self.members.get(m.instance_id)) != m.told.url]
        for instance_id in [*changed, *(known for known in self._good if known not in members)]:
            self._good.pop(instance_id, None)  # another address is a new one
        self.members = members

    # -- health

    def _check_again_and_again(self) -> None:
        while not self._background.stopped.is_set():
            try:
                asyncio.run(self.check_health())
            except Exception:  # the thread's top
                _log.exception("the health of the fleet was not checked")
            self._background.stopped.wait(self._every_s)

    async def check_health(self) -> None:
        """Ask every instance that has an address how it is."""
        members = [member for member in self.members.values() if member.told.url]
        if members:
            async with httpx.AsyncClient(timeout=_ANSWER_WITHIN_S) as client:
                await asyncio.gather(*(self._check(client, member) for member in members))

    async def _check(self, client: httpx.AsyncClient, member: Member) -> None:
        address = (member.told.url or "").removeprefix("dns+").rstrip("/")
        try:
            good = (await client.get(f"{address}/health")).is_success
        except (httpx.HTTPError, httpx.InvalidURL):
            good = False
        if good or member.instance_id in self._good:
            if self._good.get(member.instance_id) not in (None, good):
                _log.warning("instance %s is %s", member.instance_id, "well again" if good else "not well")
            self._good[member.instance_id] = good


def _url(member: Member | None) -> str | None:
    return None if member is None else member.told.url


def _body(told: InstanceBody, gone_at_s: float | None) -> dict[str, object]:
    return {"told": told.model_dump(mode="json"), "gone_at_s": gone_at_s}


def _configured(settings: Settings) -> list[Member]:
    """The instances of the configuration that have an address, under the names that the simulator gives them."""
    members: list[Member] = []
    for role, groups in (("prefill", settings.fleet.prefill), ("decode", settings.fleet.decode)):
        index = 0
        for group in groups:
            for _ in range(group.count):
                if group.url is not None:
                    members.append(Member(f"{role}-{index}", _told(settings, group), "configuration"))
                index += 1
    return members


def _told(settings: Settings, group: PrefillGroup | DecodeGroup) -> InstanceBody:
    fields = InstanceBody.model_fields.keys() & type(group).model_fields.keys()
    given = {name: getattr(group, name) for name in fields} | {"serves": list(settings.served_models(group))}
    return InstanceBody(role="prefill" if isinstance(group, PrefillGroup) else "decode", **given)
