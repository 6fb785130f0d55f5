"""Dagster's history: cells are reported anew from the landing, old runs are deleted.

The landing alone says which cells are computed, and Dagster's status of each partition is derived
from it. So any of Dagster's runs and events can be deleted.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import dagster as dg

# Not public: the storage whose files stay when their events are deleted.
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage

from audio_assets.defs.cell_events import materialization
from audio_assets.defs.partitions import FINISHED, PARTITIONS, UNFINISHED, asset_key
from audio_assets.defs.robustness_tables import FIGURES, table_key
from audio_assets.extraction.cells import CellOutcome, CellStatus
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import FeatureSet
from audio_assets.settings import get_settings
from audio_assets.warehouse import publish
from audio_assets.warehouse.database import reading
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import FILES, feature_table

_ROWS_AT_A_TIME = 1000
_CONNECTIONS = 4
_STATEMENT_TIMEOUT_MS = 60_000
_RUNS_AT_A_TIME = 100


def reconcile(
    instance: dg.DagsterInstance,
    landing: Landing,
    feature_sets: Iterable[FeatureSet],
    limit: int | None = None,
) -> int:
    """Report the cells that have a row and that Dagster does not show as materialized.

    Their runs were deleted, or killed before they reported them. Nothing is computed. The cells
    of active runs are left to these.

    Parameters
    ----------
    instance : DagsterInstance
        Where the cells are reported.
    landing : Landing
        Where the rows are.
    feature_sets : iterable of FeatureSet
        The feature sets to report.
    limit : int, optional
        Most cells to report. Default: all.

    Returns
    -------
    int
        Number of cells reported.
    """
    missing = _not_shown(instance, landing, feature_sets, limit)
    if missing:
        with _connections(instance) as map_over:
            for feature_set, file_keys in missing:
                key, table = asset_key(feature_set.name), feature_table(feature_set).landing_name
                for start in range(0, len(file_keys), _ROWS_AT_A_TIME):
                    some = file_keys[start : start + _ROWS_AT_A_TIME]
                    events = [
                        materialization(
                            key,
                            feature_set,
                            CellOutcome(
                                row["file_key"], feature_set.name, CellStatus.REUSED, row=row
                            ),
                        )
                        for row in landing.latest(table, where=("file_key", some))
                    ]
                    list(map_over(instance.report_runless_asset_event, events))
                # Not public. The cache knows events up to a number, and SQLite numbers new events
                # as deleted ones: it would miss them.
                instance.wipe_asset_cached_status([key])
    return sum(len(file_keys) for _, file_keys in missing)


def _not_shown(
    instance: dg.DagsterInstance,
    landing: Landing,
    feature_sets: Iterable[FeatureSet],
    limit: int | None,
) -> list[tuple[FeatureSet, list[str]]]:
    """Return the files whose cells have a row and are not materialized, by feature set."""
    partitions = set(instance.get_dynamic_partitions(PARTITIONS))
    contents = {
        row["file_key"]: row["content_hash"]
        for row in landing.latest(FILES.landing_name, ("file_key", "content_hash"))
        if row["file_key"] in partitions
    }
    active = {run.run_id for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED))}
    found, left = [], limit
    for feature_set in feature_sets:
        candidates = contents.keys() - instance.get_materialized_partitions(
            asset_key(feature_set.name)
        )
        if not candidates:
            continue
        rows = landing.latest(
            feature_table(feature_set).landing_name,
            ("file_key", "content_hash", "run_id"),
            where=("file_key", candidates),
        )
        file_keys = [
            row["file_key"]
            for row in rows
            if contents[row["file_key"]] == row["content_hash"] and row["run_id"] not in active
        ][:left]
        if file_keys:
            found.append((feature_set, file_keys))
        left = None if left is None else left - len(file_keys)
    return found


@contextmanager
def _connections(instance: dg.DagsterInstance) -> Iterator[Callable[..., Iterator[None]]]:
    """Yield `map`, or one that uses several connections to Dagster's storage at a time."""
    storage = instance.event_log_storage
    if isinstance(storage, SqliteEventLogStorage):  # it has one writer at a time
        yield map
        return
    # As the webserver does: otherwise each event opens connections of its own.
    storage.optimize_for_webserver(
        statement_timeout=_STATEMENT_TIMEOUT_MS, pool_recycle=3600, max_overflow=_CONNECTIONS
    )
    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        yield threads.map


@dataclass(frozen=True)
class Pruned:
    """What was removed.

    Parameters
    ----------
    runs : int
        Runs deleted, with their events and logs.
    kept : int
        Old runs that show why a partition is failed, or have the latest figures.
    reported : int
        Cells reported anew, without a run.
    """

    runs: int
    kept: int
    reported: int


def prune(instance: dg.DagsterInstance, landing: Landing, before: datetime) -> Pruned:
    """Delete runs that ended before a time; every partition keeps its status.

    A run in which a cell failed that has no row since is kept, as Dagster has the failed status of
    a partition from it.

    Parameters
    ----------
    instance : DagsterInstance
        Has the runs.
    landing : Landing
        Where the rows are.
    before : datetime
        The time.
    """
    publish()
    needed = _runs_with_failed_partitions(get_settings().warehouse) | _runs_of_figures(instance)
    deleted = kept = 0
    last_kept = None  # runs come newest first
    old = dg.RunsFilter(statuses=FINISHED, updated_before=before)
    while runs := instance.get_runs(old, cursor=last_kept, limit=_RUNS_AT_A_TIME):
        for run in runs:
            if run.run_id in needed:
                kept += 1
                last_kept = run.run_id
            else:
                _delete(instance, run.run_id)
                deleted += 1
    reported = reconcile(instance, landing, FEATURE_SETS.values())
    _delete_old_logs(before)
    _shrink(instance.event_log_storage)
    return Pruned(deleted, kept, reported)


def _runs_with_failed_partitions(warehouse: Path) -> set[str]:
    with reading(warehouse) as connection:
        found = connection.execute(
            """
            SELECT DISTINCT arg_max(run_id, row_id)
            FROM robustness.attempts JOIN features.missing USING (file_key, feature_set)
            GROUP BY file_key, feature_set
            """
        ).fetchall()
    return {run_id for (run_id,) in found}


def _runs_of_figures(instance: dg.DagsterInstance) -> set[str]:
    """Return the runs with the latest figures and checks."""
    events = [instance.get_latest_materialization_event(table_key(table)) for table in FIGURES]
    return {event.run_id for event in events if event}


def _delete(instance: dg.DagsterInstance, run_id: str) -> None:
    instance.delete_run(run_id)
    storage = instance.event_log_storage
    if isinstance(storage, SqliteEventLogStorage):
        for path in Path(storage.path_for_shard(run_id)).parent.glob(f"{run_id}.db*"):
            path.unlink(missing_ok=True)


def _delete_old_logs(before: datetime) -> None:
    """Delete what processes of Dagster wrote to their outputs, and empty directories."""
    storage = get_settings().dagster_home / "storage"
    for path in sorted(storage.rglob("*"), reverse=True):  # what is in a directory comes first
        with suppress(OSError):
            if path.stat().st_mtime < before.timestamp():
                path.rmdir() if path.is_dir() else path.unlink()


def _shrink(storage: object) -> None:
    """Give the space of deleted events back to the file system."""
    if not isinstance(storage, SqliteEventLogStorage):
        return  # PostgreSQL does so itself
    path = storage.path_for_shard("index")
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(path, timeout=10)) as index:
        index.execute("VACUUM")  # it fails while others write: the next time does it
