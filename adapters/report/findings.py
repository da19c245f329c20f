"""What the report says in words: headings and sentences, each made from the numbers it stands over."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from kairos.adapters.report.comparison import Comparison, Difference, Panel, Place
from kairos.adapters.report.results import Interval, TimelineRequest, interval
from kairos.adapters.report.timeline import Lane, Row, Window
from kairos.scheduler_core.drawing.text import DASH, MINUS, counted, percent, points, seconds, shown, signed, thousands

IN_TIME = {
    "slo_attainment": "in time end to end",
    "ttft_attainment": "with the first token in time",
    "tpot_attainment": "with the output pace kept",
}
COLUMN = {"slo_attainment": "end to end", "ttft_attainment": "first token", "tpot_attainment": "output pace"}
BETTER, WORSE, SAME, SHORT = "better", "worse", "no difference shown", "too short for an interval"
GLYPH = {BETTER: "●", WORSE: "✕", SAME: "◐", SHORT: "–"}
MAX_LOSSES = 8


def verdict_word(difference: Interval) -> str:
    """What a 95 % interval of a difference allows one to say.

    >>> verdict_word(Interval(0.4, -0.2, 1.0))
    'no difference shown'
    """
    if difference.low is None or difference.high is None:
        return SHORT
    return BETTER if difference.low > 0 else WORSE if difference.high < 0 else SAME


def at(place: Place | Panel) -> Markup:
    """A place in words: trace, target, load."""
    parts = [shown(place.trace)]
    if place.target is not None:
        parts.append(Markup("target {}").format(shown(place.target)))
    if isinstance(place, Place):
        parts.append(escape("as recorded" if place.load is None else f"load {place.load:g}"))
    return Markup(", ").join(parts)


def span(difference: Interval) -> str:
    """A difference with its interval.

    >>> span(Interval(20.1, 18.04, 22.2)).replace(chr(160), " ")
    '+20.1 points (+18.0 to +22.2)'
    """
    if not difference.known:
        return f"{points(difference.mean)} (no interval)"
    return f"{points(difference.mean)} ({signed(difference.low)} to {signed(difference.high)})"


@dataclass(frozen=True)
class Verdict:
    """One strategy against the baseline over all places. ``only`` is set when there is one place."""

    strategy: str
    counts: dict[str, int]
    smallest: Difference | None
    largest: Difference | None
    sentence: Markup

    @property
    def cells(self) -> int:
        return sum(self.counts.values())

    @property
    def only(self) -> Difference | None:
        return self.smallest if self.cells == 1 else None


def verdicts(c: Comparison) -> list[Verdict]:
    """One per strategy other than the baseline, best first."""
    return [_verdict(c, strategy) for strategy in c.challengers]


def _verdict(c: Comparison, strategy: str) -> Verdict:
    differences = c.differences(strategy)
    words = [verdict_word(d.points) for d in differences]
    counts = {word: words.count(word) for word in GLYPH if word in words or word in (BETTER, SAME, WORSE)}
    if not differences:
        sentence = Markup("No pair with {} was recorded, so there is no verdict: compare the levels below.").format(
            shown(c.baseline)
        )
        return Verdict(strategy, counts, None, None, sentence)
    smallest, largest = differences[0], differences[-1]
    if len(differences) == 1:
        sentence = Markup("{} of requests {}, against {} under {}: {}. {}.").format(
            percent(c.attainment(smallest.place, strategy, c.metric).mean),
            IN_TIME[c.metric],
            percent(c.attainment(smallest.place, c.baseline, c.metric).mean),
            shown(c.baseline),
            span(smallest.points),
            words[0].capitalize(),
        )
    else:
        sentence = Markup("Against {}: from {} ({}) to {} ({}).").format(
            shown(c.baseline), span(smallest.points), at(smallest.place), span(largest.points), at(largest.place)
        )
    return Verdict(strategy, counts, smallest, largest, sentence)


def range_of(verdict: Verdict) -> str:
    """The differences of a verdict from the smallest to the largest."""
    if verdict.smallest is None or verdict.largest is None:
        return DASH
    low, high = verdict.smallest.points.mean, verdict.largest.points.mean
    return points(low) if verdict.cells == 1 else f"{signed(low)} to {points(high)}"


def headline(c: Comparison, best: Verdict | None) -> Markup:
    """The report in one sentence."""
    if best is None:
        return Markup("{} alone was run: nothing to compare it with").format(shown(c.baseline))
    names = shown(best.strategy), shown(c.baseline)
    if best.largest is None or best.smallest is None:
        return Markup("{} and {} were run, but no pair was recorded: no verdict").format(*names)
    better, worse = best.counts[BETTER], best.counts[WORSE]
    verb, extreme = ("more", best.largest) if better else ("fewer", best.smallest)
    if better or worse:
        how_much = points(extreme.points.mean)
        if best.cells == 1:
            return Markup("{} keeps {} requests in time than {}: {}").format(names[0], verb, names[1], how_much)
        many = _of(better or worse, best.cells, "cell")
        return Markup("{} keeps {} requests in time than {} in {}, by up to {}").format(
            names[0], verb, names[1], many, how_much.lstrip(f"+{MINUS}")
        )
    if best.counts.get(SHORT) == best.cells:
        return Markup("No verdict, too short for an interval: {} minus {} is {} in the mean").format(
            *names, range_of(best)
        )
    return Markup("No difference shown between {} and {} in {}").format(*names, counted(best.cells, "cell"))


def _of(some: int, of: int, noun: str) -> str:
    if some == of > 1:
        return f"both {noun}s" if of == 2 else f"all {counted(of, noun)}"
    return f"{some} of {counted(of, noun)}"


def bound_heading(c: Comparison) -> Markup:
    """How near the best strategy comes to what is possible, in short."""
    strategy = c.best or c.baseline
    shares = [share for p in c.places if (share := c.of_bound(p, strategy)) is not None]
    if not shares:
        return Markup("How far {} is from the possible is not known: no bound was recorded").format(shown(strategy))
    reached = percent(min(shares)) if len(shares) == 1 else f"{percent(min(shares))} to {percent(max(shares))}"
    return Markup("{} reaches {} of the bound on first tokens in time").format(shown(strategy), reached)


def bound_sentence(c: Comparison) -> Markup:
    """The same with the places of the two ends; empty where there are not two."""
    strategy = c.best or c.baseline
    shares = [(share, p) for p in c.places if (share := c.of_bound(p, strategy)) is not None]
    if len(shares) < 2:
        return Markup("")
    low, high = min(shares, key=lambda s: s[0]), max(shares, key=lambda s: s[0])
    return Markup(
        "{} reaches between {} ({}) and {} ({}) of the bound, the most that any scheduler could have in time knowing "
        "the future."
    ).format(shown(strategy), percent(low[0]), at(low[1]), percent(high[0]), at(high[1]))


def over_the_bound(c: Comparison) -> list[Markup]:
    """Cells that claim more than is possible: the run or the bound is wrong."""
    return [
        Markup("{} is above the bound ({}): {} against {}. Either the run or the bound is wrong.").format(
            shown(s), at(p), percent(c.attainment(p, s, "ttft_attainment").mean), percent(c.bound(p, "ttft_attainment"))
        )
        for p in c.places
        for s in c.strategies
        if (share := c.of_bound(p, s)) is not None and share > 1 + 1e-9
    ]


@dataclass(frozen=True)
class Losses:
    """Where the best strategy is behind another one: shown by an interval, or in the mean alone."""

    shown: Sequence[Markup]
    more: int
    summary: Markup


def losses(c: Comparison) -> Losses:
    """Where the best strategy loses, largest first."""
    strategy = c.best or c.baseline
    ahead = sorted(c.rivals_ahead(strategy), key=lambda r: r[2].mean or 0.0)
    sure = [r for r in ahead if verdict_word(r[2]) == WORSE]
    unsure = [r for r in ahead if verdict_word(r[2]) != WORSE]
    lines = [
        Markup("{}: {} is ahead, {} for {}.").format(at(place), shown(other), span(d), shown(strategy))
        for place, other, d in sure
    ]
    if sure:
        summary = Markup("{} loses in {}, by an interval that excludes 0:").format(
            shown(strategy), counted(len(sure), "cell")
        )
    elif not any(interval(pair.difference_pp).known for pair in c.results.pairs):
        summary = Markup("No pair has an interval, so only means can be compared.")
    else:
        summary = Markup("In no cell is another strategy ahead of {} by an interval that excludes 0.").format(
            shown(strategy)
        )
    if unsure:
        place, other, d = unsure[0]
        summary_more = Markup(
            "In {} another has the higher mean without such an interval; the largest: {}, {}, {}."
        ).format(counted(len(unsure), "cell"), at(place), shown(other), span(d))
        lines = [*lines[:MAX_LOSSES], summary_more]
    else:
        lines = lines[:MAX_LOSSES]
    return Losses(lines, max(len(sure) - MAX_LOSSES, 0), summary)


def costs(c: Comparison) -> list[Markup]:
    """Times in which the best strategy is worse than the baseline, in how many cells and where most."""
    lines = []
    for words, of in _TIMES.items():
        known = [
            (mine / theirs, mine, theirs, place)
            for place in c.places
            if c.best and (mine := of(c, place, c.best)) is not None and (theirs := of(c, place, c.baseline))
        ]
        worse = [k for k in known if k[0] > 1]
        if worse:
            _, mine, theirs, place = max(worse, key=lambda k: k[0])
            lines.append(
                Markup("{} is longer in {}; the most: {} against {} ({}).").format(
                    words, _of(len(worse), len(known), "cell"), seconds(mine), seconds(theirs), at(place)
                )
            )
    return lines


def worst_wait_s(c: Comparison, place: Place, strategy: str) -> float | None:
    """The longest wait of any request."""
    cell = c.cell(place, strategy)
    return interval(cell.metrics.worst_wait_s).mean if cell else None


def by_chance(all_verdicts: Iterable[Verdict]) -> str:
    """How many verdicts to expect from chance alone."""
    tested = sum(v.cells - v.counts.get(SHORT, 0) for v in all_verdicts)
    if tested < 2:
        return ""
    return f"Of {tested} intervals at 95 %, about {max(round(0.05 * tested), 1)} would exclude 0 by chance alone."


def ranking(c: Comparison) -> Markup:
    """Heading of the tables: how often the best strategy is first at the reference load."""
    strategy = c.best or c.baseline
    shares = [{s: c.attainment(c.reference(p), s, c.metric).mean or 0.0 for s in c.strategies} for p in c.panels]
    first = sum(of[strategy] >= max(of.values()) for of in shares)
    if len(c.panels) == 1:
        place = c.reference(c.panels[0])
        top = c.strategies_at(c.panels[0])[0]
        return Markup("{} has the most requests {}: {} ({})").format(
            shown(top), IN_TIME[c.metric], percent(c.attainment(place, top, c.metric).mean), at(place)
        )
    return Markup("{} has the most requests {} in {}").format(
        shown(strategy), IN_TIME[c.metric], _of(first, len(c.panels), "table")
    )


def carrying(c: Comparison, panel: Panel, metric: str) -> Markup:
    """Title of a curve: the load each of the two carries at 90 % in time."""
    parts = []
    for strategy in [c.best, c.baseline] if c.best else [c.baseline]:
        load = c.carried_load(panel, strategy, metric)
        parts.append(
            Markup("{} {}").format(shown(strategy), "at no load run" if load is None else f"up to load {load:g}")
        )
    return Markup("90 % in time: {}").format(Markup("; ").join(parts))


def capacity(c: Comparison) -> Markup:
    """Heading of the curves."""
    if all(len(c.loads(panel)) < 2 for panel in c.panels):
        return Markup("One load was run, so how far each strategy carries is not known")
    if c.best is None:
        return Markup("Attainment falls as load rises: {}").format(shown(c.baseline))
    loads = [
        (c.carried_load(panel, c.best, c.metric) or 0.0, c.carried_load(panel, c.baseline, c.metric) or 0.0)
        for panel in c.panels
    ]
    more, fewer = sum(a > b for a, b in loads), sum(a < b for a, b in loads)
    names = shown(c.best), shown(c.baseline)
    if more == fewer == 0:
        return Markup("{} and {} carry the same of the loads run with 90 % in time").format(*names)
    where = "" if len(loads) == 1 else f" in {_of(more, len(loads), 'chart')}"
    if more:
        return Markup("With 90 % in time {} carries more load than {}{}").format(*names, where)
    return Markup("With 90 % in time {} carries less load than {} in {}").format(
        *names, _of(fewer, len(loads), "chart")
    )


@dataclass(frozen=True)
class Group:
    """Differences to the baseline for one part of the requests: (points, intervals apart) by challenger.

    ``apart`` is None where an interval is missing.
    """

    kind: str
    name: str
    differences: Sequence[tuple[float, bool | None] | None]


KINDS = {"by_prompt_quartile": "prompt length", "by_class": "class", "by_tenant": "tenant"}
MAX_MEMBERS = 8


def groups(c: Comparison, panel: Panel, challengers: Sequence[str]) -> tuple[list[Group], int]:
    """Parts of the requests at the reference load, and how many tenants or classes were left out.

    A kind with one member is all requests, so it is no part.
    Of a kind with more than eight members those with the largest differences stay. No paired interval exists for
    parts, so ``apart`` says whether the two strategies' own intervals do not touch, which is the stricter test.
    """
    found, left_out = [], 0
    for by, kind in KINDS.items():
        base = _members(c, panel, c.baseline, by)
        theirs = [_members(c, panel, s, by) for s in challengers]
        members = [
            Group(kind, _part_name(kind, name, list(base)), [_apart(of.get(name), base[name]) for of in theirs])
            for name in base
        ]
        members = [m for m in members if any(m.differences)]
        if len(members) < 2:
            continue
        if len(members) > MAX_MEMBERS:
            left_out += len(members) - MAX_MEMBERS
            largest = sorted(members, key=lambda m: -max(abs(d[0]) for d in m.differences if d))[:MAX_MEMBERS]
            members = [m for m in members if m in largest]
        found += members
    return found, left_out


def _members(c: Comparison, panel: Panel, strategy: str, by: str) -> dict[str, Interval]:
    cell = c.cell(c.reference(panel), strategy)
    return cell.metrics.of_group(by, c.metric) if cell else {}


def _part_name(kind: str, name: str, names: list[str]) -> str:
    numbers = [int(number.group()) if (number := re.search(r"\d+", n)) else -1 for n in names]
    if kind != "prompt length" or len(names) != 4 or numbers != sorted(set(numbers)):
        return name
    return f"{name}, {('shortest quarter', 'second quarter', 'third quarter', 'longest quarter')[names.index(name)]}"


def _apart(a: Interval | None, b: Interval) -> tuple[float, bool | None] | None:
    if a is None or a.mean is None or b.mean is None:
        return None
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return 100 * (a.mean - b.mean), None
    apart = a.low > b.high or a.high < b.low
    return 100 * (a.mean - b.mean), apart


def winners_and_losers(c: Comparison, parts: Iterable[tuple[Panel, Sequence[Group]]]) -> Markup:
    """Heading of the parts: who gains most and who loses most under the best strategy (the first column)."""
    known = [(g.differences[0][0], panel, g) for panel, gs in parts for g in gs if g.differences[0]]
    if not known:
        return Markup("No part of the requests was recorded for both strategies")
    high, low = max(known, key=lambda k: k[0]), min(known, key=lambda k: k[0])
    words = ("gains most" if high[0] > 0 else "loses least", "loses most" if low[0] < 0 else "gains least")
    said = [
        Markup("{} {} {}: {} ({})").format(g.kind, shown(g.name), word, points(d), shown(panel.trace))
        for word, (d, panel, g) in zip(words, (high, low), strict=True)
    ]
    return Markup("Under {} {}; {}").format(shown(c.best or ""), *said)


def quantile_s(c: Comparison, place: Place, strategy: str, what: str, name: str) -> float | None:
    """``p50`` and so on of ``ttft_s`` or ``tpot_s``."""
    cell = c.cell(place, strategy)
    return interval(getattr(cell.metrics, what).get(name)).mean if cell else None


_TIMES: dict[str, Callable[[Comparison, Place, str], float | None]] = {
    "p99 TTFT": lambda c, place, strategy: quantile_s(c, place, strategy, "ttft_s", "p99"),
    "p99 TPOT": lambda c, place, strategy: quantile_s(c, place, strategy, "tpot_s", "p99"),
    "The worst wait": worst_wait_s,
}


def tail(c: Comparison, place: Place, what: str) -> Markup:
    """Title of a distribution: p99 of the best and of the baseline."""
    pair = [c.best, c.baseline] if c.best else [c.baseline]
    said = [Markup("{} {}").format(shown(s), seconds(quantile_s(c, place, s, what, "p99"))) for s in pair]
    return Markup("p99 {}: {}").format("TTFT" if what == "ttft_s" else "TPOT", Markup("; ").join(said))


def tails(c: Comparison) -> Markup:
    """Heading of the distributions: where the p99 of TTFT differs most."""
    known = []
    for panel in c.panels if c.best else []:
        place = c.reference(panel)
        mine, theirs = (quantile_s(c, place, s, "ttft_s", "p99") for s in (c.best or "", c.baseline))
        if mine and theirs:
            known.append((max(mine / theirs, theirs / mine), mine, theirs, place))
    if not known:
        return Markup("How long the first token and each later one take")
    _, mine, theirs, place = max(known, key=lambda k: k[0])
    return Markup("99 of 100 first tokens come within {} under {}, {} under {} ({})").format(
        seconds(mine), shown(c.best or ""), seconds(theirs), shown(c.baseline), at(place)
    )


def blocking(window: Window, row: Row) -> Markup:
    """Heading of one timeline."""
    instance = shown(row.timeline.instance)
    if window.blocker is None:
        return Markup("{} of {} late on {}").format(row.late, counted(row.submitted, "request"), instance)
    blocker = Markup("{} ({} tokens)").format(shown(window.blocker), thousands(window.blocker_tokens))
    if not row.held:
        return Markup("{} did not run on {} in this window; {} of {} late").format(
            blocker, instance, row.late, counted(row.submitted, "request")
        )
    turns = "" if len(row.held) == 1 else f" in {len(row.held)} turns"
    return Markup("{} held {} for {}{}; {} waited behind it, {} late").format(
        blocker, instance, seconds(row.held_s), turns, row.behind, row.behind_late
    )


def same_arrivals(window: Window) -> Markup:
    """Heading of a window: late requests under each strategy, and whether they are the same requests."""
    said = [Markup("{} of {} under {}").format(r.late, r.submitted, shown(r.timeline.strategy)) for r in window.rows]
    what = "The same arrivals" if window.same_requests else "The same seconds on one instance"
    return Markup("{}, requests late: {}").format(what, Markup(", ").join(said))


def lane_sentence(lane: Lane) -> str:
    """What a lane shows, for who cannot see it."""
    r = lane.request
    said = [f"{thousands(r.prompt_tokens)} tokens"]
    if r.start_s is not None:
        said.append(f"waited {seconds(r.start_s - r.arrival_s)}")
    said.append(f"ran {seconds(lane.prefill_s)} in {counted(len(lane.blocks), 'block')}")
    if lane.waited_behind:
        said.append("waited behind the blocker")
    said.append("no first token in this window" if r.first_token_s is None else f"first token after {ttft(r)}")
    said.append("in time" if r.ttft_met else "late")
    return ", ".join(said)


def ttft(request: TimelineRequest) -> str:
    """TTFT of a timeline's request in words."""
    return seconds(None if request.first_token_s is None else request.first_token_s - request.arrival_s)
