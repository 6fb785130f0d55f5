"""Signs of life of runs: each run's process holds a lock until it ends.

On one machine this is a file lock in ``$DAGSTER_HOME/run_locks``. The kernel releases it when the
process ends, however it ends; a stopped process or a sleeping laptop keeps it. It needs no clock
and no renewal. If the robustness state is in PostgreSQL, which several hosts can share, it is a
session lock there.
"""

import logging
import threading
import time
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path

import sqlalchemy as sa
from blake3 import blake3

from audio_assets.monitoring.kernel_locks import LockedFile, is_locked
from audio_assets.settings import get_settings
from robustness.settings import get_settings as get_robustness_settings

logger = logging.getLogger(__name__)

LOCK_TAG = "audio_assets/lock"
"""Run tag: kind of the run's lock, ``file``, ``postgresql`` or ``none``."""

RETAKE_S = 5.0
"""Time between two checks of a run on its lock in PostgreSQL (s)."""

FREE_FOR_S = 3 * RETAKE_S
"""A lock in PostgreSQL counts as free if two checks this far apart find it free (s)."""


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
            if is_shared():
                self._session = _SessionLock(run_id)
            else:
                self._file = LockedFile(lock_path(run_id))
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


def lock_state(run_id: str, kind: str | None) -> Liveness:
    """Return the state of a run's process, by its lock.

    Parameters
    ----------
    run_id : str
        The run.
    kind : str or None
        Its tag `LOCK_TAG`.
    """
    try:
        match kind:
            case None:
                return Liveness.NO_LOCK_YET
            case "file":
                held = is_locked(lock_path(run_id))
            case "postgresql":
                held = _is_session_locked(run_id)
            case _:
                return Liveness.UNKNOWN
    except (OSError, sa.exc.SQLAlchemyError) as error:
        logger.warning("Cannot check whether run %s is alive: %s", run_id, error)
        return Liveness.UNKNOWN
    return Liveness.ALIVE if held else Liveness.DEAD


def is_shared() -> bool:
    """Return whether several hosts share the locks."""
    url = get_robustness_settings().state_url
    return url is not None and sa.make_url(url).get_backend_name() == "postgresql"


def lock_directory() -> Path:
    """Return where the file locks are."""
    return get_settings().dagster_home / "run_locks"


def lock_path(run_id: str) -> Path:
    """Return the file of a run's lock."""
    return lock_directory() / f"{run_id}.lock"


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


def is_found_free(run_id: str) -> bool:
    """Return whether the last check found a run's lock in PostgreSQL free, for however long."""
    return run_id in _free_since


def _engine() -> sa.Engine:
    url = get_robustness_settings().state_url
    assert url is not None
    keepalives = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    return sa.create_engine(
        url, poolclass=sa.NullPool, connect_args={"connect_timeout": 5, **keepalives}
    )


def _key(run_id: str) -> int:
    return int.from_bytes(blake3(run_id.encode()).digest()[:8], "big") >> 1
