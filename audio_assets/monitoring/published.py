"""What the present version of the database says, read once per version."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from audio_assets.monitoring.results import published_parts
from audio_assets.settings import get_settings
from audio_assets.warehouse.database import reading

_BACKLOG = """
SELECT feature_set, count(*), coalesce(sum(duration_s), 0), count(*) - count(duration_s)
FROM features.missing JOIN library.files USING (file_key)
WHERE outcome IS NULL OR outcome IN ('deferred', 'succeeded', 'reused')
GROUP BY ALL ORDER BY ALL
"""
"""What failed is not part of it: it waits for the file, the next night or a person."""


@dataclass(frozen=True)
class Backlog:
    """The cells of a feature set that are left to compute.

    Parameters
    ----------
    cells : int
        Their number.
    audio_s : float
        Audio of those whose duration is known (s).
    unknown : int
        Number of those whose duration is not.
    """

    cells: int
    audio_s: float
    unknown: int


@dataclass(frozen=True)
class Published:
    """What a version of the database says.

    Parameters
    ----------
    parts : set of str
        The parts of attempts and runs that it holds.
    files : int
        Files in the library that were opened at least once.
    known : int
        Those of them whose duration is known.
    mean_s, deviation_s : float
        Mean and standard deviation of these durations (s).
    missing : list of tuple
        Feature set, outcome and number of cells without a row.
    degraded : list of tuple
        Feature set and number of degraded cells.
    backlog : dict of str to Backlog
        What is left to compute, by feature set.
    last_row : UUID or None
        The last attempt that it holds.
    """

    parts: set[str]
    files: int
    known: int
    mean_s: float
    deviation_s: float
    missing: list[tuple[str, str, int]]
    degraded: list[tuple[str, int]]
    backlog: Mapping[str, Backlog]
    last_row: UUID | None


class PublishedReader:
    """Reads the database of the settings when it has a new version."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version: int | None = None
        self._published: Published | None = None

    def latest(self) -> Published | None:
        """Return what the present version says; None if nothing was published yet.

        Raises
        ------
        duckdb.Error
            If it cannot be read.
        """
        path = get_settings().warehouse
        with self._lock:
            version = path.stat().st_mtime_ns if path.exists() else None
            if version != self._version:
                self._published = None if version is None else _read(path)
                self._version = version
            return self._published


def _read(path: Path) -> Published:
    with reading(path) as connection:
        connection.execute("SET threads = 1")  # runs need the cores
        [(files, known, mean_s, deviation_s)] = connection.execute(
            "SELECT count(*), count(duration_s), coalesce(avg(duration_s), 0), "
            "coalesce(stddev_samp(duration_s), 0) "
            "FROM library.files WHERE NOT coalesce(gone, false)"
        ).fetchall()
        missing = connection.execute(
            "SELECT feature_set, coalesce(outcome, 'untried'), count(*) FROM features.missing "
            "GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        degraded = connection.execute(
            "SELECT feature_set, count(*) FROM features.degraded GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        backlog = connection.execute(_BACKLOG).fetchall()
        [(last_row,)] = connection.execute("SELECT max(row_id) FROM robustness.attempts").fetchall()
        return Published(
            parts=published_parts(connection),
            files=files,
            known=known,
            mean_s=mean_s,
            deviation_s=deviation_s,
            missing=missing,
            degraded=degraded,
            backlog={name: Backlog(*rest) for name, *rest in backlog},
            last_row=last_row,
        )
