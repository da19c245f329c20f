"""Every reservation that is known here: the live ones as load, the ended ones until nobody asks for them any more."""

import heapq
from threading import RLock

from kairos.scheduler_core.service.managed.load import Load
from kairos.scheduler_core.service.managed.reservation import End, How, Progress, Reservation

REMEMBER_S = 600.0
"""How long after its end a reservation is answered as before, and may still be told more."""


class Book:
    """Reservations in memory. Whoever reads and then writes holds `lock` for both."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.load = Load()
        self._reservations: dict[str, Reservation] = {}
        self._due: list[tuple[float, str]] = []
        """When to look at each: it may have expired, or may be forgotten."""

    def get(self, request_id: str) -> Reservation | None:
        """The reservation of that id, live or ended."""
        return self._reservations.get(request_id)

    def put(self, reservation: Reservation) -> Reservation:
        """Take a state in, beside what is known of the same reservation; what is known then."""
        request_id = reservation.terms.request_id
        with self.lock:
            known = self._reservations.get(request_id)
            if known is None:
                heapq.heappush(self._due, (reservation.progress.expires_at_s, request_id))
            elif known.terms.digest == reservation.terms.digest:
                reservation = reservation.moved(known.progress)
            self._reservations[request_id] = reservation
            self.load.put(reservation)
            return reservation

    def end(self, reservation: Reservation, how: How, now_s: float) -> Reservation:
        """Take in that one has ended."""
        progress = Progress(reservation.progress.expires_at_s, end=End(how == "expired", now_s, how))
        return self.put(reservation.moved(progress))

    def expire(self, now_s: float) -> list[Reservation]:
        """End what has expired, and forget what ended long ago; those that ended now."""
        expired: list[Reservation] = []
        with self.lock:
            while self._due and self._due[0][0] <= now_s:
                _, request_id = heapq.heappop(self._due)
                reservation = self._reservations[request_id]
                end = reservation.progress.holds
                if end is None and reservation.progress.expires_at_s <= now_s:
                    reservation = self.end(reservation, "expired", now_s)
                    expired.append(reservation)
                    end = reservation.progress.holds
                again_s = reservation.progress.expires_at_s if end is None else end.at_s + REMEMBER_S
                if again_s > now_s:
                    heapq.heappush(self._due, (again_s, request_id))
                else:
                    del self._reservations[request_id]
        return expired

    def on(self, instance_id: str) -> list[Reservation]:
        """The live ones of an instance."""
        with self.lock:
            return [self._reservations[request_id] for request_id in self.load.members.get(instance_id, ())]
