"""The results: whether they are published, and how many cells fail, degrade or are quarantined."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

import duckdb
from duckdb import DuckDBPyConnection

from audio_assets.library.text import counted
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
"""With a share of degraded or quarantined cells above this, and twice the usual one, they grow."""

HOUR_S, DAY_S = 3600.0, 86_400.0

_WRITTEN_TOGETHER = (ATTEMPTS, RUNS)
"""A run writes no row without one of these."""


@dataclass(frozen=True)
class Ended:
    """How cells ended, each by its last attempt.

    Parameters
    ----------
    done, failed, degraded, quarantined : int
        Cells; degraded ones are done, too, and quarantined ones are not failed. Those of a file at
        which there was no attempt were quarantined before, and do not count.
    failed_since, degraded_since, quarantined_since : datetime or None
        When the first attempt at these began.
    """

    done: int
    failed: int
    degraded: int
    quarantined: int
    failed_since: datetime | None = None
    degraded_since: datetime | None = None
    quarantined_since: datetime | None = None

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
            count(*) FILTER (outcome = 'quarantined' AND tried),
            min(started_at) FILTER (outcome IN ('failed', 'given_up')),
            min(started_at) FILTER (outcome = 'succeeded' AND degraded),
            min(started_at) FILTER (outcome = 'quarantined' AND tried)
        FROM (
            SELECT
                arg_max(outcome, row_id) AS outcome,
                arg_max_null(degraded, row_id) IS NOT NULL AS degraded,
                max(max(attempt)) OVER (PARTITION BY file_key) > 0 AS tried,
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
            f"not in the database: {counted(len(unpublished), 'part')} of the landing",
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
                since=ended.failed_since,
                subject=window,
            )


def _growth(day: Ended, before: Ended) -> Iterator[Finding]:
    """Compare with what is usual, and note what is not more, or has nothing to compare with yet."""
    for kind, cells, usual, since, advice in (
        (
            "degraded",
            day.degraded,
            before.share(before.degraded),
            day.degraded_since,
            'see `audio-assets query "FROM features.degraded"`',
        ),
        (
            "quarantined",
            day.quarantined,
            before.share(before.quarantined),
            day.quarantined_since,
            "see `audio-assets quarantine list`",
        ),
    ):
        share = day.share(cells)
        grows = bool(share and usual is not None and share > max(MAX_IMPAIRED, 2 * usual))
        if cells:
            yield Finding(
                "quality",
                Severity.DEGRADED if grows else Severity.NOTE,
                f"More cells than usual are {kind}" if grows else f"Some cells are {kind}",
                f"{cells} in the last day"
                + ("" if share is None else f", {share:.0%} of those that ended")
                + ("" if usual is None else f"; {usual:.0%} before"),
                advice + ("; a disk or a network that damages files is a common cause" * grows),
                since=since,
                subject=kind,
            )
