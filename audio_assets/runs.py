"""What Dagster knows of a run, for the warehouse."""

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.publisher import reading
from audio_assets.warehouse.schema import RUNS


def record_run(instance: dg.DagsterInstance, run_id: str, landing: Landing) -> None:
    """Land a run's begin, end and status; its figures are computed from its attempts.

    Parameters
    ----------
    instance : DagsterInstance
        Where the run was recorded.
    run_id : str
        The run; one that the instance does not know changes nothing.
    landing : Landing
        Where the row goes.
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
    """Land the ends of runs whose attempts were published, and whose ends could not be landed.

    Parameters
    ----------
    instance : DagsterInstance
        Where the runs were recorded.
    warehouse : Path
        The database.
    landing : Landing
        Where the rows go.
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
    """Tell whether a run materializes feature sets.

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
    return any(key.path[0] == "features" for key in keys or ())


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
