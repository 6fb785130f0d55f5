"""The warehouse's tables: their columns, units and keys, in DuckDB and in the landing."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import duckdb

from audio_assets.features.base import COMMON_COLUMNS, Column, FeatureSet

if TYPE_CHECKING:
    import pyarrow as pa

ROW_ID = "row_id"
"""Column of every row in the landing: a UUID that is greater than those of all earlier rows."""

ROW_ID_COLUMN = Column(ROW_ID, "UUID", "The row, ordered by when it was written")


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
        The columns in the landing, in order; empty if the table is not in the landing.
    key : tuple of str
        Columns that identify a row; of the rows of one key the one written last is published.
    computed : tuple of Column
        Columns that publishing fills in, after those of the landing.
    """

    schema: str
    name: str
    description: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
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
        written = (*self.columns, ROW_ID_COLUMN) if self.columns else ()
        return written + self.computed


def quoted(identifier: str) -> str:
    """Return an identifier quoted for SQL."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as an SQL literal, for statements that take no parameters."""
    return "'" + text.replace("'", "''") + "'"


def in_memory() -> duckdb.DuckDBPyConnection:
    """Return a connection of its own to the database that this process has in memory.

    To open a database takes 40 times as long.
    """
    return _in_memory().cursor()


@cache
def _in_memory() -> duckdb.DuckDBPyConnection:
    return duckdb.connect()


@cache
def arrow_schema(columns: tuple[Column, ...]) -> "pa.Schema":
    """Return the Arrow schema of columns, with the Arrow types that DuckDB converts theirs to.

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
    with in_memory() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        schema: pa.Schema = connection.sql(f"SELECT {selected}").to_arrow_table().schema
    return schema


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
            "succeeded, failed, deferred (to be tried later), given_up (deferred for too long, the "
            "file with the same content failed, or its first attempt, not the last, says why), "
            "skipped (cannot be read), quarantined (not tried again, as its file is at fault) or "
            "reused (unchanged since an earlier run)",
        ),
        Column("error_type", "VARCHAR", "Classified error; NULL if none"),
        Column("severity", "VARCHAR", "low, medium, high or critical; NULL if no error"),
        Column("exception_type", "VARCHAR", "Class of the exception; NULL if no error"),
        Column("message", "VARCHAR", "The error, or why the cell was not computed"),
        Column(
            "recovery_strategy",
            "VARCHAR",
            "Recovery used by the next attempt; NULL if there was no failure or no recovery",
        ),
        Column("recovered", "BOOLEAN", "Whether it succeeded after a failed attempt"),
        Column(
            "retry_strategy",
            "VARCHAR",
            "Strategy that set the wait before this attempt; NULL for a first attempt or no wait",
        ),
        Column("retry_delay_s", "DOUBLE", "Wait before this attempt", "s"),
        Column("extractor", "VARCHAR", "Library that ran"),
        Column("code_version", "VARCHAR", "Code version of the feature set"),
        Column(
            "decoder",
            "VARCHAR",
            "Decoder that ran, and codec, sample rate (Hz) and channels of what it decoded, as in "
            "av mp3 44100 2; NULL if the file was not decoded",
        ),
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
        Column("core_wait_s", "DOUBLE", "Part of it without a free core; not of decoding", "s"),
        Column("decode_core_wait_s", "DOUBLE", "Part of decoding without a free core", "s"),
        Column("audio_s", "DOUBLE", "Duration of the audio analysed", "s"),
        Column("queue_s", "DOUBLE", "Wait for a worker", "s"),
        Column("peak_memory_mib", "DOUBLE", "Peak memory of the worker", "MiB"),
        Column("worker_pid", "INTEGER", "Process that ran it"),
        Column("breaker_state", "VARCHAR", "State of the feature set's breaker at the start"),
        Column("started_at", "TIMESTAMPTZ", "When the attempt began"),
        Column("content_hash", "VARCHAR", "Hash of the file's content"),
        Column(
            "degraded", "VARCHAR", "Why the values may differ from those of a sound file and run"
        ),
    ),
    key=(ROW_ID,),
)

WORKER_TIME = (
    Column("computing_s", "DOUBLE", "Workers computed features", "s"),
    Column("decoding_s", "DOUBLE", "Workers decoded", "s"),
    Column("reading_s", "DOUBLE", "Workers read files and hashed them", "s"),
    Column("core_wait_s", "DOUBLE", "Workers had a task, and waited for a free core", "s"),
    Column("memory_wait_s", "DOUBLE", "Workers were given up, as memory was short", "s"),
    Column("events_s", "DOUBLE", "Workers waited for Dagster: its events and its steps", "s"),
    Column("publishing_s", "DOUBLE", "Workers waited for rows to be written or published", "s"),
    Column("planning_s", "DOUBLE", "Workers waited for the next stages to be planned", "s"),
    Column("idle_s", "DOUBLE", "Workers had nothing to do, or started", "s"),
)
"""What the time of a run's workers went to; together their number times the run's time."""

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
        Column("recorded_at", "TIMESTAMPTZ", "When its end was recorded; NULL while it runs"),
        Column("host", "VARCHAR", "Host of its workers"),
        Column("workers", "INTEGER", "Number of its workers"),
        *WORKER_TIME,
    ),
    key=("run_id",),
    computed=(
        Column("files", "BIGINT", "Files with at least one attempt"),
        Column("cells_done", "BIGINT", "Cells computed"),
        Column("cells_failed", "BIGINT", "Cells that failed for another reason than their file"),
        Column("cells_quarantined", "BIGINT", "Cells that cannot be computed from their file"),
        Column("cells_skipped", "BIGINT", "Cells deferred, or of files that cannot be read"),
        Column("cells_reused", "BIGINT", "Cells unchanged since an earlier run"),
        Column("cells_degraded", "BIGINT", "Cells done whose rows are degraded"),
        Column(
            "success_rate",
            "DOUBLE",
            "Cells done of those done and failed, 0 to 1; cells in quarantine, which their file "
            "makes impossible, do not count, and NULL if there are no others",
        ),
        Column("retries", "BIGINT", "Attempts after a cell's first"),
        Column("recovered_cells", "BIGINT", "Cells done after a failed attempt"),
        Column("fault_seconds", "DOUBLE", "Failed attempts and the delays after them", "s"),
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
        Column("ignored_count", "BIGINT", "Failures caused by the file itself"),
        Column("consecutive_failures", "BIGINT", "Failures since the last success"),
        Column("opened_at", "TIMESTAMPTZ", "When it last opened"),
        Column("last_failure_at", "TIMESTAMPTZ", "When it last counted a failure"),
        Column("last_error", "VARCHAR", "The last failure counted"),
        Column("recovery_timeout", "DOUBLE", "Time it stays open", "s"),
        Column("seen_at", "TIMESTAMPTZ", "When this was read from the state store"),
    ),
    key=("run_id", "name"),
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
)

RETRY_PARAMETERS = Table(
    "robustness",
    "retry_parameters",
    "One row per run, retry strategy and operation: the parameters when the run was last published",
    (
        Column("run_id", "VARCHAR", "Dagster run"),
        Column("strategy", "VARCHAR", "Retry strategy"),
        Column("operation", "VARCHAR", "Feature set, or another operation; empty for none"),
        Column("base_delay", "DOUBLE", "First delay", "s"),
        Column("multiplier", "DOUBLE", "Growth of the delay per attempt"),
        Column("seen_at", "TIMESTAMPTZ", "When this was read from the state store"),
    ),
    key=("run_id", "strategy", "operation"),
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
        Column("example_message", "VARCHAR", "Message of that failure"),
        Column("recovery_strategies", "VARCHAR[]", "Recoveries used, each once"),
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
        Column("strategy", "VARCHAR", "Retry strategy; 'immediate' if there was no wait"),
        Column("cells", "BIGINT", "Cells retried"),
        Column("attempts", "BIGINT", "Attempts after a cell's first"),
        Column("success_rate", "DOUBLE", "Retried cells that succeeded, 0 to 1"),
        Column("mean_total_s", "DOUBLE", "Mean time of these attempts and waits per cell", "s"),
        Column("base_delay_s", "DOUBLE", "First delay in force, mean over operations", "s"),
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
        Column("content_hash", "VARCHAR", "Hash of the content that failed"),
        Column("feature_set", "VARCHAR", "The feature set"),
        Column("file_key", "VARCHAR", "The file that held it"),
        Column("error_type", "VARCHAR", "Classified error"),
        Column("reason", "VARCHAR", "Why it failed"),
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
    return Table(
        "features",
        feature_set.name,
        f"One row per file. {feature_set.description}",
        COMMON_COLUMNS + tuple(feature_set.columns),
        key=("file_key",),
    )


def warehouse_tables(feature_sets: Iterable[FeatureSet]) -> tuple[Table, ...]:
    """Return every table of the warehouse, those of the feature sets first."""
    return (*map(feature_table, feature_sets), *FIXED_TABLES)
