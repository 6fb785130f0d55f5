"""Asset checks of the published tables, their rows and values, the success rate and the speed."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from duckdb import DuckDBPyConnection

from audio_assets.defs.cell_events import events_url, retry_url
from audio_assets.defs.distributions import findings
from audio_assets.defs.partitions import asset_key
from audio_assets.defs.robustness_tables import (
    last_reported,
    robustness_tables,
    runs_to_report,
    table_figures,
    table_key,
)
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Column, FeatureSet
from audio_assets.library.text import counted, four_digits, plain_markdown
from audio_assets.monitoring.performance import SLOWDOWN, baselines, trends
from audio_assets.monitoring.results import MAX_LAG, MIN_SUCCESS_RATE
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish
from audio_assets.warehouse.database import reading, recorded_parts
from audio_assets.warehouse.landing import CorruptPartError, Landing
from audio_assets.warehouse.part_names import written_at
from audio_assets.warehouse.schema import RUNS, Table, feature_table, quoted

FILES_NAMED = 5
FINDINGS_SHOWN = 5
FAILURES_SHOWN = 20
BASELINES_SHOWN = 50


@dataclass
class _Cells:
    """The file keys of a feature set's cells, by what Dagster and the database know."""

    materialized: set[str]
    rows: set[str]
    unpublished: set[str] = field(default_factory=set)
    unfinished: set[str] = field(default_factory=set)

    @property
    def without_row(self) -> set[str]:
        return self.materialized - self.rows - self.unpublished

    @property
    def not_materialized(self) -> set[str]:
        return self.rows - self.materialized - self.unfinished


_SPECS = [
    dg.AssetCheckSpec(
        "success_rate",
        asset=table_key(RUNS),
        description=f"More than {MIN_SUCCESS_RATE:.0%} of the cells that the last runs tried "
        "succeeded; cells that their file makes impossible do not count",
    ),
    dg.AssetCheckSpec(
        "speed",
        asset=table_key(RUNS),
        description="No feature set, and not decoding, takes much more time per second of audio "
        f"than it did: {SLOWDOWN - 1:.0%} more are mostly found within 100 cells",
    ),
    *(
        dg.AssetCheckSpec(name, asset=asset_key(feature_set.name), description=description)
        for feature_set in FEATURE_SETS.values()
        for name, description in (
            ("analysed", "No file has failed. A warning: only files that are themselves at fault"),
            ("finite", "No value in the table is NaN or infinite"),
            ("complete", "The table has a row for each materialized file, and no other row"),
            ("fresh", "The table has all rows that were written more than five minutes ago"),
            ("degraded", "No row is degraded: see the view features.degraded"),
            (
                "distribution",
                "No measured column is constant, mostly NULL, or much different between code "
                "versions, extractors and library roots",
            ),
        )
        if name != "distribution" or feature_set.reads_pcm
    ),
]
"""The checks; Dagster's UI opens an asset's checks at `analysed`, the first by name."""

_BY_OUTPUT = {f"{spec.asset_key.path[-1]}_{spec.name}": spec for spec in _SPECS}


@dg.op(
    name="published_tables",
    out={name: dg.Out(None, is_required=False) for name in _BY_OUTPUT},
    tags={"dagster/priority": "-1"},  # in a run of features, after these
)
def _check_tables(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckEvaluation]:
    """Check the published tables; after assets of the same run, publish their results before.

    Dagster makes an event of an output of each `dg.AssetCheckResult`, which nothing reads.
    """
    # Not public: what Dagster itself makes of an `AssetCheckResult`, before it yields the output.
    step = context.get_step_execution_context()
    context.log.setLevel(logging.WARNING)  # not the note that there are no outputs
    warehouse = get_settings().warehouse
    # The tables' own op has published already.
    others = context.job_def.asset_layer.selected_asset_keys - robustness_tables.keys
    if others or not warehouse.exists():
        publish()
    landing = open_landing()
    selected = context.selected_asset_check_keys
    # Ask Dagster first: rows may be written after this, but none can go missing.
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
                case "analysed", FeatureSet():
                    result = _check_analysed(connection, feature_set)
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
                case "degraded", FeatureSet():
                    result = _check_degraded(connection, feature_set)
                case "distribution", FeatureSet():
                    result = _check_distribution(connection, feature_set)
                case "speed", _:
                    result = _check_speed(connection)
                case _:
                    result = _check_success_rate(context.instance, connection)
            result = result._replace(asset_key=key.asset_key, check_name=key.name)
            yield result.to_asset_check_evaluation(step)


published_tables = dg.AssetChecksDefinition.create(
    # Not of @multi_asset_check, whose op would take the outputs of the features' ops as inputs:
    # these yield none, so that Dagster would skip it in each run of theirs.
    keys_by_input_name={},
    node_def=_check_tables,
    check_specs_by_output_name=_BY_OUTPUT,
    can_subset=True,
)


def _check_success_rate(
    instance: dg.DagsterInstance, connection: DuckDBPyConnection
) -> dg.AssetCheckResult:
    """Check the success rate of the runs that were reported last."""
    reported = last_reported(instance, "run_ids")
    runs = str(reported.value).split(", ") if reported else runs_to_report(connection, None)[0]
    figures = table_figures(connection, RUNS, runs)
    rate = figures.get("success_rate")
    failing = connection.execute(
        """
        SELECT file_key, any_value(message) FROM (
            FROM robustness.attempts WHERE list_contains(?, run_id)
            QUALIFY row_id = max(row_id) OVER (PARTITION BY run_id, file_key, feature_set)
        )
        WHERE outcome IN ('failed', 'given_up')
        GROUP BY file_key ORDER BY count(*) DESC, file_key LIMIT ?
        """,
        [runs, FILES_NAMED],
    ).fetchall()
    return dg.AssetCheckResult(
        passed=rate is None or rate > MIN_SUCCESS_RATE,
        severity=dg.AssetCheckSeverity.WARN,
        description="No cell was tried"
        if rate is None
        else f"{rate:.1%} of the cells tried succeeded",
        metadata={
            name: figures[name]
            for name in ("success_rate", "cells_failed", "cells_quarantined")
            if name in figures
        }
        | {f"failed: {file_key}": message or "" for file_key, message in failing},
    )


def _check_speed(connection: DuckDBPyConnection) -> dg.AssetCheckResult:
    """Report what got slower, and show the baselines."""
    slower = [
        f"{trend.feature_set} takes {trend.slowdown:.2f} times as long as before"
        + (f" on {trend.host}" if trend.host else "")
        + f", since {trend.since:%Y-%m-%d %H:%M} UTC"
        for trend in trends(connection)
        if trend.is_slower
    ]
    usual = [
        {
            name: float(four_digits(value)) if isinstance(value, float) else value
            for name, value in vars(baseline).items()
        }
        for baseline in baselines(connection)[-BASELINES_SHOWN:]
    ]
    metadata: dict[str, Any] = {"slower": len(slower)}
    if usual:
        metadata["baselines"] = dg.MetadataValue.table([dg.TableRecord(row) for row in usual])
    return dg.AssetCheckResult(
        passed=not slower,
        severity=dg.AssetCheckSeverity.WARN,
        description=plain_markdown("; ".join(slower)) if slower else None,
        metadata=metadata,
    )


def _check_analysed(connection: DuckDBPyConnection, feature_set: FeatureSet) -> dg.AssetCheckResult:
    """Report the failed files, why they failed, and where to retry them."""
    failed = connection.execute(
        """
        SELECT
            missing.file_key, missing.reason,
            outcome <> 'deferred' AND quarantine.content_hash IS NULL AS needs_person
        FROM features.missing AS missing JOIN library.files USING (file_key)
        LEFT JOIN robustness.quarantine USING (content_hash, feature_set)
        WHERE feature_set = ? AND outcome NOT IN ('succeeded', 'reused')
        ORDER BY last_attempt DESC, missing.file_key
        """,
        [feature_set.name],
    ).fetchall()
    lines = [
        f"- [{plain_markdown(file_key)}]({events_url(feature_set.name, file_key)}): "
        f"{plain_markdown(reason)} ([retry]({retry_url(file_key)}))"
        for file_key, reason, _ in failed[:FAILURES_SHOWN]
    ]
    if len(failed) > FAILURES_SHOWN:
        lines.append(f"- and {len(failed) - FAILURES_SHOWN} more, in the view features.missing")
    needs_person = any(needs for *_, needs in failed)
    summary = f"{counted(len(failed), 'file')} failed:"
    return dg.AssetCheckResult(
        passed=not failed,
        severity=dg.AssetCheckSeverity.ERROR if needs_person else dg.AssetCheckSeverity.WARN,
        description="\n".join([summary, "", *lines]) if failed else None,
        metadata={"failed": len(failed)},
    )


def _check_finite(connection: DuckDBPyConnection, feature_set: FeatureSet) -> dg.AssetCheckResult:
    tests = {
        column.name: test
        for column in feature_table(feature_set).columns
        if (test := _is_not_finite(column))
    }
    if not tests:
        return dg.AssetCheckResult(passed=True, metadata={"bad_rows": 0})
    counts = ", ".join(f"count(*) FILTER ({test})" for test in tests.values())
    [[bad, files, *by_column]] = connection.execute(
        f"SELECT count(*), list(file_key ORDER BY file_key)[:{FILES_NAMED}], {counts} "
        f"FROM {feature_table(feature_set).sql_name} WHERE {' OR '.join(tests.values())}"
    ).fetchall()
    columns = [name for name, count in zip(tests, by_column, strict=True) if count]
    return dg.AssetCheckResult(
        passed=not bad,
        severity=dg.AssetCheckSeverity.ERROR,
        description=f"{counted(bad, 'file')} with NaN or infinity in {', '.join(columns)}"
        if bad
        else None,
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
    # DuckDB sorts NaN above infinity: one of the two extremes is not finite.
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
            with suppress(CorruptPartError):
                written = landing.read_part(table.landing_name, part, ["file_key"])
                cells.unpublished.update(written["file_key"].to_pylist())
    if cells.not_materialized:
        run_of = dict(
            connection.execute(
                f"SELECT file_key, run_id FROM {table.sql_name} WHERE list_contains(?, file_key)",
                [list(cells.not_materialized)],
            ).fetchall()
        )
        ended = _ended_before(instance, set(run_of.values()), asked_at)
        cells.unfinished.update(key for key, run_id in run_of.items() if run_id not in ended)
    return cells


def _ended_before(instance: dg.DagsterInstance, run_ids: set[str], moment: datetime) -> set[str]:
    """Return the runs that ended before a moment, and so had reported all their cells."""
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
    """Compare rows and materializations: no row is an error, no materialization a warning."""
    parts = recorded_parts(connection, feature_table(feature_set))
    metadata: dict[str, Any] = {
        "materialized": len(cells.materialized),
        "rows": len(cells.rows),
        "materialized_without_row": len(cells.without_row),
        "rows_not_materialized": len(cells.not_materialized),
    }
    for name, keys in (
        ("files_without_row", cells.without_row),
        ("files_not_materialized", cells.not_materialized),
        ("damaged_parts", {part for part, is_damaged in parts.items() if is_damaged}),
    ):
        if keys:
            metadata[name] = ", ".join(sorted(keys)[:FILES_NAMED])
    reasons = []
    if cells.without_row:
        reasons.append(
            f"{counted(len(cells.without_row), 'file')} materialized without a row: "
            "materialize again"
        )
    if cells.not_materialized:
        reasons.append(
            f"{counted(len(cells.not_materialized), 'file')} with a row that an interrupted run "
            "did not report to Dagster: `audio-assets reconcile` reports it"
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
    unpublished = []
    for table in (feature_table(feature_set), RUNS):
        for part in _unpublished(connection, landing, table):
            with suppress(ValueError):  # the name of a foreign file, which publishing will report
                unpublished.append(written_at(part))
    late = [at for at in unpublished if at < datetime.now(UTC) - MAX_LAG]
    return dg.AssetCheckResult(
        passed=not late,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"Rows written at {min(late):%Y-%m-%d %H:%M} UTC are not published. Is "
        "Dagster's daemon running? `audio-assets publish` publishes them now"
        if late
        else None,
        metadata={
            "version": version,
            "published_at": dg.MetadataValue.timestamp(published_at),
            "parts_waiting": len(unpublished),
        },
    )


def _check_degraded(connection: DuckDBPyConnection, feature_set: FeatureSet) -> dg.AssetCheckResult:
    """Tell of rows that may differ from the best ones."""
    [(rows, degraded, due)] = connection.execute(
        "SELECT count(*), count(degraded), count(retry_after) "
        f"FROM {feature_table(feature_set).sql_name}"
    ).fetchall()
    return dg.AssetCheckResult(
        passed=not degraded,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"degraded: {degraded} of {counted(rows, 'row')}; {due} to be computed again"
        if degraded
        else None,
        metadata={"degraded": degraded, "computed_again": due},
    )


def _check_distribution(
    connection: DuckDBPyConnection, feature_set: FeatureSet
) -> dg.AssetCheckResult:
    found = findings(connection, feature_set)
    return dg.AssetCheckResult(
        passed=not found,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(found[:FINDINGS_SHOWN]) or None,
        metadata={"findings": len(found)},
    )


def _unpublished(connection: DuckDBPyConnection, landing: Landing, table: Table) -> list[str]:
    """Return the parts that are not in this version of the database."""
    names = recorded_parts(connection, table).keys()
    unpublished = []
    for part in landing.parts(table.landing_name):
        if part not in names:
            with suppress(CorruptPartError):
                # A merged part has nothing new if all its sources are known.
                sources = landing.supersedes(table.landing_name, part)
                if not sources or sources - names:
                    unpublished.append(part)
    return unpublished
