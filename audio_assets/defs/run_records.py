"""Records of runs: start, end and status, for the table ``robustness.runs``."""

import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from audio_assets.defs.partitions import asset_key
from audio_assets.features import FEATURE_SETS
from audio_assets.warehouse.database import reading
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import RUNS


def record_start(run: dg.DagsterRun, workers: int, landing: Landing) -> None:
    """Write to the landing that a run has started here, with so many workers."""
    row = {
        "run_id": run.run_id,
        "job_name": run.job_name,
        "started_at": datetime.now(UTC),
        "status": "started",
        "host": socket.gethostname(),
        "workers": workers,
    }
    landing.append(RUNS.landing_name, [row])


def record_worker_time(run: dg.DagsterRun, seconds: Mapping[str, float], landing: Landing) -> None:
    """Write to the landing what the time of a run's workers went to.

    Parameters
    ----------
    run : DagsterRun
        The run, whose start was recorded.
    seconds : mapping of str to float
        Time (s) by the columns of `WORKER_TIME`.
    landing : Landing
        Where the row is written.
    """
    _record(landing, run.run_id, **seconds)


def _record(landing: Landing, run_id: str, **values: object) -> None:
    """Write a run's row with some values in place of what it had."""
    known = landing.latest(RUNS.landing_name, where=("run_id", [run_id]))
    row = known[0] if known else {"run_id": run_id}
    landing.append(RUNS.landing_name, [{**row, **values}])


def record_run(instance: dg.DagsterInstance, run_id: str, landing: Landing) -> None:
    """Write a run's start, end and status to the landing.

    Parameters
    ----------
    instance : DagsterInstance
        Where the run was recorded.
    run_id : str
        The run; nothing is written if the instance does not know it.
    landing : Landing
        Where the row is written.
    """
    record = instance.get_run_record_by_id(run_id)
    if record is None:
        return
    _record(
        landing,
        run_id,
        job_name=record.dagster_run.job_name,
        started_at=_time(record.start_time),
        ended_at=_time(record.end_time),
        status=record.dagster_run.status.value.lower(),
        recorded_at=datetime.now(UTC),
    )


def record_ended_runs(instance: dg.DagsterInstance, warehouse: Path, landing: Landing) -> None:
    """Write the ends of runs that have published attempts but no record yet.

    Parameters
    ----------
    instance : DagsterInstance
        Where the runs were recorded.
    warehouse : Path
        The database.
    landing : Landing
        Where the rows are written.
    """
    if not warehouse.exists():
        return
    with reading(warehouse) as connection:
        open_runs = connection.execute(
            f"SELECT run_id FROM {RUNS.sql_name} WHERE recorded_at IS NULL"
        ).fetchall()
    for (run_id,) in open_runs:
        run = instance.get_run_by_id(run_id)
        if run is not None and run.is_finished:
            record_run(instance, run_id, landing)


def computes_features(run: dg.DagsterRun, repository: dg.RepositoryDefinition | None) -> bool:
    """Return whether a run materializes feature sets.

    Parameters
    ----------
    run : DagsterRun
        The run.
    repository : RepositoryDefinition, optional
        Where its job is defined.
    """
    keys = run.asset_selection
    if not keys and repository is not None and repository.has_job(run.job_name):
        keys = repository.get_job(run.job_name).asset_layer.selected_asset_keys
    return not {asset_key(name) for name in FEATURE_SETS}.isdisjoint(keys or ())


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
