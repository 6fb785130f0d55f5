"""Liveness of runs: each run's process holds a lock until it ends.

On one machine this is a file lock in ``$DAGSTER_HOME/run_locks``. The kernel releases it when the
process ends, however it ends; a stopped process or a sleeping laptop keeps it. It needs no clock
and no renewal. If the robustness state is in PostgreSQL, which several hosts can share, it is a
session lock there.
"""

import logging
import os
import threading
import time
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
from blake3 import blake3

from audio_assets.defs.kernel_locks import LockedFile, is_locked
from audio_assets.settings import get_settings
from robustness.settings import get_settings as get_robustness_settings

logger = logging.getLogger(__name__)

LOCK_TAG = "audio_assets/lock"
"""Run tag: kind of the run's lock, ``file``, ``postgresql`` or ``none``."""

START_TIMEOUT_S = 60.0
"""Time in which a run must take its lock (s): ``start_timeout_seconds`` in ``dagster.yaml``."""

CLAIM_S = 30.0
"""Time for which only one process may end a dead run (s)."""

RETAKE_S = 5.0
"""Time between two checks of a run on its lock in PostgreSQL (s)."""

FREE_FOR_S = 3 * RETAKE_S
"""A lock in PostgreSQL counts as free if two checks this far apart find it free (s)."""

_STATUSES = (
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)


class Liveness(Enum):
    """State of a run's process, by its lock."""

    ALIVE = auto()
    DEAD = auto()
    NO_LOCK_YET = auto()
    UNKNOWN = auto()


class RunLock:
    """The lock of one run, held until `release` or the end of the process.

    A run that cannot take a lock continues without one, and never counts as dead.

    Parameters
    ----------
    run_id : str
        The run.

    Attributes
    ----------
    tag : dict of str to str
        The run tag `LOCK_TAG`.
    problem : str or None
        Why there is no lock.
    """

    def __init__(self, run_id: str) -> None:
        self.problem: str | None = None
        self._file: LockedFile | None = None
        self._session: _SessionLock | None = None
        try:
            if _is_shared():
                self._session = _SessionLock(run_id)
            else:
                self._file = LockedFile(_lock_path(run_id))
        except (OSError, sa.exc.SQLAlchemyError) as error:
            self.problem = f"it could not take its lock: {error}"
        kind = "postgresql" if self._session else "file" if self._file else "none"
        self.tag = {LOCK_TAG: kind}

    def release(self) -> None:
        """Release the lock, after the run's end was recorded."""
        if self._file:
            self._file.release()
        if self._session:
            self._session.release()


def liveness(run: dg.DagsterRun) -> Liveness:
    """Return the state of a run's process, by its lock."""
    try:
        match run.tags.get(LOCK_TAG):
            case None:
                return Liveness.NO_LOCK_YET
            case "file":
                held = is_locked(_lock_path(run.run_id))
            case "postgresql":
                held = _is_session_locked(run.run_id)
            case _:
                return Liveness.UNKNOWN
    except (OSError, sa.exc.SQLAlchemyError) as error:
        logger.warning("Cannot check whether run %s is alive: %s", run.run_id, error)
        return Liveness.UNKNOWN
    return Liveness.ALIVE if held else Liveness.DEAD


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
    if _is_shared() and any(liveness(run) is Liveness.DEAD for run in runs):
        time.sleep(FREE_FOR_S)
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
        for path in _lock_directory().glob("*.lock"):
            if not is_locked(path):
                run = instance.get_run_by_id(path.stem)
                if run is None or run.is_finished:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".ending").unlink(missing_ok=True)


def _is_shared() -> bool:
    url = get_robustness_settings().state_url
    return url is not None and sa.make_url(url).get_backend_name() == "postgresql"


def _lock_directory() -> Path:
    return get_settings().dagster_home / "run_locks"


def _lock_path(run_id: str) -> Path:
    return _lock_directory() / f"{run_id}.lock"


def _claim(run_id: str) -> bool:
    """Return whether this process is the one to end a run."""
    path = _lock_path(run_id).with_suffix(".ending")
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


class _SessionLock:
    """An advisory lock of a PostgreSQL session, taken again after its connection was lost."""

    def __init__(self, run_id: str) -> None:
        self._key = _key(run_id)
        self._connection = self._take()
        self._ended = threading.Event()
        threading.Thread(target=self._keep, name="run-lock", daemon=True).start()

    def release(self) -> None:
        self._ended.set()

    def _take(self) -> sa.Connection:
        connection = _engine().connect()
        try:
            connection.execute(sa.select(sa.func.pg_advisory_lock(self._key)))
            connection.commit()
        except BaseException:
            connection.close()
            raise
        return connection

    def _keep(self) -> None:
        while not self._ended.wait(RETAKE_S):
            try:
                self._connection.execute(sa.select(1))
                self._connection.commit()
            except sa.exc.SQLAlchemyError:
                with suppress(sa.exc.SQLAlchemyError):
                    self._connection.close()
                with suppress(sa.exc.SQLAlchemyError):
                    self._connection = self._take()
        with suppress(sa.exc.SQLAlchemyError):
            self._connection.close()


def _is_session_locked(run_id: str) -> bool:
    """Return whether a run's lock is held; it is free if two checks found it free."""
    key = _key(run_id)
    locks = sa.text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1"
        " AND classid::bigint = :high AND objid::bigint = :low"
    )
    try:
        with _engine().connect() as connection:
            held = connection.execute(locks, {"high": key >> 32, "low": key & 0xFFFFFFFF})
            is_held = bool(held.scalar())
    except sa.exc.SQLAlchemyError:
        _free_since.clear()
        raise
    if is_held:
        _free_since.pop(run_id, None)
        return True
    return time.monotonic() - _free_since.setdefault(run_id, time.monotonic()) < FREE_FOR_S


_free_since: dict[str, float] = {}


def _engine() -> sa.Engine:
    url = get_robustness_settings().state_url
    assert url is not None
    keepalives = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    return sa.create_engine(
        url, poolclass=sa.NullPool, connect_args={"connect_timeout": 5, **keepalives}
    )


def _key(run_id: str) -> int:
    return int.from_bytes(blake3(run_id.encode()).digest()[:8], "big") >> 1
