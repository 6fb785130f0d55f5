"""Runs whose process has ended are ended, too: see `audio_assets.monitoring.run_locks`."""

import os
import time
from contextlib import suppress

import dagster as dg

from audio_assets.monitoring import run_locks
from audio_assets.monitoring.kernel_locks import is_locked
from audio_assets.monitoring.run_locks import (
    LOCK_TAG,
    Liveness,
    is_found_free,
    lock_directory,
    lock_path,
    lock_state,
)

START_TIMEOUT_S = 60.0
"""Time in which a run must take its lock (s): ``start_timeout_seconds`` in ``dagster.yaml``."""

CLAIM_S = 30.0
"""Time for which only one process may end a dead run (s)."""

_STATUSES = (
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)


def liveness(run: dg.DagsterRun) -> Liveness:
    """Return the state of a run's process, by its lock."""
    return lock_state(run.run_id, run.tags.get(LOCK_TAG))


def is_dead(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Return whether a run was started and its process has ended.

    If several processes ask at the same time, only one gets True, and should end the run.

    Parameters
    ----------
    instance : DagsterInstance
        Has the run.
    run : DagsterRun
        A run that is not finished and not queued.
    """
    match liveness(run):
        case Liveness.DEAD:
            pass
        case Liveness.NO_LOCK_YET:
            record = instance.get_run_record_by_id(run.run_id)
            if record is None:
                return False
            started = record.start_time or record.create_timestamp.timestamp()
            if time.time() - started < START_TIMEOUT_S:
                return False
        case _:
            return False
    current = instance.get_run_by_id(run.run_id)
    return current is not None and current.status == run.status and _claim(run.run_id)


def end_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """End the runs whose process is gone, as Dagster's daemon does when it is running.

    Parameters
    ----------
    instance : DagsterInstance
        Has the runs.

    Returns
    -------
    list of str
        IDs of the runs that were ended.
    """
    ended = []
    runs = instance.get_runs(filters=dg.RunsFilter(statuses=_STATUSES))
    for run in runs:
        liveness(run)  # a lock in PostgreSQL counts as free at the second check
    if any(is_found_free(run.run_id) for run in runs):
        time.sleep(run_locks.FREE_FOR_S)
    for run in runs:
        if not is_dead(instance, run):
            continue
        if run.status is dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, GONE)
        else:
            instance.report_run_failed(run, GONE)
        ended.append(run.run_id)
    return ended


GONE = "The run's process is gone: it was killed, or the machine went down."


def remove_old_locks(instance: dg.DagsterInstance) -> None:
    """Remove the locks of runs that are finished."""
    with suppress(OSError):
        for path in lock_directory().glob("*.lock"):
            if not is_locked(path):
                run = instance.get_run_by_id(path.stem)
                if run is None or run.is_finished:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".ending").unlink(missing_ok=True)


def _claim(run_id: str) -> bool:
    """Return whether this process is the one to end a run."""
    path = lock_path(run_id).with_suffix(".ending")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        with suppress(OSError):
            if 0 <= time.time() - path.stat().st_mtime < CLAIM_S:
                return False
            os.utime(path)
    except OSError:
        pass  # better ended twice than never
    return True
