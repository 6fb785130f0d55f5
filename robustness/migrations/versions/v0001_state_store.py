"""The tables of the state store."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """Create every table."""
    op.create_table(
        "circuit_breakers",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("forced", sa.Text()),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("failure_count", sa.Integer(), nullable=False),
        sa.Column("success_count", sa.Integer(), nullable=False),
        sa.Column("ignored_count", sa.Integer(), nullable=False),
        sa.Column("rejected_count", sa.Integer(), nullable=False),
        sa.Column("consecutive_failures", sa.Integer(), nullable=False),
        sa.Column("probe_successes", sa.Integer(), nullable=False),
        sa.Column("opened_at", sa.Float()),
        sa.Column("last_failure_at", sa.Float()),
        sa.Column("last_error", sa.Text()),
        sa.Column("recovery_timeout", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "breaker_outcomes",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("failed", sa.Boolean(), nullable=False),
        sa.Column("slow", sa.Boolean(), nullable=False),
    )
    op.create_index("ix_breaker_outcomes_name_id", "breaker_outcomes", ["name", "id"])
    op.create_table(
        "breaker_probes",
        sa.Column("token", sa.Text(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
    )
    op.create_index("ix_breaker_probes_name", "breaker_probes", ["name"])
    op.create_table(
        "breaker_transitions",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("from_state", sa.Text(), nullable=False),
        sa.Column("to_state", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text()),
    )
    op.create_index("ix_breaker_transitions_name_id", "breaker_transitions", ["name", "id"])
    op.create_table(
        "timings",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("feature_type", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("audio_seconds", sa.Float()),
        sa.Column("file_size_mb", sa.Float()),
        sa.Column("success", sa.Boolean(), nullable=False),
        sa.Column("censored", sa.Boolean(), nullable=False),
        sa.Column("timeout_given", sa.Float()),
    )
    op.create_index("ix_timings_feature_type_id", "timings", ["feature_type", "id"])
    op.create_table(
        "retry_outcomes",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("strategy", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text()),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("success", sa.Boolean(), nullable=False),
        sa.Column("total_seconds", sa.Float(), nullable=False),
    )
    op.create_index("ix_retry_outcomes_strategy_id", "retry_outcomes", ["strategy", "id"])
    op.create_table(
        "retry_parameters",
        sa.Column("strategy", sa.Text(), primary_key=True),
        sa.Column("base_delay", sa.Float(), nullable=False),
        sa.Column("multiplier", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "retry_budget",
        sa.Column("scope", sa.Text(), primary_key=True),
        sa.Column("tokens", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "errors",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("error_type", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("recovery_strategy", sa.Text(), nullable=False),
        sa.Column("retryable", sa.Boolean(), nullable=False),
        sa.Column("recovered", sa.Boolean()),
        sa.Column("operation", sa.Text()),
        sa.Column("file", sa.Text()),
        sa.Column("message", sa.Text(), nullable=False),
    )
    op.create_table(
        "quarantine",
        sa.Column("content_hash", sa.Text(), primary_key=True),
        sa.Column("feature_set", sa.Text(), primary_key=True),
        sa.Column("file_key", sa.Text(), nullable=False),
        sa.Column("error_type", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("first_failed_at", sa.Float(), nullable=False),
        sa.Column("last_failed_at", sa.Float(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
    )
