"""A database of the state store: SQLite in WAL mode or PostgreSQL, its schema kept up to date."""

import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from robustness.log_context import get_logger
from robustness.state_schema import SCHEMA_REVISION, VERSION_TABLE, metadata

logger = get_logger("state")

_inherited: list[Engine] = []


class UnavailableError(Exception):
    """The database cannot be used now."""


def is_unavailability(error: Exception) -> bool:
    """Return whether the database failed, not the code.

    A statement that is simply wrong also fails on the fallback, and is raised from there.
    """
    if isinstance(error, DBAPIError):
        return not isinstance(error, IntegrityError | DataError)
    return isinstance(error, sa.exc.TimeoutError | UnavailableError)


def is_corruption(error: BaseException) -> bool:
    """Return whether SQLite says that the file is malformed or no database at all."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Database:
    """A database at a URL, its schema brought up to date when it is first used.

    Parameters
    ----------
    url : str
        SQLAlchemy URL; `sqlite://` is a database in the memory of this process.
    lock_timeout : float
        Seconds to wait for a connection or a lock.
    """

    def __init__(self, url: str, lock_timeout: float) -> None:
        self.url = sa.make_url(url)
        self.lock_timeout = lock_timeout
        self._engine: Engine | None = None
        self._file_id: tuple[int, int] | None = None
        self._preparing = threading.Lock()
        # One connection holds a database in memory: it serves one thread at a time.
        self._turn = threading.RLock() if self.in_memory else None

    @property
    def in_memory(self) -> bool:
        """Whether the database is in the memory of this process."""
        return self._sqlite and self.url.database in (None, "", ":memory:")

    @property
    def _sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def _path(self) -> Path | None:
        """The SQLite file, None for other databases."""
        if self.in_memory or not self._sqlite or self.url.database is None:
            return None
        return Path(self.url.database)

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Connection]:
        """Open a transaction; a writing one holds SQLite's write lock from its start."""
        with self._turn or nullcontext(), self._ready_engine().connect() as connection:
            connection.execution_options(robustness_write=write)
            with connection.begin():
                yield connection

    def _ready_engine(self) -> Engine:
        """Return an engine whose database exists, is sound and has the current schema."""
        engine = self._engine
        if engine is not None and self._file_id == self._current_file_id():
            return engine
        with self._preparing:
            if self._engine is None or self._file_id != self._current_file_id():
                # A file that was replaced or removed: open connections still hold the old one.
                self.close()
                self._engine = self._prepared_engine()
            return self._engine

    def _current_file_id(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnavailableError(str(error)) from error
        return status.st_dev, status.st_ino

    def _prepared_engine(self) -> Engine:
        try:
            if self._path is None:
                return self._migrated_engine()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(self._path.with_name(self._path.name + ".lock"), self.lock_timeout):
                try:
                    engine = self._migrated_engine()
                except SQLAlchemyError as error:
                    if not is_corruption(error):
                        raise
                    _set_aside(self._path)
                    engine = self._migrated_engine()
                self._file_id = self._current_file_id()
            return engine
        except (SQLAlchemyError, ImportError, OSError) as error:
            raise UnavailableError(str(error)) from error

    def _migrated_engine(self) -> Engine:
        engine = self._new_engine()
        try:
            if self.in_memory:
                with engine.connect() as connection:
                    metadata.create_all(connection.execution_options(robustness_write=True))
                    connection.commit()
                return engine
            with engine.connect() as connection:
                connection = connection.execution_options(robustness_write=False)
                if self._path is not None:
                    _quick_check(connection)
                revision = revision_of(connection)
            if revision != SCHEMA_REVISION:
                with engine.connect() as connection:
                    connection = connection.execution_options(robustness_write=True)
                    with connection.begin():
                        _migrate(connection)
        except BaseException:
            engine.dispose()
            raise
        return engine

    def _new_engine(self) -> Engine:
        if self.in_memory:
            engine = sa.create_engine(
                "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
            )
        elif self._sqlite:
            engine = sa.create_engine(
                self.url,
                pool_size=2,
                max_overflow=-1,
                connect_args={"timeout": self.lock_timeout, "check_same_thread": False},
            )
        else:
            milliseconds = round(self.lock_timeout * 1000)
            engine = sa.create_engine(
                self.url,
                pool_size=2,
                max_overflow=-1,
                pool_pre_ping=True,
                connect_args={
                    "connect_timeout": max(2, round(self.lock_timeout)),
                    "tcp_user_timeout": milliseconds,
                    "options": f"-c lock_timeout={milliseconds} "
                    f"-c statement_timeout={milliseconds}",
                },
            )
        if self._sqlite:
            event.listen(engine, "connect", self._set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _set_up_sqlite(self, dbapi_connection: Any, _record: object) -> None:
        # The driver's own transactions begin late and without the write lock; ours begin in
        # `_begin_sqlite`.
        dbapi_connection.isolation_level = None
        if self.in_memory:
            return
        dbapi_connection.execute("PRAGMA journal_mode=WAL")
        # A commit survives the death of any process; the last ones may be lost with the power.
        dbapi_connection.execute("PRAGMA synchronous=NORMAL")

    def close(self) -> None:
        """Close all connections; the next use opens new ones."""
        with self._turn or nullcontext():
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None

    def release_idle(self) -> None:
        """Close idle connections before a fork.

        A forked process would inherit SQLite's belief that this one's locks are its own, and set
        none where it needs them.
        """
        engine = self._engine
        if engine is not None and not self.in_memory:
            engine.dispose()

    def abandon(self) -> None:
        """Forget connections that belong to the process this one was forked from."""
        if self._engine is not None:
            # Closing an inherited SQLite connection would undo the parent's locking.
            _inherited.append(self._engine)
        self._engine = None
        self._preparing = threading.Lock()
        self._turn = threading.RLock() if self.in_memory else None


@contextmanager
def _exclusive(path: Path, seconds: float) -> Iterator[None]:
    """Keep other processes out of the preparation of a database file.

    Raises
    ------
    TimeoutError
        If another process holds the lock for longer.
    """
    deadline = time.monotonic() + seconds
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {path}") from None
                time.sleep(0.01)
        try:
            yield
        finally:
            # Closing is not enough while a process forked since has the file open, too.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _set_aside(path: Path) -> None:
    """Rename a corrupt SQLite file, with its write-ahead log."""
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns() // 1_000_000}")
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    logger.error(
        "The robustness state in %s is corrupt. It is kept as %s and a new one is created: "
        "breakers, learned timeouts, retry history and quarantine start empty.",
        path,
        aside,
    )


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options()["robustness_write"]
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _quick_check(connection: Connection) -> None:
    """Raise SQLite's own error for a file that is damaged anywhere.

    Raises
    ------
    sqlalchemy.exc.DatabaseError
        With SQLite's code for a corrupt file.
    """
    verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    if verdict != "ok":
        problem = sqlite3.DatabaseError(verdict)
        problem.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise sa.exc.DatabaseError("PRAGMA quick_check", None, problem)


def revision_of(connection: Connection, version_table: str = VERSION_TABLE) -> str | None:
    """Return the newest migration applied to a store; None if it is new or not migrated yet."""
    if not sa.inspect(connection).has_table(version_table):
        return None
    return connection.scalar(
        sa.select(sa.column("version_num")).select_from(sa.table(version_table))
    )


def _migrate(connection: Connection) -> None:
    """Bring the schema up to date inside the caller's transaction.

    Processes that race do this one after the other; all but the first find nothing to do.
    Alembic's environment is not used: it is global to the process, and Dagster may be migrating
    a database of its own at the same time.
    """
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from alembic.script.revision import RevisionError

    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
        connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('robustness.state'))"))
    scripts = ScriptDirectory(str(Path(__file__).parent / "migrations"))
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    if context.get_current_revision() is None:
        # Where earlier releases kept it; the revisions of others have other names.
        earlier = revision_of(connection, "alembic_version")
        if earlier in {script.revision for script in scripts.walk_revisions()}:
            context.stamp(scripts, earlier)
            connection.execute(sa.text("DROP TABLE alembic_version"))
    try:
        current = context.get_current_revision() or "base"
        pending = list(scripts.iterate_revisions("head", current))
    except RevisionError as error:
        raise UnavailableError(
            f"its schema is unknown here ({error}); a newer version of this program wrote it"
        ) from error
    for revision in reversed(pending):
        revision.module.upgrade(Operations(context))
    context.stamp(scripts, "head")
