"""The results: whether they are published, and how many cells fail, degrade or are quarantined."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

import duckdb
from duckdb import DuckDBPyConnection

from audio_assets.monitoring.findings import Finding, Severity, at, span
from audio_assets.settings import get_settings
from audio_assets.warehouse.database import reading, recorded_parts
from audio_assets.warehouse.part_names import MERGED, NAME, written_at
from audio_assets.warehouse.schema import ATTEMPTS, RUNS

MIN_SUCCESS_RATE = 0.95
"""More than this share of the cells that are tried should succeed; the rest is the error budget."""

MAX_LAG = timedelta(minutes=5)
"""Parts that are older than this should be published."""

MIN_CELLS = 20
"""Of fewer cells no share is judged."""

MAX_IMPAIRED = 0.05
"""With a share of degraded or quarantined cells above this, and twice the former one, they grow."""

HOUR_S, DAY_S = 3600.0, 86_400.0

_WRITTEN_TOGETHER = (ATTEMPTS, RUNS)
"""A run writes no row without one of these."""


@dataclass(frozen=True)
class Ended:
    """How cells ended, each by its last attempt.

    Parameters
    ----------
    done, failed, degraded, quarantined : int
        Cells; degraded ones are done, too, and quarantined ones are not failed.
    since : datetime or None
        When the first attempt that failed was written.
    """

    done: int
    failed: int
    degraded: int
    quarantined: int
    since: datetime | None = None

    @property
    def budget_spent(self) -> float | None:
        """Share of the error budget that they have spent; None of too few cells."""
        tried = self.done + self.failed
        return self.failed / tried / (1 - MIN_SUCCESS_RATE) if tried >= MIN_CELLS else None

    def share(self, count: int) -> float | None:
        """Return a count's share of the cells; None of too few."""
        cells = self.done + self.failed + self.quarantined
        return count / cells if cells >= MIN_CELLS else None


def check_results(now: float) -> Iterator[Finding]:
    """Check what is published; nothing if nothing was ever landed."""
    path = get_settings().warehouse
    landed = landed_parts()
    if not path.exists():
        yield from _lag(landed, now)
        return
    try:
        with reading(path) as connection:
            published = published_parts(connection)
            hour, day = (ended_since(connection, now - window) for window in (HOUR_S, DAY_S))
            before = _ended_before(connection, now - DAY_S)
    except duckdb.Error as error:
        yield Finding(
            "results",
            Severity.UNKNOWN,
            "The database cannot be read: neither publishing nor failures are known",
            f"{path}: {str(error).splitlines()[0]}",
            "if a newer version of this program wrote it, upgrade; else `audio-assets publish "
            "--rebuild` makes it anew",
        )
        return
    if published and is_landing_away():
        yield Finding(
            "landing",
            Severity.BROKEN,
            "The landing is not there: no run can write its rows",
            get_settings().landing,
            "mount its disk, or correct AUDIO_LANDING",
        )
    yield from _lag(landed - published, now)
    yield from _overspent(hour, day)
    yield from _growth(day, before)


def is_landing_away() -> bool:
    """Return whether the landing is a directory that is not there."""
    url = get_settings().landing
    return "://" not in url and not Path(url).is_dir()


def landed_parts() -> set[str]:
    """Return the names of the parts that runs have written, without those merged from them.

    Only what is published is merged. To import `Landing` would take longer than all checks.
    """
    url = get_settings().landing
    names: list[str] = []
    for table in _WRITTEN_TOGETHER:
        if "://" not in url:
            directory = Path(url) / table.landing_name
            names += (path.name for path in directory.iterdir()) if directory.is_dir() else ()
        else:
            import fsspec

            filesystem, root = fsspec.core.url_to_fs(url)
            folder = f"{root.rstrip('/')}/{table.landing_name}"
            if filesystem.exists(folder):
                names += (path.rsplit("/", 1)[-1] for path in filesystem.ls(folder, detail=False))
    return {name for name in names if NAME.fullmatch(name) and not name.endswith(MERGED)}


def published_parts(connection: DuckDBPyConnection) -> set[str]:
    """Return the names of the parts of the same tables that a version of the database holds."""
    return {part for table in _WRITTEN_TOGETHER for part in recorded_parts(connection, table)}


def ended_since(connection: DuckDBPyConnection, seconds: float) -> Ended:
    """Return how the cells ended whose attempts were written since a time (s since the epoch)."""
    [row] = connection.execute(
        """
        SELECT
            count(*) FILTER (outcome = 'succeeded'),
            count(*) FILTER (outcome IN ('failed', 'given_up')),
            count(*) FILTER (outcome = 'succeeded' AND degraded),
            count(*) FILTER (outcome = 'quarantined'),
            min(started_at) FILTER (outcome IN ('failed', 'given_up'))
        FROM (
            SELECT
                arg_max(outcome, row_id) AS outcome,
                arg_max_null(degraded, row_id) IS NOT NULL AS degraded,
                min(started_at) AS started_at
            FROM robustness.attempts WHERE row_id >= ? GROUP BY file_key, feature_set
        )
        """,
        [row_at(seconds)],
    ).fetchall()
    return Ended(*row)


def row_at(seconds: float) -> UUID:
    """Return the least ID of a row that was written at a time (s since the epoch)."""
    return UUID(int=round(seconds * 1000) << 80)


def _ended_before(connection: DuckDBPyConnection, seconds: float) -> Ended:
    """Return how the cells of all runs ended that were over by a time (s since the epoch)."""
    [row] = connection.execute(
        "SELECT coalesce(sum(cells_done), 0)::BIGINT, coalesce(sum(cells_failed), 0)::BIGINT, "
        "coalesce(sum(cells_degraded), 0)::BIGINT, coalesce(sum(cells_quarantined), 0)::BIGINT "
        "FROM robustness.runs WHERE ended_at < ?",
        [at(seconds)],
    ).fetchall()
    return Ended(*row)


def _lag(unpublished: set[str], now: float) -> Iterator[Finding]:
    oldest = min(map(written_at, unpublished), default=None)
    if oldest is not None and oldest < at(now) - MAX_LAG:
        yield Finding(
            "publish",
            Severity.DEGRADED,
            f"Results of {span(now - oldest.timestamp())} ago are not published",
            f"{len(unpublished)} parts of the landing are not in the database",
            "start Dagster's daemon, or run `audio-assets publish`, which says what is wrong",
            since=oldest,
        )


def _overspent(hour: Ended, day: Ended) -> Iterator[Finding]:
    for window, ended in (("hour", hour), ("day", day)):
        if ended.budget_spent is not None and ended.budget_spent > 1:
            yield Finding(
                "errors",
                Severity.DEGRADED,
                f"More than {1 - MIN_SUCCESS_RATE:.0%} of the cells of the last {window} failed, "
                "and not for their file",
                f"{ended.failed} of {ended.done + ended.failed}, {ended.budget_spent:.1f} times "
                "the error budget",
                "`audio-assets status` says why",
                since=ended.since,
                subject=window,
            )


def _growth(day: Ended, before: Ended) -> Iterator[Finding]:
    for kind, now_, then, advice in (
        ("degraded", day.degraded, before.degraded, "see the view features.degraded"),
        ("quarantined", day.quarantined, before.quarantined, "`audio-assets quarantine list`"),
    ):
        share, former = day.share(now_), before.share(then)
        if share is not None and share > max(MAX_IMPAIRED, 2 * (former or 0.0)):
            yield Finding(
                "quality",
                Severity.DEGRADED,
                f"More cells than before are {kind}",
                f"{now_} in the last day, {share:.0%} of those that ended"
                + ("" if former is None else f"; {former:.0%} before"),
                f"{advice}; a disk or a network that damages files is a common cause",
                subject=kind,
            )
