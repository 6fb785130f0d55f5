"""Statistics of the robustness tables, computed in SQL from the attempts.

Each statement recomputes the runs in the temporary table ``touched`` (run_id), so that its cost
does not grow with the number of earlier runs.
"""

from duckdb import DuckDBPyConnection

from audio_assets.warehouse.schema import ERRORS, FEATURE_STATS, RETRIES, TIMEOUTS, Table

# Attempts that ran: cells deferred, given up, quarantined or reused leave records of attempts too.
# `nth` counts a cell's attempts across retries of its step, each of which numbers them from 1.
_WORKING_TABLES = """
CREATE OR REPLACE TEMP TABLE tried AS
SELECT *, row_number() OVER (PARTITION BY run_id, feature_set, file_key ORDER BY row_id) AS nth
FROM robustness.attempts
WHERE run_id IN (FROM touched) AND outcome IN ('succeeded', 'failed');

CREATE OR REPLACE TEMP TABLE cells AS
SELECT
    run_id, feature_set, file_key,
    CASE WHEN bool_or(outcome = 'succeeded') THEN 'succeeded' ELSE arg_max(outcome, row_id) END
        AS outcome,
    bool_or(outcome = 'failed') AS stumbled,
    bool_or(degraded IS NOT NULL) AS degraded,
    max(row_id) FILTER (outcome = 'succeeded') AS success_id,
    max(audio_s) AS audio_s
FROM robustness.attempts
WHERE run_id IN (FROM touched)
GROUP BY ALL
"""

_RUNS = """
INSERT INTO robustness.runs (run_id, started_at, status)
SELECT run_id, min(started_at), 'unknown'
FROM robustness.attempts
WHERE run_id IN (FROM touched) AND run_id NOT IN (SELECT run_id FROM robustness.runs)
GROUP BY run_id;

UPDATE robustness.runs
SET files = figures.files,
    cells_done = figures.done,
    cells_failed = figures.failed,
    cells_quarantined = figures.quarantined,
    cells_skipped = figures.skipped,
    cells_reused = figures.reused,
    cells_degraded = figures.degraded,
    success_rate = figures.done / nullif(figures.done + figures.failed, 0),
    retries = figures.retries,
    recovered_cells = figures.recovered,
    fault_seconds = figures.fault_seconds,
    audio_seconds = figures.audio_seconds,
    audio_seconds_per_second = figures.audio_seconds
        / nullif(epoch(coalesce(ended_at, figures.last_seen_at) - started_at), 0),
    peak_memory_mib = figures.peak_memory_mib
FROM (
    FROM (
        SELECT
            run_id,
            count(DISTINCT file_key) AS files,
            count(*) FILTER (outcome = 'succeeded') AS done,
            count(*) FILTER (outcome IN ('failed', 'given_up')) AS failed,
            count(*) FILTER (outcome = 'quarantined') AS quarantined,
            count(*) FILTER (outcome IN ('deferred', 'skipped')) AS skipped,
            count(*) FILTER (outcome = 'reused') AS reused,
            count(*) FILTER (outcome = 'succeeded' AND degraded) AS degraded,
            count(*) FILTER (outcome = 'succeeded' AND stumbled) AS recovered
        FROM cells GROUP BY run_id
    )
    LEFT JOIN (
        SELECT
            run_id,
            count(*) FILTER (nth > 1) AS retries,
            coalesce(sum(duration_s) FILTER (outcome = 'failed'), 0)
                + coalesce(sum(retry_delay_s), 0) AS fault_seconds,
            max(peak_memory_mib) AS peak_memory_mib,
            max(started_at + to_microseconds((1e6 * coalesce(duration_s, 0))::BIGINT))
                AS last_seen_at
        FROM tried GROUP BY run_id
    ) USING (run_id)
    LEFT JOIN (
        SELECT run_id, sum(audio_s) AS audio_seconds
        FROM (
            SELECT run_id, file_key, max(audio_s) AS audio_s
            FROM cells WHERE outcome = 'succeeded' GROUP BY ALL
        )
        GROUP BY run_id
    ) USING (run_id)
) AS figures
WHERE runs.run_id = figures.run_id
"""

_FEATURE_STATS = """
SELECT
    run_id, feature_set,
    count(*) AS attempts,
    count(*) FILTER (outcome = 'succeeded') / count(*) AS success_rate,
    avg(duration_s) FILTER (outcome = 'succeeded') AS mean_s,
    quantile_cont(duration_s, 0.5) FILTER (outcome = 'succeeded') AS p50_s,
    quantile_cont(duration_s, 0.95) FILTER (outcome = 'succeeded') AS p95_s,
    max(duration_s) FILTER (outcome = 'succeeded') AS max_s,
    avg(timeout_s) AS mean_timeout_s,
    avg(duration_s / nullif(timeout_s, 0)) FILTER (outcome = 'succeeded') AS timeout_efficiency,
    count(*) FILTER (nth > 1) AS retries
FROM tried GROUP BY ALL
"""

_ERRORS = """
SELECT
    run_id,
    coalesce(error_type, 'unknown') AS error_type,
    coalesce(severity, 'unknown') AS severity,
    count(*) AS count,
    arg_min(file_key, tried.row_id) AS example_file,
    arg_min(message, tried.row_id) AS example_message,
    coalesce(list_sort(list(DISTINCT recovery_strategy) FILTER (recovery_strategy IS NOT NULL)), [])
        AS recovery_strategies,
    count(*) FILTER (success_id > tried.row_id) AS recovered
FROM tried JOIN cells USING (run_id, feature_set, file_key)
WHERE tried.outcome = 'failed'
GROUP BY ALL
"""

_TIMEOUTS = """
SELECT
    run_id, feature_set,
    arg_max_null(timeout_source, row_id) AS source,
    arg_max_null(timeout_rate, row_id) AS learned_rate,
    arg_max_null(timeout_base_s, row_id) AS base_s,
    arg_max_null(timeout_multiplier, row_id) AS multiplier,
    arg_max_null(timeout_s, row_id) AS timeout_s,
    count(*) FILTER (error_type = 'timeout') AS timed_out
FROM tried GROUP BY ALL
"""

_RETRIES = """
SELECT
    run_id, strategy, cells, attempts, success_rate, mean_total_s,
    base_delay AS base_delay_s, multiplier
FROM (
    SELECT
        run_id,
        coalesce(retry_strategy, 'immediate') AS strategy,
        count(DISTINCT (feature_set, file_key)) AS cells,
        count(*) AS attempts,
        count(DISTINCT (feature_set, file_key)) FILTER (cells.outcome = 'succeeded')
            / count(DISTINCT (feature_set, file_key)) AS success_rate,
        sum(coalesce(duration_s, 0) + coalesce(retry_delay_s, 0))
            / count(DISTINCT (feature_set, file_key)) AS mean_total_s
    FROM tried JOIN cells USING (run_id, feature_set, file_key)
    WHERE nth > 1
    GROUP BY ALL
)
LEFT JOIN (
    SELECT run_id, strategy, avg(base_delay) AS base_delay, avg(multiplier) AS multiplier
    FROM robustness.retry_parameters GROUP BY ALL
) USING (run_id, strategy)
"""

_BY_TABLE: dict[Table, str] = {
    FEATURE_STATS: _FEATURE_STATS,
    ERRORS: _ERRORS,
    TIMEOUTS: _TIMEOUTS,
    RETRIES: _RETRIES,
}

ROLLUP_SQL = (_WORKING_TABLES, _RUNS, *_BY_TABLE.values())
"""Every statement; if one changes, the statistics of all runs are computed again."""


def compute_rollups(connection: DuckDBPyConnection) -> None:
    """Recompute the statistics of the runs in the temporary table ``touched``."""
    connection.execute(_WORKING_TABLES)
    connection.execute(_RUNS)
    for table, select in _BY_TABLE.items():
        connection.execute(f"DELETE FROM {table.sql_name} WHERE run_id IN (FROM touched)")
        connection.execute(f"INSERT INTO {table.sql_name} BY NAME {select}")
