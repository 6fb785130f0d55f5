"""The ``robustness`` tables and the views of tracks as assets, with figures over time."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from duckdb import DuckDBPyConnection

from audio_assets.defs.assets import column_schema
from audio_assets.defs.partitions import asset_key
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Column
from audio_assets.library.text import four_digits
from audio_assets.settings import get_settings
from audio_assets.warehouse import publish
from audio_assets.warehouse.database import reading
from audio_assets.warehouse.schema import (
    ATTEMPTS,
    BREAKER_TRANSITIONS,
    CIRCUIT_BREAKERS,
    ERRORS,
    FEATURE_STATS,
    QUARANTINE,
    RETRIES,
    RUNS,
    TIMEOUTS,
    Table,
)
from audio_assets.warehouse.views import views

FIGURES: dict[Table, str] = {
    ATTEMPTS: """
        SELECT
            count(*) FILTER (outcome = 'succeeded') AS succeeded,
            count(*) FILTER (outcome = 'failed') AS failed,
            count(*) FILTER (outcome = 'deferred') AS deferred,
            sum(duration_s) AS computing_s, avg(queue_s) AS mean_queue_s
        FROM robustness.attempts WHERE list_contains($runs, run_id)
    """,
    RUNS: """
        SELECT
            count(*) AS runs, sum(files) AS files,
            sum(cells_done) AS cells_done, sum(cells_failed) AS cells_failed,
            sum(cells_quarantined) AS cells_quarantined, sum(cells_skipped) AS cells_skipped,
            sum(cells_reused) AS cells_reused,
            sum(cells_done) / nullif(sum(cells_done) + sum(cells_failed), 0) AS success_rate,
            sum(retries) AS retries, sum(recovered_cells) AS recovered_cells,
            sum(fault_seconds) AS fault_seconds, sum(audio_seconds) AS audio_seconds,
            sum(audio_seconds) / sum(audio_seconds / nullif(audio_seconds_per_second, 0))
                AS audio_seconds_per_second,
            max(peak_memory_mib) AS peak_memory_mib
        FROM robustness.runs WHERE list_contains($runs, run_id)
    """,
    FEATURE_STATS: """
        SELECT
            sum(attempts) AS attempts,
            sum(success_rate * attempts) / sum(attempts) AS attempt_success_rate,
            avg(timeout_efficiency) AS mean_timeout_efficiency,
            arg_max(feature_set, p95_s) AS slowest_feature_set,
            max(p95_s) AS slowest_p95_s
        FROM robustness.feature_stats WHERE list_contains($runs, run_id)
    """,
    ERRORS: """
        SELECT
            coalesce(sum(count), 0) AS errors, coalesce(sum(recovered), 0) AS recovered,
            coalesce(sum(count) FILTER (severity IN ('high', 'critical')), 0) AS severe,
            arg_max(error_type, count) AS most_frequent
        FROM robustness.errors WHERE list_contains($runs, run_id)
    """,
    CIRCUIT_BREAKERS: """
        SELECT
            count(*) FILTER (coalesce(forced = 'open', state = 'OPEN')) AS open_breakers,
            count(*) FILTER (forced IS NULL AND state = 'HALF_OPEN') AS half_open_breakers,
            coalesce(sum(failure_count), 0) AS failures_counted,
            string_agg(name, ', ' ORDER BY name)
                FILTER (coalesce(forced = 'open', state <> 'CLOSED')) AS not_closed
        FROM (
            FROM robustness.circuit_breakers
            QUALIFY row_number() OVER (PARTITION BY name ORDER BY seen_at DESC) = 1
        )
    """,
    BREAKER_TRANSITIONS: """
        SELECT
            count(*) AS transitions,
            count(*) FILTER (to_state = 'OPEN') AS openings
        FROM robustness.breaker_transitions WHERE list_contains($runs, run_id)
    """,
    TIMEOUTS: """
        SELECT
            coalesce(sum(timed_out), 0) AS timed_out, avg(timeout_s) AS mean_timeout_s,
            count(*) FILTER (source = 'learned') AS learned_timeouts
        FROM robustness.timeouts WHERE list_contains($runs, run_id)
    """,
    RETRIES: """
        SELECT
            coalesce(sum(attempts), 0) AS retries, coalesce(sum(cells), 0) AS cells_retried,
            sum(success_rate * cells) / sum(cells) AS retry_success_rate
        FROM robustness.retries WHERE list_contains($runs, run_id)
    """,
    QUARANTINE: """
        SELECT
            count(*) AS quarantined_cells,
            count(DISTINCT content_hash) AS quarantined_contents
        FROM robustness.quarantine
    """,
}
"""The tables that are assets, sources first, and their figures' query for the runs ``$runs``."""


VIEWS = {
    "tracks": "SELECT count(degraded) FILTER (len(degraded) > 0) AS degraded FROM features.tracks",
    "missing": """
        SELECT count(DISTINCT file_key) AS files,
            count(*) FILTER (outcome IN ('failed', 'given_up', 'skipped', 'quarantined')) AS failed
        FROM features.missing
    """,
}
"""The views that are assets, each with the query of its figures."""

_FROM_ATTEMPTS = (RUNS, FEATURE_STATS, ERRORS, TIMEOUTS, RETRIES)
"""The tables that publishing computes from the attempts."""


def table_key(table: Table) -> dg.AssetKey:
    """Return the asset key of a table of the robustness layer."""
    return dg.AssetKey([table.schema, table.name])


def _spec(
    key: dg.AssetKey,
    group: str,
    description: str,
    columns: Sequence[Column],
    deps: Sequence[dg.AssetKey],
) -> dg.AssetSpec:
    return dg.AssetSpec(
        key,
        group_name=group,
        description=description,
        kinds={"duckdb", "table"},
        owners=["team:audio-features"],
        deps=deps,
        metadata={
            "dagster/table_name": ".".join(key.path),
            "dagster/column_schema": column_schema(columns),
        },
    )


def _specs() -> Iterator[dg.AssetSpec]:
    cells = [asset_key(name) for name in FEATURE_SETS]
    for table in FIGURES:
        deps = [table_key(ATTEMPTS)] if table in _FROM_ATTEMPTS else cells
        yield _spec(table_key(table), table.schema, table.description, table.all_columns, deps)
    for view in views(tuple(FEATURE_SETS.values())):
        if view.name in VIEWS:
            yield _spec(asset_key(view.name), "published", view.description, view.columns, cells)


@dg.multi_asset(name="robustness_tables", specs=list(_specs()))
def robustness_tables(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
    """Publish, and report the figures of the runs that ended since the last time.

    Publishing fills the tables. If no run has ended since, the figures are the newest run's.
    """
    publish()
    with reading(get_settings().warehouse) as connection:
        runs, until = runs_to_report(connection, _reported_until(context.instance))
        run_ids = ", ".join(runs)
        reported = {
            "run_ids": run_ids,
            "reported_until": until and dg.MetadataValue.timestamp(until),
        }
        for table in FIGURES:
            yield dg.MaterializeResult(
                asset_key=table_key(table),
                metadata=reported | table_figures(connection, table, runs),
            )
        for name, sql in VIEWS.items():
            yield dg.MaterializeResult(
                asset_key=asset_key(name),
                metadata=_figures(connection, f"features.{name}", sql, runs),
            )


def _reported_until(instance: dg.DagsterInstance) -> datetime | None:
    """Return when the last run that was reported was recorded."""
    value = last_reported(instance, "reported_until")
    if isinstance(value, dg.TimestampMetadataValue):
        return datetime.fromtimestamp(value.value, UTC)
    return None


def last_reported(instance: dg.DagsterInstance, name: str) -> dg.MetadataValue | None:
    """Return a metadata entry of the latest materialization of the table of runs."""
    event = instance.get_latest_materialization_event(table_key(RUNS))
    materialization = event.asset_materialization if event else None
    return materialization.metadata.get(name) if materialization else None


def runs_to_report(
    connection: DuckDBPyConnection, reported_until: datetime | None
) -> tuple[list[str], datetime | None]:
    """Return the runs recorded since, or the newest if there are none, and its time of record."""
    found = connection.execute(
        """
        SELECT run_id, recorded_at FROM robustness.runs WHERE recorded_at IS NOT NULL
        QUALIFY recorded_at > ? OR recorded_at = max(recorded_at) OVER ()
        ORDER BY recorded_at
        """,
        [reported_until or datetime.min.replace(tzinfo=UTC)],
    ).fetchall()
    return [run_id for run_id, _ in found], found[-1][1] if found else None


def table_figures(connection: DuckDBPyConnection, table: Table, runs: list[str]) -> dict[str, Any]:
    """Return a table's metadata: its row count, and the figures of the runs that are not NULL."""
    return _figures(connection, table.sql_name, FIGURES[table], runs)


def _figures(
    connection: DuckDBPyConnection, sql_name: str, sql: str, runs: list[str]
) -> dict[str, Any]:
    [(rows,)] = connection.execute(f"SELECT count(*) FROM {sql_name}").fetchall()
    cursor = connection.execute(sql, {"runs": runs} if "$runs" in sql else None)
    names = [column[0] for column in cursor.description or ()]
    [values] = cursor.fetchall()
    figures = {
        name: value if isinstance(value, int | str) else float(four_digits(value))
        for name, value in zip(names, values, strict=True)
        if value is not None
    }
    return {"dagster/row_count": rows, **figures}
