"""Every table. Times are seconds, lengths tokens, dates UTC; migrations/ brings a database to this form.

Steps are many and never read one by one, so they are small: numbers alone, and no foreign keys that the database would
check row by row (batch and recording are written in the same transaction, before their rows).
"""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
}

Key = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only where the key is INTEGER."""


class UtcDate(TypeDecorator[datetime]):
    """A date in UTC; SQLite forgets the zone, this gives it back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database, in UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From the database, with its zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Table(DeclarativeBase):
    """Base of all."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {float: Double}


class ServedRevision(Table):
    """Revisions whose releases run on the database as it is: a migration adds its own, a contracting one removes."""

    __tablename__ = "served_revisions"

    revision: Mapped[str] = mapped_column(String(32), primary_key=True)


class Batch(Table):
    """A batch of telemetry that was acknowledged; the same id again is answered from here."""

    __tablename__ = "telemetry_batches"
    __table_args__ = (UniqueConstraint("rows_of", "batch_id"),)

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    rows_of: Mapped[str] = mapped_column(String(16))
    """Its kind: steps or requests."""
    batch_id: Mapped[str] = mapped_column(String(256))
    digest: Mapped[bytes] = mapped_column(LargeBinary(16))
    """Of what was sent: the same id with other content is refused."""
    received_at: Mapped[datetime] = mapped_column(UtcDate)
    stored: Mapped[int] = mapped_column(Integer)
    """Rows."""


class Recording(Table):
    """One profile in one recording: what steps and requests have in common, written once."""

    __tablename__ = "recordings"
    __table_args__ = (UniqueConstraint("gpu", "model", "precision", "tp", "ep", "engine", "run", name="uq_recordings"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    gpu: Mapped[str] = mapped_column(String(128))
    model: Mapped[str] = mapped_column(String(128))
    precision: Mapped[str] = mapped_column(String(128))
    tp: Mapped[int] = mapped_column(Integer)
    ep: Mapped[int] = mapped_column(Integer)
    engine: Mapped[str] = mapped_column(String(128))
    run: Mapped[str] = mapped_column(String(128))


class Step(Table):
    """One step of an engine; `scheduler_core.telemetry.StepRecord` says what the fields mean."""

    __tablename__ = "steps"

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    batch: Mapped[int] = mapped_column(Key)
    step_s: Mapped[float]
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    sum_context_tokens: Mapped[int] = mapped_column(BigInteger)
    recording: Mapped[int] = mapped_column(Integer)
    n_requests: Mapped[int] = mapped_column(Integer)
    new_tokens: Mapped[int] = mapped_column(Integer)
    batch_size: Mapped[int] = mapped_column(Integer)
    kind: Mapped[int] = mapped_column(SmallInteger)
    """Place in STEP_KINDS."""
    prev_phase: Mapped[int] = mapped_column(SmallInteger)
    """Place in PHASES."""
    noisy: Mapped[bool]
    ended_at_s: Mapped[float] = mapped_column(server_default="0")
    """UTC epoch seconds of its end, or of its arrival here where that was not told; 0: neither was kept."""


class Request(Table):
    """One request that has ended: the prediction paired to the outcome. Lengths and times, never its content."""

    __tablename__ = "requests"
    __table_args__ = (
        Index(
            "ix_requests_session",
            "session",
            sqlite_where=text("session IS NOT NULL"),
            postgresql_where=text("session IS NOT NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    batch: Mapped[int] = mapped_column(Key)
    recording: Mapped[int] = mapped_column(Integer)
    request_id: Mapped[str | None] = mapped_column(String(256), index=True)
    """Null: not told, or forgotten."""
    tenant: Mapped[str | None] = mapped_column(String(128), index=True)
    slo_class: Mapped[str] = mapped_column(String(128))
    input_tokens: Mapped[int] = mapped_column(Integer)
    output_tokens: Mapped[int | None] = mapped_column(Integer)
    prefix_hit_ratio: Mapped[float]
    kv_cache_usage: Mapped[float]
    requests_running: Mapped[int] = mapped_column(Integer)
    requests_waiting: Mapped[int] = mapped_column(Integer)
    prefill_tokens_in_flight: Mapped[int] = mapped_column(BigInteger)
    decode_tokens_in_flight: Mapped[int] = mapped_column(BigInteger)
    model_version: Mapped[str] = mapped_column(String(128))
    """Of the model that predicted; empty: none did."""
    predicted_ttft_s: Mapped[float | None]
    predicted_tpot_s: Mapped[float | None]
    ttft_s: Mapped[float | None]
    tpot_s: Mapped[float | None]
    arrived_at_s: Mapped[float | None] = mapped_column(index=True)
    """UTC epoch seconds."""
    status: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    """Place in REQUEST_STATUSES."""
    ttft_target_s: Mapped[float | None]
    tpot_target_s: Mapped[float | None]
    wait_s: Mapped[float | None]
    """Arrival until its prefill began."""
    strategy: Mapped[str | None] = mapped_column(String(128))
    """What decided about it, as name@version."""
    session: Mapped[str | None] = mapped_column(String(128))
    """A salted hash."""
    pool: Mapped[int | None] = mapped_column(SmallInteger)
    prefill_instance: Mapped[str | None] = mapped_column(String(128))
    decode_instance: Mapped[str | None] = mapped_column(String(128))


class InstanceSample(Table):
    """What an instance said of itself at a moment; `scheduler_core.telemetry.SampleRow` says what the fields mean."""

    __tablename__ = "instance_samples"
    __table_args__ = (Index(None, "instance", "at_s"),)

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    batch: Mapped[int] = mapped_column(Key)
    at_s: Mapped[float]
    instance: Mapped[str] = mapped_column(String(128))
    engine: Mapped[str] = mapped_column(String(128))
    requests_running: Mapped[int | None] = mapped_column(Integer)
    requests_waiting: Mapped[int | None] = mapped_column(Integer)
    kv_cache_usage: Mapped[float | None]
    interval_s: Mapped[float | None]
    finished_requests: Mapped[int | None] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int | None] = mapped_column(BigInteger)
    output_tokens: Mapped[int | None] = mapped_column(BigInteger)
    preemptions: Mapped[int | None] = mapped_column(BigInteger)
    prefix_hit_ratio: Mapped[float | None]
    kv_expired: Mapped[int | None] = mapped_column(BigInteger)
    failed_transfers: Mapped[int | None] = mapped_column(BigInteger)
    ttft_s: Mapped[float | None]
    itl_s: Mapped[float | None]
    e2e_s: Mapped[float | None]
    decode_steps: Mapped[int | None] = mapped_column(BigInteger)
    decode_batch: Mapped[float | None]
    decode_step_s: Mapped[float | None]


class StepHour(Table):
    """Sums over the steps of an hour that were deleted, by bucket: k = 2^(k-1) to 2^k-1, 0 = 0."""

    __tablename__ = "step_hours"

    hour_at: Mapped[datetime] = mapped_column(UtcDate, primary_key=True)
    """In which they were received."""
    recording: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    kind: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    batch_bucket: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    new_bucket: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    context_bucket: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    """Of cached tokens and contexts together."""
    n: Mapped[int] = mapped_column(BigInteger)
    step_s: Mapped[float]
    step_s_squares: Mapped[float]


class RequestHour(Table):
    """Sums over the requests of an hour that were deleted. Met and missed: of those that had the target."""

    __tablename__ = "request_hours"

    hour_at: Mapped[datetime] = mapped_column(UtcDate, primary_key=True)
    """Of their arrival; where it was not told, in which they were received."""
    slo_class: Mapped[str] = mapped_column(String(128), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(128), primary_key=True)
    """Empty: not told, or forgotten."""
    n: Mapped[int] = mapped_column(BigInteger)
    finished: Mapped[int] = mapped_column(BigInteger)
    ttft_met: Mapped[int] = mapped_column(BigInteger)
    ttft_missed: Mapped[int] = mapped_column(BigInteger)
    tpot_met: Mapped[int] = mapped_column(BigInteger)
    tpot_missed: Mapped[int] = mapped_column(BigInteger)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    ttft_n: Mapped[int] = mapped_column(BigInteger)
    """That have one."""
    ttft_s: Mapped[float]
    ttft_s_squares: Mapped[float]
    tpot_n: Mapped[int] = mapped_column(BigInteger)
    tpot_s: Mapped[float]
    tpot_s_squares: Mapped[float]


class Model(Table):
    """A trained predictor of one profile, as the bytes of its artifact."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("profile_id", "version"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    profile_id: Mapped[str] = mapped_column(String(1600))
    version: Mapped[int] = mapped_column(Integer)
    """From 1, within the profile."""
    schema_hash: Mapped[str] = mapped_column(String(64))
    """Of the features it was trained on."""
    trained_at: Mapped[datetime] = mapped_column(UtcDate)
    last_step: Mapped[int] = mapped_column(Key)
    """Id of the last step it learned from: later ones may judge it."""
    state: Mapped[str] = mapped_column(String(16), server_default="judged")
    """challenger: the gate has not looked at all of it yet; judged; superseded: by a newer challenger before that."""
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """How it was made and what the gate said of it."""
    artifact: Mapped[bytes] = mapped_column(LargeBinary)


class Promotion(Table):
    """Since when a model serves its profile; the one of the highest generation does. A rollback is one more."""

    __tablename__ = "promotions"

    generation: Mapped[int] = mapped_column(Key, primary_key=True, autoincrement=False)
    profile_id: Mapped[str] = mapped_column(String(1600))
    model: Mapped[int | None] = mapped_column(ForeignKey("models.id"))
    """Null: none, the step times of the configuration serve."""
    rollback: Mapped[bool] = mapped_column(server_default=false())
    promoted_at: Mapped[datetime] = mapped_column(UtcDate)
    reason: Mapped[str] = mapped_column(String(1024))


class Training(Table):
    """A training that was asked for, and what became of it."""

    __tablename__ = "trainings"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    cause: Mapped[str] = mapped_column(String(16))
    """request, schedule, rows, drift."""
    profiles: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    """Their ids; null: all that have telemetry."""
    state: Mapped[str] = mapped_column(String(16), index=True)
    """waiting, running, done, failed."""
    attempts: Mapped[int] = mapped_column(Integer)
    asked_at: Mapped[datetime] = mapped_column(UtcDate)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDate)
    models: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    """What it made, as profile_id@version."""
    error: Mapped[str | None] = mapped_column(String(1024))


class Watch(Table):
    """What the steps of one profile and kind taught about the model that serves them, up to `last_step`."""

    __tablename__ = "watches"

    profile_id: Mapped[str] = mapped_column(String(1600), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    last_step: Mapped[int] = mapped_column(Key)
    correction: Mapped[dict[str, Any]] = mapped_column(JSON)
    """Served with every prediction."""
    state: Mapped[bytes] = mapped_column(LargeBinary)
    """MessagePack; `service/models/watch.py` says what of."""


class Strategy(Table):
    """A version of a strategy; it never changes, a change is a new version."""

    __tablename__ = "strategies"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(256))
    version: Mapped[int] = mapped_column(Integer)
    """From 1, within the name."""
    policies: Mapped[dict[str, Any]] = mapped_column(JSON)
    """As in the configuration: a policy for each kind."""
    created_at: Mapped[datetime] = mapped_column(UtcDate)


class Activation(Table):
    """Since when a strategy is the active one: the highest generation is. A rollback is one more."""

    __tablename__ = "activations"

    generation: Mapped[int] = mapped_column(Key, primary_key=True, autoincrement=False)
    strategy: Mapped[int] = mapped_column(ForeignKey("strategies.id"))
    activated_at: Mapped[datetime] = mapped_column(UtcDate)


class Event(Table):
    """Something an operator would want to know: a training that failed, a drift alarm, a promotion, a verdict."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDate, index=True)
    kind: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(1600))
    """Which profile, model, strategy, experiment or instance."""
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)


class Lease(Table):
    """Work that one replica does for all: who does it, and until when nobody else may."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    until_s: Mapped[float]
    """UTC epoch seconds of the database's clock."""


class Decision(Table):
    """A decision about one request, as it was made: what waited, what was predicted, what was chosen and why."""

    __tablename__ = "decisions"

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    decided_at: Mapped[datetime] = mapped_column(UtcDate, index=True)
    request_id: Mapped[str | None] = mapped_column(String(256), index=True)
    """Null: forgotten."""
    tenant: Mapped[str | None] = mapped_column(String(256), index=True)
    decision_id: Mapped[str] = mapped_column(String(64))
    kept_for: Mapped[str] = mapped_column(String(16))
    """Why it was recorded: sampled, missed, rejected, guarded, failed, long_wait."""
    body: Mapped[bytes] = mapped_column(LargeBinary(2048))
    """MessagePack."""


class Instance(Table):
    """An engine of the live fleet that was announced by REST."""

    __tablename__ = "instances"

    instance_id: Mapped[str] = mapped_column(String(256), primary_key=True)
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
    """Role, profile, capacities, address."""
    state: Mapped[str] = mapped_column(String(16))
    """active, draining, or gone: one of the configuration that was removed."""
    changed_at: Mapped[datetime] = mapped_column(UtcDate)


class Reservation(Table):
    """A request of the managed form: load on its instances from its announcement until its end, or its expiry."""

    __tablename__ = "reservations"

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    request_id: Mapped[str] = mapped_column(String(256), unique=True)
    tenant: Mapped[str | None] = mapped_column(String(256), index=True)
    state: Mapped[str] = mapped_column(String(16))
    expires_at_s: Mapped[float] = mapped_column(index=True)
    """UTC epoch seconds."""
    change: Mapped[int] = mapped_column(Key, unique=True)
    """Rises with every change of any reservation, in the order of commits."""
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
    """What was settled at its announcement, and what was reported of it."""


class ApiKey(Table):
    """A bearer key: its digest, what its holder may do, and for whom."""

    __tablename__ = "api_keys"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    """read, schedule or operate."""
    tenant: Mapped[str | None] = mapped_column(String(256))
    created_at: Mapped[datetime] = mapped_column(UtcDate)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDate)


class Experiment(Table):
    """A live experiment: everything fixed before the first coin, and the record it ended in."""

    __tablename__ = "experiments"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    design: Mapped[str] = mapped_column(String(16))
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(16))
    """running or ended."""
    started_at_s: Mapped[float]
    """UTC epoch seconds: the beginning of its first slot."""
    generation: Mapped[int] = mapped_column(Key)
    """Of the active strategy at its start; after its end, of the champion put back."""
    key: Mapped[bytes] = mapped_column(LargeBinary)
    """What its schedules are signed with; null: the key of the configuration."""
    ended_at: Mapped[datetime | None] = mapped_column(UtcDate)
    record: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """Null while it runs: it is made from the pairs then."""


class ExperimentPair(Table):
    """What one coin of an experiment decided about; written once its blocks are closed, never changed."""

    __tablename__ = "experiment_pairs"

    experiment: Mapped[str] = mapped_column(ForeignKey("experiments.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    """live; champion: against itself, where it runs alone; sample and block: of a shadow."""
    i: Mapped[int] = mapped_column(Integer, primary_key=True)
    observed: Mapped[dict[str, Any]] = mapped_column(JSON)


class ExperimentReport(Table):
    """What one data plane did in one slot of an experiment; the latest report of a slot holds."""

    __tablename__ = "experiment_reports"

    experiment: Mapped[str] = mapped_column(ForeignKey("experiments.id"), primary_key=True)
    data_plane: Mapped[str] = mapped_column(String(256), primary_key=True)
    slot_start_s: Mapped[float] = mapped_column(primary_key=True)
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
