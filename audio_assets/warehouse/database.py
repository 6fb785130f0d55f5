"""The DuckDB file: read it, build its next version beside it, rename that into its place.

DuckDB lets one process write to a file, and then nobody else can read it. So the file that readers
open is never written to, and a reader keeps the version that it has opened.

The next version starts from the version before the present one, which is kept, if the kernel can
tell that nobody has that file open: DuckDB then writes only the blocks that change. Otherwise it
starts from a copy of the present version. Any version will do, as each records which parts of the
landing it holds. A file that was written to since it was published is not started from: its
modification time is not the one that publishing gave it.
"""

import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
from duckdb import DuckDBPyConnection

from audio_assets.library.files import fsync_folder
from audio_assets.warehouse.schema import Table, literal, quoted

if TYPE_CHECKING:
    from filelock import FileLock

STORAGE_VERSION = "v1.0.0"
"""Of the database: every DuckDB since then reads it, where the newest storage needs the newest."""


@contextmanager
def reading(path: Path) -> Iterator[DuckDBPyConnection]:
    """Open the present version of a database for reading.

    Raises
    ------
    duckdb.IOException
        If there is no database, or it cannot be read.
    """
    # Attached to a connection of its own: connecting to the path again would return the version
    # that this process already has open.
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"ATTACH {literal(str(path))} AS warehouse (READ_ONLY)")
        connection.execute("USE warehouse")
        yield connection


def recorded_parts(connection: DuckDBPyConnection, table: Table) -> dict[str, bool]:
    """Return the parts of a table that a version records, and whether each was damaged."""
    rows = connection.execute(
        "SELECT part, damaged FROM publishing.parts WHERE landing_table = ?", [table.landing_name]
    ).fetchall()
    return dict(rows)


def read_all(connection: DuckDBPyConnection, within_s: float) -> bool:
    """Read every value of a database; DuckDB compares each block with its checksum.

    Parameters
    ----------
    connection : DuckDBPyConnection
        The database, see `reading`.
    within_s : float
        Time after which to stop (s).

    Returns
    -------
    bool
        Whether the time was enough.

    Raises
    ------
    duckdb.Error
        If a block is damaged.
    """
    tables = connection.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'warehouse'"
    ).fetchall()
    ends = time.monotonic() + within_s
    timer = threading.Timer(within_s, connection.interrupt)
    timer.start()
    try:
        for names in tables:
            if time.monotonic() > ends:
                return False
            name = ".".join(map(quoted, names))
            connection.execute(f"SELECT bit_xor(hash(row)) FROM {name} AS row").fetchall()
    except duckdb.InterruptException:
        return False
    finally:
        timer.cancel()
    return True


class DatabaseFile:
    """A database file whose versions replace one another.

    Parameters
    ----------
    path : Path
        The file. Its directory also holds the previous version, the next one while it is built,
        and a lock, under names that begin with a dot.

    Attributes
    ----------
    path : Path
        The present version.
    next : Path
        The next version, while it is built.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.next = self._hidden(".next")
        self._previous = self._hidden(".previous")

    def lock(self) -> "FileLock":
        """Return the lock under which the next version is built; make its directory."""
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._hidden(".lock"))

    def is_as_published(self) -> bool:
        """Return whether the present version is in `STORAGE_VERSION` and nobody has changed it."""
        return _is_as_published(self.path)

    def building(self) -> DuckDBPyConnection:
        """Open the next version for writing."""
        return duckdb.connect(self.next, config={"storage_compatibility_version": STORAGE_VERSION})

    def starts(self, *, rebuild: bool) -> Iterator[str]:
        """Put a file to start from in the next version's place; continue if it is damaged.

        Parameters
        ----------
        rebuild : bool
            Start from no file; necessary if the present version is not as published.

        Yields
        ------
        str
            ``previous`` version, ``copy`` of the present one, or ``landing`` (no file).
        """
        _remove(self.next)
        if not rebuild:
            if (
                _is_as_published(self._previous)
                and _is_unused(self._previous)
                and not self._previous.samefile(self.path)
            ):
                self._previous.rename(self.next)
                yield "previous"
                _remove(self.next)
            _remove(self._previous)
            _copy(self.path, self.next)
            yield "copy"
        _remove(self._previous)
        _remove(self.next)
        yield "landing"

    def swap_in(self, *, keep_present: bool) -> None:
        """Make the next version the present one.

        Parameters
        ----------
        keep_present : bool
            Keep the present version as the previous one.
        """
        with reading(self.next) as connection:
            modified = _modified_s(connection)
        os.utime(self.next, (modified, modified))
        with self.next.open("rb") as file:
            os.fsync(file.fileno())
        # A log left by someone who wrote to the present version does not belong to the next.
        _log(self.path).unlink(missing_ok=True)
        if keep_present:
            with suppress(OSError):  # without hard links, the next version starts from a copy
                self._previous.hardlink_to(self.path)
        self.next.replace(self.path)
        fsync_folder(self.path.parent)

    def _hidden(self, suffix: str) -> Path:
        return self.path.with_name(f".{self.path.name}{suffix}")


def _remove(path: Path) -> None:
    """Remove a database with its log and its temporary files."""
    path.unlink(missing_ok=True)
    _log(path).unlink(missing_ok=True)
    shutil.rmtree(path.with_name(f"{path.name}.tmp"), ignore_errors=True)


def _is_as_published(path: Path) -> bool:
    try:
        modified = path.stat().st_mtime_ns
        with reading(path) as connection:
            published = modified == _modified_s(connection) * 10**9
            [(storage,)] = connection.execute(
                "SELECT tags['storage_version'] FROM duckdb_databases() "
                "WHERE database_name = 'warehouse'"
            ).fetchall()
        return published and storage == f"{STORAGE_VERSION}+" and not _log(path).exists()
    except (OSError, ValueError, duckdb.Error):
        return False


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}.wal")


def _modified_s(connection: DuckDBPyConnection) -> int:
    """Return the modification time that publishing gives a version: when it was published.

    It is an even second, which every file system can store, and a later write does not leave.
    """
    [(published_at,)] = connection.execute("SELECT published_at FROM publishing.version").fetchall()
    return int(published_at.timestamp()) // 2 * 2


def _is_unused(path: Path) -> bool:
    """Return whether a file exists and no process, this one included, has it open.

    The kernel grants a write lease only on such a file (Linux, local file systems). Where there
    are no leases, the file counts as used.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Whoever opens the file now causes a signal, which by default ends the process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (AttributeError, OSError):
        return False
    finally:
        os.close(descriptor)
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks where the file system can (XFS, Btrfs)."""
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), 2**30):
                pass
        except (AttributeError, OSError):
            reader.seek(0)
            writer.seek(0)
            writer.truncate()
            shutil.copyfileobj(reader, writer, 2**20)
