"""What the training process does: it watches the steps that come in, trains, judges, promotes and takes back.

Everything it concludes is in the database before it goes on: killed at any instant, it leaves whole models, and the
next one goes on from the last step that was watched.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from sqlalchemy import Connection

from kairos.predictors.artifact import ProfileModels, dump
from kairos.predictors.features import SCHEMA_HASH
from kairos.predictors.step_model import StepModel
from kairos.predictors.training import train
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import InputError, KairosError
from kairos.scheduler_core.service.models.artifacts import add_challenger, read_model
from kairos.scheduler_core.service.models.gate import Verdict, judge
from kairos.scheduler_core.service.models.serving import Corrected, Served, Serving, configured_models
from kairos.scheduler_core.service.models.watch import (
    Former,
    Happening,
    Pending,
    Watch,
    calibrated,
    in_order,
    later_steps,
    new_watch,
    observe,
)
from kairos.scheduler_core.service.store.queries import models as queries
from kairos.scheduler_core.service.store.queries.events import add_event
from kairos.scheduler_core.service.store.queries.leases import take_lease
from kairos.scheduler_core.service.store.queries.telemetry import read_steps
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.telemetry import StepKind, Steps

_log = logging.getLogger(__name__)

LEASE, LEASE_S = "trainer", 10.0
PAGE_STEPS = 20_000
"""Steps that are watched in one go."""
Key = tuple[str, StepKind]


class LostLeaseError(KairosError):
    """Another process does this work now."""


class Lifecycle:
    """The work of one training process, which holds the trainer's lease."""

    def __init__(self, store: Store, settings: Settings, holder: str) -> None:
        self._store, self._settings, self._holder = store, settings, holder
        self._watches: dict[Key, Watch] = {}
        self._profiles: dict[str, Profile] = {}
        self._models: dict[tuple[str, int], ProfileModels] = {}
        """Versions that wait or served before, as they were read."""
        self._later: dict[int, dict[Key, Steps]] = {}
        """Steps after an id, up to those that are watched."""
        self._configured = configured_models(settings)
        self._serving = Serving(self._configured, {})
        self._generation = -1
        self._waiting: dict[str, queries.ModelRow] = {}
        with store.read() as connection:
            for row in queries.watches(connection):
                self._watches[row.profile_id, row.kind] = msgspec.msgpack.decode(row.state, type=Watch)  # type: ignore[index]  # kinds are STEP_KINDS
            self._watched = queries.watched_step(connection)

    def go_on(self) -> bool:
        """Do the next piece of work; whether there was any."""
        self._look_up()
        worked = self._watch_page()
        if any(self._judge(key, watch) for key, watch in list(self._watches.items())):
            return True  # one at a time: it may have changed what serves
        self._ask_trainings()
        return self._train() or worked

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """A transaction that only the holder of the lease makes."""
        with self._store.write() as connection:
            if not take_lease(connection, LEASE, self._holder, LEASE_S):
                raise LostLeaseError("another process trains now")
            yield connection

    # -- what serves, what waits

    def _look_up(self) -> None:
        """Follow promotions, and challengers that somebody uploaded."""
        with self._store.read() as connection:
            generation = queries.generation(connection)
            self._waiting = {row.profile_id: row for row in queries.models(connection, state="challenger")}
            if generation != self._generation:
                self._serving = self._read_serving(connection)
        if generation != self._generation:
            self._generation = generation
            self._models.clear()
            for key in list(self._watches):
                self._follow_promotion(key)
        for key, watch in self._watches.items():
            self._await_challenger(key, watch)

    def _await_challenger(self, key: Key, watch: Watch) -> None:
        """Count later steps for the model of this kind that waits to be judged, from the first one after it on.

        Some were watched before this process saw the model, if they came right after it.
        """
        row = self._waiting.get(key[0])
        if row is None or key[1] not in (row.report or {}).get("waiting", []):
            watch.challenger = None
        elif watch.challenger is None or watch.challenger.version != row.version:
            watch.challenger = Pending(row.version, row.last_step)
            if (steps := self._watched_after(key, row.last_step)) is not None:
                watch.challenger.count(steps.ended_at_s, row.last_step)

    def _read_serving(self, connection: Connection) -> Serving:
        served = {}
        for profile_id, row in queries.serving_models(connection).items():
            stored = queries.model(connection, profile_id, row.version)
            content = queries.model_artifact(connection, profile_id, row.version)
            try:
                learned, origins = read_model(content, f"{profile_id}@{row.version}", stored.report)
            except InputError as error:  # the services say so; its profile is not watched until another one is promoted
                _log.warning("%s", error)
                continue
            served[profile_id] = Served(row.version, row.trained_at, learned, origins)
            self._profiles[profile_id] = learned.profile
        return Serving(self._configured, served)

    def _follow_promotion(self, key: Key) -> None:
        """Watch the new model of a kind from its beginning, and the old one in its shadow."""
        profile_id, kind = key
        watch, origin = self._watches[key], self._serving.origin(*key)
        if origin == watch.origin:
            return
        with self._store.read() as connection:
            last = queries.last_promotion(connection, profile_id)
        model = self._serving.models(self._profile(profile_id))[kind]
        fresh = new_watch(origin, model)
        fresh.unlearned_rows, fresh.changed_at_s = watch.unlearned_rows, watch.changed_at_s
        if not last.rollback:
            fresh.former = Former(Pending(last.before or 0, self._watched))
        self._watches[key] = fresh

    def _profile(self, profile_id: str) -> Profile:
        return self._profiles.get(profile_id) or self._serving.profile(profile_id)

    def _model(self, profile_id: str, version: int, kind: StepKind) -> StepModel:
        """A kind's model in a version; of 0, and where the version lacks it, that of the configuration or the prior."""
        if version and (profile_id, version) not in self._models:
            with self._store.read() as connection:
                content = queries.model_artifact(connection, profile_id, version)
            self._models[profile_id, version] = read_model(content, f"{profile_id}@{version}", None)[0]
        own = self._models[profile_id, version].models if version else {}
        return own.get(kind) or Serving(self._configured, {}).models(self._profile(profile_id))[kind]

    # -- watching

    def _watch_page(self) -> bool:
        with self._store.read() as connection:
            newest = queries.last_step(connection)
        if newest < self._watched:  # SQLite numbers from 1 again once all steps were deleted
            self._watched = 0
        after = max(self._watched, newest - self._settings.training.window_steps)
        learned = [row.last_step - after for row in self._waiting.values() if row.last_step > after]
        groups, last = read_steps(self._store, after, most=min([PAGE_STEPS, *learned]))
        if last <= self._watched:
            return False
        told: list[tuple[Key, Happening]] = []
        keys: list[Key] = []
        for part in groups:
            key = part.profile.profile_id, part.kind
            self._profiles[key[0]] = part.profile
            keys.append(key)
            told += [(key, happening) for happening in self._observe(key, in_order(part), after)]
        with self._write() as connection:
            queries.write_watches(connection, last, {key: self._kept(key) for key in keys})
            for (profile_id, kind), happening in told:
                self._tell(connection, profile_id, kind, happening)
        self._watched = last
        self._later.clear()
        return True

    def _watched_after(self, key: Key, step: int) -> Steps | None:
        """What was watched of a kind after a step, as far as it is among the newest, in order of its end."""
        after = max(step, self._watched - self._settings.training.window_steps)
        if after >= self._watched:
            return None
        if after not in self._later:  # models of one training are judged together
            groups, _ = read_steps(self._store, after, most=self._watched - after)
            self._later[after] = {(s.profile.profile_id, s.kind): in_order(s) for s in groups}
        return self._later[after].get(key)

    def _observe(self, key: Key, steps: Steps, after: int) -> list[Happening]:
        model = self._serving.models(steps.profile)[steps.kind]
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = new_watch(self._serving.origin(*key), model)
            self._await_challenger(key, watch)
        return observe(watch, steps, after, model, self._former(key, watch), len(self._watches))

    def _former(self, key: Key, watch: Watch) -> StepModel | None:
        """The model before this one; one that cannot be read is scored no longer."""
        if watch.former is None:
            return None
        try:
            return self._model(key[0], watch.former.pending.version, key[1])
        except InputError as error:
            _log.warning("%s", error)
            watch.former = None
            return None

    def _kept(self, key: Key) -> tuple[dict[str, Any], bytes]:
        watch = self._watches[key]
        correction = Corrected(watch.origin, watch.online.correction())
        return msgspec.to_builtins(correction), msgspec.msgpack.encode(watch)

    def _tell(self, connection: Connection, profile_id: str, kind: StepKind, happening: Happening) -> None:
        if happening.kind == "coverage":
            add_event(connection, "coverage", f"{profile_id} {kind}", happening.detail)
            return
        add_event(connection, "drift", f"{profile_id} {kind}", happening.detail)
        if happening.kind == "alone" and self._is_current(connection):
            reason = f"{kind} steps drift from the new model, and not from the one before it"
            queries.roll_back(connection, profile_id, reason)
        else:
            queries.ask_training(connection, "drift", [profile_id])

    def _is_current(self, connection: Connection) -> bool:
        """Whether nobody promoted anything since this process looked: what it concluded was about what serves."""
        return queries.generation(connection) == self._generation

    # -- judging

    def _judge(self, key: Key, watch: Watch) -> bool:
        first = watch.origin == 0
        if watch.challenger and watch.challenger.due(first=first):
            self._judge_challenger(key, watch, watch.challenger)
        elif watch.former and not watch.former.looked and watch.former.pending.due(first=False):
            self._judge_former(key, watch.former, self._former(key, watch))
        else:
            return False
        return True

    def _verdict(self, key: Key, after_step: int, champion: StepModel, other: StepModel, *, first: bool) -> Verdict:
        steps = self._watched_after(key, after_step)
        if steps is None:
            return Verdict("wait", "its later steps are no longer among the newest", 0)
        return judge(later_steps(steps), calibrated(champion, steps), calibrated(other, steps), first=first)

    def _judge_challenger(self, key: Key, watch: Watch, pending: Pending) -> None:
        profile_id, kind = key
        champion = self._serving.models(self._profile(profile_id))[kind]
        try:
            challenger = self._model(profile_id, pending.version, kind)
        except InputError as error:
            verdict = Verdict("keep", f"champion kept: {error}", 0)
        else:
            verdict = self._verdict(key, pending.after_step, champion, challenger, first=watch.origin == 0)
        waits = verdict.word == "wait"
        if waits:
            pending.wait_rows = pending.rows + pending.rows // 2
        with self._write() as connection:
            if not self._is_current(connection):
                return
            row = queries.model(connection, profile_id, pending.version)
            report = dict(row.report or {})
            report["gate"] = report.get("gate", {}) | {kind: msgspec.to_builtins(verdict)}
            if waits:
                queries.judge_model(connection, profile_id, pending.version, row.state, report)
                return
            watch.challenger = None
            report["waiting"] = [other for other in report.get("waiting", []) if other != kind]
            state = row.state if report["waiting"] else "judged"
            queries.judge_model(connection, profile_id, pending.version, state, report)
            if verdict.word == "promote" and self._settings.training.promote == "auto":
                self._promote(connection, profile_id, pending.version, kind, verdict)
            else:
                detail = {"version": pending.version, "kind": kind, "verdict": verdict.word, "why": verdict.sentence}
                add_event(connection, "challenger_judged", profile_id, detail)

    def _promote(self, connection: Connection, profile_id: str, version: int, kind: StepKind, verdict: Verdict) -> None:
        """Let a kind of a challenger serve; the others stay as they are, so this may be a version made of two."""
        challenger = self._models[profile_id, version]
        served = self._serving.served.get(profile_id)
        models = dict(served.learned.models) if served else {}
        baselines = dict(served.learned.baselines) if served else {}
        origins = dict(served.origins) if served else {}
        models[kind] = challenger.models[kind]
        baselines |= {k: b for k, b in challenger.baselines.items() if k == kind}
        origins[kind] = version
        if set(models) == set(challenger.models) and set(origins.values()) == {version}:
            promoted = version
        else:
            content = dump([ProfileModels(challenger.profile, models, baselines)])
            row = queries.model(connection, profile_id, version)
            report = {"kinds": origins}
            promoted = queries.add_model(connection, profile_id, SCHEMA_HASH, row.last_step, content, report)
        queries.promote_model(connection, profile_id, promoted, f"gate, {kind}: {verdict.sentence}")

    def _judge_former(self, key: Key, former: Former, before: StepModel | None) -> None:
        """The same test the other way round."""
        if before is None:
            return
        profile_id, kind = key
        serving = self._serving.models(self._profile(profile_id))[kind]
        verdict = self._verdict(key, former.pending.after_step, serving, before, first=False)
        if verdict.word == "wait":
            former.pending.wait_rows = former.pending.rows + former.pending.rows // 2
            return
        former.looked = True
        if verdict.word == "promote":
            with self._write() as connection:
                if self._is_current(connection):
                    queries.roll_back(connection, profile_id, f"{kind}: the model before is {verdict.sentence}")

    # -- training

    def _ask_trainings(self) -> None:
        """By schedule, and where enough steps came that no model has learned from."""
        training = self._settings.training
        unlearned: dict[str, int] = {}
        for (profile_id, _), watch in self._watches.items():
            if watch.challenger is None:
                unlearned[profile_id] = unlearned.get(profile_id, 0) + watch.unlearned_rows
        many = [pid for pid, rows in unlearned.items() if training.after_rows and rows >= training.after_rows]
        some = [pid for pid, rows in unlearned.items() if rows]
        if many:
            self._ask("rows", many)
        elif some and training.every_s:
            with self._store.read() as connection:
                last = queries.last_training_at(connection)
            if last is not None and time.time() - last.timestamp() >= training.every_s:
                self._ask("schedule", some)

    def _ask(self, cause: str, profile_ids: list[str]) -> None:
        with self._write() as connection:
            queries.ask_training(connection, cause, profile_ids)
        for (profile_id, _), watch in self._watches.items():
            if profile_id in profile_ids:
                watch.unlearned_rows = 0

    def _train(self) -> bool:
        with self._write() as connection:
            asked = queries.begin_training(connection)
        if asked is None:
            return False
        made: list[str] = []
        try:
            for learned, last in self._fits(asked.profiles):
                with self._write() as connection:
                    made.append(add_challenger(connection, learned, last))
            if not made:
                raise InputError(
                    f"no step telemetry of {', '.join(asked.profiles or ['any profile'])}; send some first"
                )
        except LostLeaseError:
            raise
        except Exception as error:
            if not isinstance(error, KairosError):
                _log.exception("training %s failed", asked.id)
            with self._write() as connection:
                queries.end_training(connection, asked.id, made=made, error=f"{type(error).__name__}: {error}")
        else:
            with self._write() as connection:
                queries.end_training(connection, asked.id, made=made)
        return True

    def _fits(self, profile_ids: list[str] | None) -> Iterator[tuple[ProfileModels, int]]:
        """The models of some profiles or of all, and the last step that they learned from."""
        groups, last = read_steps(self._store, max(0, self._watched - self._settings.training.window_steps))
        wanted = [s for s in groups if profile_ids is None or s.profile.profile_id in profile_ids]
        for group in wanted:
            watch = self._watches.get((group.profile.profile_id, group.kind))
            if watch is not None:
                watch.unlearned_rows = 0
        for learned in train([kept for group in wanted if len(kept := self._unchanged(group))]):
            yield learned, last

    def _unchanged(self, steps: Steps) -> Steps:
        """Those since steps take what they take now."""
        watch = self._watches.get((steps.profile.profile_id, steps.kind))
        return steps if watch is None else steps.take(steps.ended_at_s >= watch.changed_at_s)
