"""Telemetry with its batches and recordings, models with their promotions, strategies with their activations."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None

key = sa.BigInteger().with_variant(sa.Integer, "sqlite")
date = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Begin."""
    op.create_table(
        "served_revisions",
        sa.Column("revision", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("revision", name="pk_served_revisions"),
    )
    op.create_table(
        "telemetry_batches",
        sa.Column("id", key, nullable=False),
        sa.Column("rows_of", sa.String(16), nullable=False),
        sa.Column("batch_id", sa.String(256), nullable=False),
        sa.Column("digest", sa.LargeBinary(16), nullable=False),
        sa.Column("received_at", date, nullable=False),
        sa.Column("stored", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_telemetry_batches"),
        sa.UniqueConstraint("rows_of", "batch_id", name="uq_telemetry_batches_rows_of_batch_id"),
    )
    op.create_table(
        "recordings",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("gpu", sa.String(128), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("precision", sa.String(128), nullable=False),
        sa.Column("tp", sa.Integer, nullable=False),
        sa.Column("ep", sa.Integer, nullable=False),
        sa.Column("engine", sa.String(128), nullable=False),
        sa.Column("run", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_recordings"),
        sa.UniqueConstraint("gpu", "model", "precision", "tp", "ep", "engine", "run", name="uq_recordings"),
    )
    op.create_table(
        "steps",
        sa.Column("id", key, nullable=False),
        sa.Column("batch", key, nullable=False),
        sa.Column("step_s", sa.Double, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("sum_context_tokens", sa.BigInteger, nullable=False),
        sa.Column("recording", sa.Integer, nullable=False),
        sa.Column("n_requests", sa.Integer, nullable=False),
        sa.Column("new_tokens", sa.Integer, nullable=False),
        sa.Column("batch_size", sa.Integer, nullable=False),
        sa.Column("kind", sa.SmallInteger, nullable=False),
        sa.Column("prev_phase", sa.SmallInteger, nullable=False),
        sa.Column("noisy", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_steps"),
    )
    op.create_table(
        "requests",
        sa.Column("id", key, nullable=False),
        sa.Column("batch", key, nullable=False),
        sa.Column("recording", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(256)),
        sa.Column("tenant", sa.String(128)),
        sa.Column("slo_class", sa.String(128), nullable=False),
        sa.Column("input_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer),
        sa.Column("prefix_hit_ratio", sa.Double, nullable=False),
        sa.Column("kv_cache_usage", sa.Double, nullable=False),
        sa.Column("requests_running", sa.Integer, nullable=False),
        sa.Column("requests_waiting", sa.Integer, nullable=False),
        sa.Column("prefill_tokens_in_flight", sa.BigInteger, nullable=False),
        sa.Column("decode_tokens_in_flight", sa.BigInteger, nullable=False),
        sa.Column("model_version", sa.String(128), nullable=False),
        sa.Column("predicted_ttft_s", sa.Double),
        sa.Column("predicted_tpot_s", sa.Double),
        sa.Column("ttft_s", sa.Double),
        sa.Column("tpot_s", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_requests"),
    )
    op.create_index("ix_requests_request_id", "requests", ["request_id"])
    op.create_index("ix_requests_tenant", "requests", ["tenant"])
    op.create_table(
        "models",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("profile_id", sa.String(1600), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("schema_hash", sa.String(64), nullable=False),
        sa.Column("trained_at", date, nullable=False),
        sa.Column("last_step", key, nullable=False),
        sa.Column("artifact", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("profile_id", "version", name="uq_models_profile_id_version"),
    )
    op.create_table(
        "promotions",
        sa.Column("generation", key, nullable=False, autoincrement=False),
        sa.Column("profile_id", sa.String(1600), nullable=False),
        sa.Column("model", sa.Integer, nullable=False),
        sa.Column("promoted_at", date, nullable=False),
        sa.Column("reason", sa.String(1024), nullable=False),
        sa.PrimaryKeyConstraint("generation", name="pk_promotions"),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name="fk_promotions_model"),
    )
    op.create_table(
        "strategies",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("policies", sa.JSON, nullable=False),
        sa.Column("created_at", date, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_strategies"),
        sa.UniqueConstraint("name", "version", name="uq_strategies_name_version"),
    )
    op.create_table(
        "activations",
        sa.Column("generation", key, nullable=False, autoincrement=False),
        sa.Column("strategy", sa.Integer, nullable=False),
        sa.Column("activated_at", date, nullable=False),
        sa.PrimaryKeyConstraint("generation", name="pk_activations"),
        sa.ForeignKeyConstraint(["strategy"], ["strategies.id"], name="fk_activations_strategy"),
    )
    op.execute("INSERT INTO served_revisions VALUES ('0001')")


def downgrade() -> None:
    """Back to an empty database."""
    op.drop_table("activations")
    op.drop_table("strategies")
    op.drop_table("promotions")
    op.drop_table("models")
    op.drop_table("requests")
    op.drop_table("steps")
    op.drop_table("recordings")
    op.drop_table("telemetry_batches")
    op.drop_table("served_revisions")
