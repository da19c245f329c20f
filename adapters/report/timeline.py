"""One instance in one window under several strategies: who waited, who ran, and who stood in the way."""

from collections.abc import Sequence
from dataclasses import dataclass

from kairos.adapters.report.results import Timeline, TimelineRequest
from kairos.scheduler_core.drawing.scale import Scale

MAX_LANES = 40
MAX_BLOCKS_PER_LANE = 50
_NOTICED_S = 1e-6
Span = tuple[float, float]


@dataclass(frozen=True)
class Lane:
    """One request; spans in seconds on the clock of the run."""

    request: TimelineRequest
    waiting: Span
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
        behind_s: what they waited while it ran, together.
        late, submitted: over all requests of the window.
    """

    timeline: Timeline
    lanes: Sequence[Lane]
    held: Sequence[Span]
    held_s: float
    behind: int
    behind_late: int
    behind_s: float
    late: int
    submitted: int

    @property
    def hidden(self) -> int:
        """Requests without a lane."""
        return self.submitted - len(self.lanes)


@dataclass(frozen=True)
class Window:
    """One stretch of time under several strategies, one time axis for all.

    Attributes:
        same_requests: whether all rows hold the same requests, not only the same instance and time.
    """

    blocker: str | None
    blocker_tokens: int
    rows: Sequence[Row]
    x: Scale
    same_requests: bool


def worst_window(timelines: Sequence[Timeline]) -> tuple[Window, int] | None:
    """The window with the most seconds waited behind the blocker, and how many windows there are.

    A window is what was recorded of one run (trace, target, load, seed) from one moment on, the first strategy first;
    that one counts.
    """
    together: dict[tuple[object, ...], list[Timeline]] = {}
    for t in timelines:
        together.setdefault((t.trace, t.target, t.load, t.seed, t.start_s), []).append(t)
    if not together:
        return None
    return max(map(_window, together.values()), key=lambda w: w.rows[0].behind_s), len(together)


def _window(timelines: Sequence[Timeline]) -> Window:
    blocker = next((str(t.blocker) for t in timelines if t.blocker is not None), None)
    behind = set[str]()
    for t in timelines:
        held = _held(t, blocker)
        behind |= {str(r.request_id) for r in t.requests if _waited_s(r, t.end_s, held) > _NOTICED_S}
    start_s, end_s = min(t.start_s for t in timelines), max(t.end_s for t in timelines)
    tokens = {str(r.request_id): r.prompt_tokens for t in timelines for r in t.requests}
    return Window(
        blocker=blocker,
        blocker_tokens=tokens.get(blocker or "", 0),
        rows=[_row(t, blocker, behind) for t in timelines],
        x=Scale(start_s, max(end_s, start_s + 1e-3), 0, 100),
        same_requests=all(len(t.requests) == len(tokens) for t in timelines),
    )


def _row(timeline: Timeline, blocker: str | None, behind_any: set[str]) -> Row:
    held = _held(timeline, blocker)
    behind = [
        r for r in timeline.requests if str(r.request_id) != blocker and _waited_s(r, timeline.end_s, held) > _NOTICED_S
    ]

    def interest(r: TimelineRequest) -> tuple[bool, bool, float]:
        return str(r.request_id) != blocker, str(r.request_id) not in behind_any, r.arrival_s

    drawn = sorted(sorted(timeline.requests, key=interest)[:MAX_LANES], key=lambda r: r.arrival_s)
    return Row(
        timeline=timeline,
        lanes=[_lane(timeline, r, blocker, held) for r in drawn],
        held=held,
        held_s=sum(end - start for start, end in held),
        behind=len(behind),
        behind_late=sum(not r.ttft_met for r in behind),
        behind_s=sum(_waited_s(r, timeline.end_s, held) for r in behind),
        late=sum(not r.ttft_met for r in timeline.requests),
        submitted=len(timeline.requests),
    )


def _lane(timeline: Timeline, request: TimelineRequest, blocker: str | None, held: Sequence[Span]) -> Lane:
    request_id = str(request.request_id)
    blocks = _steps_of(timeline, request_id)
    until = timeline.end_s if request.first_token_s is None else request.first_token_s
    return Lane(
        request=request,
        waiting=(request.arrival_s, max(until, request.arrival_s)),
        blocks=blocks if len(blocks) <= MAX_BLOCKS_PER_LANE else _turns(blocks),
        prefill_s=sum(end - start for start, end in blocks),
        is_blocker=request_id == blocker,
        waited_behind=request_id != blocker and _waited_s(request, timeline.end_s, held) > _NOTICED_S,
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


def _waited_s(request: TimelineRequest, end_s: float, held: Sequence[Span]) -> float:
    """How long a request waited for its first step while the blocker ran."""
    until = end_s if request.start_s is None else request.start_s
    return sum(max(min(until, end) - max(request.arrival_s, start), 0.0) for start, end in held)
