"""The tables of the state store.

All times are seconds since the epoch (UTC). Hosts that share a store are expected to keep their
clocks within a second or so of each other (NTP).
"""

from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Dialect,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

SCHEMA_REVISION = "0005"
"""The newest migration; a store at this revision is used without loading alembic."""

VERSION_TABLE = "robustness_version"
"""The table that names the newest migration applied.

Not Alembic's usual one: Dagster's tables, with theirs, may be in the same database.
"""

TEXT_LIMIT = 4000
"""Characters kept of a text; error messages can hold whole tracebacks."""


class CleanText(TypeDecorator[str]):
    """Text that every backend stores: no NUL, no lone surrogates, at most `TEXT_LIMIT` long."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Replace what UTF-8 and PostgreSQL cannot hold by its backslash escape."""
        if value is None:
            return None
        value = value[:TEXT_LIMIT].replace("\0", "\\x00")
        return value.encode("utf-8", "backslashreplace").decode("utf-8")


metadata = MetaData()

circuit_breakers = Table(
    "circuit_breakers",
    metadata,
    Column("name", CleanText, primary_key=True),
    Column("state", CleanText, nullable=False),
    Column("forced", CleanText),
    # Grows by one with every transition: an outcome of a call that began before the last
    # transition says nothing about the present state.
    Column("generation", Integer, nullable=False),
    Column("failure_count", Integer, nullable=False),
    Column("success_count", Integer, nullable=False),
    Column("ignored_count", Integer, nullable=False),
    Column("rejected_count", Integer, nullable=False),
    Column("consecutive_failures", Integer, nullable=False),
    Column("probe_successes", Integer, nullable=False),
    Column("opened_at", Float),
    Column("last_failure_at", Float),
    Column("last_error", CleanText),
    Column("recovery_timeout", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

breaker_outcomes = Table(
    "breaker_outcomes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", CleanText, nullable=False),
    Column("at", Float, nullable=False),
    Column("failed", Boolean, nullable=False),
    Column("slow", Boolean, nullable=False),
    Index("ix_breaker_outcomes_name_id", "name", "id"),
)

breaker_probes = Table(
    "breaker_probes",
    metadata,
    Column("token", CleanText, primary_key=True),
    Column("name", CleanText, nullable=False, index=True),
    Column("started_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)

breaker_transitions = Table(
    "breaker_transitions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", CleanText, nullable=False),
    Column("from_state", CleanText, nullable=False),
    Column("to_state", CleanText, nullable=False),
    Column("at", Float, nullable=False),
    Column("reason", CleanText, nullable=False),
    Column("run_id", CleanText),
    Index("ix_breaker_transitions_name_id", "name", "id"),
)

timings = Table(
    "timings",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("feature_type", CleanText, nullable=False),
    Column("at", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("audio_seconds", Float),
    Column("file_size_mb", Float),
    Column("success", Boolean, nullable=False),
    # Stopped at its timeout: the true time is longer than `seconds`.
    Column("censored", Boolean, nullable=False),
    Column("timeout_given", Float),
    Index("ix_timings_feature_type_id", "feature_type", "id"),
)

retry_outcomes = Table(
    "retry_outcomes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("strategy", CleanText, nullable=False),
    Column("operation", CleanText),
    Column("at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("success", Boolean, nullable=False),
    Column("total_seconds", Float, nullable=False),
    Index("ix_retry_outcomes_strategy_id", "strategy", "id"),
)

retry_parameters = Table(
    "retry_parameters",
    metadata,
    Column("strategy", CleanText, primary_key=True),
    # Empty for outcomes recorded without one.
    Column("operation", CleanText, primary_key=True, default=""),
    Column("base_delay", Float, nullable=False),
    Column("multiplier", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

retry_budget = Table(
    "retry_budget",
    metadata,
    Column("scope", CleanText, primary_key=True),
    Column("tokens", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

errors = Table(
    "errors",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("error_type", CleanText, nullable=False),
    Column("severity", CleanText, nullable=False),
    Column("recovery_strategy", CleanText, nullable=False),
    Column("retryable", Boolean, nullable=False),
    Column("recovered", Boolean),
    Column("operation", CleanText),
    Column("file", CleanText),
    Column("message", CleanText, nullable=False),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("content_hash", CleanText, primary_key=True),
    Column("feature_set", CleanText, primary_key=True),
    Column("file_key", CleanText, nullable=False),
    Column("error_type", CleanText, nullable=False),
    Column("reason", CleanText, nullable=False),
    Column("first_failed_at", Float, nullable=False),
    Column("last_failed_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("code_version", CleanText),
    Column("conditions", CleanText),
)

activity = Table(
    "activity",
    metadata,
    Column("name", CleanText, primary_key=True),
    Column("host", CleanText, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("body", Text, nullable=False),
)


def insert_into(connection: Connection, table: Table) -> "postgresql.Insert | sqlite.Insert":
    """Return an INSERT that knows `on_conflict_do_update` and `on_conflict_do_nothing`."""
    # Only the dialect in use is imported: a command that shows the state starts faster.
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def prune(connection: Connection, table: Table, keep: int, **group: str) -> None:
    """Delete all rows of a group but the newest.

    Parameters
    ----------
    connection : Connection
        A connection in a write transaction.
    table : Table
        A table with an ascending integer column `id`.
    keep : int
        Rows to keep.
    **group : str
        Columns and the values that make up the group, for instance `feature_type="key"`.
    """
    members = [table.c[column] == value for column, value in group.items()]
    newest_surplus = (
        sa.select(table.c.id).where(*members).order_by(table.c.id.desc()).limit(1).offset(keep)
    )
    connection.execute(
        sa.delete(table).where(*members, table.c.id <= newest_surplus.scalar_subquery())
    )
