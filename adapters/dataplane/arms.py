"""Which strategy serves a request now: what a gateway or an engine knows without asking, from what it last pulled.

Times are seconds on the clock of experiments (`kairos.scheduler_core.experiment`), handed in. Nothing here does I/O.
"""

import hashlib
import hmac
from collections import OrderedDict
from typing import Any, Literal

import msgspec

from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.experiment import Schedule, read_schedule
from kairos.scheduler_core.strategy import PolicyChoice, Strategy

SESSIONS = 100_000
"""How many sessions of a `sticky` experiment are remembered; the longest unseen one is forgotten."""


class _Choice(msgspec.Struct, frozen=True):
    name: str
    params: dict[str, Any] = {}


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a strategy, as `GET /strategies/active` has it."""

    name: str
    version: int
    policies: dict[str, _Choice]

    @property
    def known_as(self) -> str:
        """`name@version`: what schedules and telemetry call it."""
        return f"{self.name}@{self.version}"

    def strategy(self) -> Strategy:
        """The policies, under that name.

        Raises:
            InputError: a policy is not installed here, or does not take its parameters.
        """
        choices = {kind: PolicyChoice(choice.name, choice.params) for kind, choice in self.policies.items()}
        try:
            return Strategy(self.known_as, **choices).check()
        except TypeError as problem:
            raise InputError(f"strategy {self.known_as} is not one of this Kairos: {problem}") from problem


class Lengths(msgspec.Struct, frozen=True):
    """Which arrivals of a slot count: neither those of its first `burn_s` nor of its last `tail_s` seconds."""

    block_s: float
    burn_s: float
    tail_s: float


class Experiment(msgspec.Struct, frozen=True):
    """The experiment that runs."""

    id: str
    design: Literal["switchback", "pools", "sticky", "shadow"]
    challenger: Version
    lengths: Lengths
    schedule: str
    """Signed; `read_schedule` reads it."""


class Active(Version, frozen=True, kw_only=True):
    """The answer of `GET /strategies/active`."""

    generation: int
    clock_scale: float = 1.0
    experiment: Experiment | None = None


class Arm(msgspec.Struct, frozen=True):
    """What serves a request, or a pool, now."""

    strategy: Strategy
    """Its name is what telemetry reports."""
    challenger: bool


class Running(msgspec.Struct, frozen=True):
    """An experiment whose schedule carries the right signature."""

    experiment: Experiment
    schedule: Schedule
    challenger: Arm


class Arms:
    """Keeps what was last pulled and answers from it; falls back to the champion by itself.

    Args:
        champion: what runs until the control plane has been heard.
        key: what schedules are signed with. Sessions are hashed with it, so all data planes of a fleet agree.
    """

    def __init__(self, champion: Strategy, key: bytes) -> None:
        self._champion = Arm(champion, False)
        self._key = key
        self._generation = -1
        self._heard_s = float("-inf")
        self.known: Running | None = None
        """The experiment of the answer in force, whether or not the control plane is still heard."""
        self._sessions: OrderedDict[str, bool] = OrderedDict()
        self.refused = 0
        """Answers whose experiment or strategy could not be used."""

    def pulled(self, active: Active, now_s: float) -> None:
        """Take an answer over; an older generation than the one in force is passed over.

        Raises:
            InputError: its strategy cannot be built here (the one in force goes on), or its schedule is not one of this
                control plane (its champion runs alone).
        """
        if active.generation < self._generation:
            return
        try:
            if active.known_as != self._champion.strategy.name:
                self._champion = Arm(active.strategy(), False)
            self._generation, self._heard_s = active.generation, now_s
            self._take_part(active)
        except InputError:
            self.refused += 1
            raise

    def _take_part(self, active: Active) -> None:
        experiment = active.experiment
        if experiment is None or self.known is None or experiment.id != self.known.experiment.id:
            self.known = None
            self._sessions.clear()
        if experiment is None or (self.known and experiment.schedule == self.known.experiment.schedule):
            return
        self.known = None
        schedule = read_schedule(experiment.schedule.encode(), self._key)
        said = (schedule.experiment_id, schedule.champion, schedule.challenger)
        if said != (experiment.id, active.known_as, experiment.challenger.known_as):
            raise InputError(f"the schedule is of {said}, not of {experiment.id}; the champion runs alone")
        self.known = Running(experiment, schedule, Arm(experiment.challenger.strategy(), True))

    @property
    def generation(self) -> int:
        """Of the answer in force; -1: none yet."""
        return self._generation

    def running(self, now_s: float) -> Running | None:
        """The experiment that this data plane takes part in.

        None without one, and when the control plane has been away for longer than a block: whoever is not heard cannot
        stop a harmful challenger.
        """
        return self.known if now_s <= self.trusted_until_s else None

    @property
    def trusted_until_s(self) -> float:
        """When the champion runs alone unless the control plane is heard again: a block after it was."""
        return self._heard_s + (self.known.experiment.lengths.block_s if self.known else 0.0)

    @property
    def champion(self) -> Arm:
        """What runs where no experiment says otherwise."""
        return self._champion

    def of_pool(self, now_s: float, pool: int = 0) -> Arm:
        """What orders, places and batches now: in the whole fleet, or in a pool (0 or 1)."""
        running = self.running(now_s)
        if running is None or running.experiment.design not in ("switchback", "pools"):
            return self._champion
        plays = running.schedule.strategy_at(now_s, pool if running.experiment.design == "pools" else 0)
        return running.challenger if plays == running.schedule.challenger else self._champion

    def of_session(self, session: str, now_s: float) -> Arm:
        """What serves a request of a session (its hash): with `sticky` the same for the session's life.

        One that began on another data plane, or before a restart, when the challenger's share was smaller, may come to
        the challenger here; none leaves it.
        """
        running = self.running(now_s)
        if running is None or running.experiment.design != "sticky":
            return self.of_pool(now_s, self.pool_of(session))
        if running.schedule.slot_at(now_s) is None:
            return self._champion
        challenger = self._sessions.pop(session, None)
        if challenger is None:
            challenger = running.schedule.strategy_of(session, now_s) == running.schedule.challenger
        self._sessions[session] = challenger
        if len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        return running.challenger if challenger else self._champion

    def session_hash(self, session: str) -> str:
        """What telemetry calls a session or key: not to be turned back without the fleet's key."""
        return hmac.new(self._key, session.encode(), hashlib.sha256).hexdigest()[:32]

    def pool_of(self, session: str) -> int:
        """The pool (0 or 1) that a session (its hash) belongs to for good."""
        return int(session[-1], 16) % 2
