"""State shared by every process of a deployment, in one SQL database.

SQLite in WAL mode by default, PostgreSQL by URL. A store that is corrupt, locked for too long or
unreachable never stops the work: `StateStore` logs it, goes on with state of its own process, and
returns to the shared state, with what was recorded since, as soon as that works again.
"""

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from robustness.instrumentation import emit
from robustness.log_context import get_logger
from robustness.settings import get_settings
from robustness.state_database import (
    Database,
    UnavailableError,
    is_corruption,
    is_unavailability,
)
from robustness.state_schema import breaker_probes, insert_into, metadata

logger = get_logger("state")

T = TypeVar("T")

SOON_SECONDS = 1.0
"""How long `StateStore.transact_soon` may wait."""


class StateUnavailableError(RuntimeError):
    """The shared store failed in the middle of a transaction that could not be repeated."""


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

    Attributes
    ----------
    problem : str or None
        Why the database was last out of use.
    returned_at : float
        When it was last in use again after that (s, monotonic clock).
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
        self._database = Database(url or "sqlite://", lock_timeout or settings.state_lock_timeout)
        self._fallback: Database | None = None
        self._next_try = 0.0
        self.problem: str | None = None
        self.returned_at = -math.inf
        self._switching = threading.Lock()
        self._local = threading.local()
        self._forget_pending()
        _stores.add(self)

    def _forget_pending(self) -> None:
        self._pending: dict[Callable[[Connection, list[Any]], object], list[Any]] = {}
        self._pending_lock = threading.Lock()
        self._pending_timer: threading.Timer | None = None
        self._storing = threading.RLock()

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

    def query(self, function: Callable[[Connection], T], *, latest: bool = True) -> T:
        """Run a function that only reads, on one consistent view, and return its result.

        Parameters
        ----------
        function : callable
            Called with a connection.
        latest : bool
            Whether what `transact_soon` was given is stored before.
        """
        return self._run(function, write=False, latest=latest)

    def transact_soon(self, function: Callable[[Connection, list[T]], object], item: T) -> None:
        """Run a function on an item, and on others given for it, in one write transaction soon.

        That is at most `SOON_SECONDS` later, and before this process writes to the store or reads
        what is `latest`. What is not stored yet is lost if the process is killed.

        Parameters
        ----------
        function : callable
            Called with a connection and the items, in order; as for `transact`, perhaps again. If
            it locks several rows, then in an order that all processes keep.
        item : object
            What to store.
        """
        with self._pending_lock:
            self._pending.setdefault(function, []).append(item)
            if self._pending_timer:
                return
            self._pending_timer = threading.Timer(SOON_SECONDS, self._store_in_time)
            self._pending_timer.daemon = True
            with suppress(RuntimeError):  # no threads left: stored at the next use, or at exit
                self._pending_timer.start()

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

    def _run(self, function: Callable[[Connection], T], *, write: bool, latest: bool = True) -> T:
        while True:
            try:
                with self._opened(write=write, latest=latest) as connection:
                    return function(connection)
            except StateUnavailableError:
                continue  # the fallback, which cannot be unavailable, is in use now

    @contextmanager
    def _opened(self, *, write: bool, latest: bool = True) -> Iterator[Connection]:
        outer: tuple[Connection, bool] | None = getattr(self._local, "outer", None)
        if outer is not None and (outer[1] or not write):
            yield outer[0]
            return
        if latest:
            self._store_pending()
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
            if database is not self._database or not is_unavailability(error):
                raise
            self._give_up(error)
            raise StateUnavailableError(f"{self.url} failed: {error}") from error

    def _store_in_time(self) -> None:
        with self._pending_lock:
            self._pending_timer = None
        self._store_pending()

    def _store_pending(self) -> None:
        """Store what `transact_soon` was given; when this returns, other threads have, too."""
        with self._storing:
            with self._pending_lock:
                pending, self._pending = self._pending, {}
            if pending:
                # All processes lock rows in one order.
                in_order = sorted(pending.items(), key=lambda item: item[0].__qualname__)
                self.transact(lambda c: [store(c, items) for store, items in in_order])

    def _enter(self, stack: ExitStack, *, write: bool) -> tuple[Database, Connection]:
        """Open a transaction on the database, or on the fallback if it cannot be opened."""
        self._consider_return()
        while True:
            database = self._fallback or self._database
            try:
                connection = stack.enter_context(database.transaction(write=write))
            except Exception as error:
                if database is not self._database or not is_unavailability(error):
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
            wait = 0.0 if is_corruption(error) else self._retry_interval
            self._next_try = time.monotonic() + wait
            self._fallback = Database("sqlite://", self._database.lock_timeout)
            self.problem = str(getattr(error, "orig", None) or error)
            self._database.close()
        emit("state_failures")
        logger.error(
            "The robustness state %s cannot be used: %s. Work goes on with breakers, timeouts, "
            "retries and quarantine known to this process alone; it is tried again every %g s. "
            "Check that the database is reachable, not locked and has space, or set "
            "ROBUSTNESS_STATE_URL.",
            self.url,
            self.problem,
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

    def _return(self, fallback: Database) -> None:
        """Go back to the database with what the fallback recorded."""
        try:
            # Nothing waits for this first transaction, and the database may still be locked.
            with self._database.transaction(write=True):
                pass
            with fallback.transaction(write=True) as source:
                with self._database.transaction(write=True) as target:
                    _carry_over(source, target)
                self._fallback, self.returned_at = None, time.monotonic()
        except (SQLAlchemyError, UnavailableError) as error:
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
        self._forget_pending()  # the parent stores it


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


def _release_all() -> None:
    for store in list(_stores):
        store._database.release_idle()


def _abandon_all() -> None:
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(before=_release_all, after_in_child=_abandon_all)


@atexit.register
def _return_all() -> None:
    for store in list(_stores):
        store._store_pending()
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
