"""Requests that have ended, as metrics: which promises were kept, for whom, and how far predictions were off."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.slo import NO_TARGET_S, BoolArray, FloatArray, tpot_met, ttft_met
from kairos.scheduler_core.telemetry import RequestRow

OTHER = "other"
NOBODY = "none"
"""The tenant of requests that have none."""
MOST_TENANTS = 50
MOST_MODELS = 50
"""Profiles with the version of their model."""

Key = TypeVar("Key", bound=Hashable)


class Busiest(Generic[Key]):
    """Which of many get series of their own: a bounded number, the busiest ones.

    The first ones do at once. Another one takes the place of the least busy when it has twice as much of late; what was
    counted before stays under "other", so every series only ever grows.
    """

    _CANDIDATES = 1_000
    _PERIOD = 100_000
    """After so many, what was counted counts half."""

    def __init__(self, most: int, leaves: Callable[[Key], None]) -> None:
        """Args: most: of them; leaves: told of one that loses its series."""
        self._most, self._leaves = most, leaves
        self._shown: dict[Key, float] = {}
        self._others: dict[Key, float] = {}
        self._counted = 0

    def shows(self, key: Key, count: int) -> bool:
        """Count so many for one; whether it has series of its own."""
        self._age(count)
        if key in self._shown or len(self._shown) < self._most:
            self._shown[key] = self._shown.get(key, 0) + count
            return True
        busy = self._others.pop(key, 0) + count
        least = min(self._shown, key=self._shown.__getitem__)
        if busy > 2 * self._shown[least]:
            self._leaves(least)
            self._others[least] = self._shown.pop(least)
            self._shown[key] = busy
            return True
        self._others[key] = busy
        if len(self._others) > self._CANDIDATES:  # Misra and Gries: whoever is frequent stays
            floor = min(self._others.values())
            self._others = {other: seen - floor for other, seen in self._others.items() if seen > floor}
        return False

    def _age(self, count: int) -> None:
        self._counted += count
        if self._counted >= self._PERIOD:
            self._counted = 0
            for counts in (self._shown, self._others):
                counts.update({key: seen / 2 for key, seen in counts.items()})


class Kept(NamedTuple):
    """Of n requests, each (n,): who had such a promise, and for whom it was kept."""

    had: BoolArray
    met: BoolArray


def kept_promises(rows: Sequence[RequestRow]) -> dict[str, Kept]:
    """By `ttft`, `tpot` and `end_to_end` (all that a request had). A time that was not recorded was not kept."""
    finished = np.array([row.status == "finished" for row in rows], np.bool_)
    ttft, ttft_target = _column(row.ttft_ms for row in rows), _column(row.ttft_target_ms for row in rows)
    tpot, tpot_target = _column(row.tpot_ms for row in rows), _column(row.tpot_target_ms for row in rows)
    tokens = _column(row.output_tokens for row in rows)
    had_ttft, had_tpot = ~np.isnan(ttft_target), ~np.isnan(tpot_target)
    kept_ttft = finished & ttft_met(ttft, np.where(had_ttft, ttft_target, NO_TARGET_S))
    kept_tpot = tpot_met(tpot, np.where(had_tpot, tpot_target, NO_TARGET_S), tokens, finished)
    return {
        "ttft": Kept(had_ttft, kept_ttft),
        "tpot": Kept(had_tpot, kept_tpot),
        "end_to_end": Kept(had_ttft | had_tpot, (kept_ttft | ~had_ttft) & (kept_tpot | ~had_tpot)),
    }


def _column(values: Iterable[float | None]) -> FloatArray:
    """As numbers, NaN where there is none."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


class Outcomes:
    """Feeds the metrics."""

    def __init__(self, metrics: Metrics, slo_classes: Callable[[], Iterable[str]]) -> None:
        """Args: slo_classes: the names of those configured now; requests of another are counted under "other"."""
        self._metrics, self._slo_classes = metrics, slo_classes
        self._lock = Lock()
        self._tenants: Busiest[str] = Busiest(MOST_TENANTS, self._forget_tenant)
        self._models: Busiest[tuple[str, str]] = Busiest(MOST_MODELS, self._forget_model)

    def note(self, rows: Sequence[RequestRow]) -> None:
        """Count requests that were stored."""
        with self._lock:
            self._note(rows)

    def _note(self, rows: Sequence[RequestRow]) -> None:
        places: dict[tuple[str, str], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault((row.slo_class or "default", row.tenant or NOBODY), []).append(place)
        promises = kept_promises(rows)
        known = set(self._slo_classes())
        for (slo_class, tenant), chosen in places.items():
            shown_class = slo_class if slo_class in known else OTHER
            shown_tenant = tenant if self._tenants.shows(tenant, len(chosen)) else OTHER
            for promise, kept in promises.items():
                if judged := int(np.count_nonzero(kept.had[chosen])):
                    met = int(np.count_nonzero((kept.had & kept.met)[chosen]))
                    self._metrics.slo_requests.labels(shown_class, shown_tenant, promise).inc(judged)
                    self._metrics.slo_requests_met.labels(shown_class, shown_tenant, promise).inc(met)
        for row in rows:
            if row.predicted_ttft_ms or row.predicted_tpot_ms:
                self._note_prediction(row)

    def _note_prediction(self, row: RequestRow) -> None:
        profile = Profile(row.gpu, row.model, row.precision, row.tp, row.ep, row.engine).profile_id
        model = (profile, row.model_version)
        labels = model if self._models.shows(model, 1) else (OTHER, OTHER)
        for time, actual, predicted in (
            ("ttft", row.ttft_ms, row.predicted_ttft_ms),
            ("tpot", row.tpot_ms, row.predicted_tpot_ms),
        ):
            if actual is not None and predicted is not None:
                self._metrics.prediction_ratio.labels(*labels, time).observe(actual / predicted)

    def _forget_tenant(self, tenant: str) -> None:
        for series in (self._metrics.slo_requests, self._metrics.slo_requests_met):
            series.remove_by_labels({"tenant": tenant})

    def _forget_model(self, model: tuple[str, str]) -> None:
        profile, version = model
        self._metrics.prediction_ratio.remove_by_labels({"profile": profile, "model_version": version})
