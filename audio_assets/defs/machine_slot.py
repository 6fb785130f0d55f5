"""The machine's slots: they limit how many runs extract features at once.

Dagster's daemon enforces the limit of the pool `audio_extraction` for the runs that it launches,
but not for `audio-assets analyze`. So each run has a file in ``$DAGSTER_HOME/run_locks/queue``,
which its process keeps locked.
"""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dagster as dg

from audio_assets.defs.partitions import PARTITIONS, POOL, REQUESTED_BY_TAG, partition_range
from audio_assets.monitoring.kernel_locks import LockedFile, is_locked
from audio_assets.settings import get_settings

POLL_S = 0.5
REMIND_S = 60.0


@contextmanager
def machine_slot(
    instance: dg.DagsterInstance, run: dg.DagsterRun, log: logging.Logger
) -> Iterator[None]:
    """Hold one of the pool's slots; runs get them in the order of arrival.

    A run that shares files with an earlier run waits until that has ended, even if a slot is
    free: it would compute the same cells.

    Parameters
    ----------
    instance : DagsterInstance
        Has the runs and the pool's limit.
    run : DagsterRun
        The run.
    log : logging.Logger
        Where the runs are named that this one waits for.
    """
    try:
        place = _queue_up(run.run_id)
    except OSError as error:
        log.warning(f"The run does not wait for others, as it cannot take a lock: {error}")
        yield
        return
    try:
        reminded = float("-inf")
        while earlier := _runs_waited_for(instance, run, place.path):
            if time.monotonic() - reminded > REMIND_S:
                reminded = time.monotonic()
                log.info(f"Waiting for {' and '.join(map(_description, earlier))}")
            waiting = instance.get_run_by_id(run.run_id)
            if waiting is not None and waiting.status is dg.DagsterRunStatus.CANCELING:
                raise dg.DagsterExecutionInterruptedError
            time.sleep(POLL_S)
        yield
    finally:
        place.release()


def runs_ahead(run_id: str) -> list[str]:
    """Return the runs that are in the queue before a run."""
    runs = [path.suffix.removeprefix(".") for path in _queue()]
    return runs[: runs.index(run_id)] if run_id in runs else []


def _queue_up(run_id: str) -> LockedFile:
    directory = _directory()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs must not take the same number
        numbers = [int(path.stem) for path in directory.glob("*.*") if path.stem.isdigit()]
        return LockedFile(directory / f"{max(numbers, default=0) + 1:09}.{run_id}")


def _queue() -> list[Path]:
    """Return the files of the runs that are alive, in the order of arrival."""
    places = []
    for path in sorted(_directory().glob("*.*")):
        with suppress(OSError):  # the run has just ended
            if is_locked(path):
                places.append(path)
            else:
                path.unlink(missing_ok=True)
    return places


def _runs_waited_for(
    instance: dg.DagsterInstance, run: dg.DagsterRun, place: Path
) -> list[dg.DagsterRun]:
    """Return the earlier runs that take all slots, or share files with this one."""
    queue = _queue()
    earlier = queue[: queue.index(place)] if place in queue else []
    runs = [instance.get_run_by_id(path.suffix.removeprefix(".")) for path in earlier]
    known = [other for other in runs if other is not None]
    if len(earlier) >= _limit(instance):
        return known
    if not known:
        return []
    position = {key: i for i, key in enumerate(instance.get_dynamic_partitions(PARTITIONS))}
    own = _span(run, position)
    return [other for other in known if not own.isdisjoint(_span(other, position))]


def _span(run: dg.DagsterRun, position: dict[str, int]) -> set[int]:
    ends = [position[key] for key in partition_range(run) or () if key in position]
    return set(range(min(ends), max(ends) + 1)) if ends else set()


def _limit(instance: dg.DagsterInstance) -> int:
    # Not public: the limits on the page of concurrency pools in Dagster's UI.
    limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
    return limits.get(POOL) or instance.global_op_concurrency_default_limit or 1


def _description(run: dg.DagsterRun) -> str:
    requested_by = run.tags.get(REQUESTED_BY_TAG)
    return f"run {run.run_id}" + (f" ({requested_by})" if requested_by else "")


def _directory() -> Path:
    return get_settings().dagster_home / "run_locks" / "queue"
