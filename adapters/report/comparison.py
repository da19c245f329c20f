"""What the results say, in numbers: who is compared with whom, where, and what came out. No words, no drawing."""

from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from kairos.adapters.report.results import UNKNOWN, Cell, Interval, Results, interval

ENOUGH_IN_TIME = 0.9
"""The share in time at which the load that a strategy carries is read (goodput)."""

REFERENCE_LOAD = 0.9
"""Tables and distributions show the load nearest to this one; the lower of two."""


class Panel(NamedTuple):
    """What is shown side by side and never pooled: one trace with one target family."""

    trace: str
    target: str | None


class Place(NamedTuple):
    """A panel at one load; None: as recorded."""

    trace: str
    target: str | None
    load: float | None

    @property
    def panel(self) -> Panel:
        return Panel(self.trace, self.target)


class Difference(NamedTuple):
    """A strategy minus another at a place, in percentage points."""

    place: Place
    points: Interval


class Comparison:
    """Results with an index.

    Attributes:
        metrics: the attainments that are shown; the first one decides verdicts and order.
        strategies: in the order of the results.
        baseline: what differences are measured against.
        best: of the others, the one with the highest mean attainment over all cells; None when there is no other.
        styles: strategy -> 1 to 4 for those drawn in colour: best, baseline, and the next two.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.strategies = list(dict.fromkeys(c.strategy for c in results.cells))
        self.panels = list(dict.fromkeys(Panel(c.trace, c.target) for c in results.cells))
        self._cells = {(c.trace, c.target, c.load, c.strategy): c for c in results.cells}
        self._pairs = {(p.trace, p.target, p.load, p.a, p.b, p.metric): p for p in results.pairs}
        end_to_end = results.meta.stages != "prefill" and any(
            c.metrics.attainment("slo_attainment").mean is not None for c in results.cells
        )
        self.metrics = ["slo_attainment", "ttft_attainment"] if end_to_end else ["ttft_attainment"]
        wanted = results.meta.baseline
        self.baseline = wanted if wanted in self.strategies else self.strategies[0]
        others = sorted((s for s in self.strategies if s != self.baseline), key=self._mean_attainment, reverse=True)
        self.best = others[0] if others else None
        drawn = [*others[:1], self.baseline, *others[1:3]]
        self.styles = {strategy: i + 1 for i, strategy in enumerate(drawn)}
        self.challengers = others

    @property
    def metric(self) -> str:
        """The attainment that decides."""
        return self.metrics[0]

    @property
    def places(self) -> list[Place]:
        """Every place, panel by panel, loads ascending."""
        return [Place(*panel, load) for panel in self.panels for load in self.loads(panel)]

    def loads(self, panel: Panel) -> list[float | None]:
        """The loads of a panel, ascending; "as recorded" first."""
        loads = {c.load for c in self.results.cells if (c.trace, c.target) == panel}
        return sorted(loads, key=lambda load: -1.0 if load is None else load)

    def reference(self, panel: Panel) -> Place:
        """The panel at the load nearest to 0.9."""
        load = min(self.loads(panel), key=lambda load: 0.0 if load is None else round(abs(load - REFERENCE_LOAD), 9))
        return Place(*panel, load)

    def cell(self, place: Place, strategy: str) -> Cell | None:
        """What a strategy did at a place."""
        return self._cells.get((*place, strategy))

    def attainment(self, place: Place, strategy: str, metric: str) -> Interval:
        """Share of all submitted requests; unknown where there is no cell."""
        cell = self.cell(place, strategy)
        return cell.metrics.attainment(metric) if cell else UNKNOWN

    def strategies_at(self, panel: Panel) -> list[str]:
        """The strategies of a panel, by attainment at its reference load, highest first."""
        place = self.reference(panel)
        known = [s for s in self.strategies if any(self.cell(Place(*panel, load), s) for load in self.loads(panel))]
        return sorted(known, key=lambda s: -(self.attainment(place, s, self.metric).mean or 0.0))

    def bound(self, place: Place, metric: str) -> float | None:
        """Mean over the seeds. The bound on TTFT also bounds the share in time end to end where that has none."""
        bounds = [b for b in self.results.bounds if (b.trace, b.target, b.load) == place]
        for name in (metric, "ttft_attainment"):
            values = [v for b in bounds if (v := interval(getattr(b, name, None)).mean) is not None]
            if values:
                return fmean(values)
        return None

    def of_bound(self, place: Place, strategy: str) -> float | None:
        """Share of the bound that a strategy reaches, TTFT attainment by TTFT bound."""
        mean, bound = self.attainment(place, strategy, "ttft_attainment").mean, self.bound(place, "ttft_attainment")
        return None if mean is None or not bound else mean / bound

    def difference(self, place: Place, a: str, b: str, metric: str) -> Interval:
        """a minus b in points as recorded, whichever way round the pair was written; unknown where it was not."""
        if pair := self._pairs.get((*place, a, b, metric)):
            return interval(pair.difference_pp)
        if pair := self._pairs.get((*place, b, a, metric)):
            d = interval(pair.difference_pp)
            return Interval(_minus(d.mean), _minus(d.high), _minus(d.low), d.n)
        return UNKNOWN

    def differences(self, strategy: str) -> list[Difference]:
        """To the baseline at every place where a pair was recorded, smallest first."""
        found = (Difference(p, self.difference(p, strategy, self.baseline, self.metric)) for p in self.places)
        known = [d for d in found if d.points.mean is not None]
        return sorted(known, key=lambda d: d.points.mean or 0.0)

    def rivals_ahead(self, strategy: str) -> Iterator[tuple[Place, str, Interval]]:
        """Where another strategy has the higher mean: place, the other, strategy minus other in points.

        Recorded pairs come with their interval; where a pair was not recorded the difference of the means has none.
        """
        for place in self.places:
            mean = self.attainment(place, strategy, self.metric).mean
            for other in self.strategies:
                theirs = self.attainment(place, other, self.metric).mean
                if other == strategy or mean is None or theirs is None:
                    continue
                d = self.difference(place, strategy, other, self.metric)
                d = d if d.mean is not None else Interval(100 * (mean - theirs))
                if d.mean is not None and d.mean < 0:
                    yield place, other, d

    def carried_load(self, panel: Panel, strategy: str, metric: str) -> float | None:
        """The highest load at which at least 90 % are in time; None where there is none."""
        carried = [
            load
            for load in self.loads(panel)
            if load is not None and (self.attainment(Place(*panel, load), strategy, metric).mean or 0) >= ENOUGH_IN_TIME
        ]
        return max(carried, default=None)

    def extremes(self, panel: Panel, strategy: str) -> tuple[Place, Place] | None:
        """The places with the lowest and the highest share in time; None with fewer than two loads."""
        known = [
            (mean, Place(*panel, load))
            for load in self.loads(panel)
            if (mean := self.attainment(Place(*panel, load), strategy, self.metric).mean) is not None
        ]
        if len(known) < 2:
            return None
        return min(known, key=lambda k: k[0])[1], max(known, key=lambda k: k[0])[1]

    def _mean_attainment(self, strategy: str) -> float:
        cells = [c for c in self.results.cells if c.strategy == strategy]
        return fmean(c.metrics.attainment(self.metric).mean or 0.0 for c in cells)


def _minus(value: float | None) -> float | None:
    return None if value is None else -value
