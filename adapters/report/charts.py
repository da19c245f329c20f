"""The series and scales of the report's charts. Small multiples share one size, to be read side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from kairos.adapters.report.comparison import Comparison, Panel, Place
from kairos.adapters.report.results import Quantiles
from kairos.scheduler_core.drawing import Series
from kairos.scheduler_core.drawing.scale import Scale, around

LEFT, RIGHT, TOP, BOTTOM = 50, 352, 10, 176
"""The drawing area of a small multiple of 360 x 214."""


@dataclass(frozen=True)
class Chart:
    """One small multiple. ``bound`` is a line without a band; it and ``x_ticks`` may be empty."""

    x: Scale
    y: Scale
    series: Sequence[Series]
    bound: Sequence[tuple[float, float | None]] = ()
    x_ticks: Sequence[float] = ()


def attainment_by_load(c: Comparison, panel: Panel, metric: str) -> Chart | None:
    """Share in time against load; None with fewer than two loads. The coloured lines are drawn last, on top."""
    loads = [load for load in c.loads(panel) if load is not None]
    if len(loads) < 2:
        return None
    series = []
    for strategy in sorted(c.strategies, key=lambda s: -c.styles.get(s, 9)):
        at_load = [(load, c.attainment(Place(*panel, load), strategy, metric)) for load in loads]
        style = c.styles.get(strategy, 0)
        spans = [(load, i.low, i.high) for load, i in at_load] if style else []
        series.append(Series(strategy, style, [(load, i.mean) for load, i in at_load], spans))
    return Chart(
        x=around(loads, LEFT, RIGHT),
        y=Scale(0, 1, BOTTOM, TOP),
        series=series,
        bound=[(load, c.bound(Place(*panel, load), metric)) for load in loads],
        x_ticks=loads if len(loads) <= 7 else (),
    )


def distribution(c: Comparison, place: Place, what: str) -> Chart | None:
    """Share of requests with at most so many seconds, of ``ttft_s`` or ``tpot_s``; None where nobody recorded it."""
    series = []
    for strategy, style in sorted(c.styles.items(), key=lambda s: -s[1]):
        cell = c.cell(place, strategy)
        quantiles = cell.distributions.get(what, Quantiles()) if cell else Quantiles()
        steps = [(v, p) for p, v in zip(quantiles.probabilities, quantiles.values, strict=False) if v is not None]
        if steps:
            series.append(Series(strategy, style, steps))
    if not series:
        return None
    return Chart(
        x=around([v for s in series for v, p in s.points if p and p >= 0.01], LEFT, RIGHT, log=True),
        y=Scale(0, 1, BOTTOM, TOP),
        series=series,
    )


def predicted_against_actual(c: Comparison, panel: Panel) -> tuple[str, Place, Chart] | None:
    """Medians per bin under the best strategy that recorded them, at the reference load first."""
    reference = c.reference(panel)
    for place in [reference, *(Place(*panel, load) for load in c.loads(panel))]:
        for strategy in dict.fromkeys([c.best or c.baseline, *c.strategies]):
            cell = c.cell(place, strategy)
            bins = [b for b in cell.predicted_vs_actual if b.predicted_s > 0 and b.actual_s > 0] if cell else []
            if bins:
                values = [v for b in bins for v in (b.predicted_s, b.actual_s)]
                return (
                    strategy,
                    place,
                    Chart(
                        x=around(values, LEFT, RIGHT, log=True),
                        y=around(values, BOTTOM, TOP, log=True),
                        series=[Series(strategy, 1, [(b.predicted_s, b.actual_s) for b in bins])],
                    ),
                )
    return None
