"""What is kept of a decision about one request: at most 2 KB, in MessagePack."""

from collections.abc import Collection, Sequence
from typing import Literal

import msgspec

MOST_BYTES = 2048
MOST_ALTERNATIVES = 8

Stage = Literal["prefill", "decode", "admission"]


class Spread(msgspec.Struct, frozen=True):
    """Many numbers in four."""

    count: int = 0
    p50: float = 0.0
    p90: float = 0.0
    most: float = 0.0

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Nearest ranks.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(count=3, p50=2.0, p90=3.0, most=3.0)
        """
        if not values:
            return Spread()
        ordered = sorted(values)
        last = len(ordered) - 1
        return Spread(len(ordered), ordered[round(0.5 * last)], ordered[round(0.9 * last)], ordered[-1])


class Elsewhere(msgspec.Struct, frozen=True):
    """Another instance that could have taken the request."""

    instance_id: str
    seconds: float
    """Predicted: the TTFT there, behind what is planned there; for decode its next step."""
    requests: int
    """Planned there before it (prefill), or there already (decode)."""


class First(msgspec.Struct, frozen=True):
    """Another request that goes first on the same instance."""

    request_id: str
    prefill_s: float
    """Predicted: what is left of its prompt."""
    ttft_s: float
    """Predicted."""
    on_time: bool


class Rule(msgspec.Struct, frozen=True, omit_defaults=True):
    """What decided."""

    strategy: str
    policies: str
    """What the strategy is made of, with parameters."""
    model_version: str = ""
    """Where the predicted seconds come from."""
    failures: list[str] = []
    """Policies that failed and were replaced, as `policy: error`."""


class Asked(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the request was."""

    prompt_tokens: int
    cached_tokens: int = 0
    slo_class: str = ""


class Queue(msgspec.Struct, frozen=True, omit_defaults=True):
    """What there was at that moment."""

    tokens: Spread = Spread()
    """Prompt tokens of everyone who waited."""
    waited_s: Spread = Spread()
    late: int = 0
    """How many of them were predicted late."""
    running: int = 0
    transferred: int = 0
    resident: int = 0


class DecisionRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A decision about one request. Seconds and tokens; lengths and times alone, never content."""

    stage: Stage
    rule: Rule
    asked: Asked
    queue: Queue
    # what was chosen
    instance_id: str = ""
    """Empty: it was rejected."""
    code: str = ""
    """Prefill: how it stands (`runs_next`, ...); rejected: why."""
    chosen_by: str = ""
    order: int = 0
    step_tokens: int = 0
    bound: bool = False
    """It had its instance before."""
    decode_instance_id: str = ""
    status: int | None = None
    """Rejected: the HTTP status."""
    retry_after_s: int | None = None
    # what was predicted
    waited_s: float = 0.0
    ahead_requests: int = 0
    ahead_s: float = 0.0
    predicted_prefill_s: float | None = None
    predicted_ttft_s: float | None = None
    predicted_step_s: float | None = None
    ttft_target_s: float | None = None
    on_time: bool | None = None
    laxity_s: float | None = None
    # the alternatives
    elsewhere: list[Elsewhere] = []
    """The best others, the best first."""
    elsewhere_rest: Spread = Spread()
    """`seconds` of those not named."""
    first: list[First] = []
    """Those that go first, in their order."""
    line: Spread = Spread()
    """Predicted prefill seconds of all that wait for the same instance."""


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(DecisionRecord)


def pack(record: DecisionRecord, elsewhere: Sequence[Elsewhere] = (), first: Sequence[First] = ()) -> bytes:
    """A record in at most `MOST_BYTES`: long names are cut, and of the alternatives as many are named as fit.

    Args:
        elsewhere: every other instance, the best first.
        first: those that go first, in order.
    """
    record = _fitting(record)
    packed = b""
    for named in range(MOST_ALTERNATIVES, -1, -1):
        packed = _encode(_with_alternatives(record, elsewhere, first, named))
        if len(packed) <= MOST_BYTES:
            break
    return packed


def unpack(packed: bytes) -> DecisionRecord:
    """What `pack` wrote."""
    return _decoder.decode(packed)


def without_ids(packed: bytes, request_ids: Collection[str] | None) -> bytes | None:
    """A record without these ids among those that went first, or (None) without any; None: nothing to change."""
    record = unpack(packed)
    cut = None if request_ids is None else {_cut(request_id, _ID_BYTES) for request_id in request_ids}
    first = [
        msgspec.structs.replace(f, request_id="") if cut is None or f.request_id in cut else f for f in record.first
    ]
    return None if first == record.first else _encode(msgspec.structs.replace(record, first=first))


_ID_BYTES, _NAME_BYTES, _RULE_BYTES = 48, 96, 192
"""Most bytes of an id among alternatives, of every other name, of a strategy's text: so a record without alternatives
is never too long."""


def _fitting(record: DecisionRecord) -> DecisionRecord:
    rule, asked = record.rule, record.asked
    return msgspec.structs.replace(
        record,
        rule=Rule(
            _cut(rule.strategy, _NAME_BYTES),
            _cut(rule.policies, _RULE_BYTES),
            _cut(rule.model_version, _NAME_BYTES),
            [_cut(failure, _NAME_BYTES) for failure in rule.failures[:3]],
        ),
        asked=msgspec.structs.replace(asked, slo_class=_cut(asked.slo_class, _NAME_BYTES)),
        instance_id=_cut(record.instance_id, _NAME_BYTES),
        decode_instance_id=_cut(record.decode_instance_id, _NAME_BYTES),
        code=_cut(record.code, _NAME_BYTES),
    )


def _with_alternatives(
    record: DecisionRecord, elsewhere: Sequence[Elsewhere], first: Sequence[First], named: int
) -> DecisionRecord:
    return msgspec.structs.replace(
        record,
        elsewhere=[msgspec.structs.replace(e, instance_id=_cut(e.instance_id, _ID_BYTES)) for e in elsewhere[:named]],
        elsewhere_rest=Spread.of([e.seconds for e in elsewhere[named:]]),
        first=[msgspec.structs.replace(f, request_id=_cut(f.request_id, _ID_BYTES)) for f in first[:named]],
    )


def _cut(text: str, most_bytes: int) -> str:
    """The text, or its beginning.

    >>> _cut("prefill-0", 9), _cut("prefill-10", 9)
    ('prefill-0', 'prefil…')
    """
    whole = text.encode()
    return text if len(whole) <= most_bytes else whole[: most_bytes - 3].decode(errors="ignore") + "…"
