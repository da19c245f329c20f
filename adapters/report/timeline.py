"""One instance in one window under several strategies: who waited, who ran, and who stood in the way."""

from collections.abc import Sequence
from dataclasses import dataclass

from kairos.adapters.report.results import Timeline, TimelineRequest
from kairos.scheduler_core.drawing.scale import Scale

MAX_LANES = 40
MAX_BLOCKS_PER_LANE = 50
Span = tuple[float, float]


@dataclass(frozen=True)
class Lane:
    """One request; spans in seconds on the clock of the run. ``request`` is None where it was not in this window."""

    request_id: str
    request: TimelineRequest | None
    waiting: Span | None
    blocks: Sequence[Span]
    prefill_s: float
    is_blocker: bool
    waited_behind: bool


@dataclass(frozen=True)
class Row:
    """One strategy's part of a window.

    Attributes:
        held: when the blocker ran, turn by turn.
        held_s: how long that was.
        behind, behind_late: requests that waited while it ran, and those of them that were late.
        late, submitted: over all requests of the window.
    """

    timeline: Timeline
    lanes: Sequence[Lane]
    held: Sequence[Span]
    held_s: float
    behind: int
    behind_late: int
    late: int
    submitted: int


@dataclass(frozen=True)
class Window:
    """The same arrivals under several strategies, one time axis for all; ``hidden`` requests have no lane."""

    blocker: str | None
    blocker_tokens: int
    rows: Sequence[Row]
    x: Scale
    hidden: int


def windows(timelines: Sequence[Timeline]) -> list[Window]:
    """Timelines of one run (trace, target, load, seed) and window together, in the order given."""
    together: dict[tuple[object, ...], list[Timeline]] = {}
    for t in timelines:
        together.setdefault((t.trace, t.target, t.load, t.seed, t.start_s), []).append(t)
    return [_window(same) for same in together.values()]


def _window(timelines: Sequence[Timeline]) -> Window:
    blocker = next((str(t.blocker) for t in timelines if t.blocker is not None), None)
    behind = set[str]()
    for t in timelines:
        held = _held(t, blocker)
        behind |= {str(r.request_id) for r in t.requests if _waited(r, t.end_s, held)}
    everyone = {str(r.request_id): r for t in reversed(timelines) for r in t.requests}
    by_interest = sorted(everyone, key=lambda i: (i != blocker, i not in behind, everyone[i].arrival_s))
    lanes = sorted(by_interest[:MAX_LANES], key=lambda i: (everyone[i].arrival_s, i))
    start_s = min([t.start_s for t in timelines] + [everyone[i].arrival_s for i in lanes])
    end_s = max(t.end_s for t in timelines)
    return Window(
        blocker=blocker,
        blocker_tokens=everyone[blocker].prompt_tokens if blocker in everyone else 0,
        rows=[_row(t, blocker, lanes) for t in timelines],
        x=Scale(start_s, max(end_s, start_s + 1e-3), 0, 100),
        hidden=len(everyone) - len(lanes),
    )


def _row(timeline: Timeline, blocker: str | None, lanes: Sequence[str]) -> Row:
    held = _held(timeline, blocker)
    requests = {str(r.request_id): r for r in timeline.requests}
    behind = [r for i, r in requests.items() if i != blocker and _waited(r, timeline.end_s, held)]
    return Row(
        timeline=timeline,
        lanes=[_lane(timeline, i, requests.get(i), blocker, held) for i in lanes],
        held=held,
        held_s=sum(end - start for start, end in held),
        behind=len(behind),
        behind_late=sum(not r.ttft_met for r in behind),
        late=sum(not r.ttft_met for r in timeline.requests),
        submitted=len(timeline.requests),
    )


def _lane(
    timeline: Timeline, request_id: str, request: TimelineRequest | None, blocker: str | None, held: Sequence[Span]
) -> Lane:
    blocks = _steps_of(timeline, request_id)
    waiting = None
    if request is not None:
        until = timeline.end_s if request.first_token_s is None else request.first_token_s
        waiting = (request.arrival_s, max(until, request.arrival_s))
    return Lane(
        request_id=request_id,
        request=request,
        waiting=waiting,
        blocks=blocks if len(blocks) <= MAX_BLOCKS_PER_LANE else _turns(blocks),
        prefill_s=sum(end - start for start, end in blocks),
        is_blocker=request_id == blocker,
        waited_behind=request is not None and request_id != blocker and _waited(request, timeline.end_s, held),
    )


def _held(timeline: Timeline, blocker: str | None) -> list[Span]:
    return [] if blocker is None else _turns(_steps_of(timeline, blocker))


def _steps_of(timeline: Timeline, request_id: str) -> list[Span]:
    return sorted((s.start_s, s.end_s) for s in timeline.steps if request_id in map(str, s.request_ids))


def _turns(steps: Sequence[Span]) -> list[Span]:
    """Steps that follow one another without a pause, joined.

    >>> _turns([(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)])
    [(0.0, 2.0), (3.0, 4.0)]
    """
    turns: list[Span] = []
    for start, end in steps:
        if turns and start - turns[-1][1] < 1e-6:
            turns[-1] = (turns[-1][0], end)
        else:
            turns.append((start, end))
    return turns


def _waited(request: TimelineRequest, end_s: float, held: Sequence[Span]) -> bool:
    """Whether a request waited for its first step while the blocker ran."""
    until = end_s if request.start_s is None else request.start_s
    return any(min(until, end) - max(request.arrival_s, start) > 1e-6 for start, end in held)
