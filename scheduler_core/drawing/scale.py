"""From values to places: scales with their ticks, and the paths of lines and bands."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float | None]
"""x and y in the units of the data; y = None leaves a gap."""
Span = tuple[float, float | None, float | None]
"""x, lower and upper y in the units of the data."""


@dataclass(frozen=True)
class Scale:
    """Values ``low..high`` spread over coordinates ``start..end``; what lies outside is drawn at the edge.

    >>> [Scale(0, 10, 0, 100)(5), Scale(1, 100, 0, 100, log=True)(10), Scale(0, 1, 90, 10)(2)]
    [50.0, 50.0, 10.0]
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value, to a tenth."""
        low, high = self._place(self.low), self._place(self.high)
        share = 0.5 if high == low else (self._place(value) - low) / (high - low)
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale, about so many; powers of ten, with 2 and 5 between where there is room, on a
        logarithmic one.

        >>> Scale(0, 9.4, 0, 1).ticks(), Scale(0.03, 40, 0, 1, log=True).ticks()
        ([0.0, 2.0, 4.0, 6.0, 8.0], [0.1, 1.0, 10.0])
        """
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max(1, math.ceil((last - first) / count))
            steps: tuple[float, ...] = (1.0, 2.0, 5.0) if self.high / self.low < 50 else (1.0,)
            values = [float(f"{m}e{e}") for e in range(first, last + 1) for m in steps if e % every == 0]
        else:
            step = _round_step((self.high - self.low) / count)
            first = math.ceil(self.low / step - 1e-9)
            values = [round((first + i) * step, 12) for i in range(int((self.high - self.low) / step + 1e-9) + 1)]
        return [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]

    def _place(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value


def around(values: Iterable[float], start: float, end: float, *, log: bool = False) -> Scale:
    """A scale that holds all values, with a little room; a logarithmic one ignores what is not positive.

    >>> around([2.0, 8.0], 0, 100)
    Scale(low=1.7, high=8.3, start=0, end=100, log=False)
    """
    kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(kept), max(kept)
    if log:
        return Scale(low / 1.2, high * 1.2, start, end, log=True)
    room = 0.05 * (high - low) or 0.5
    return Scale(low - room, high + room, start, end)


def line(x: Scale, y: Scale, points: Sequence[Point]) -> str:
    """The path of a line through points; a point without y breaks it, one within a pixel of the last is not drawn.

    >>> line(Scale(0, 2, 0, 20), Scale(0, 1, 10, 0), [(0, 0.0), (1, 0.5), (2, None)])
    'M0 10L10 5'
    """
    path, pen, last = [], "M", (math.inf, math.inf)
    for i, (at, value) in enumerate(points):
        if value is None:
            pen = "M"
            continue
        place = (x(at), y(value))
        ends = i + 1 == len(points) or points[i + 1][1] is None
        if pen == "M" or ends or math.dist(place, last) >= 1:
            path.append(f"{pen}{place[0]:g} {place[1]:g}")
            pen, last = "L", place
    return "".join(path)


def band(x: Scale, y: Scale, spans: Sequence[Span]) -> str:
    """The outline of what lies between lower and upper; spans without either are left out.

    >>> band(Scale(0, 1, 0, 10), Scale(0, 1, 10, 0), [(0, 0.0, 1.0), (1, 0.5, 0.5)])
    'M0 0L10 5L10 5L0 10Z'
    """
    kept = [(at, low, high) for at, low, high in spans if low is not None and high is not None]
    if len(kept) < 2:
        return ""
    outline = [f"{x(at):g} {y(high):g}" for at, _, high in kept] + [
        f"{x(at):g} {y(low):g}" for at, low, _ in reversed(kept)
    ]
    return "M" + "L".join(outline) + "Z"


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten at or above a step."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= step * (1 - 1e-9))
