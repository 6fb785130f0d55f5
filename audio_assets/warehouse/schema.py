"""The warehouse's tables: their columns, units and keys, in DuckDB and in the landing."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import duckdb
import pyarrow as pa

from audio_assets.features.base import Column, FeatureSet


@dataclass(frozen=True)
class Table:
    """A table of the warehouse.

    Parameters
    ----------
    schema, name : str
        DuckDB schema and table; ``<schema>/<name>`` is the table's name in the landing.
    description : str
        What one row is.
    columns : tuple of Column
        The columns that land, in order; empty where nothing lands.
    key : tuple of str
        Columns that tell rows apart. Where `version` is given, a later row of a key replaces an
        earlier one; where not, every landed row is a fact of its own and stays.
    version : str, optional
        Column that orders the rows of one key; the greatest wins, at a tie the later landed.
    computed : tuple of Column
        Columns that publishing fills in, after those that land.
    """

    schema: str
    name: str
    description: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    version: str | None = None
    computed: tuple[Column, ...] = ()

    @property
    def landing_name(self) -> str:
        """Name of the table in the landing."""
        return f"{self.schema}/{self.name}"

    @property
    def sql_name(self) -> str:
        """Quoted name of the table in DuckDB."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    @property
    def all_columns(self) -> tuple[Column, ...]:
        """The columns of the table in DuckDB."""
        return self.columns + self.computed


def quoted(identifier: str) -> str:
    """Return an identifier quoted for SQL."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as an SQL literal, for statements that take no parameters."""
    return "'" + text.replace("'", "''") + "'"


@cache
def arrow_schema(columns: tuple[Column, ...]) -> pa.Schema:
    """Return the Arrow schema of columns given by their DuckDB types.

    DuckDB itself says which Arrow type each of its types is, so that the landing's types and the
    database's cannot drift apart.

    Parameters
    ----------
    columns : tuple of Column
        Columns with DuckDB types.

    Raises
    ------
    duckdb.Error
        If a type is unknown to DuckDB.
    """
    selected = ", ".join(f"NULL::{column.type} AS {quoted(column.name)}" for column in columns)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        schema: pa.Schema = connection.sql(f"SELECT {selected}").to_arrow_table().schema
    return schema


COMMON_COLUMNS = (
    Column("file_key", "VARCHAR", "The file: name of its root and path below it, escaped"),
    Column("content_hash", "VARCHAR", "Hash of the file's content when the row was computed"),
    Column("extractor", "VARCHAR", "Library that made the row"),
    Column("computed_at", "TIMESTAMPTZ", "When the row was computed, or taken from a copy's"),
    Column("run_id", "VARCHAR", "Dagster run that computed the row, or took it from a copy's"),
    Column("code_version", "VARCHAR", "Version of the feature set's code"),
)
"""What every feature table carries before its own columns."""

FILES = Table(
    "library",
    "files",
    "One row per file that is or was in the library",
    (
        Column("file_key", "VARCHAR", "The file: name of its root and path below it, escaped"),
        Column("path", "VARCHAR", "Where the file was last seen"),
        Column("size", "BIGINT", "Size of the file", "bytes"),
        Column("mtime_ns", "BIGINT", "When the file was last modified, since the epoch", "ns"),
        Column("content_hash", "VARCHAR", "Hash of the file's content"),
        Column("duration_s", "DOUBLE", "Duration of the audio; NULL if not known", "s"),
        Column("seen_at", "TIMESTAMPTZ", "When the library was scanned"),
        Column("gone", "BOOLEAN", "Whether the file has left the library"),
    ),
    key=("file_key",),
    version="seen_at",
)

ATTEMPTS = Table(
    "robustness",
    "attempts",
    "One row per attempt at one cell (a file and a feature set)",
    (
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("file_key", "VARCHAR", "The file"),
        Column("feature_set", "VARCHAR", "The feature set"),
        Column(
            "attempt",
            "INTEGER",
            "Number of the attempt at this cell, from 1; 0 if it was not tried",
        ),
        Column(
            "outcome",
            "VARCHAR",
            "succeeded, failed, deferred (it waits), given_up (it waited too long, or the file "
            "with the same content failed), skipped (quarantined, or not to be read) or reused "
            "(unchanged since an earlier run)",
        ),
        Column("error_type", "VARCHAR", "Classified error; NULL if none"),
        Column("severity", "VARCHAR", "low, medium, high or critical; NULL if no error"),
        Column("exception_type", "VARCHAR", "Class of the exception; NULL if no error"),
        Column("message", "VARCHAR", "What went wrong, or why nothing was done"),
        Column(
            "recovery_strategy",
            "VARCHAR",
            "What was tried next in answer to this failure; NULL if there was none or nothing to",
        ),
        Column("recovered", "BOOLEAN", "Whether it succeeded after a failed attempt"),
        Column(
            "retry_strategy",
            "VARCHAR",
            "What set the wait before this attempt; NULL for a first attempt or no wait",
        ),
        Column("retry_delay_s", "DOUBLE", "Wait before this attempt", "s"),
        Column("extractor", "VARCHAR", "Library that ran"),
        Column("timeout_s", "DOUBLE", "Timeout given", "s"),
        Column("timeout_source", "VARCHAR", "base (the fixed table) or learned"),
        Column(
            "timeout_rate",
            "DOUBLE",
            "Learned quantile of computing time per second of audio; NULL if not learned yet",
            "s/s",
        ),
        Column("timeout_base_s", "DOUBLE", "Fixed base of the timeout", "s"),
        Column("timeout_multiplier", "DOUBLE", "Factor put on it for load, memory and failures"),
        Column("duration_s", "DOUBLE", "Time of the attempt in its worker", "s"),
        Column("decode_s", "DOUBLE", "Part of it spent decoding", "s"),
        Column("audio_s", "DOUBLE", "Duration of the audio analysed", "s"),
        Column("queue_s", "DOUBLE", "Wait for a worker", "s"),
        Column("peak_memory_mib", "DOUBLE", "Peak memory of the worker", "MiB"),
        Column("worker_pid", "INTEGER", "Process that ran it"),
        Column("breaker_state", "VARCHAR", "State of the feature set's breaker at the start"),
        Column("started_at", "TIMESTAMPTZ", "When the attempt began"),
        Column("content_hash", "VARCHAR", "Hash of the file's content"),
    ),
    key=("row_id",),
    computed=(Column("row_id", "UUID", "The attempt, ordered by when it was recorded"),),
)

RUNS = Table(
    "robustness",
    "runs",
    "One row per run",
    (
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("job_name", "VARCHAR", "Dagster job; NULL if the run left no record of its own"),
        Column("started_at", "TIMESTAMPTZ", "When it began"),
        Column("ended_at", "TIMESTAMPTZ", "When it ended; NULL while it runs"),
        Column("status", "VARCHAR", "Dagster's run status, lower case"),
        Column("recorded_at", "TIMESTAMPTZ", "When this was recorded"),
    ),
    key=("run_id",),
    version="recorded_at",
    computed=(
        Column("files", "BIGINT", "Files with at least one attempt"),
        Column("cells_done", "BIGINT", "Cells computed"),
        Column("cells_failed", "BIGINT", "Cells whose last attempt failed"),
        Column("cells_skipped", "BIGINT", "Cells put off or quarantined"),
        Column("cells_reused", "BIGINT", "Cells unchanged since an earlier run"),
        Column("success_rate", "DOUBLE", "Done of done and failed, 0 to 1"),
        Column("retries", "BIGINT", "Attempts after a cell's first"),
        Column("recovered_cells", "BIGINT", "Cells done after a failed attempt"),
        Column("fault_seconds", "DOUBLE", "Failed attempts and the waits after them", "s"),
        Column("audio_seconds", "DOUBLE", "Audio of the files with a cell done", "s"),
        Column(
            "audio_seconds_per_second",
            "DOUBLE",
            "Audio analysed per second of the run's time",
            "s/s",
        ),
        Column("peak_memory_mib", "DOUBLE", "Peak memory of the largest worker", "MiB"),
    ),
)

CIRCUIT_BREAKERS = Table(
    "robustness",
    "circuit_breakers",
    "One row per run and breaker: its state when the run was last published",
    (
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("name", "VARCHAR", "The breaker"),
        Column("state", "VARCHAR", "CLOSED, OPEN or HALF_OPEN"),
        Column("forced", "VARCHAR", "State set by hand; NULL if none"),
        Column("failure_count", "BIGINT", "Failures counted"),
        Column("success_count", "BIGINT", "Successes counted"),
        Column("ignored_count", "BIGINT", "Failures that were the file's own fault"),
        Column("consecutive_failures", "BIGINT", "Failures since the last success"),
        Column("opened_at", "TIMESTAMPTZ", "When it last opened"),
        Column("last_failure_at", "TIMESTAMPTZ", "When it last counted a failure"),
        Column("last_error", "VARCHAR", "The last failure counted"),
        Column("recovery_timeout", "DOUBLE", "Time it stays open", "s"),
        Column("seen_at", "TIMESTAMPTZ", "When this was read from the state store"),
    ),
    key=("run_id", "name"),
    version="seen_at",
)

BREAKER_TRANSITIONS = Table(
    "robustness",
    "breaker_transitions",
    "One row per change of a breaker's state",
    (
        Column("name", "VARCHAR", "The breaker"),
        Column("from_state", "VARCHAR", "State before"),
        Column("to_state", "VARCHAR", "State after"),
        Column("at", "TIMESTAMPTZ", "When it changed"),
        Column("reason", "VARCHAR", "Why it changed"),
        Column("run_id", "VARCHAR", "Dagster run in which it changed; NULL if in none"),
        Column("seen_at", "TIMESTAMPTZ", "When this was read from the state store"),
    ),
    key=("name", "at", "from_state", "to_state"),
    version="seen_at",
)

RETRY_PARAMETERS = Table(
    "robustness",
    "retry_parameters",
    "One row per run and retry strategy: its parameters when the run was last published",
    (
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("strategy", "VARCHAR", "Retry strategy"),
        Column("base_delay", "DOUBLE", "First delay", "s"),
        Column("multiplier", "DOUBLE", "Growth of the delay per attempt"),
        Column("seen_at", "TIMESTAMPTZ", "When this was read from the state store"),
    ),
    key=("run_id", "strategy"),
    version="seen_at",
)

FEATURE_STATS = Table(
    "robustness",
    "feature_stats",
    "One row per run and feature set",
    (),
    key=("run_id", "feature_set"),
    computed=(
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("feature_set", "VARCHAR", "The feature set"),
        Column("attempts", "BIGINT", "Attempts that ran"),
        Column("success_rate", "DOUBLE", "Attempts that succeeded of those that ran, 0 to 1"),
        Column("mean_s", "DOUBLE", "Mean time of a successful attempt", "s"),
        Column("p50_s", "DOUBLE", "Median time of a successful attempt", "s"),
        Column("p95_s", "DOUBLE", "95th percentile of a successful attempt's time", "s"),
        Column("max_s", "DOUBLE", "Longest successful attempt", "s"),
        Column("mean_timeout_s", "DOUBLE", "Mean timeout given", "s"),
        Column(
            "timeout_efficiency",
            "DOUBLE",
            "Time used of the timeout given, mean over successful attempts, 0 to 1",
        ),
        Column("retries", "BIGINT", "Attempts after a cell's first"),
    ),
)

ERRORS = Table(
    "robustness",
    "errors",
    "One row per run, error type and severity",
    (),
    key=("run_id", "error_type", "severity"),
    computed=(
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("error_type", "VARCHAR", "Classified error"),
        Column("severity", "VARCHAR", "low, medium, high or critical"),
        Column("count", "BIGINT", "Failed attempts"),
        Column("example_file", "VARCHAR", "The first file it happened to"),
        Column("example_message", "VARCHAR", "What was said of that file"),
        Column("recovery_strategies", "VARCHAR[]", "What was decided in answer, each once"),
        Column("recovered", "BIGINT", "Failed attempts whose cell succeeded later in the run"),
    ),
)

TIMEOUTS = Table(
    "robustness",
    "timeouts",
    "One row per run and feature set: the timeout in force at its last attempt",
    (),
    key=("run_id", "feature_set"),
    computed=(
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("feature_set", "VARCHAR", "The feature set"),
        Column("source", "VARCHAR", "base (the fixed table) or learned"),
        Column("learned_rate", "DOUBLE", "Learned quantile per second of audio", "s/s"),
        Column("base_s", "DOUBLE", "Fixed base", "s"),
        Column("multiplier", "DOUBLE", "Factor put on it for load, memory and failures"),
        Column("timeout_s", "DOUBLE", "Timeout given at the last attempt", "s"),
        Column("timed_out", "BIGINT", "Attempts that timed out"),
    ),
)

RETRIES = Table(
    "robustness",
    "retries",
    "One row per run and retry strategy",
    (),
    key=("run_id", "strategy"),
    computed=(
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("strategy", "VARCHAR", "Retry strategy; 'immediate' where nothing was waited for"),
        Column("cells", "BIGINT", "Cells retried"),
        Column("attempts", "BIGINT", "Attempts after a cell's first"),
        Column("success_rate", "DOUBLE", "Retried cells that succeeded in the end, 0 to 1"),
        Column("mean_total_s", "DOUBLE", "Mean time of these attempts and waits per cell", "s"),
        Column("base_delay_s", "DOUBLE", "First delay in force", "s"),
        Column("multiplier", "DOUBLE", "Growth of the delay in force"),
    ),
)

QUARANTINE = Table(
    "robustness",
    "quarantine",
    "One row per quarantined cell",
    (),
    key=("content_hash", "feature_set"),
    computed=(
        Column("content_hash", "VARCHAR", "Content that failed for its own fault"),
        Column("feature_set", "VARCHAR", "The feature set"),
        Column("file_key", "VARCHAR", "The file that held it"),
        Column("error_type", "VARCHAR", "Classified error"),
        Column("reason", "VARCHAR", "What was wrong"),
        Column("first_failed_at", "TIMESTAMPTZ", "When it first failed"),
        Column("last_failed_at", "TIMESTAMPTZ", "When it last failed"),
        Column("attempts", "BIGINT", "Attempts so far"),
    ),
)

FIXED_TABLES = (
    FILES,
    ATTEMPTS,
    RUNS,
    CIRCUIT_BREAKERS,
    BREAKER_TRANSITIONS,
    RETRY_PARAMETERS,
    FEATURE_STATS,
    ERRORS,
    TIMEOUTS,
    RETRIES,
    QUARANTINE,
)
"""Every table that does not depend on the feature sets."""


def feature_table(feature_set: FeatureSet) -> Table:
    """Return the table of a feature set: the common columns, then its own."""
    common = {column.name for column in COMMON_COLUMNS}
    own = tuple(column for column in feature_set.columns if column.name not in common)
    return Table(
        "features",
        feature_set.name,
        f"One row per file. {feature_set.description}",
        COMMON_COLUMNS + own,
        key=("file_key",),
        version="computed_at",
    )


def warehouse_tables(feature_sets: Iterable[FeatureSet]) -> tuple[Table, ...]:
    """Return every table of the warehouse, those of the feature sets first."""
    return (*map(feature_table, feature_sets), *FIXED_TABLES)
