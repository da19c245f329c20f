"""From parsed results to the HTML of the report."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kairos.adapters.report import charts, findings, timeline
from kairos.adapters.report.comparison import Comparison, Panel, Place
from kairos.adapters.report.findings import Group
from kairos.adapters.report.results import Cell, Interval, Meta, Number, Results, Timeline, interval, read_results
from kairos.scheduler_core.drawing import environment, stylesheet
from kairos.scheduler_core.drawing.scale import Scale
from kairos.scheduler_core.drawing.text import (
    DASH,
    MINUS,
    NAME_CHARACTERS,
    counted,
    number_of_percent,
    seconds,
    shown,
    signed,
    thousands,
    visible,
)

MAX_BYTES = 1_000_000
_MAKES_ROOM = ("sentences", "pairs", "cells")
"""What can be left out, since results.json has it, in this order."""
_HERE = Path(__file__).parent


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write report.html: self-contained, readable without a script or a network.

    Args:
        results: results.json, parsed; additions that are absent leave their section out, with a sentence why.
        path: the file to write; folders that are missing are made.

    Raises:
        InputError: the needed part of results.json is missing or of another type.
    """
    html = render(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def render(results: dict[str, Any]) -> str:
    """The HTML that ``write_report`` writes, under 1 MB: where it would be more, the longest tables make room."""
    read = read_results(results)
    for some in range(len(_MAKES_ROOM) + 1):
        html = _render(read, left_out=_MAKES_ROOM[:some])
        if len(html.encode()) < MAX_BYTES:
            break
    return html


def _render(read: Results, left_out: Sequence[str]) -> str:
    c = Comparison(read)
    env = environment(_HERE)
    env.filters["visible_lines"] = lambda text: "\n".join(visible(line) for line in str(text).split("\n"))
    verdicts = findings.verdicts(c)
    headline = findings.headline(c, verdicts[0] if verdicts else None)
    parts = list(_parts(c))
    pair_metrics = list(dict.fromkeys(p.metric for p in read.pairs))
    accuracy = [row for row in ((s, _accuracy(c, s)) for s in c.strategies) if set(row[1]) != {DASH}]
    return env.get_template("report.html").render(
        comparison=c,
        results=read,
        meta=read.meta,
        left_out=left_out,
        too_large="Left out to keep this file under 1 MB; results.json has it.",
        css=stylesheet(),
        title=headline.striptags(),
        headline=headline,
        facts=_facts(c),
        notes=_notes(c),
        in_time=findings.IN_TIME,
        column=findings.COLUMN,
        glyph=findings.GLYPH,
        verdicts=verdicts,
        bound_heading=findings.bound_heading(c),
        bound_sentence=findings.bound_sentence(c),
        by_chance=findings.by_chance(verdicts),
        losses=findings.losses(c),
        costs=findings.costs(c),
        ranking=findings.ranking(c),
        tables=[_table(c, panel) for panel in c.panels],
        capacity=findings.capacity(c),
        curves=list(_curves(c)),
        parts=parts,
        part_strategies=_compared(c),
        parts_heading=findings.winners_and_losers(c, [(p.panel, p.groups) for p in parts]),
        tails=findings.tails(c),
        latencies=list(_latencies(c)),
        window=_window(read.timelines),
        blocking=findings.blocking,
        lane_sentence=findings.lane_sentence,
        ttft=findings.ttft,
        range_of=findings.range_of,
        predictions=list(_predictions(c)),
        accuracy=accuracy,
        accuracy_heading=_accuracy_heading(c),
        cells=_cells(c),
        sentences=[*(cell.sentence for cell in read.cells if cell.sentence), *read.meta.sentences],
        pairs=_pairs(c, pair_metrics),
        pair_metrics=pair_metrics,
        long_names=_long_names(read),
        command=_command(read.meta),
        seeds=_seeds(read.meta),
        config=json.dumps(read.meta.config, indent=2, ensure_ascii=False) if read.meta.config else "",
        counted=counted,
        number=lambda value: DASH if value is None else f"{value:g}",
        number_of_percent=number_of_percent,
        signed=signed,
        percent_tick=lambda share: f"{100 * share:g} %",
        seconds_tick=lambda value: f"{value:g} s" if value >= 1 else f"{1_000 * value:g} ms",
    )


@dataclass(frozen=True)
class StrategyRow:
    """One strategy at one place; times in seconds."""

    strategy: str
    style: int
    attainment: dict[str, Interval]
    difference: Interval
    of_bound: float | None
    goodput: str
    p99: float | None
    worst_wait: float | None
    worst: tuple[Place, float | None] | None
    best: tuple[Place, float | None] | None


@dataclass(frozen=True)
class StrategyTable:
    """All strategies at one place; ``share`` and ``points`` are scales into percent of a cell's width."""

    place: Place
    rows: Sequence[StrategyRow]
    bound: float | None
    share: Scale
    points: Scale
    scale_label: str
    extremes: bool


def _table(c: Comparison, panel: Panel) -> StrategyTable:
    place = c.reference(panel)
    rows = [_strategy_row(c, place, strategy) for strategy in c.strategies_at(panel)]
    ends = [v for r in rows for v in (r.difference.mean, r.difference.low, r.difference.high) if v is not None]
    scale = _points_scale(ends)
    return StrategyTable(
        place=place,
        rows=rows,
        bound=c.bound(place, c.metric),
        share=Scale(0, 1, 3, 97),
        points=scale,
        scale_label=_scale_label(scale),
        extremes=len(c.loads(panel)) > 1,
    )


def _strategy_row(c: Comparison, place: Place, strategy: str) -> StrategyRow:
    cell = c.cell(place, strategy)
    extremes = c.extremes(place.panel, strategy)
    worst, best = [(p, c.attainment(p, strategy, c.metric).mean) for p in extremes] if extremes else (None, None)
    return StrategyRow(
        strategy=strategy,
        style=c.styles.get(strategy, 0),
        attainment={m: c.attainment(place, strategy, m) for m in findings.IN_TIME},
        difference=c.difference(place, strategy, c.baseline, c.metric),
        of_bound=c.of_bound(place, strategy),
        goodput=_plain(cell.metrics.goodput_per_s, 2) if cell else DASH,
        p99=findings.quantile_s(c, place, strategy, "ttft_s", "p99"),
        worst_wait=findings.worst_wait_s(c, place, strategy),
        worst=worst,
        best=best,
    )


def _points_scale(values: Sequence[float]) -> Scale:
    """A scale of differences with round ends that always holds zero."""
    low, high = min([0.0, *values]), max([0.0, *values])
    step = next(s for s in (1, 2, 5, 10, 20) if high - low <= 10 * s or s == 20)
    return Scale(step * floor(low / step), max(step * ceil(high / step), step), 3, 97)


def _scale_label(scale: Scale) -> str:
    low = f"{MINUS}{-scale.low:g}" if scale.low else "0"
    return f"{low} to +{scale.high:g} points"


def _curves(c: Comparison) -> Iterator[tuple[str, list[tuple[Panel, Markup, charts.Chart]]]]:
    for metric in c.metrics:
        drawn = [
            (panel, findings.carrying(c, panel, metric), chart)
            for panel in c.panels
            if (chart := charts.attainment_by_load(c, panel, metric))
        ]
        if drawn:
            yield metric, drawn


@dataclass(frozen=True)
class PartsTable:
    """Differences by part of the requests; ``marks`` has one list of (style, points, filled) a group."""

    panel: Panel
    groups: Sequence[Group]
    left_out: int
    x: Scale
    scale_label: str
    marks: Sequence[Sequence[tuple[int, float, bool | None]]]


def _compared(c: Comparison) -> list[str]:
    """The challengers drawn in colour."""
    return [s for s in c.challengers if s in c.styles]


def _parts(c: Comparison) -> Iterator[PartsTable]:
    compared = _compared(c)
    for panel in c.panels:
        groups, left_out = findings.groups(c, panel, compared)
        if not groups:
            continue
        x = _points_scale([d[0] for g in groups for d in g.differences if d])
        marks = [
            [(c.styles[s], *d) for s, d in reversed(list(zip(compared, g.differences, strict=True))) if d]
            for g in groups
        ]
        yield PartsTable(panel, groups, left_out, x, _scale_label(x), marks)


def _latencies(
    c: Comparison,
) -> Iterator[tuple[str, list[tuple[Place, Markup, charts.Chart, list[tuple[str, list[float | None]]]]]]]:
    for what in ("ttft_s", "tpot_s"):
        drawn = []
        for place in map(c.reference, c.panels):
            if chart := charts.distribution(c, place, what):
                rows = [
                    (s, [findings.quantile_s(c, place, s, what, q) for q in ("p50", "p95", "p99", "max")])
                    for s in c.strategies_at(place.panel)
                ]
                drawn.append((place, findings.tail(c, place, what), chart, rows))
        if drawn:
            yield what, drawn


@dataclass(frozen=True)
class WindowView:
    """A window with its words and its ticks."""

    window: timeline.Window
    heading: Markup
    place: Place
    seed: int | None
    rule: str
    ticks: Sequence[float]

    def since(self, at_s: float | None) -> float | None:
        """A time on the clock of the run as seconds since the window began."""
        return None if at_s is None else at_s - self.window.x.low

    def tick(self, at_s: float) -> str:
        """A tick as seconds since the window began."""
        return f"{at_s - self.window.x.low:g} s"


def _window(timelines: Sequence[Timeline]) -> WindowView | None:
    found = timeline.worst_window(timelines)
    if found is None:
        return None
    window, of = found
    first = window.rows[0].timeline
    of_several = f"of {of} windows recorded, the one with the most seconds waited behind the blocker" if of > 1 else ""
    x = window.x
    return WindowView(
        window=window,
        heading=findings.blocking(window, window.rows[0]) if len(window.rows) == 1 else findings.same_arrivals(window),
        place=Place(first.trace, first.target, first.load),
        seed=first.seed,
        rule="; ".join(filter(None, [visible(first.rule), of_several])),
        ticks=[x.low + t for t in Scale(0, x.high - x.low, 0, 1).ticks(6)],
    )


def _predictions(c: Comparison) -> Iterator[tuple[Panel, Place, str, charts.Chart, Sequence[Any]]]:
    """One chart a trace: predictions do not depend on the target."""
    seen = set[str]()
    for panel in c.panels:
        if panel.trace not in seen and (found := charts.predicted_against_actual(c, panel)):
            seen.add(panel.trace)
            strategy, place, chart = found
            cell = c.cell(place, strategy)
            yield panel, place, strategy, chart, cell.predicted_vs_actual if cell else []


def _known(c: Comparison, strategy: str | None, group: str, name: str) -> list[float]:
    """All values of one number of ``predictor`` or ``decision_us`` over the cells, ascending."""
    values = (
        interval(getattr(cell.metrics, group).get(name)).mean
        for cell in c.results.cells
        if strategy in (None, cell.strategy)
    )
    return sorted(v for v in values if v is not None)


def _accuracy(c: Comparison, strategy: str) -> list[str]:
    """Median and p95 error in percent, decision time p50 and p99; smallest to largest."""
    errors = [[number_of_percent(v) for v in _known(c, strategy, "predictor", q)] for q in ("median_ape", "p95_ape")]
    times = [[seconds(v * 1e-6) for v in _known(c, strategy, "decision_us", q)] for q in ("p50", "p99")]
    return [_from_to(values) for values in (*errors, *times)]


def _from_to(values: Sequence[str]) -> str:
    if not values:
        return DASH
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _accuracy_heading(c: Comparison) -> str:
    errors, times = _known(c, None, "predictor", "median_ape"), _known(c, None, "decision_us", "p99")
    said = []
    if errors:
        said.append(f"half of the predictions are off by at most {number_of_percent(errors[-1])}\xa0% in every cell")
    if times:
        said.append(f"99 of 100 decisions take at most {seconds(times[-1] * 1e-6)} in every cell")
    text = "; ".join(said)
    return text[0].upper() + text[1:] if text else "Neither predictor error nor decision time was recorded"


def _cells(c: Comparison) -> Iterator[tuple[Place, list[tuple[str, list[str]]]]]:
    """Every cell as text, place by place."""
    for place in c.places:
        rows = [(s, _cell_values(c, cell)) for s in c.strategies if (cell := c.cell(place, s))]
        yield place, rows


def _cell_values(c: Comparison, cell: Cell) -> list[str]:
    m = cell.metrics
    return [
        *(number_of_percent(m.attainment(a).mean) for a in ("ttft_attainment", "tpot_attainment", "slo_attainment")),
        thousands(m.attainment(c.metric).n),
        number_of_percent(c.of_bound(Place(cell.trace, cell.target, cell.load), cell.strategy)),
        _plain(m.goodput_per_s, 2),
        _plain(m.output_tokens_per_s, 0),
        *(seconds(interval(m.ttft_s.get(q)).mean) for q in ("p50", "p95", "p99")),
        *(seconds(interval(m.tpot_s.get(q)).mean) for q in ("p50", "p99")),
        seconds(interval(m.itl_s.get("p99")).mean),
        number_of_percent(interval(m.fluidity).mean),
        seconds(interval(m.worst_wait_s).mean),
        thousands(interval(m.rejected).mean),
        thousands(interval(m.unfinished).mean),
    ]


def _pairs(c: Comparison, metrics: Sequence[str]) -> Iterator[tuple[Place, list[tuple[str, str, list[Any]]]]]:
    """Every pair, place by place: a, b, and per metric the difference with what its interval allows one to say."""
    together: dict[Place, dict[tuple[str, str], None]] = {}
    for p in c.results.pairs:
        together.setdefault(Place(p.trace, p.target, p.load), {})[p.a, p.b] = None
    for place, pairs in together.items():
        rows = []
        for a, b in pairs:
            differences = [c.difference(place, a, b, metric) for metric in metrics]
            rows.append((a, b, [(d, findings.verdict_word(d)) for d in differences]))
        yield place, rows


def _plain(value: Number, digits: int) -> str:
    mean = interval(value).mean
    if mean is None:
        return DASH
    return f"{mean:.{digits}f}" if digits and abs(mean) < 100 else thousands(round(mean))


def _facts(c: Comparison) -> str:
    """What was run, in one line."""
    traces = {panel.trace for panel in c.panels}
    targets = {panel.target for panel in c.panels}
    loads = {cell.load for cell in c.results.cells}
    seeds = c.results.meta.seeds
    facts = [
        counted(len(traces), "trace"),
        counted(len(targets), "target"),
        counted(len(loads), "load"),
        counted(len(c.strategies), "strategy", "strategies"),
    ]
    if seeds is not None:
        facts.append(counted(seeds if isinstance(seeds, int) else len(seeds), "seed"))
    return " · ".join(facts)


def _notes(c: Comparison) -> list[str | Markup]:
    """What limits the findings: of the run first, then of this report."""
    meta = c.results.meta
    notes: list[str | Markup] = [visible(note) for note in meta.notes]
    synthetic = [panel.trace for panel in c.panels if meta.synthetic.get(panel.trace)]
    if synthetic:
        names = Markup(", ").join(shown(trace) for trace in dict.fromkeys(synthetic))
        notes.append(Markup("Synthetic, not recorded traffic: {}.").format(names))
    if meta.baseline is not None and meta.baseline != c.baseline:
        notes.append(
            Markup("The baseline {} has no cell; differences are measured against {}.").format(
                shown(meta.baseline), shown(c.baseline)
            )
        )
    return notes + findings.over_the_bound(c)


def _long_names(results: Results) -> list[str]:
    """Every name that tables cut, whole once."""
    names = [n for cell in results.cells for n in (cell.trace, cell.target or "", cell.strategy)]
    for cell in results.cells:
        for group in findings.KINDS:
            names += cell.metrics.of_group(group, "ttft_attainment")
    return [name for name in dict.fromkeys(names) if len(visible(name)) > NAME_CHARACTERS]


def _command(meta: Meta) -> str:
    return meta.command if isinstance(meta.command, str) else " ".join(meta.command)


def _seeds(meta: Meta) -> str:
    if meta.seeds is None:
        return "not recorded"
    return str(meta.seeds) if isinstance(meta.seeds, int) else ", ".join(map(str, meta.seeds))
