"""Records of runs: start, end and status, for the table ``robustness.runs``."""

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from audio_assets.defs.partitions import asset_key
from audio_assets.features import FEATURE_SETS
from audio_assets.warehouse.database import reading
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import RUNS


def record_start(run: dg.DagsterRun, landing: Landing) -> None:
    """Write to the landing that a run has started."""
    now = datetime.now(UTC)
    row = {"run_id": run.run_id, "job_name": run.job_name, "started_at": now, "status": "started"}
    landing.append(RUNS.landing_name, [row])


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
    landing.append(
        RUNS.landing_name,
        [
            {
                "run_id": run_id,
                "job_name": record.dagster_run.job_name,
                "started_at": _time(record.start_time),
                "ended_at": _time(record.end_time),
                "status": record.dagster_run.status.value.lower(),
                "recorded_at": datetime.now(UTC),
            }
        ],
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
