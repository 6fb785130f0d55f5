"""The publisher: builds the database's next version from the landing, and swaps it in."""

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import duckdb
from duckdb import DuckDBPyConnection

from audio_assets.features.base import FeatureSet
from audio_assets.warehouse.database import DatabaseFile, reading, recorded_parts
from audio_assets.warehouse.definition import Definition
from audio_assets.warehouse.ingest import (
    TABLES_SQL,
    LedgerError,
    check_ledger,
    ingest,
)
from audio_assets.warehouse.landing import CorruptPartError, Landing, PartVanishedError
from audio_assets.warehouse.rollups import compute_rollups
from audio_assets.warehouse.schema import ATTEMPTS, FILES, RUNS, Table, feature_table
from audio_assets.warehouse.state_snapshot import STATE_TABLES, read_state
from robustness.state import StateStore

logger = logging.getLogger(__name__)


@dataclass
class PublishResult:
    """The result of a publication.

    Parameters
    ----------
    version : int
        The present version.
    published : bool
        Whether it is new; False if the landing had nothing new.
    rows : dict of str to int
        Rows ingested, by table.
    damaged_parts : list of str
        Parts that cannot be read, whose rows are therefore missing.
    start : str
        What the version was built from: ``previous`` version, ``copy`` of the present one, or
        ``landing`` (from nothing).
    seconds : float
        Time it took (s).
    """

    version: int = 0
    published: bool = False
    rows: dict[str, int] = field(default_factory=dict)
    damaged_parts: list[str] = field(default_factory=list)
    start: str = ""
    seconds: float = 0.0


class Publisher:
    """Publishes a landing as a DuckDB database.

    Parameters
    ----------
    landing : Landing
        Where the rows are.
    warehouse_path : Path
        The database file, see `DatabaseFile`.
    feature_sets : iterable of FeatureSet
        The feature sets of this program.
    state_store : StateStore, optional
        Where breakers, retry parameters and quarantine are; without it their tables stay as
        they are.
    """

    def __init__(
        self,
        landing: Landing,
        warehouse_path: Path,
        feature_sets: Iterable[FeatureSet],
        state_store: StateStore | None = None,
    ) -> None:
        feature_sets = tuple(feature_sets)
        self._landing = landing
        self._database = DatabaseFile(warehouse_path)
        self._definition = Definition(feature_sets)
        # Attempts are listed before the cells, so that the row of each computed cell is among
        # those listed after it.
        self._tables = (FILES, RUNS, ATTEMPTS, *map(feature_table, feature_sets), *STATE_TABLES)
        self._state_store = state_store

    def publish(self, *, rebuild: bool = False) -> PublishResult:
        """Bring the database up to date with the landing; wait while another process does.

        Parameters
        ----------
        rebuild : bool, default False
            Make it anew from the landing, as is always done if it cannot be opened, somebody has
            written to it, or its storage is of another version of DuckDB.

        Raises
        ------
        OSError, duckdb.Error
            If the next version cannot be built; the present one stays.
        """
        started = time.monotonic()
        with self._database.lock():
            result = self._publish(rebuild)
        result.seconds = time.monotonic() - started
        return result

    def _publish(self, rebuild: bool) -> PublishResult:
        if not rebuild and not self._database.is_as_published():
            rebuild = True
            if self._database.path.exists():
                logger.warning(
                    "%s is damaged, was written to since it was published, or is of an earlier "
                    "release: it is made anew from the landing",
                    self._database.path,
                )
        version = None if rebuild else self._version_if_up_to_date()
        if version is not None:
            return PublishResult(version=version)
        for start in self._database.starts(rebuild=rebuild):
            try:
                result, mergeable = self._build(start)
                break
            except (duckdb.Error, LedgerError) as error:
                if start == "landing":
                    raise
                logger.warning("cannot build on %s (%s): %s", self._database.path, start, error)
        self._database.swap_in(keep_present=start != "landing")
        self._compact(mergeable)
        return result

    def _version_if_up_to_date(self) -> int | None:
        """Return the present version, or None if a new one would differ from it."""
        try:
            with reading(self._database.path) as connection:
                version, definition = connection.execute(
                    "SELECT version, definition FROM publishing.version"
                ).fetchall()[0]
                snapshot = read_state(self._state_store)
                if definition != self._definition.digest or (
                    snapshot and not snapshot.is_published(connection)
                ):
                    return None
                check_ledger(connection, digests=False)
                for table in self._tables:
                    parts = set(self._landing.parts(table.landing_name))
                    if parts - recorded_parts(connection, table).keys():
                        return None
        except (duckdb.Error, IndexError, LedgerError):
            return None
        return int(version)

    def _build(self, start: str) -> tuple[PublishResult, dict[str, Collection[str]]]:
        """Complete the next version; return the result and the parts that may be merged."""
        result = PublishResult(published=True, start=start)
        with self._database.building() as connection:
            connection.execute("SET TimeZone = 'UTC'")
            if start != "landing":
                check_ledger(connection, digests=False)
            connection.execute("BEGIN")
            connection.execute(TABLES_SQL)
            # Parts that this start holds are in the present version too. When they are merged,
            # the next publication, whichever of the two it starts from, has all their rows.
            mergeable: dict[str, Collection[str]] = {
                table.landing_name: [
                    part
                    for part, damaged in recorded_parts(connection, table).items()
                    if not damaged
                ]
                for table in self._tables
            }
            known = connection.execute("SELECT definition FROM publishing.version").fetchall()
            if known != [(self._definition.digest,)]:
                self._definition.apply(connection)
            for table in self._tables:
                self._ingest(connection, table, result)
            connection.execute(
                "CREATE OR REPLACE TEMP TABLE touched AS "
                "SELECT DISTINCT run_id FROM touched WHERE run_id IS NOT NULL"
            )
            self._ingest_state(connection, result)
            compute_rollups(connection)
            result.version = self._advance_version(connection)
            connection.execute("COMMIT")
            connection.execute("CHECKPOINT")
        return result, mergeable

    def _ingest(self, connection: DuckDBPyConnection, table: Table, result: PublishResult) -> None:
        ingested = ingest(connection, self._landing, table)
        name = table.landing_name
        result.damaged_parts += [f"{name}/{part}" for part in ingested.damaged]
        if ingested.rows:
            result.rows[name] = result.rows.get(name, 0) + ingested.rows

    def _ingest_state(self, connection: DuckDBPyConnection, result: PublishResult) -> None:
        """Write the state store's present state to the landing, and ingest it."""
        snapshot = read_state(self._state_store)
        if snapshot is None:
            return
        for table, rows in snapshot.new_rows(connection).items():
            if rows:
                self._landing.append(table.landing_name, rows)
                self._ingest(connection, table, result)
        snapshot.replace_quarantine(connection)

    def _advance_version(self, connection: DuckDBPyConnection) -> int:
        """Give the version the number after the present one's."""
        version = 1
        with suppress(duckdb.Error), reading(self._database.path) as present:
            numbers = present.execute("SELECT version FROM publishing.version").fetchall()
            version += max((number for (number,) in numbers), default=0)
        connection.execute("DELETE FROM publishing.version")
        connection.execute(
            "INSERT INTO publishing.version VALUES (?, ?, ?)",
            [version, datetime.now(UTC), self._definition.digest],
        )
        return version

    def _compact(self, mergeable: Mapping[str, Collection[str]]) -> None:
        """Merge small parts; a failure does not undo the publication."""
        for table, parts in mergeable.items():
            try:
                self._landing.compact(table, only=parts)
            except (CorruptPartError, PartVanishedError, OSError):
                logger.exception("the parts of %s could not be merged", table)
