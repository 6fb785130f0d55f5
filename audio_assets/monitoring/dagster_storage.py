"""What Dagster's storage says of its daemon, sensors and runs, read without Dagster.

To import Dagster takes longer than all checks together. Its tables are those of
``dagster._core.storage``: heartbeats and instigators as JSON, runs and their tags as rows.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from audio_assets.monitoring.run_locks import LOCK_TAG
from audio_assets.settings import get_settings

ANSWER_S = 2
"""How long to wait for a database's answer (s)."""

_heartbeats = sa.table("daemon_heartbeats", sa.column("body"))
_runs = sa.table(
    "runs",
    sa.column("run_id"),
    sa.column("pipeline_name"),
    sa.column("status"),
    sa.column("create_timestamp", sa.DateTime),
    sa.column("update_timestamp", sa.DateTime),
)
_tags = sa.table("run_tags", sa.column("run_id"), sa.column("key"), sa.column("value"))
_partitions = sa.table("dynamic_partitions", sa.column("partitions_def_name"))
_instigators = sa.table(
    "instigators",
    sa.column("selector_id"),
    sa.column("status"),
    sa.column("instigator_body"),
)
_ticks = sa.table(
    "job_ticks",
    sa.column("id", sa.Integer),
    sa.column("selector_id"),
    sa.column("status"),
    sa.column("timestamp", sa.DateTime),
    sa.column("tick_body"),
)

PARTITIONS = "audio_files"
"""Name of the partitions, one per file."""

UNFINISHED = ("QUEUED", "NOT_STARTED", "STARTING", "STARTED", "CANCELING")


class StorageError(Exception):
    """Dagster's storage cannot be read; the message says why."""


@dataclass(frozen=True)
class Run:
    """A run that has not ended.

    Parameters
    ----------
    run_id, job, status : str
        The run, its job, and Dagster's status.
    since : float
        When its status last changed (s since the epoch).
    lock : str or None
        Kind of its lock.
    """

    run_id: str
    job: str
    status: str
    since: float
    lock: str | None


@dataclass(frozen=True)
class Instigator:
    """A sensor or a schedule that is switched on.

    Parameters
    ----------
    name : str
        Its name.
    ticked_at : float or None
        When its last tick began (s since the epoch).
    interval_s : float or None
        Its least time between two ticks (s); None for a schedule.
    error : str or None
        Why its last tick failed.
    failed_since : float or None
        When the first of its failed ticks in a row began (s since the epoch).
    """

    name: str
    ticked_at: float | None
    interval_s: float | None
    error: str | None
    failed_since: float | None


class DagsterStorage:
    """Reads the storage that ``dagster.yaml`` names.

    Raises
    ------
    StorageError
        If it is of a kind that is not read here.
    """

    def __init__(self) -> None:
        home = get_settings().dagster_home
        url = _postgres_url(home / "dagster.yaml")
        self._files = [] if url else [home / "history/runs.db", home / "schedules/schedules.db"]
        if url:
            options = {"connect_timeout": ANSWER_S, "options": f"-c statement_timeout={ANSWER_S}s"}
            self._runs = self._schedules = self._events = sa.create_engine(
                url, connect_args=options, poolclass=sa.NullPool
            )
        else:
            self._runs, self._schedules = map(_read_only, self._files)
            self._events = _read_only(home / "history/runs/index.db")

    @property
    def exists(self) -> bool:
        """Whether Dagster has been used."""
        return all(file.exists() for file in self._files)

    def heartbeats(self) -> dict[str, float]:
        """Return when each of the daemon's threads last had a heartbeat (s since the epoch)."""
        with _reading(self._runs) as connection:
            beats = [json.loads(body) for (body,) in connection.execute(sa.select(_heartbeats))]
        return {beat["daemon_type"]: beat["timestamp"] for beat in beats}

    def unfinished_runs(self) -> list[Run]:
        """Return the runs that have not ended, oldest first."""
        is_lock = (_tags.c.run_id == _runs.c.run_id) & (_tags.c.key == LOCK_TAG)
        statement = (
            sa.select(_runs, _tags.c.value)
            .outerjoin_from(_runs, _tags, is_lock)
            .where(_runs.c.status.in_(UNFINISHED))
            .order_by(_runs.c.create_timestamp)
        )
        with _reading(self._runs) as connection:
            return [
                Run(run_id, job, status, _seconds(changed or created), lock)
                for run_id, job, status, created, changed, lock in connection.execute(statement)
            ]

    def files(self) -> int:
        """Return the number of partitions: files of the library, also those not opened yet."""
        are_files = _partitions.c.partitions_def_name == PARTITIONS
        statement = sa.select(sa.func.count()).select_from(_partitions).where(are_files)
        with _reading(self._events) as connection:
            return connection.scalar(statement) or 0

    def instigators(self) -> list[Instigator]:
        """Return the sensors and schedules that are switched on."""
        is_on = _instigators.c.status.in_(("RUNNING", "DECLARED_IN_CODE"))
        with _reading(self._schedules) as connection:
            rows = connection.execute(sa.select(_instigators).where(is_on)).all()
            return [
                _instigator(connection, selector_id, json.loads(text))
                for selector_id, _, text in rows
            ]


def _instigator(connection: sa.Connection, selector_id: str, body: dict[str, Any]) -> Instigator:
    data = body.get("job_specific_data") or {}
    ended = sa.select(_ticks).where(
        _ticks.c.selector_id == selector_id, _ticks.c.status != "STARTED"
    )
    last = connection.execute(ended.order_by(_ticks.c.timestamp.desc()).limit(1)).first()
    error = failed_since = None
    if last and last.status == "FAILURE":
        error = (json.loads(last.tick_body).get("error") or {}).get("message") or "no reason given"
        sound = ended.where(_ticks.c.status != "FAILURE").subquery()
        newest = sa.select(sa.func.coalesce(sa.func.max(sound.c.id), 0)).scalar_subquery()
        failed = ended.where(_ticks.c.id > newest).subquery()
        failed_since = connection.scalar(sa.select(sa.func.min(failed.c.timestamp)))
    return Instigator(
        name=body["origin"]["job_name"],
        ticked_at=data.get("last_tick_start_timestamp") or data.get("last_tick_timestamp"),
        interval_s=data.get("min_interval"),
        error=error,
        failed_since=failed_since and _seconds(failed_since),
    )


@contextmanager
def _reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    try:
        with engine.connect() as connection:
            yield connection
    except (sa.exc.SQLAlchemyError, ImportError, KeyError, ValueError) as error:
        raise StorageError(f"{engine.url!r}: {getattr(error, 'orig', None) or error}") from error


def _read_only(file: Path) -> sa.Engine:
    return sa.create_engine(
        f"sqlite:///file:{quote(str(file.absolute()))}?mode=ro&uri=true",
        connect_args={"timeout": ANSWER_S},
        poolclass=sa.NullPool,
    )


def _postgres_url(config: Path) -> str | None:
    """Return the URL of a storage in PostgreSQL; None if it is below Dagster's home."""
    text = config.read_text("utf-8") if config.exists() else ""
    if not re.search(r"^(storage|\w+_storage):", text, re.MULTILINE):
        return None
    import yaml

    match yaml.safe_load(text):
        case {"storage": {"postgres": {"postgres_url": {"env": variable}}}}:
            if url := os.environ.get(variable):
                return url
            raise StorageError(f"{config} names the variable {variable}, which is not set")
        case {"storage": {"postgres": {"postgres_url": str(url)}}}:
            return url
    raise StorageError(f"{config} names a storage that only Dagster itself can read")


def _seconds(moment: datetime) -> float:
    return moment.replace(tzinfo=UTC).timestamp()
