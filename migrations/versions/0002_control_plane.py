"""Requests with their arrival, targets and strategy; decisions, reservations, keys, experiments, events, leases."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"

key = sa.BigInteger().with_variant(sa.Integer, "sqlite")
date = sa.DateTime(timezone=True)
_BUCKETS = ("batch_bucket", "new_bucket", "context_bucket")


def upgrade() -> None:
    """Expand: new columns may be empty, so the release before this one goes on writing."""
    added = (
        sa.Column("arrived_at_s", sa.Double),
        sa.Column("status", sa.SmallInteger, nullable=False, server_default="0"),
        sa.Column("ttft_target_s", sa.Double),
        sa.Column("tpot_target_s", sa.Double),
        sa.Column("wait_s", sa.Double),
        sa.Column("strategy", sa.String(128)),
        sa.Column("session", sa.String(128)),
        sa.Column("pool", sa.SmallInteger),
        sa.Column("prefill_instance", sa.String(128)),
        sa.Column("decode_instance", sa.String(128)),
    )
    for column in added:
        op.add_column("requests", column)
    op.create_index("ix_requests_arrived_at_s", "requests", ["arrived_at_s"])
    told = sa.text("session IS NOT NULL")
    op.create_index("ix_requests_session", "requests", ["session"], sqlite_where=told, postgresql_where=told)
    op.add_column("steps", sa.Column("ended_at_s", sa.Double, nullable=False, server_default="0"))
    op.create_table(
        "instance_samples",
        sa.Column("id", key, nullable=False),
        sa.Column("batch", key, nullable=False),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("instance", sa.String(128), nullable=False),
        sa.Column("engine", sa.String(128), nullable=False),
        *(sa.Column(name, sa.Integer) for name in ("requests_running", "requests_waiting")),
        *(sa.Column(name, sa.Double) for name in ("kv_cache_usage", "interval_s")),
        *(sa.Column(f"{name}_tokens", sa.BigInteger) for name in ("prompt", "output")),
        *(sa.Column(name, sa.BigInteger) for name in ("finished_requests", "preemptions")),
        sa.Column("prefix_hit_ratio", sa.Double),
        *(sa.Column(name, sa.BigInteger) for name in ("kv_expired", "failed_transfers", "decode_steps")),
        *(sa.Column(name, sa.Double) for name in ("ttft_s", "itl_s", "e2e_s", "decode_batch", "decode_step_s")),
        sa.PrimaryKeyConstraint("id", name="pk_instance_samples"),
    )
    op.create_index("ix_instance_samples_instance_at_s", "instance_samples", ["instance", "at_s"])
    op.create_table(
        "step_hours",
        sa.Column("hour_at", date, nullable=False),
        sa.Column("recording", sa.Integer, nullable=False),
        *(sa.Column(n, sa.SmallInteger, nullable=False) for n in ("kind", *_BUCKETS)),
        sa.Column("n", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.Double, nullable=False) for name in ("step_s", "step_s_squares")),
        sa.PrimaryKeyConstraint("hour_at", "recording", "kind", *_BUCKETS, name="pk_step_hours"),
    )
    counts = ("n", "finished", "ttft_met", "ttft_missed", "tpot_met", "tpot_missed", "input_tokens", "output_tokens")
    op.create_table(
        "request_hours",
        sa.Column("hour_at", date, nullable=False),
        *(sa.Column(name, sa.String(128), nullable=False) for name in ("slo_class", "tenant")),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in (*counts, "ttft_n", "tpot_n")),
        *(sa.Column(f"{name}_s", sa.Double, nullable=False) for name in ("ttft", "tpot")),
        *(sa.Column(f"{name}_s_squares", sa.Double, nullable=False) for name in ("ttft", "tpot")),
        sa.PrimaryKeyConstraint("hour_at", "slo_class", "tenant", name="pk_request_hours"),
    )
    op.add_column("models", sa.Column("report", sa.JSON))
    op.add_column("models", sa.Column("state", sa.String(16), nullable=False, server_default="judged"))
    with op.batch_alter_table("promotions") as promotions:  # SQLite cannot alter in place
        promotions.alter_column("model", existing_type=sa.Integer, nullable=True)
        promotions.add_column(sa.Column("rollback", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_table(
        "trainings",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("cause", sa.String(16), nullable=False),
        sa.Column("profiles", sa.JSON),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("asked_at", date, nullable=False),
        sa.Column("ended_at", date),
        sa.Column("models", sa.JSON),
        sa.Column("error", sa.String(1024)),
        sa.PrimaryKeyConstraint("id", name="pk_trainings"),
    )
    op.create_index("ix_trainings_state", "trainings", ["state"])
    op.create_table(
        "watches",
        sa.Column("profile_id", sa.String(1600), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("last_step", key, nullable=False),
        sa.Column("correction", sa.JSON, nullable=False),
        sa.Column("state", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("profile_id", "kind", name="pk_watches"),
    )
    op.create_table(
        "events",
        sa.Column("id", key, nullable=False),
        sa.Column("at", date, nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(1600), nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_at", "events", ["at"])
    op.create_table(
        "leases",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("holder", sa.String(64), nullable=False),
        sa.Column("until_s", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.create_table(
        "decisions",
        sa.Column("id", key, nullable=False),
        sa.Column("decided_at", date, nullable=False),
        sa.Column("request_id", sa.String(256)),
        sa.Column("tenant", sa.String(256)),
        sa.Column("decision_id", sa.String(64), nullable=False),
        sa.Column("kept_for", sa.String(16), nullable=False),
        sa.Column("body", sa.LargeBinary(2048), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_decisions"),
    )
    for indexed in ("decided_at", "request_id", "tenant"):
        op.create_index(f"ix_decisions_{indexed}", "decisions", [indexed])
    op.create_table(
        "instances",
        sa.Column("instance_id", sa.String(256), nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("changed_at", date, nullable=False),
        sa.PrimaryKeyConstraint("instance_id", name="pk_instances"),
    )
    op.create_table(
        "reservations",
        sa.Column("id", key, nullable=False),
        sa.Column("request_id", sa.String(256), nullable=False),
        sa.Column("tenant", sa.String(256)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("expires_at_s", sa.Double, nullable=False),
        sa.Column("change", key, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_reservations"),
        sa.UniqueConstraint("request_id", name="uq_reservations_request_id"),
        sa.UniqueConstraint("change", name="uq_reservations_change"),
    )
    for indexed in ("tenant", "expires_at_s"):
        op.create_index(f"ix_reservations_{indexed}", "reservations", [indexed])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(256)),
        sa.Column("created_at", date, nullable=False),
        sa.Column("revoked_at", date),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("name", name="uq_api_keys_name"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )
    op.create_table(
        "experiments",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("design", sa.String(16), nullable=False),
        sa.Column("plan", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("started_at_s", sa.Double, nullable=False),
        sa.Column("generation", key, nullable=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("ended_at", date),
        sa.Column("record", sa.JSON),
        sa.PrimaryKeyConstraint("id", name="pk_experiments"),
    )
    op.create_table(
        "experiment_pairs",
        sa.Column("experiment", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("i", sa.Integer, nullable=False),
        sa.Column("observed", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("experiment", "kind", "i", name="pk_experiment_pairs"),
        sa.ForeignKeyConstraint(["experiment"], ["experiments.id"], name="fk_experiment_pairs_experiment"),
    )
    op.create_table(
        "experiment_reports",
        sa.Column("experiment", sa.String(64), nullable=False),
        sa.Column("data_plane", sa.String(256), nullable=False),
        sa.Column("slot_start_s", sa.Double, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("experiment", "data_plane", "slot_start_s", name="pk_experiment_reports"),
        sa.ForeignKeyConstraint(["experiment"], ["experiments.id"], name="fk_experiment_reports_experiment"),
    )
    op.execute("INSERT INTO served_revisions VALUES ('0002')")


def downgrade() -> None:
    """Back to the tables of 0001."""
    for table in ("experiment_reports", "experiment_pairs", "experiments", "api_keys", "reservations", "instances"):
        op.drop_table(table)
    for table in ("decisions", "leases", "events"):
        op.drop_table(table)
    op.drop_table("watches")
    op.drop_table("trainings")
    op.execute("DELETE FROM promotions WHERE model IS NULL")
    with op.batch_alter_table("promotions") as promotions:
        promotions.drop_column("rollback")
        promotions.alter_column("model", existing_type=sa.Integer, nullable=False)
    op.drop_column("models", "state")
    for table in ("request_hours", "step_hours", "instance_samples"):
        op.drop_table(table)
    op.drop_column("models", "report")
    op.drop_index("ix_requests_session", "requests")
    op.drop_column("steps", "ended_at_s")
    op.drop_index("ix_requests_arrived_at_s", "requests")
    for added in ("arrived_at_s", "status", "ttft_target_s", "tpot_target_s", "wait_s", "strategy", "session", "pool"):
        op.drop_column("requests", added)
    for added in ("prefill_instance", "decode_instance"):
        op.drop_column("requests", added)
    op.execute("DELETE FROM served_revisions WHERE revision = '0002'")
