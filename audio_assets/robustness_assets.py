"""How extraction fares, as Dagster assets: the ``robustness`` tables and checks of what they tell.

The figures of each materialization are what Dagster plots over time. The checks ask whether
what is published can be trusted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from duckdb import DuckDBPyConnection

from audio_assets.assets import asset_key, column_schema
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Column, FeatureSet
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish
from audio_assets.warehouse.landing import Landing, landed_at
from audio_assets.warehouse.publisher import reading
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
    feature_table,
    quoted,
)

JOB = "robustness_stats"
SUCCESS_RATE_EXPECTED = 0.95
"""Share of the cells tried that should be done; below it the check of the runs warns."""

PUBLISHED_WITHIN = timedelta(minutes=5)
"""What has landed should be in the database by then."""

FILES_NAMED = 5

FIGURES: dict[Table, str] = {
    RUNS: """
        SELECT
            count(*) AS runs, sum(files) AS files,
            sum(cells_done) AS cells_done, sum(cells_failed) AS cells_failed,
            sum(cells_skipped) AS cells_skipped, sum(cells_reused) AS cells_reused,
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
    ATTEMPTS: """
        SELECT
            count(*) FILTER (outcome = 'succeeded') AS succeeded,
            count(*) FILTER (outcome = 'failed') AS failed,
            count(*) FILTER (outcome = 'deferred') AS deferred,
            sum(duration_s) AS computing_s, avg(queue_s) AS mean_queue_s
        FROM robustness.attempts WHERE list_contains($runs, run_id)
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
"""The tables that are assets, and the figures of the runs ``$runs`` that Dagster plots."""


def table_key(table: Table) -> dg.AssetKey:
    """Return the asset key of a table of the robustness layer."""
    return dg.AssetKey([table.schema, table.name])


@dg.multi_asset(
    name="robustness_tables",
    specs=[
        dg.AssetSpec(
            table_key(table),
            group_name=table.schema,
            description=table.description,
            kinds={"duckdb", "table"},
            owners=["team:audio-features"],
            metadata={
                "dagster/table_name": f"{table.schema}.{table.name}",
                "dagster/column_schema": column_schema(table.all_columns),
            },
        )
        for table in FIGURES
    ],
)
def robustness_tables(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
    """Publish, and tell the figures of the runs that ended since the last time.

    Publishing fills the tables. If no run has ended since, the figures are the newest run's.
    """
    publish()
    with reading(get_settings().warehouse) as connection:
        runs, until = _runs_to_tell(connection, _told_until(context.instance))
        told = {"run_ids": ", ".join(runs), "told_until": until.timestamp() if until else None}
        context.log.info(f"figures of the runs {told['run_ids'] or '(none yet)'}")
        for table in FIGURES:
            yield dg.MaterializeResult(
                asset_key=table_key(table),
                metadata=told | _figures(connection, table, runs),
            )


def _told_until(instance: dg.DagsterInstance) -> datetime | None:
    """Return up to when the last materialization told of runs."""
    value = _last_told(instance, "told_until")
    if isinstance(value, dg.FloatMetadataValue) and value.value is not None:
        return datetime.fromtimestamp(value.value, UTC)
    return None


def _last_told(instance: dg.DagsterInstance, name: str) -> dg.MetadataValue | None:
    """Return what the latest materialization of the runs tells under a name."""
    event = instance.get_latest_materialization_event(table_key(RUNS))
    materialization = event.asset_materialization if event else None
    return materialization.metadata.get(name) if materialization else None


def _runs_to_tell(
    connection: DuckDBPyConnection, told_until: datetime | None
) -> tuple[list[str], datetime | None]:
    """Return the runs recorded since, or else the newest; and when the last was recorded."""
    found = connection.execute(
        """
        SELECT run_id, recorded_at FROM robustness.runs WHERE recorded_at IS NOT NULL
        QUALIFY recorded_at > ? OR recorded_at = max(recorded_at) OVER ()
        ORDER BY recorded_at
        """,
        [told_until or datetime.min.replace(tzinfo=UTC)],
    ).fetchall()
    return [run_id for run_id, _ in found], found[-1][1] if found else None


def _figures(connection: DuckDBPyConnection, table: Table, runs: list[str]) -> dict[str, Any]:
    """Return a table's metadata: its rows, and the figures of some runs that have a value."""
    [(rows,)] = connection.execute(f"SELECT count(*) FROM {table.sql_name}").fetchall()
    sql = FIGURES[table]
    cursor = connection.execute(sql, {"runs": runs} if "$runs" in sql else None)
    names = [column[0] for column in cursor.description or ()]
    [values] = cursor.fetchall()
    figures = {
        name: value if isinstance(value, int | str) else float(value)
        for name, value in zip(names, values, strict=True)
        if value is not None
    }
    return {"dagster/row_count": rows, **figures}


@dataclass
class _Cells:
    """A feature set's cells, as Dagster and the database have them."""

    materialized: set[str]
    rows: set[str]
    unpublished: set[str] = field(default_factory=set)
    unfinished: set[str] = field(default_factory=set)

    @property
    def without_row(self) -> set[str]:
        return self.materialized - self.rows - self.unpublished

    @property
    def untold(self) -> set[str]:
        return self.rows - self.materialized - self.unfinished


@dg.multi_asset_check(
    name="published_tables",
    specs=[
        dg.AssetCheckSpec(
            "success_rate",
            asset=table_key(RUNS),
            description=f"At least {SUCCESS_RATE_EXPECTED:.0%} of the cells that the last runs "
            "tried are done",
        ),
        *(
            dg.AssetCheckSpec(name, asset=asset_key(feature_set), description=description)
            for feature_set in FEATURE_SETS
            for name, description in (
                ("finite", "No number in the table is NaN or infinite"),
                ("complete", "The table has a row for each materialized file, and for no other"),
                ("fresh", "The table holds all that landed more than five minutes ago"),
            )
        ),
    ],
    can_subset=True,
)
def published_tables(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
    """Check what is published, as it is.

    In a run that computes features the step is skipped, since their ops yield no output; the
    run `robustness_stats` that follows has it.
    """
    warehouse = get_settings().warehouse
    if not warehouse.exists():
        publish()
    landing = open_landing()
    selected = context.selected_asset_check_keys
    # First what Dagster says: what lands later may be in the database, but cannot be missing.
    asked_at = datetime.now(UTC)
    materialized = {
        name: context.instance.get_materialized_partitions(asset_key(name))
        for name in FEATURE_SETS
        if dg.AssetCheckKey(asset_key(name), "complete") in selected
    }
    with reading(warehouse) as connection:
        for key in sorted(selected):
            feature_set = FEATURE_SETS.get(key.asset_key.path[-1])
            match key.name, feature_set:
                case "finite", FeatureSet():
                    result = _check_finite(connection, feature_set)
                case "complete", FeatureSet():
                    cells = _cells(
                        context.instance, connection, landing, feature_set,
                        materialized[feature_set.name], asked_at,
                    )  # fmt: skip
                    result = _check_complete(connection, feature_set, cells)
                case "fresh", FeatureSet():
                    result = _check_fresh(connection, landing, feature_set)
                case _:
                    result = _check_success_rate(context.instance, connection)
            yield result._replace(asset_key=key.asset_key, check_name=key.name)


def _check_success_rate(
    instance: dg.DagsterInstance, connection: DuckDBPyConnection
) -> dg.AssetCheckResult:
    """Check the rate of the runs that the latest materialization is about."""
    told = _last_told(instance, "run_ids")
    runs = str(told.value).split(", ") if told else _runs_to_tell(connection, None)[0]
    figures = _figures(connection, RUNS, runs)
    rate = figures.get("success_rate")
    failing = connection.execute(
        """
        SELECT file_key, arg_max(message, row_id) FROM robustness.attempts
        WHERE outcome IN ('failed', 'given_up') AND list_contains(?, run_id)
        GROUP BY file_key ORDER BY count(*) DESC, file_key LIMIT ?
        """,
        [runs, FILES_NAMED],
    ).fetchall()
    return dg.AssetCheckResult(
        passed=rate is None or rate >= SUCCESS_RATE_EXPECTED,
        severity=dg.AssetCheckSeverity.WARN,
        description="No cell was tried" if rate is None else f"{rate:.1%} of the cells tried done",
        metadata={
            name: figures[name] for name in ("success_rate", "cells_failed") if name in figures
        }
        | {f"failed: {file_key}": message or "" for file_key, message in failing},
    )


def _check_finite(connection: DuckDBPyConnection, feature_set: FeatureSet) -> dg.AssetCheckResult:
    tests = {
        column.name: test
        for column in feature_table(feature_set).columns
        if (test := _is_not_finite(column))
    }
    counts = ", ".join(f"count(*) FILTER ({test})" for test in tests.values())
    [[bad, files, *by_column]] = connection.execute(
        f"SELECT count(*), list(file_key ORDER BY file_key)[:{FILES_NAMED}], {counts} "
        f"FROM {feature_table(feature_set).sql_name} WHERE {' OR '.join(tests.values())}"
    ).fetchall()
    columns = [name for name, count in zip(tests, by_column, strict=True) if count]
    return dg.AssetCheckResult(
        passed=not bad,
        severity=dg.AssetCheckSeverity.ERROR,
        description=f"{bad} files with NaN or infinity in {', '.join(columns)}" if bad else None,
        metadata={"bad_rows": bad} | ({"files": ", ".join(files)} if bad else {}),
    )


def _is_not_finite(column: Column) -> str | None:
    """Return the SQL that finds NaN and infinity in a column, if its type has them."""
    name = quoted(column.name)
    if "DOUBLE" not in column.type and "FLOAT" not in column.type:
        return None
    if column.type.startswith("MAP"):
        name = f"map_values({name})"
    elif not column.type.endswith("]"):
        return f"NOT isfinite({name})"
    # Of a list's values an infinity is the least or the greatest, NaN the greatest.
    return f"(NOT isfinite(list_max({name}::DOUBLE[])) OR NOT isfinite(list_min({name}::DOUBLE[])))"


def _cells(
    instance: dg.DagsterInstance,
    connection: DuckDBPyConnection,
    landing: Landing,
    feature_set: FeatureSet,
    materialized: set[str],
    asked_at: datetime,
) -> _Cells:
    table = feature_table(feature_set)
    rows = connection.execute(f"SELECT file_key FROM {table.sql_name}").fetchall()
    cells = _Cells(materialized, {file_key for (file_key,) in rows})
    if cells.without_row:
        for part in _unpublished(connection, landing, table):
            landed = landing.read_part(table.landing_name, part, ["file_key"])
            cells.unpublished.update(landed["file_key"].to_pylist())
    if cells.untold:
        run_of = dict(
            connection.execute(
                f"SELECT file_key, run_id FROM {table.sql_name} WHERE list_contains(?, file_key)",
                [list(cells.untold)],
            ).fetchall()
        )
        ended = _ended_before(instance, set(run_of.values()), asked_at)
        cells.unfinished.update(key for key, run_id in run_of.items() if run_id not in ended)
    return cells


def _ended_before(instance: dg.DagsterInstance, run_ids: set[str], moment: datetime) -> set[str]:
    """Return those of the runs that had told Dagster all they would."""
    records = instance.get_run_records(dg.RunsFilter(run_ids=list(run_ids)))
    known = {record.dagster_run.run_id for record in records}
    return (run_ids - known) | {
        record.dagster_run.run_id
        for record in records
        if record.dagster_run.is_finished
        and (record.end_time is None or record.end_time < moment.timestamp())
    }


def _check_complete(
    connection: DuckDBPyConnection, feature_set: FeatureSet, cells: _Cells
) -> dg.AssetCheckResult:
    """Compare the cells; a promise not kept is an error, a row not told of a warning."""
    damaged = connection.execute(
        "SELECT part FROM publishing.parts WHERE damaged AND landing_table = ?",
        [feature_table(feature_set).landing_name],
    ).fetchall()
    metadata: dict[str, Any] = {
        "materialized": len(cells.materialized),
        "rows": len(cells.rows),
        "materialized_without_row": len(cells.without_row),
        "rows_not_materialized": len(cells.untold),
    }
    for name, keys in (
        ("files_without_row", cells.without_row),
        ("files_not_materialized", cells.untold),
        ("damaged_parts", {part for (part,) in damaged}),
    ):
        if keys:
            metadata[name] = ", ".join(sorted(keys)[:FILES_NAMED])
    reasons = []
    if cells.without_row:
        reasons.append(
            f"{len(cells.without_row)} files are materialized but have no row: "
            "materialize them again"
        )
    if cells.untold:
        reasons.append(
            f"{len(cells.untold)} files have a row of which a run that broke off did not tell "
            "Dagster: the next run of these files does"
        )
    return dg.AssetCheckResult(
        passed=not reasons,
        severity=dg.AssetCheckSeverity.ERROR if cells.without_row else dg.AssetCheckSeverity.WARN,
        description="; ".join(reasons) or None,
        metadata=metadata,
    )


def _check_fresh(
    connection: DuckDBPyConnection, landing: Landing, feature_set: FeatureSet
) -> dg.AssetCheckResult:
    [(version, published_at)] = connection.execute(
        "SELECT version, published_at FROM publishing.version"
    ).fetchall()
    waiting = [
        landed_at(part)
        for table in (feature_table(feature_set), RUNS)
        for part in _unpublished(connection, landing, table)
    ]
    late = [at for at in waiting if at < datetime.now(UTC) - PUBLISHED_WITHIN]
    return dg.AssetCheckResult(
        passed=not late,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"what landed at {min(late):%Y-%m-%d %H:%M} UTC is not published: "
        "is Dagster's daemon running? audio-assets publish does it by hand"
        if late
        else None,
        metadata={
            "version": version,
            "published_at": dg.MetadataValue.timestamp(published_at),
            "parts_waiting": len(waiting),
        },
    )


def _unpublished(connection: DuckDBPyConnection, landing: Landing, table: Table) -> list[str]:
    """Return the parts that this version of the database does not know."""
    known = connection.execute(
        "SELECT part FROM publishing.parts WHERE landing_table = ?", [table.landing_name]
    ).fetchall()
    names = {part for (part,) in known}
    return [
        part
        for part in landing.parts(table.landing_name)
        if part not in names
        # A merged part has nothing new if all that it took over is known.
        and (not (sources := landing.supersedes(table.landing_name, part)) or sources - names)
    ]


robustness_stats = dg.define_asset_job(
    JOB,
    selection=dg.AssetSelection.assets(robustness_tables)
    | dg.AssetSelection.checks(published_tables),
    description="The robustness tables' figures of the runs that just ended, and the checks",
)
