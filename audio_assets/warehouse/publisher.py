"""The publisher: makes the database's next version from what has landed, and swaps it in.

DuckDB lets one process write to a file and then nobody read it. So the file that readers open is
never written: the publisher builds the next version beside it, and one rename puts it in its
place. Whoever has the old version open keeps it for as long as they like.

The next version starts from the version before the present one, which is kept beside it, wherever
the kernel vouches that nobody has that file open any more; it then lacks only what the last two
publications added, and DuckDB writes only the blocks that change. Otherwise it starts from a copy.
Any version will do as a start, since each one records which parts it holds.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import sqlalchemy as sa
from duckdb import DuckDBPyConnection
from filelock import FileLock

from audio_assets.features.base import Column, FeatureSet
from audio_assets.warehouse import rollups, views
from audio_assets.warehouse.landing import (
    ROW_ID,
    CorruptPartError,
    Landing,
    PartVanishedError,
    fsync_folder,
)
from audio_assets.warehouse.schema import (
    ATTEMPTS,
    BREAKER_TRANSITIONS,
    CIRCUIT_BREAKERS,
    FILES,
    QUARANTINE,
    RETRY_PARAMETERS,
    RUNS,
    Table,
    feature_table,
    literal,
    quoted,
    warehouse_tables,
)
from robustness import state
from robustness.state import StateStore

logger = logging.getLogger(__name__)

_LEDGER = """
CREATE SCHEMA IF NOT EXISTS publishing;
CREATE TABLE IF NOT EXISTS publishing.parts
    (landing_table VARCHAR, part VARCHAR, damaged BOOLEAN);
CREATE TABLE IF NOT EXISTS publishing.version
    (version BIGINT, published_at TIMESTAMPTZ, definition VARCHAR)
"""

_STATE_TABLES = (CIRCUIT_BREAKERS, BREAKER_TRANSITIONS, RETRY_PARAMETERS)


@dataclass
class PublishResult:
    """What a publication did.

    Parameters
    ----------
    version : int
        Version that is in place now.
    published : bool
        Whether that is a new one; False if nothing new had landed.
    rows : dict of str to int
        Landed rows taken in, by table.
    damaged_parts : list of str
        Parts that cannot be read, whose rows are therefore not there.
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
        The database file. Its folder also holds the version before, the next one while it is
        made, and the lock that keeps publishers apart, all with names that begin with a dot.
    feature_sets : iterable of FeatureSet
        The feature sets there are now.
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
        self._landing = landing
        self._path = warehouse_path.absolute()
        self._feature_sets = tuple(feature_sets)
        self._tables = warehouse_tables(self._feature_sets)
        # What a run says of cells is listed before the cells: whatever is said to be done is
        # then among the rows listed after it.
        self._landed = (
            FILES,
            RUNS,
            ATTEMPTS,
            *map(feature_table, self._feature_sets),
            *_STATE_TABLES,
        )
        self._state_store = state_store
        self._next = self._hidden(".next")
        self._previous = self._hidden(".previous")

    def publish(self) -> PublishResult:
        """Bring the database up to date with the landing; wait if another process is at it.

        Returns
        -------
        PublishResult
            What was done.

        Raises
        ------
        OSError, duckdb.Error
            If the next version cannot be made; the present one stays.
        """
        started = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._hidden(".lock")):
            result = self._publish()
        result.seconds = time.monotonic() - started
        return result

    def _publish(self) -> PublishResult:
        version = self._version_if_up_to_date()
        if version is not None:
            return PublishResult(version=version)
        for start in self._starts():
            try:
                result, mergeable = self._build(start)
                break
            except duckdb.Error:
                if start == "landing":
                    raise
                logger.exception("%s (%s) cannot be continued", self._path, start)
        self._swap_in(keep_present=start != "landing")
        self._compact(mergeable)
        return result

    def _hidden(self, suffix: str) -> Path:
        return self._path.with_name(f".{self._path.name}{suffix}")

    # Is there anything to do?

    def _version_if_up_to_date(self) -> int | None:
        """Return the present version if it has all that a new one would have."""
        try:
            with reading(self._path) as connection:
                version, definition = connection.execute(
                    "SELECT version, definition FROM publishing.version"
                ).fetchall()[0]
                if definition != self._definition() or not self._has_state(connection):
                    return None
                for table in self._landed:
                    parts = set(self._landing.parts(table.landing_name))
                    if parts - _ledger(connection, table).keys():
                        return None
        except (duckdb.Error, IndexError):
            return None
        return int(version)

    def _has_state(self, connection: DuckDBPyConnection) -> bool:
        """Tell whether the tables read from the state store say what it says."""
        quarantine, transitions = self._quarantine(), self._rows_of(state.breaker_transitions)
        if quarantine is None or transitions is None:
            return True
        columns = ", ".join(quoted(column.name) for column in QUARANTINE.computed)
        known = connection.execute(f"SELECT {columns} FROM {QUARANTINE.sql_name}").fetchall()
        return sorted(known) == sorted(
            tuple(row.values()) for row in quarantine
        ) and not self._new_transitions(connection, transitions)

    # The file

    def _starts(self) -> Iterator[str]:
        """Put a file to start from in the next version's place; go on if one turns out damaged.

        Yields
        ------
        str
            What it is, see `PublishResult`.
        """
        self._discard(self._next)
        if self._path.exists():
            if _is_unused(self._previous) and not self._previous.samefile(self._path):
                self._previous.rename(self._next)
                yield "previous"
                self._discard(self._next)
            self._discard(self._previous)
            _copy(self._path, self._next)
            yield "copy"
        self._discard(self._previous)
        self._discard(self._next)
        yield "landing"

    def _swap_in(self, *, keep_present: bool) -> None:
        """Make the next version the present one, and the present one, unless lost, the previous."""
        _fsync(self._next)
        # A log that someone left by writing to the present version is not the next one's.
        self._path.with_name(f"{self._path.name}.wal").unlink(missing_ok=True)
        if keep_present:
            with suppress(OSError):  # without hard links, the next version starts from a copy
                self._previous.hardlink_to(self._path)
        self._next.replace(self._path)
        fsync_folder(self._path.parent)

    def _discard(self, path: Path) -> None:
        for name in (path.name, f"{path.name}.wal"):
            path.with_name(name).unlink(missing_ok=True)
        shutil.rmtree(path.with_name(f"{path.name}.tmp"), ignore_errors=True)

    # The contents

    def _build(self, start: str) -> tuple[PublishResult, dict[str, Collection[str]]]:
        """Complete the next version; return what was done and the parts that may be merged."""
        result = PublishResult(published=True, start=start)
        with duckdb.connect(self._next) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("BEGIN")
            connection.execute(_LEDGER)
            # Parts that this start holds are held by the present version too: when merged, the
            # next publication, whichever of the two it starts from, knows all that is in them.
            mergeable: dict[str, Collection[str]] = {
                table.landing_name: [
                    part for part, damaged in _ledger(connection, table).items() if not damaged
                ]
                for table in self._landed
            }
            connection.execute("CREATE TEMP TABLE touched (run_id VARCHAR)")
            self._define(connection)
            for table in self._landed:
                self._take_in(connection, table, result)
            self._take_in_state(connection, result)
            connection.execute(
                "CREATE OR REPLACE TEMP TABLE touched AS "
                "SELECT DISTINCT run_id FROM touched WHERE run_id IS NOT NULL"
            )
            rollups.compute_rollups(connection)
            result.version = self._advance_version(connection)
            connection.execute("COMMIT")
            connection.execute("CHECKPOINT")
        return result, mergeable

    def _compact(self, mergeable: Mapping[str, Collection[str]]) -> None:
        """Merge small parts; what keeps it from doing so does not undo the publication."""
        for table, parts in mergeable.items():
            try:
                self._landing.compact(table, only=parts)
            except (CorruptPartError, PartVanishedError, OSError):
                logger.exception("the parts of %s could not be merged", table)

    def _advance_version(self, connection: DuckDBPyConnection) -> int:
        """Give the version its number: one more than that of the present one."""
        version = 1
        with suppress(duckdb.Error), reading(self._path) as present:
            numbers = present.execute("SELECT version FROM publishing.version").fetchall()
            version += max((number for (number,) in numbers), default=0)
        connection.execute("DELETE FROM publishing.version")
        connection.execute(
            "INSERT INTO publishing.version VALUES (?, ?, ?)",
            [version, datetime.now(UTC), self._definition()],
        )
        return version

    def _definition(self) -> str:
        """Return a digest of all that the tables and views are made by."""
        made_by = repr((self._tables, rollups.ROLLUP_SQL, self._views()))
        return hashlib.sha256(made_by.encode()).hexdigest()

    def _views(self) -> tuple[str, str]:
        return views.tracks_view(self._feature_sets), views.missing_view(self._feature_sets)

    def _define(self, connection: DuckDBPyConnection) -> None:
        """Create the tables and views, or migrate those of another definition in place."""
        known = connection.execute("SELECT definition FROM publishing.version").fetchall()
        if known == [(self._definition(),)]:
            return
        for table in self._tables:
            connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(table.schema)}")
            if _migrate(connection, table):
                # Parts may hold what the table had no column for.
                connection.execute(
                    "DELETE FROM publishing.parts WHERE landing_table = ?", [table.landing_name]
                )
            _comment(
                connection,
                "TABLE",
                table.sql_name,
                table.description,
                {c.name: c for c in table.all_columns},
            )
        for view in self._views():
            connection.execute(view)
        _comment(
            connection,
            "VIEW",
            "features.tracks",
            views.TRACKS_COMMENT,
            views.headline_columns(self._feature_sets),
        )
        _comment(connection, "VIEW", "features.missing", views.MISSING_COMMENT, {})
        connection.execute(
            f"INSERT INTO touched SELECT run_id FROM {RUNS.sql_name} "
            f"UNION SELECT run_id FROM {ATTEMPTS.sql_name}"
        )

    def _take_in(self, connection: DuckDBPyConnection, table: Table, result: PublishResult) -> None:
        """Take in the parts of a table that the version does not hold yet."""
        while True:
            try:
                staged = self._stage(connection, table)
                break
            except PartVanishedError:
                logger.info("%s was compacted meanwhile; reading it again", table.landing_name)
        result.damaged_parts += [f"{table.landing_name}/{part}" for part in staged.damaged]
        rows = _merge_staged(connection, table)
        if rows:
            result.rows[table.landing_name] = result.rows.get(table.landing_name, 0) + rows
        _record(connection, table, staged)

    def _stage(self, connection: DuckDBPyConnection, table: Table) -> "_Staged":
        """Gather the new parts' rows in the temporary table ``staged``."""
        columns = ", ".join(f"{quoted(c.name)} {c.type}" for c in table.columns)
        connection.execute(f"CREATE OR REPLACE TEMP TABLE staged ({columns}, {ROW_ID} UUID)")
        ledger = _ledger(connection, table)
        staged = _Staged(live=self._landing.parts(table.landing_name))
        for part in staged.live:
            if ledger.get(part) is False:
                continue
            try:
                sources = self._landing.supersedes(table.landing_name, part)
                if not sources or any(ledger.get(source) is not False for source in sources):
                    _insert(connection, table, self._landing.read_part(table.landing_name, part))
                staged.taken.append(part)
            except CorruptPartError:
                logger.exception("rows are missing from %s", table.sql_name)
                staged.damaged.append(part)
        return staged

    # The state store

    def _take_in_state(self, connection: DuckDBPyConnection, result: PublishResult) -> None:
        """Land what the state store says of the runs touched, and take that in."""
        quarantine = self._quarantine()
        breakers = self._rows_of(state.circuit_breakers)
        transitions = self._rows_of(state.breaker_transitions)
        parameters = self._rows_of(state.retry_parameters)
        if quarantine is None or breakers is None or transitions is None or parameters is None:
            return
        now = datetime.now(UTC)
        # What the state store says now is not what it said at the end of a run long over.
        touched = connection.execute(
            f"""
            SELECT DISTINCT run_id FROM touched
            WHERE run_id IS NOT NULL AND NOT EXISTS (
                FROM {CIRCUIT_BREAKERS.sql_name} AS seen JOIN {RUNS.sql_name} USING (run_id)
                WHERE seen.run_id = touched.run_id AND seen.seen_at >= runs.recorded_at
            )
            """
        ).fetchall()
        snapshots = {
            CIRCUIT_BREAKERS: [
                {**row, "run_id": run_id} for (run_id,) in touched for row in breakers
            ],
            BREAKER_TRANSITIONS: self._new_transitions(connection, transitions),
            RETRY_PARAMETERS: [
                {**row, "run_id": run_id} for (run_id,) in touched for row in parameters
            ],
        }
        for table, rows in snapshots.items():
            if rows:
                names = [column.name for column in table.columns]
                self._landing.append(
                    table.landing_name,
                    [
                        {name: row[name] for name in names if name in row} | {"seen_at": now}
                        for row in rows
                    ],
                )
                self._take_in(connection, table, result)
        connection.execute(f"DELETE FROM {QUARANTINE.sql_name}")
        if quarantine:
            marks = ", ".join("?" for _ in QUARANTINE.computed)
            connection.executemany(
                f"INSERT INTO {QUARANTINE.sql_name} VALUES ({marks})",
                [list(row.values()) for row in quarantine],
            )

    def _quarantine(self) -> list[dict[str, Any]] | None:
        rows = self._rows_of(state.quarantine)
        if rows is None:
            return None
        return [{column.name: row[column.name] for column in QUARANTINE.computed} for row in rows]

    def _new_transitions(
        self, connection: DuckDBPyConnection, transitions: Iterable[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        key = ", ".join(map(quoted, BREAKER_TRANSITIONS.key))
        known = set(
            connection.execute(f"SELECT {key} FROM {BREAKER_TRANSITIONS.sql_name}").fetchall()
        )
        return [
            row
            for row in transitions
            if tuple(row[name] for name in BREAKER_TRANSITIONS.key) not in known
        ]

    def _rows_of(self, table: sa.Table) -> list[dict[str, Any]] | None:
        """Return a table of the state store, its times as such; None if it cannot be had."""
        if self._state_store is None:
            return None
        rows = self._state_store.query(
            lambda connection: [dict(r) for r in connection.execute(sa.select(table)).mappings()]
        )
        # A store that stands in for the real one for a while knows nothing of what went before.
        if self._state_store.degraded:
            return None
        return [
            {name: _as_time(value) if _is_time(name) else value for name, value in row.items()}
            for row in rows
        ]


@dataclass
class _Staged:
    """Parts of a table: all that hold its rows, those just read, those that cannot be."""

    live: Sequence[str]
    taken: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


@contextmanager
def reading(path: Path) -> Iterator[DuckDBPyConnection]:
    """Open the present version of a database for reading.

    It is attached to a connection of its own: connecting to the path would give back the version
    that this process opened first, for as long as it has it open anywhere.

    Raises
    ------
    duckdb.IOException
        If there is no database, or it cannot be read.
    """
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"ATTACH {literal(str(path))} AS warehouse (READ_ONLY)")
        connection.execute("USE warehouse")
        yield connection


def _ledger(connection: DuckDBPyConnection, table: Table) -> dict[str, bool]:
    """Return the parts of a table that a version knows, and whether each was damaged."""
    rows = connection.execute(
        "SELECT part, damaged FROM publishing.parts WHERE landing_table = ?", [table.landing_name]
    ).fetchall()
    return dict(rows)


def _record(connection: DuckDBPyConnection, table: Table, staged: _Staged) -> None:
    """Write down which parts a version holds, and forget those that are no more."""
    parts = [*staged.taken, *staged.damaged]
    connection.execute(
        "DELETE FROM publishing.parts WHERE landing_table = ? "
        "AND (list_contains(?, part) OR NOT list_contains(?, part))",
        [table.landing_name, parts, list(staged.live)],
    )
    for damaged, names in ((False, staged.taken), (True, staged.damaged)):
        connection.execute(
            "INSERT INTO publishing.parts SELECT ?, unnest(?::VARCHAR[]), ?",
            [table.landing_name, names, damaged],
        )


def _insert(connection: DuckDBPyConnection, table: Table, rows: pa.Table) -> None:
    """Add a part's rows to ``staged``; what it has no column for, or no longer fits, is NULL."""
    connection.register("part_rows", rows)
    names = [column for column in table.columns if column.name in rows.schema.names]
    selected = ", ".join(
        f"TRY_CAST({quoted(c.name)} AS {c.type}) AS {quoted(c.name)}" for c in names
    )
    connection.execute(f"INSERT INTO staged BY NAME SELECT {selected}, {ROW_ID} FROM part_rows")
    connection.unregister("part_rows")


def _merge_staged(connection: DuckDBPyConnection, table: Table) -> int:
    """Move the rows in force from ``staged`` to their table; return how many were staged."""
    count: int = connection.execute("SELECT count(*) FROM staged").fetchall()[0][0]
    if not count:
        return 0
    key = ", ".join(map(quoted, table.key))
    same = " AND ".join(f"present.{quoted(k)} = staged.{quoted(k)}" for k in table.key)
    order = f"{quoted(table.version)} DESC NULLS LAST, " if table.version else ""
    connection.execute(f"""
        CREATE OR REPLACE TEMP TABLE staged AS FROM staged
        QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY {order}{ROW_ID} DESC) = 1
    """)
    if table.version:
        version = quoted(table.version)
        connection.execute(
            f"DELETE FROM staged USING {table.sql_name} AS present "
            f"WHERE {same} AND present.{version} > staged.{version}"
        )
    connection.execute(f"DELETE FROM {table.sql_name} AS present USING staged WHERE {same}")
    own = ", ".join(
        quoted(c.name) for c in table.all_columns if c in table.columns or c.name == ROW_ID
    )
    connection.execute(f"INSERT INTO {table.sql_name} BY NAME SELECT {own} FROM staged")
    if table in (ATTEMPTS, RUNS):
        connection.execute("INSERT INTO touched SELECT DISTINCT run_id FROM staged")
    return count


def _migrate(connection: DuckDBPyConnection, table: Table) -> bool:
    """Create a table, or give it the columns it should have; tell whether it had others."""
    wanted = {column.name: column.type for column in table.all_columns}
    columns = ", ".join(f"{quoted(name)} {kind}" for name, kind in wanted.items())
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table.sql_name} ({columns})")
    connection.execute(f"CREATE OR REPLACE TEMP TABLE template ({columns})")
    present, right = (
        _column_types(connection, table.sql_name),
        _column_types(connection, "template"),
    )
    if present == right:
        return False
    # A view keeps a column from being altered; the views are made again afterwards.
    connection.execute("DROP VIEW IF EXISTS features.tracks; DROP VIEW IF EXISTS features.missing")
    alter = f"ALTER TABLE {table.sql_name}"
    for name in right.keys() - present.keys():
        connection.execute(f"{alter} ADD COLUMN {quoted(name)} {wanted[name]}")
    for name in present.keys() - right.keys():
        connection.execute(f"{alter} DROP COLUMN {quoted(name)}")
    for name in right.keys() & present.keys():
        if right[name] != present[name]:
            column, kind = quoted(name), wanted[name]
            connection.execute(
                f"{alter} ALTER COLUMN {column} TYPE {kind} USING TRY_CAST({column} AS {kind})"
            )
    return True


def _column_types(connection: DuckDBPyConnection, table: str) -> dict[str, str]:
    return {row[0]: row[1] for row in connection.execute(f"DESCRIBE {table}").fetchall()}


def _comment(
    connection: DuckDBPyConnection,
    kind: str,
    name: str,
    description: str,
    columns: Mapping[str, Column],
) -> None:
    """Put the description on a table or view, and description and unit on its columns."""
    connection.execute(f"COMMENT ON {kind} {name} IS {literal(description)}")
    for column_name, column in columns.items():
        text = f"{column.description} ({column.unit})" if column.unit else column.description
        connection.execute(f"COMMENT ON COLUMN {name}.{quoted(column_name)} IS {literal(text)}")


def _is_time(name: str) -> bool:
    return name == "at" or name.endswith("_at")


def _as_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _is_unused(path: Path) -> bool:
    """Tell whether a file is there and nobody, this process included, has it open.

    The kernel grants a write lease on such a file alone (Linux, local file systems). Where it
    cannot say, the file counts as used.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Whoever opens it in this instant causes a signal, by default a deadly one.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks where the file system can (XFS, Btrfs)."""
    with source.open("rb") as reader, target.open("xb") as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left > 0:
                copied = os.copy_file_range(reader.fileno(), writer.fileno(), left)
                if not copied:
                    break
                left -= copied
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            reader.seek(0)
            writer.seek(0)
            writer.truncate()
            shutil.copyfileobj(reader, writer, 2**20)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
