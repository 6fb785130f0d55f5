"""State shared by every process of a deployment, in one SQL database.

SQLite in WAL mode by default, PostgreSQL by URL. A store that is corrupt, locked for too long or
out of reach never stops the work: `StateStore` goes on with state of its own process, says so,
and returns to the shared state, with what was recorded meanwhile, as soon as that works again.

All times are seconds since the epoch (UTC). Hosts that share a store are expected to keep their
clocks within a second or so of each other (NTP).
"""

import atexit
import fcntl
import logging
import math
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Dialect,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    SQLAlchemyError,
)
from sqlalchemy.pool import StaticPool

from robustness.settings import get_settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA_REVISION = "0002"
"""The newest migration; a store at this revision is used without loading alembic."""

TEXT_LIMIT = 4000
"""Characters kept of a text; error messages can hold whole tracebacks."""


class StateUnavailableError(RuntimeError):
    """The shared store failed in the middle of a transaction that could not be repeated."""


class CleanText(TypeDecorator[str]):
    """Text that every backend stores: no NUL, no lone surrogates, at most `TEXT_LIMIT` long."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Replace what UTF-8 and PostgreSQL cannot hold by its backslash escape."""
        if value is None:
            return None
        value = value[:TEXT_LIMIT].replace("\0", "\\x00")
        return value.encode("utf-8", "backslashreplace").decode("utf-8")


metadata = MetaData()

circuit_breakers = Table(
    "circuit_breakers",
    metadata,
    Column("name", CleanText, primary_key=True),
    Column("state", CleanText, nullable=False),
    Column("forced", CleanText),
    # Grows by one with every transition: an outcome of a call that began before the last
    # transition says nothing about the present state.
    Column("generation", Integer, nullable=False),
    Column("failure_count", Integer, nullable=False),
    Column("success_count", Integer, nullable=False),
    Column("ignored_count", Integer, nullable=False),
    Column("rejected_count", Integer, nullable=False),
    Column("consecutive_failures", Integer, nullable=False),
    Column("probe_successes", Integer, nullable=False),
    Column("opened_at", Float),
    Column("last_failure_at", Float),
    Column("last_error", CleanText),
    Column("recovery_timeout", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

breaker_outcomes = Table(
    "breaker_outcomes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", CleanText, nullable=False),
    Column("at", Float, nullable=False),
    Column("failed", Boolean, nullable=False),
    Column("slow", Boolean, nullable=False),
    Index("ix_breaker_outcomes_name_id", "name", "id"),
)

breaker_probes = Table(
    "breaker_probes",
    metadata,
    Column("token", CleanText, primary_key=True),
    Column("name", CleanText, nullable=False, index=True),
    Column("started_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)

breaker_transitions = Table(
    "breaker_transitions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", CleanText, nullable=False),
    Column("from_state", CleanText, nullable=False),
    Column("to_state", CleanText, nullable=False),
    Column("at", Float, nullable=False),
    Column("reason", CleanText, nullable=False),
    Column("run_id", CleanText),
    Index("ix_breaker_transitions_name_id", "name", "id"),
)

timings = Table(
    "timings",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("feature_type", CleanText, nullable=False),
    Column("at", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("audio_seconds", Float),
    Column("file_size_mb", Float),
    Column("success", Boolean, nullable=False),
    # Stopped at its timeout: the true time is longer than `seconds`.
    Column("censored", Boolean, nullable=False),
    Column("timeout_given", Float),
    Index("ix_timings_feature_type_id", "feature_type", "id"),
)

retry_outcomes = Table(
    "retry_outcomes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("strategy", CleanText, nullable=False),
    Column("operation", CleanText),
    Column("at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("success", Boolean, nullable=False),
    Column("total_seconds", Float, nullable=False),
    Index("ix_retry_outcomes_strategy_id", "strategy", "id"),
)

retry_parameters = Table(
    "retry_parameters",
    metadata,
    Column("strategy", CleanText, primary_key=True),
    Column("base_delay", Float, nullable=False),
    Column("multiplier", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

retry_budget = Table(
    "retry_budget",
    metadata,
    Column("scope", CleanText, primary_key=True),
    Column("tokens", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

errors = Table(
    "errors",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("error_type", CleanText, nullable=False),
    Column("severity", CleanText, nullable=False),
    Column("recovery_strategy", CleanText, nullable=False),
    Column("retryable", Boolean, nullable=False),
    Column("recovered", Boolean),
    Column("operation", CleanText),
    Column("file", CleanText),
    Column("message", CleanText, nullable=False),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("content_hash", CleanText, primary_key=True),
    Column("feature_set", CleanText, primary_key=True),
    Column("file_key", CleanText, nullable=False),
    Column("error_type", CleanText, nullable=False),
    Column("reason", CleanText, nullable=False),
    Column("first_failed_at", Float, nullable=False),
    Column("last_failed_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("code_version", CleanText),
)


def insert_into(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT that knows `on_conflict_do_update` and `on_conflict_do_nothing`."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def prune(connection: Connection, table: Table, keep: int, **group: str) -> None:
    """Delete all rows of a group but the newest.

    Parameters
    ----------
    connection : Connection
        A connection in a write transaction.
    table : Table
        A table with an ascending integer column `id`.
    keep : int
        Rows to keep.
    **group : str
        Columns and the values that make up the group, for instance `feature_type="key"`.
    """
    members = [table.c[column] == value for column, value in group.items()]
    newest_surplus = (
        sa.select(table.c.id).where(*members).order_by(table.c.id.desc()).limit(1).offset(keep)
    )
    connection.execute(
        sa.delete(table).where(*members, table.c.id <= newest_surplus.scalar_subquery())
    )


class _UnavailableError(Exception):
    """The database cannot be used now."""


def _is_unavailability(error: Exception) -> bool:
    """Tell a failing database from failing code.

    A statement that is simply wrong also fails on the fallback, and is raised from there.
    """
    if isinstance(error, DBAPIError):
        return not isinstance(error, IntegrityError | DataError)
    return isinstance(error, sa.exc.TimeoutError | _UnavailableError)


def _is_corruption(error: BaseException) -> bool:
    """Tell whether SQLite says that the file is malformed or no database at all."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class _Database:
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
            raise _UnavailableError(str(error)) from error
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
                    if not _is_corruption(error):
                        raise
                    _set_aside(self._path)
                    engine = self._migrated_engine()
                self._file_id = self._current_file_id()
            return engine
        except (SQLAlchemyError, ImportError, OSError) as error:
            raise _UnavailableError(str(error)) from error

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
                revision = _revision(connection)
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
        If another process has been at it for longer than it should take.
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
            # Closing would not do it while a process forked meanwhile has the file open, too.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _set_aside(path: Path) -> None:
    """Rename a corrupt SQLite file, with its write-ahead log."""
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns() // 1_000_000}")
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    logger.error(
        "The robustness state in %s is corrupt. It is kept as %s and a new one is begun: "
        "breakers, learned timeouts, retry history and quarantine start afresh.",
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


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _migrate(connection: Connection) -> None:
    """Bring the schema up to date inside the caller's transaction.

    Processes that race do this one after the other; all but the first find nothing to do.
    Alembic's environment is not used: it is global to the process, and whoever else migrates a
    database of theirs meanwhile, as Dagster does, would get into its way.
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
    context = MigrationContext.configure(connection)
    try:
        current = context.get_current_revision() or "base"
        pending = list(scripts.iterate_revisions("head", current))
    except RevisionError as error:
        raise _UnavailableError(
            f"its schema is unknown here ({error}); a newer version of this program wrote it"
        ) from error
    for revision in reversed(pending):
        revision.module.upgrade(Operations(context))
    context.stamp(scripts, "head")


class StateStore:
    """The state that all processes of a deployment share.

    Parameters
    ----------
    url : str, optional
        SQLAlchemy URL of an SQLite or PostgreSQL database. None keeps the state in the memory of
        this process.
    lock_timeout : float, optional
        Seconds to wait for a lock or an answer before going on without the database; the
        setting ROBUSTNESS_STATE_LOCK_TIMEOUT by default.
    retry_interval : float, optional
        Seconds between tries to return to it; ROBUSTNESS_STATE_RETRY_INTERVAL by default.

    Notes
    -----
    Use `transact` and `query`, which repeat their function on the fallback when the database
    fails half-way, so that they always return. `begin` and `read` are for statements that belong
    in a `with` block; they never fail to open, but a database that dies between opening and
    commit raises `StateUnavailableError` from the block.

    Objects may be used from many threads, and in processes forked from this one.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        lock_timeout: float | None = None,
        retry_interval: float | None = None,
    ) -> None:
        settings = get_settings()
        self._retry_interval = retry_interval or settings.state_retry_interval
        self._database = _Database(url or "sqlite://", lock_timeout or settings.state_lock_timeout)
        self._fallback: _Database | None = None
        self._next_try = 0.0
        self._switching = threading.Lock()
        self._local = threading.local()
        _stores.add(self)

    @property
    def url(self) -> str:
        """The database's URL, its password hidden."""
        return self._database.url.render_as_string(hide_password=True)

    @property
    def degraded(self) -> bool:
        """Whether the database is out of use and state is kept in this process alone."""
        return self._fallback is not None

    def transact(self, function: Callable[[Connection], T]) -> T:
        """Run a function in a write transaction and return its result.

        Parameters
        ----------
        function : callable
            Called with a connection, and called again with another one if the database fails, so
            it must have no other effects.
        """
        return self._run(function, write=True)

    def query(self, function: Callable[[Connection], T]) -> T:
        """Run a function that only reads, on one consistent view, and return its result."""
        return self._run(function, write=False)

    def begin(self) -> AbstractContextManager[Connection]:
        """Open a write transaction; keep it short.

        A block inside another one of the same thread joins its transaction.

        Raises
        ------
        StateUnavailableError
            From the end of the block, if the database died while it was open. The store is then
            on its fallback: the block can be run again.
        """
        return self._opened(write=True)

    def read(self) -> AbstractContextManager[Connection]:
        """Open one consistent view for reading; raises as `begin` does."""
        return self._opened(write=False)

    def close(self) -> None:
        """Close the connections of this process; the next use opens new ones."""
        self._database.close()

    def _run(self, function: Callable[[Connection], T], *, write: bool) -> T:
        while True:
            try:
                with self._opened(write=write) as connection:
                    return function(connection)
            except StateUnavailableError:
                continue  # the fallback, which cannot be unavailable, is in use now

    @contextmanager
    def _opened(self, *, write: bool) -> Iterator[Connection]:
        outer: tuple[Connection, bool] | None = getattr(self._local, "outer", None)
        if outer is not None and (outer[1] or not write):
            yield outer[0]
            return
        database = self._database
        try:
            with ExitStack() as stack:
                database, connection = self._enter(stack, write=write)
                self._local.outer = (connection, write or database.in_memory)
                try:
                    yield connection
                finally:
                    self._local.outer = outer
        except Exception as error:
            if database is not self._database or not _is_unavailability(error):
                raise
            self._give_up(error)
            raise StateUnavailableError(f"{self.url} failed: {error}") from error

    def _enter(self, stack: ExitStack, *, write: bool) -> tuple["_Database", Connection]:
        """Open a transaction on the database, or on the fallback if it cannot be opened."""
        self._consider_return()
        while True:
            database = self._fallback or self._database
            try:
                connection = stack.enter_context(database.transaction(write=write))
            except Exception as error:
                if database is not self._database or not _is_unavailability(error):
                    raise
                self._give_up(error)
                continue
            if database is self._database or database is self._fallback:
                return database, connection
            stack.close()  # waited for a fallback that was left in the meantime

    def _give_up(self, error: Exception) -> None:
        with self._switching:
            if self._fallback is not None:
                return
            # The file of a corrupt database is replaced at the next try: no need to wait.
            wait = 0.0 if _is_corruption(error) else self._retry_interval
            self._next_try = time.monotonic() + wait
            self._fallback = _Database("sqlite://", self._database.lock_timeout)
            self._database.close()
        logger.error(
            "The robustness state %s cannot be used: %s. Work goes on with breakers, timeouts, "
            "retries and quarantine known to this process alone; it is tried again every %g s. "
            "Check that the database is reachable, not locked and has space, or set "
            "ROBUSTNESS_STATE_URL.",
            self.url,
            getattr(error, "orig", None) or error,
            self._retry_interval,
        )

    def _consider_return(self) -> None:
        """Try the database again in the background, if that is due."""
        if self._fallback is None or time.monotonic() < self._next_try:
            return
        with self._switching:
            if self._fallback is None or time.monotonic() < self._next_try:
                return
            self._next_try = math.inf
            thread = threading.Thread(
                target=self._return, args=(self._fallback,), name="robustness-state", daemon=True
            )
        try:
            thread.start()
        except RuntimeError:  # no threads left, or the interpreter is ending
            self._next_try = time.monotonic() + self._retry_interval

    def _return(self, fallback: "_Database") -> None:
        """Go back to the database with what the fallback recorded."""
        try:
            # Nobody waits for this first transaction, which may find the database still locked.
            with self._database.transaction(write=True):
                pass
            with fallback.transaction(write=True) as source:
                with self._database.transaction(write=True) as target:
                    _carry_over(source, target)
                self._fallback = None
        except (SQLAlchemyError, _UnavailableError) as error:
            logger.debug("The robustness state %s still cannot be used: %s", self.url, error)
            self._next_try = time.monotonic() + self._retry_interval
        else:
            logger.warning("The robustness state %s is in use again.", self.url)

    def _return_at_exit(self) -> None:
        """Try the database a last time: what the fallback recorded ends with this process."""
        with self._switching:
            fallback, is_returning = self._fallback, self._next_try == math.inf
            self._next_try = math.inf
        if fallback is not None and not is_returning:
            self._return(fallback)

    def _after_fork(self) -> None:
        self._database.abandon()
        if self._fallback is not None:
            self._fallback.abandon()
            self._next_try = time.monotonic() + self._retry_interval
        self._switching = threading.Lock()
        self._local = threading.local()


def _carry_over(source: Connection, target: Connection) -> None:
    """Copy what a fallback recorded: new rows of every history, and states the target lacks."""
    for table in metadata.sorted_tables:
        if table is breaker_probes:  # leases of probes that the target never granted
            continue
        rows = [dict(row) for row in source.execute(sa.select(table)).mappings()]
        if not rows:
            continue
        if "id" in table.c:
            for row in rows:
                del row["id"]
            target.execute(sa.insert(table), rows)
        else:
            target.execute(insert_into(target, table).on_conflict_do_nothing(), rows)


_stores: "weakref.WeakSet[StateStore]" = weakref.WeakSet()
_inherited: list[Engine] = []


def _abandon_all() -> None:
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(after_in_child=_abandon_all)


@atexit.register
def _return_all() -> None:
    for store in list(_stores):
        store._return_at_exit()


@cache
def _store_at(url: str | None) -> StateStore:
    return StateStore(url)


def get_state_store() -> StateStore:
    """Return the store that the settings name (ROBUSTNESS_STATE_URL); one per process and URL."""
    return _store_at(get_settings().state_url)


def reset_state_store() -> None:
    """Forget this process's stores, for tests; their databases stay as they are."""
    _store_at.cache_clear()
