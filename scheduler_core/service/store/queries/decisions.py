"""Decisions: rows in, those of a request out, ids forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple, cast

from sqlalchemy import ColumnElement, Connection, insert, or_, select, update

from kairos.scheduler_core.service.decisions.record import without_ids
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Decision, Request
from kairos.scheduler_core.telemetry import REQUEST_STATUSES

KeptFor = Literal["rejected", "failed", "guarded", "missed", "long_wait", "sampled"]
KEPT_FOR: tuple[KeptFor, ...] = ("rejected", "failed", "guarded", "missed", "long_wait", "sampled")
"""Why a decision is recorded; where several hold, the first."""

_MOST_SHOWN = 64
_PAGE_ROWS = 10_000


class DecisionRow(NamedTuple):
    """A decision about one request; `body` is a packed `Record`."""

    decided_at: datetime
    request_id: str
    tenant: str | None
    decision_id: str
    kept_for: KeptFor
    body: bytes


@dataclass(frozen=True, slots=True)
class DecisionRows:
    """Rows that are stored together."""

    rows: Sequence[DecisionRow]

    @property
    def row_count(self) -> int:
        """How many rows."""
        return len(self.rows)

    def write(self, connection: Connection) -> int:
        """Store them; how many."""
        connection.execute(insert(Decision), [row._asdict() for row in self.rows])
        return len(self.rows)


def decisions_of(connection: Connection, request_id: str, tenant: str | None) -> list[DecisionRow]:
    """What was recorded of a request, in the order in which it was decided; tenant None: whosever it is."""
    columns = (Decision.decided_at, Decision.tenant, Decision.decision_id, Decision.kept_for, Decision.body)
    mine = select(*columns).where(Decision.request_id == request_id)
    if tenant is not None:
        mine = mine.where(Decision.tenant == tenant)
    rows = connection.execute(mine.order_by(Decision.id.desc()).limit(_MOST_SHOWN)).all()
    return [
        DecisionRow(row.decided_at, request_id, row.tenant, row.decision_id, cast(KeptFor, row.kept_for), row.body)
        for row in reversed(rows)
    ]


class Outcome(NamedTuple):
    """What became of a request, as telemetry tells it; None: not told."""

    status: str
    arrived_at_s: float | None
    wait_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    output_tokens: int | None
    predicted_ttft_s: float | None
    predicted_tpot_s: float | None
    ttft_target_s: float | None
    tpot_target_s: float | None
    prefill_instance: str | None
    decode_instance: str | None
    strategy: str | None
    model_version: str


def outcome_of(connection: Connection, request_id: str, tenant: str | None) -> Outcome | None:
    """The latest telemetry of a request of this id; tenant None: whosever it is."""
    columns = [getattr(Request, name) for name in Outcome._fields[1:]]
    mine = select(Request.status, *columns).where(Request.request_id == request_id)
    if tenant is not None:
        mine = mine.where(Request.tenant == tenant)
    row = connection.execute(mine.order_by(Request.id.desc()).limit(1)).first()
    return None if row is None else Outcome(REQUEST_STATUSES[row[0]], *row[1:])


def forget_decisions(store: Store, *, tenants: Sequence[str], requests: Sequence[str], everyone: bool) -> None:
    """Delete ids: of the decisions that are named, and of the requests that went first in the others.

    Those that went first have no tenant beside them, so forgetting a tenant takes all of their ids.
    """
    named: ColumnElement[bool] = or_(Decision.tenant.in_(tenants), Decision.request_id.in_(requests))
    ids = None if everyone or tenants else requests
    after = 0
    while True:
        page = select(Decision.id, Decision.body).where(Decision.id > after).order_by(Decision.id).limit(_PAGE_ROWS)
        with store.write() as connection:
            rows = connection.execute(page).all()
            if not rows:
                return
            last = rows[-1].id
            span = Decision.id.between(after + 1, last)
            mine = update(Decision).where(span) if everyone else update(Decision).where(span, named)
            connection.execute(mine.values(tenant=None, request_id=None))
            for row in rows:
                if (body := without_ids(row.body, ids)) is not None:
                    connection.execute(update(Decision).where(Decision.id == row.id).values(body=body))
        after = last
