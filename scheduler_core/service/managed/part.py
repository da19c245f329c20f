"""The part of the control plane that takes announcements, keeps reservations, and knows the live fleet."""

import logging
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b

from starlette.routing import BaseRoute

from kairos.scheduler_core.errors import BusyError, ConflictError, FieldsError, NotFoundError, StoreError
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.decisions.record import pack
from kairos.scheduler_core.service.decisions.recorder import Recorder
from kairos.scheduler_core.service.managed.book import Book
from kairos.scheduler_core.service.managed.fleet import LiveFleet, Member
from kairos.scheduler_core.service.managed.ledger import Committed, Ledger, reservation_of
from kairos.scheduler_core.service.managed.placing import Choice, Placer
from kairos.scheduler_core.service.managed.reservation import End, Progress, Reservation
from kairos.scheduler_core.service.managed.routes import managed_routes
from kairos.scheduler_core.service.managed.schemas import Announcement, Reported
from kairos.scheduler_core.service.plane import Database, Plane
from kairos.scheduler_core.service.store.queries.decisions import KeptFor
from kairos.scheduler_core.service.store.queries.reservations import (
    delete_ended_reservations,
    reservations_after,
    reservations_named,
)
from kairos.scheduler_core.telemetry import RequestRow

_log = logging.getLogger(__name__)

STORED_WITHIN_S = 2.0
"""An answer waits so long for its commit, then says that it is not stored yet."""
SWEEP_EVERY_S = 0.5
_CLEAN_EVERY_S = 60.0
_AHEAD_S = 1.0
"""How far another machine's clock may be ahead."""
_SEEN_BY_ALL_S = 2.0
"""By then every replica knows that an instance drains."""
_PAGE_ROWS = 1_000


class Managed:
    """Reservations and the fleet they are on."""

    def __init__(
        self,
        plane: Plane,
        database: Database,
        recorder: Recorder,
        requests_stored: Callable[[Sequence[RequestRow]], None],
    ) -> None:
        """Args: requests_stored: told of requests that ended, once they are committed."""
        self._plane, self._database, self._recorder = plane, database, recorder
        self._requests_stored = requests_stored
        self._settings = plane.settings.managed
        self.book = Book()
        self.fleet = LiveFleet(plane.settings, database)
        self._placer = Placer(plane.scheduler, self.fleet, self.book.load, self._settings.health_every_s)
        self._ledger = Ledger(database.store, self._on_committed)
        self._seen_change = 0
        self._clean_at_s = 0.0
        self._sweeper = Background("kairos-sweeper", self._sweep_again_and_again)
        database.changes.watch("instances", self.fleet.look)
        database.changes.watch("reservations", self.look)

    @property
    def drain_s(self) -> float:
        """How long an instance that is removed keeps what it has."""
        return self._settings.drain_s

    def routes(self) -> Sequence[BaseRoute]:
        """`/requests` and `/instances`."""
        return managed_routes(self)

    def start(self) -> None:
        """Take over what is stored, write what comes, watch over both."""
        self._ledger.start()
        self.fleet.start()
        self._sweeper.start()

    def stop(self) -> None:
        """Store what is left."""
        self._sweeper.stop()
        self.fleet.stop()
        self._ledger.stop()

    # -- requests

    def announce(self, asked: Announcement) -> tuple[Reservation, bool]:
        """Take a request, or the reservation that was made for it before; and whether it is stored.

        Raises:
            NotAdmittedError: it was refused.
            ConflictError: another request was announced under its id.
            BusyError: there are as many reservations as there may be.
            FieldsError: its class is unknown, or its arrival in the future.
        """
        now_s = time.time()
        arrival_s = now_s if asked.arrival_s is None else asked.arrival_s
        if arrival_s > now_s + _AHEAD_S:
            raise FieldsError([("arrival_s", f"is {arrival_s - now_s:.1f} s in the future; send UTC epoch seconds")])
        digest = blake2b(asked.model_dump_json().encode(), digest_size=16).hexdigest()
        ttl_s = asked.ttl_s or self._settings.ttl_s
        with self.book.lock:
            known = self.book.get(asked.request_id)
            if known is None:
                if len(self.book.load) >= self._settings.most_reservations:
                    raise BusyError(
                        f"{len(self.book.load)} requests are reserved for, the limit is "
                        f"{self._settings.most_reservations} (managed.most_reservations)",
                        1,
                    )
                choice = self._placer.place(asked, digest, arrival_s, now_s, ttl_s)
                if choice.terms is not None:
                    known = self.book.put(Reservation(choice.terms, Progress(now_s + ttl_s)))
                self._record(asked, choice, now_s)
        if known is None:
            assert choice.refusal is not None
            raise choice.refusal
        stored = self._stored(known)
        reservation = stored or known
        if reservation.terms.digest != digest:
            raise ConflictError(f"another request was announced under the id '{asked.request_id}'; use a new one")
        return reservation, stored is not None

    def report(self, request_id: str, told: Reported, tenant: str | None) -> tuple[Reservation, bool]:
        """Take in what happened to a request; how far it has come then, and whether that is stored.

        Raises:
            NotFoundError: it is not known here.
            FieldsError: a time before its arrival, or in the future.
        """
        now_s = time.time()
        known = self._known(request_id, tenant)
        arrival_s = known.terms.arrival_s
        at_s = max(now_s, arrival_s) if told.at_s is None else told.at_s
        if not arrival_s <= at_s <= now_s + _AHEAD_S:
            raise FieldsError([("at_s", f"must lie between the arrival ({arrival_s:.3f}) and now ({now_s:.3f})")])
        progress = _progress_of(told, at_s, now_s + known.terms.ttl_s)
        reservation = self.book.put(Reservation(known.terms, progress))
        stored = self._stored(reservation)
        return stored or reservation, stored is not None

    def release(self, request_id: str, tenant: str | None) -> tuple[Reservation, bool]:
        """End a reservation, unless it has ended; and whether that is stored.

        Raises:
            NotFoundError: it is not known here.
        """
        reservation = self.book.end(self._known(request_id, tenant), "released", time.time())
        stored = self._stored(reservation)
        return stored or reservation, stored is not None

    def _known(self, request_id: str, tenant: str | None) -> Reservation:
        """A reservation, looked up in the database where another replica may have just made it."""
        known = self.book.get(request_id)
        if known is None:
            with self._database.store.read() as connection:
                rows = reservations_named(connection, [request_id])
            known = self.book.put(reservation_of(rows[0])) if rows else None
        if known is None or tenant not in (None, known.terms.tenant):
            raise NotFoundError(f"no request '{request_id}' is announced here, or it ended long ago")
        return known

    def _stored(self, reservation: Reservation) -> Reservation | None:
        """What the database holds of it now; None: not yet."""
        try:
            return self._ledger.put(reservation).result(STORED_WITHIN_S)
        except TimeoutError:
            return None

    def _record(self, asked: Announcement, choice: Choice, now_s: float) -> None:
        kept_for: KeptFor | None = None
        if choice.refusal is not None:
            kept_for = "rejected"
        elif choice.record.rule.failures:
            kept_for = "failed"
        elif not choice.record.on_time:
            kept_for = "missed"
        decision_id = choice.terms.decision_id if choice.terms else ""
        self._recorder.keep_of(
            asked.request_id,
            asked.tenant,
            decision_id,
            now_s,
            kept_for,
            lambda: pack(choice.record, choice.elsewhere),
        )

    # -- what others did, what time does

    def look(self) -> None:
        """Take over what changed in the database.

        Raises:
            StoreError: it is away.
        """
        while True:
            with self._database.store.read() as connection:
                rows = reservations_after(connection, self._seen_change, _PAGE_ROWS)
            for row in rows:
                self.book.put(reservation_of(row))
            if rows:
                self._seen_change = rows[-1].change
            if len(rows) < _PAGE_ROWS:
                return

    def sweep(self) -> None:
        """End what has expired and what is on instances that are gone; let go of instances that have drained."""
        now_s = time.time()
        for reservation in self.book.expire(now_s):
            self._ledger.put(reservation)
        if self._orphaned():
            self.fleet.look()  # another replica may have taken an instance in a moment ago
            for instance_id in self._orphaned():
                for reservation in self.book.on(instance_id):
                    self._ledger.put(self.book.end(reservation, "instance_gone", now_s))
        for member in list(self.fleet.members.values()):
            if member.gone_at_s is not None and self._may_go(member, now_s):
                self.fleet.remove(member.instance_id)
        self._plane.metrics.reservations.set(len(self.book.load))
        if now_s >= self._clean_at_s:
            delete_ended_reservations(self._database.store, now_s)
            self._clean_at_s = now_s + _CLEAN_EVERY_S

    def _orphaned(self) -> list[str]:
        """Instances with reservations that are not in the fleet."""
        with self.book.lock:
            return [name for name in self.book.load.members if name not in self.fleet.members]

    def _may_go(self, member: Member, now_s: float) -> bool:
        if member.gone_at_s is None:
            return False
        told_all_s = member.gone_at_s - self._settings.drain_s + _SEEN_BY_ALL_S
        empty = member.instance_id not in self.book.load.members
        return now_s >= member.gone_at_s or (empty and now_s >= told_all_s)

    def _sweep_again_and_again(self) -> None:
        away = False
        while not self._sweeper.stopped.wait(SWEEP_EVERY_S):
            try:
                self.sweep()
                away = False
            except StoreError as error:
                if not away:
                    _log.warning("the live fleet stays as it is until the database answers again: %s", error)
                away = True
            except Exception:  # the thread's top
                _log.exception("reservations were not looked after")

    def _on_committed(self, done: Committed) -> None:
        for reservation in done.reservations:
            self.book.put(reservation)
        for reservation in done.ended:
            if (end := reservation.progress.holds) is not None:
                self._plane.metrics.reservations_ended.labels(end.how).inc()
        if done.rows:
            self._requests_stored(done.rows)


def _progress_of(told: Reported, at_s: float, expires_at_s: float) -> Progress:
    """What an event says."""
    tokens = told.output_tokens or 0
    match told.event:
        case "prefill_started":
            return Progress(expires_at_s, prefill_started_s=at_s)
        case "first_token":
            return Progress(expires_at_s, first_token_s=at_s, last_token_s=at_s, output_tokens=max(1, tokens))
        case "transferred":
            return Progress(expires_at_s, transferred_s=at_s)
        case "tokens":
            return Progress(expires_at_s, last_token_s=at_s, output_tokens=tokens)
        case "finished":
            end = End(False, at_s, "finished")
            return Progress(expires_at_s, last_token_s=at_s, output_tokens=tokens, end=end)
        case "failed":
            return Progress(expires_at_s, output_tokens=tokens, end=End(False, at_s, "failed"))
