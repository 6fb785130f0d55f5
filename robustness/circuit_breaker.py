"""Circuit breakers that all processes of a deployment share.

A breaker that has seen too many failures opens: calls are refused at once, until a bounded number
of probes (over all processes) has shown that the work succeeds again. The model is the circuit
breaker of M. Nygard, *Release It!* (2007), with the sliding-window failure and slow-call rates of
resilience4j.
"""

import atexit
import functools
import inspect
import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Literal, ParamSpec, TypedDict, TypeVar, Unpack, cast

import sqlalchemy as sa
from sqlalchemy import Connection

from robustness.log_context import current_log_fields
from robustness.settings import get_settings
from robustness.state import (
    StateStore,
    breaker_outcomes,
    breaker_probes,
    breaker_transitions,
    circuit_breakers,
    get_state_store,
    insert_into,
    prune,
)

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

CACHE_SECONDS = 1.0
"""How old the state that a call is judged by, and a success not yet stored, may be."""

TRANSITIONS_KEPT = 1000
"""Stored transitions per breaker."""


class CircuitState(StrEnum):
    """What a breaker does with calls: let them through, refuse them, or try a few."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"


class CircuitBreakerOpenError(Exception):
    """A breaker refused a call.

    Parameters
    ----------
    name : str
        The breaker.
    retry_after : float
        Seconds until it is worth asking again.
    why : str
        Why it refuses, for the message.
    """

    def __init__(self, name: str, retry_after: float, why: str = "is open") -> None:
        super().__init__(name, retry_after, why)
        self.name = name
        self.retry_after = retry_after
        self.why = why

    def __str__(self) -> str:
        seconds = math.ceil(self.retry_after)
        return f"Circuit breaker {self.name!r} {self.why}; try again in {seconds} s"


@dataclass(frozen=True)
class Transition:
    """A breaker changed its state.

    Parameters
    ----------
    name : str
        The breaker.
    from_state, to_state : str
        A `CircuitState`, or FORCED_OPEN or DISABLED for a state set by hand.
    at : float
        When (s since the epoch).
    reason : str
        Why.
    run_id : str or None
        The Dagster run that was logging when it happened.
    """

    name: str
    from_state: str
    to_state: str
    at: float
    reason: str
    run_id: str | None


class BreakerStats(TypedDict):
    """A breaker's state and counts since its last reset; times in seconds since the epoch.

    The rates are fractions of the sliding window, None where the breaker keeps no window or has
    seen fewer than `minimum_calls`.
    """

    state: str
    forced: str | None
    failure_count: int
    success_count: int
    ignored_count: int
    rejected_count: int
    consecutive_failures: int
    failure_rate: float | None
    slow_call_rate: float | None
    opened_at: float | None
    last_failure_at: float | None
    last_error: str | None
    failure_threshold: int
    recovery_timeout: float
    retry_after: float


class BreakerOptions(TypedDict, total=False):
    """The keyword arguments of `CircuitBreaker`."""

    failure_threshold: int | None
    recovery_timeout: float | None
    recovery_multiplier: float
    max_recovery_timeout: float
    failure_rate_threshold: float | None
    slow_call_seconds: float | None
    slow_call_rate_threshold: float | None
    window_size: int
    window_seconds: float | None
    minimum_calls: int | None
    half_open_permits: int | None
    half_open_successes: int
    counts: Callable[[Exception], bool] | None
    store: StateStore | None


_Listener = Callable[[Transition], None]
_Outcome = Literal["success", "failure", "ignored", "released"]
_Forced = Literal["open", "disabled"]

_listeners: list[_Listener] = []


def add_transition_listener(listener: _Listener) -> Callable[[], None]:
    """Call a function after every transition that this process brings about.

    Parameters
    ----------
    listener : callable
        Called with a `Transition`, in the thread whose call or outcome caused it.

    Returns
    -------
    callable
        Removes the listener.
    """
    _listeners.append(listener)

    def remove() -> None:
        with suppress(ValueError):
            _listeners.remove(listener)

    return remove


@dataclass
class _Record:
    """A breaker's row in the store."""

    name: str
    state: str
    recovery_timeout: float
    forced: str | None = None
    generation: int = 0
    failure_count: int = 0
    success_count: int = 0
    ignored_count: int = 0
    rejected_count: int = 0
    consecutive_failures: int = 0
    probe_successes: int = 0
    opened_at: float | None = None
    last_failure_at: float | None = None
    last_error: str | None = None
    updated_at: float = 0.0

    def effective_state(self, now: float) -> CircuitState:
        """Return the state a call would meet: an open breaker whose time is up would try it."""
        if self.forced is not None:
            return CircuitState.OPEN if self.forced == "open" else CircuitState.CLOSED
        if self.state == CircuitState.OPEN and self.retry_after(now) <= 0:
            return CircuitState.HALF_OPEN
        return CircuitState(self.state)

    def retry_after(self, now: float) -> float:
        """Return the seconds until the breaker lets a call through, 0 if it does so now."""
        if self.forced == "open":
            return self.recovery_timeout  # nobody knows; that is how long others wait
        if self.forced is not None or self.state != CircuitState.OPEN or self.opened_at is None:
            return 0.0
        # A clock that was set back must not keep the breaker open beyond its time.
        return min(max(self.opened_at + self.recovery_timeout - now, 0.0), self.recovery_timeout)

    def refusal(self, now: float) -> CircuitBreakerOpenError:
        """Return the error for a call that meets an open breaker."""
        if self.forced == "open":
            why = "is held open by hand"
        else:
            why = f"is open since {_clock(self.opened_at or now)} (last error: {self.last_error})"
        return CircuitBreakerOpenError(self.name, self.retry_after(now), why)


@dataclass
class _Pending:
    """Outcomes not yet stored: they change no state, so they can wait a moment."""

    success_times: list[float] = field(default_factory=list)
    ignored: int = 0
    rejected: int = 0

    def __bool__(self) -> bool:
        return bool(self.success_times or self.ignored or self.rejected)


@dataclass(frozen=True)
class _Report:
    """How a call went, under which permit."""

    generation: int
    token: str | None
    outcome: _Outcome
    error: BaseException | None
    slow: bool


class Permit:
    """Leave to make one call; its holder says how the call went, once.

    A permit of a half-open breaker is a lease in the store: if its holder dies, another process
    gets it when the lease is over.
    """

    __slots__ = ("_breaker", "_generation", "_settled", "_started", "_token")

    def __init__(self, breaker: "CircuitBreaker", generation: int, token: str | None) -> None:
        self._breaker = breaker
        self._generation = generation
        self._token = token
        self._started = time.perf_counter()
        self._settled = False

    @property
    def is_probe(self) -> bool:
        """Whether the call tries out a half-open breaker."""
        return self._token is not None

    def succeeded(self, seconds: float | None = None) -> None:
        """Record a success and the time it took; by default, the time since the permit."""
        self._settle("success", seconds=seconds)

    def failed(self, error: BaseException, seconds: float | None = None) -> None:
        """Record a failure; it counts if the breaker's `counts` says so.

        What is no `Exception` (an interrupt, a cancellation) says nothing about the work and
        only gives the permit back.
        """
        if not isinstance(error, Exception):
            self.release()
        elif self._breaker.counts(error):
            self._settle("failure", error=error, seconds=seconds)
        else:
            self.ignored(error)

    def ignored(self, error: BaseException | None = None) -> None:
        """Record a failure that says nothing about the health of what the breaker guards."""
        self._settle("ignored", error=error)

    def release(self) -> None:
        """Give the permit back unused."""
        self._settle("released")

    def _settle(
        self,
        outcome: _Outcome,
        *,
        error: BaseException | None = None,
        seconds: float | None = None,
    ) -> None:
        if self._settled:
            return
        self._settled = True
        if seconds is None:
            seconds = time.perf_counter() - self._started
        slow = self._breaker.is_slow(seconds)
        self._breaker._record(_Report(self._generation, self._token, outcome, error, slow))


class GuardedCall:
    """A breaker's `call`: calls a function under the breaker, or guards a `with` block."""

    __slots__ = ("_breaker", "_permit")

    def __init__(self, breaker: "CircuitBreaker") -> None:
        self._breaker = breaker
        self._permit: Permit | None = None

    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function and record how it went.

        Raises
        ------
        CircuitBreakerOpenError
            If the breaker refuses; the function is not called then.
        """
        # Another object than this one, which may be in use further up or in another thread.
        with GuardedCall(self._breaker):
            return function(*args, **kwargs)

    def __enter__(self) -> Permit:
        self._permit = self._breaker.acquire()
        return self._permit

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        permit, self._permit = self._permit, None
        if permit is None:
            return
        if error is None:
            permit.succeeded()
        else:
            permit.failed(error)


# The blocks that this thread or asyncio task is in, innermost last.
_entered: ContextVar[tuple[GuardedCall, ...]] = ContextVar("_entered", default=())


def _is_systemic(error: Exception) -> bool:
    """Ask the error classifier whether an error speaks of more than one file."""
    from robustness.error_classifier import get_error_classifier

    return get_error_classifier().classify_error(error, {}).systemic


class CircuitBreaker:
    """A circuit breaker.

    Parameters
    ----------
    name : str, optional
        Breakers of one name share one state, in all processes that use the same store. Without a
        name, the state is this object's alone.
    failure_threshold : int, optional
        Consecutive failures that open it; CIRCUIT_BREAKER_FAILURE_THRESHOLD by default.
    recovery_timeout : float, optional
        Seconds from opening to the first probe; CIRCUIT_BREAKER_RECOVERY_TIMEOUT by default.
    recovery_multiplier : float
        Factor on the recovery timeout each time that a probe fails (1 keeps it constant).
    max_recovery_timeout : float
        Bound (s) for the recovery timeout as it grows.
    failure_rate_threshold : float, optional
        Share of failures in the sliding window (0 to 1) that opens it, too.
    slow_call_seconds : float, optional
        Calls that take longer are slow.
    slow_call_rate_threshold : float, optional
        Share of slow calls in the sliding window (0 to 1) that opens it, too; a slow probe then
        counts as failed.
    window_size : int
        Calls in the sliding window.
    window_seconds : float, optional
        Leaves calls out of the window that are older than this.
    minimum_calls : int, optional
        Calls in the window before its rates are looked at; 10, or the window if it is smaller.
    half_open_permits : int, optional
        Probes in flight at once, over all processes; ROBUSTNESS_HALF_OPEN_PERMITS by default.
    half_open_successes : int
        Successful probes that close it.
    counts : callable, optional
        Tells whether an exception counts as a failure; those that do not are recorded as
        ignored. By default the error classifier decides: what is systemic counts, a file's own
        fault does not.
    store : StateStore, optional
        Where the state lives; the process's store (`get_state_store`) for a breaker with a name.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    A call that meets a closed breaker costs no access to the store: state up to a second old is
    good enough for that, and successes are stored together, within a second. Failures, probes and
    transitions are stored at once.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        failure_threshold: int | None = None,
        recovery_timeout: float | None = None,
        recovery_multiplier: float = 1.0,
        max_recovery_timeout: float = 3600.0,
        failure_rate_threshold: float | None = None,
        slow_call_seconds: float | None = None,
        slow_call_rate_threshold: float | None = None,
        window_size: int = 100,
        window_seconds: float | None = None,
        minimum_calls: int | None = None,
        half_open_permits: int | None = None,
        half_open_successes: int = 1,
        counts: Callable[[Exception], bool] | None = None,
        store: StateStore | None = None,
    ) -> None:
        settings = get_settings()
        if failure_threshold is None:
            failure_threshold = settings.circuit_breaker_failure_threshold
        if recovery_timeout is None:
            recovery_timeout = settings.circuit_breaker_recovery_timeout
        if half_open_permits is None:
            half_open_permits = settings.half_open_permits
        if minimum_calls is None:
            minimum_calls = min(10, window_size)
        for option, value, lowest in (
            ("failure_threshold", failure_threshold, 1),
            ("recovery_timeout", recovery_timeout, 0),
            ("recovery_multiplier", recovery_multiplier, 1),
            ("window_size", window_size, 1),
            ("minimum_calls", minimum_calls, 1),
            ("half_open_permits", half_open_permits, 1),
            ("half_open_successes", half_open_successes, 1),
        ):
            if value < lowest:
                raise ValueError(f"{option}={value} should be at least {lowest}")
        for option, rate in (
            ("failure_rate_threshold", failure_rate_threshold),
            ("slow_call_rate_threshold", slow_call_rate_threshold),
        ):
            if rate is not None and not 0 < rate <= 1:
                raise ValueError(f"{option}={rate} should be above 0 and at most 1")
        if (slow_call_seconds is None) != (slow_call_rate_threshold is None):
            raise ValueError("slow_call_seconds and slow_call_rate_threshold go together")
        if minimum_calls > window_size:
            raise ValueError(f"minimum_calls={minimum_calls} exceeds window_size={window_size}")

        self.failure_threshold = failure_threshold
        self.recovery_timeout = recovery_timeout
        self.counts = counts or _is_systemic
        self._recovery_multiplier = recovery_multiplier
        self._max_recovery_timeout = max(max_recovery_timeout, recovery_timeout)
        self._failure_rate_threshold = failure_rate_threshold
        self._slow_call_seconds = slow_call_seconds
        self._slow_call_rate_threshold = slow_call_rate_threshold
        self._window_size = window_size
        self._window_seconds = window_seconds
        self._minimum_calls = minimum_calls
        self._half_open_permits = half_open_permits
        self._half_open_successes = half_open_successes
        self._has_window = not (failure_rate_threshold is slow_call_rate_threshold is None)

        if name is None:
            name = f"unnamed-{uuid.uuid4().hex[:12]}"
            store = store or _private_store()
        self.name = name
        self._given_store = store
        self._after_fork()
        _breakers.add(self)

    @property
    def call(self) -> GuardedCall:
        """Calls a function under the breaker; also a context manager that guards its block.

        ``breaker.call(function, *args, **kwargs)`` returns the function's result;
        ``with breaker.call:`` and ``with breaker:`` guard a block. Each raises
        `CircuitBreakerOpenError` if the breaker refuses.
        """
        return GuardedCall(self)

    def __enter__(self) -> Permit:
        guard = GuardedCall(self)
        permit = guard.__enter__()
        _entered.set((*_entered.get(), guard))
        return permit

    def __exit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        *outer, guard = _entered.get()
        _entered.set(tuple(outer))
        guard.__exit__(type_, error, traceback)

    def acquire(self, *, lease_seconds: float | None = None) -> Permit:
        """Ask for leave to make one call, which may end in another thread.

        Parameters
        ----------
        lease_seconds : float, optional
            Time after which the permit of a probe is given to others; longer than the call can
            take. TIMEOUT_MAX_DELAY by default.

        Raises
        ------
        CircuitBreakerOpenError
            If the breaker refuses.
        """
        record = self._recent()
        now = time.time()
        state = record.effective_state(now)
        if state is CircuitState.CLOSED:
            return Permit(self, record.generation, None)
        answer: Permit | CircuitBreakerOpenError
        if state is CircuitState.OPEN:
            answer = record.refusal(now)
        else:
            lease = lease_seconds or get_settings().timeout_max_delay
            record, transitions, answer = self._store.transact(lambda c: self._admit(c, lease))
            self._remember(record)
            _announce(transitions)
        if isinstance(answer, CircuitBreakerOpenError):
            self._postpone(rejected=1)
            raise answer
        return answer

    def is_slow(self, seconds: float) -> bool:
        """Tell whether a call that took this long is slow."""
        return self._slow_call_seconds is not None and seconds > self._slow_call_seconds

    def get_state(self) -> CircuitState:
        """Return what a call would meet now.

        A breaker forced open is OPEN, a disabled one CLOSED; an open one whose recovery timeout
        is over is HALF_OPEN.
        """
        return self._recent().effective_state(time.time())

    def get_stats(self) -> BreakerStats:
        """Return the state and the counts since the last reset, as stored for all processes."""
        self._flush()
        record, rates = self._store.query(lambda c: (self._read(c), self._rates(c, time.time())))
        self._remember(record)
        now = time.time()
        return BreakerStats(
            state=record.effective_state(now).value,
            forced=record.forced,
            failure_count=record.failure_count,
            success_count=record.success_count,
            ignored_count=record.ignored_count,
            rejected_count=record.rejected_count,
            consecutive_failures=record.consecutive_failures,
            failure_rate=rates[0] if rates else None,
            slow_call_rate=rates[1] if rates else None,
            opened_at=record.opened_at,
            last_failure_at=record.last_failure_at,
            last_error=record.last_error,
            failure_threshold=self.failure_threshold,
            recovery_timeout=record.recovery_timeout,
            retry_after=record.retry_after(now),
        )

    def reset(self) -> None:
        """Close the breaker, forget its counts, and lift `force_open` and `disable`."""
        self._set_by_hand(None)

    def force_open(self) -> None:
        """Refuse every call, in all processes, until `reset`."""
        self._set_by_hand("open")

    def disable(self) -> None:
        """Let every call through, in all processes, until `reset`; outcomes are still counted."""
        self._set_by_hand("disabled")

    # State in this process

    @property
    def _store(self) -> StateStore:
        return self._given_store or get_state_store()

    def _after_fork(self) -> None:
        """Start with nothing pending: what is, the parent stores."""
        self._lock = threading.Lock()
        self._pending = _Pending()
        self._flush_due = False
        self._cached: tuple[float, StateStore, _Record] | None = None

    def _recent(self) -> _Record:
        """Return the stored record, at most `CACHE_SECONDS` old."""
        cached, store = self._cached, self._store
        if cached is not None and time.monotonic() < cached[0] and cached[1] is store:
            return cached[2]
        record = store.query(self._read)
        self._remember(record)
        return record

    def _remember(self, record: _Record) -> None:
        self._cached = time.monotonic() + CACHE_SECONDS, self._store, record

    def _new_record(self) -> _Record:
        """Return the record of a breaker that the store does not know.

        A store that has just fallen back to this process knows none: it goes on with what was
        last seen.
        """
        cached, store = self._cached, self._store
        if cached is not None and cached[1] is store and store.degraded:
            return replace(cached[2])
        return _Record(self.name, CircuitState.CLOSED, self.recovery_timeout)

    def _postpone(
        self, *, success_at: float | None = None, ignored: int = 0, rejected: int = 0
    ) -> None:
        """Leave an outcome that changes no state to be stored with others."""
        with self._lock:
            if success_at is not None:
                self._pending.success_times.append(success_at)
            self._pending.ignored += ignored
            self._pending.rejected += rejected
            if self._flush_due:
                return
            self._flush_due = True
        timer = threading.Timer(CACHE_SECONDS, self._flush)
        timer.daemon = True
        with suppress(RuntimeError):  # no threads left: stored with the next failure, or at exit
            timer.start()

    def _take_pending(self) -> _Pending:
        with self._lock:
            pending, self._pending = self._pending, _Pending()
            self._flush_due = False
        return pending

    def _flush(self) -> None:
        pending = self._take_pending()
        if pending:
            self._write(pending, None)

    def _record(self, report: _Report) -> None:
        if report.token is None:
            if report.outcome == "released":
                return
            if report.outcome == "ignored":
                self._postpone(ignored=1)
                return
            # A success can only matter if failures came before it, or if it is slow.
            if (
                report.outcome == "success"
                and not report.slow
                and self._recent().consecutive_failures == 0
            ):
                self._postpone(success_at=time.time())
                return
        self._write(self._take_pending(), report)

    def _write(self, pending: _Pending, report: _Report | None) -> None:
        record, transitions = self._store.transact(lambda c: self._account(c, pending, report))
        self._remember(record)
        _announce(transitions)

    # State in the store; everything below runs inside a transaction

    def _read(self, connection: Connection) -> _Record:
        return self._select(connection, sa.select(circuit_breakers)) or self._new_record()

    def _select(
        self, connection: Connection, query: "sa.Select[tuple[object, ...]]"
    ) -> _Record | None:
        row = connection.execute(query.where(circuit_breakers.c.name == self.name)).mappings()
        found = row.one_or_none()
        return None if found is None else _Record(**found)

    def _lock_record(self, connection: Connection) -> _Record:
        """Return the record, locked against other writers until the end of the transaction."""
        query = sa.select(circuit_breakers).with_for_update()
        record = self._select(connection, query)
        if record is None:
            insert = insert_into(connection, circuit_breakers).on_conflict_do_nothing()
            connection.execute(insert, asdict(self._new_record()))
            record = self._select(connection, query)
        return cast("_Record", record)

    def _save(self, connection: Connection, record: _Record, now: float) -> None:
        record.updated_at = now
        connection.execute(
            sa.update(circuit_breakers).where(circuit_breakers.c.name == self.name),
            asdict(record),
        )

    def _admit(
        self, connection: Connection, lease_seconds: float
    ) -> tuple[_Record, list[Transition], Permit | CircuitBreakerOpenError]:
        """Admit a probe if one is due, half-opening the breaker if its time has come."""
        record = self._lock_record(connection)
        now = time.time()
        state = record.effective_state(now)
        if state is CircuitState.CLOSED:
            return record, [], Permit(self, record.generation, None)
        if state is CircuitState.OPEN:
            return record, [], record.refusal(now)
        transitions = []
        if record.state == CircuitState.OPEN:
            reason = f"its recovery timeout of {record.recovery_timeout:g} s is over"
            transitions.append(self._move(connection, record, CircuitState.HALF_OPEN, now, reason))
            self._save(connection, record, now)
        mine = breaker_probes.c.name == self.name
        connection.execute(sa.delete(breaker_probes).where(mine, breaker_probes.c.expires_at < now))
        in_flight, first_expiry = connection.execute(
            sa.select(sa.func.count(), sa.func.min(breaker_probes.c.expires_at)).where(mine)
        ).one()
        if in_flight >= self._half_open_permits:
            wait = min(first_expiry - now, record.recovery_timeout)
            refusal = CircuitBreakerOpenError(self.name, wait, "is being probed")
            return record, transitions, refusal
        token = uuid.uuid4().hex
        connection.execute(
            sa.insert(breaker_probes).values(
                token=token, name=self.name, started_at=now, expires_at=now + lease_seconds
            )
        )
        return record, transitions, Permit(self, record.generation, token)

    def _account(
        self, connection: Connection, pending: _Pending, report: _Report | None
    ) -> tuple[_Record, list[Transition]]:
        """Store what was pending, then a report, and draw the consequences."""
        record = self._lock_record(connection)
        now = time.time()
        transitions: list[Transition] = []
        record.success_count += len(pending.success_times)
        record.ignored_count += pending.ignored
        record.rejected_count += pending.rejected
        if record.forced is None and record.state == CircuitState.CLOSED and pending.success_times:
            if pending.success_times[-1] > (record.last_failure_at or 0):
                record.consecutive_failures = 0
            self._extend_window(connection, [(at, False, False) for at in pending.success_times])
        if report is not None:
            transitions = self._account_report(connection, record, report, now)
        self._save(connection, record, now)
        return record, transitions

    def _account_report(
        self, connection: Connection, record: _Record, report: _Report, now: float
    ) -> list[Transition]:
        failed = report.outcome == "failure"
        record.success_count += report.outcome == "success"
        record.ignored_count += report.outcome == "ignored"
        if failed:
            record.failure_count += 1
            record.last_failure_at = now
            record.last_error = f"{type(report.error).__name__}: {report.error}"
        holds_permit = report.token is not None and self._return_permit(connection, report.token)
        decisive = (
            report.outcome in ("success", "failure")
            and report.generation == record.generation
            and record.forced is None
        )
        if decisive and record.state == CircuitState.CLOSED:
            record.consecutive_failures = record.consecutive_failures + 1 if failed else 0
            self._extend_window(connection, [(now, failed, report.slow)])
            reason = self._reason_to_open(connection, record, now)
            if reason:
                return [self._move(connection, record, CircuitState.OPEN, now, reason)]
        elif decisive and holds_permit:
            return self._conclude_probe(connection, record, report, now)
        return []

    def _return_permit(self, connection: Connection, token: str) -> bool:
        """Give a probe's permit back; False if its lease was over and somebody took it away."""
        deleted = connection.execute(
            sa.delete(breaker_probes).where(breaker_probes.c.token == token)
        )
        return deleted.rowcount == 1

    def _extend_window(
        self, connection: Connection, window: list[tuple[float, bool, bool]]
    ) -> None:
        if not self._has_window:
            return
        connection.execute(
            sa.insert(breaker_outcomes),
            [
                {"name": self.name, "at": at, "failed": failed, "slow": slow}
                for at, failed, slow in window
            ],
        )
        prune(connection, breaker_outcomes, self._window_size, name=self.name)

    def _rates(self, connection: Connection, now: float) -> tuple[float, float] | None:
        """Return the shares of failed and of slow calls, None if the window is too empty."""
        if not self._has_window:
            return None
        window = sa.select(breaker_outcomes).where(breaker_outcomes.c.name == self.name)
        if self._window_seconds is not None:
            window = window.where(breaker_outcomes.c.at > now - self._window_seconds)
        newest = window.order_by(breaker_outcomes.c.id.desc()).limit(self._window_size).subquery()
        calls, failed, slow = connection.execute(
            sa.select(
                sa.func.count(),
                sa.func.count().filter(newest.c.failed),
                sa.func.count().filter(newest.c.slow),
            ).select_from(newest)
        ).one()
        if calls < self._minimum_calls:
            return None
        return failed / calls, slow / calls

    def _reason_to_open(self, connection: Connection, record: _Record, now: float) -> str | None:
        if record.consecutive_failures >= self.failure_threshold:
            return f"{record.consecutive_failures} failures in a row, the last {record.last_error}"
        rates = self._rates(connection, now)
        if rates is None:
            return None
        failed, slow = rates
        if self._failure_rate_threshold is not None and failed >= self._failure_rate_threshold:
            return f"{failed:.0%} of the recent calls failed, the last with {record.last_error}"
        if self._slow_call_rate_threshold is not None and slow >= self._slow_call_rate_threshold:
            return f"{slow:.0%} of the recent calls took over {self._slow_call_seconds:g} s"
        return None

    def _conclude_probe(
        self, connection: Connection, record: _Record, report: _Report, now: float
    ) -> list[Transition]:
        if report.outcome == "failure" or report.slow:
            record.consecutive_failures += 1
            if report.outcome == "failure":
                reason = f"a probe failed with {record.last_error}"
            else:
                reason = f"a probe took over {self._slow_call_seconds:g} s"
            longer = record.recovery_timeout * self._recovery_multiplier
            record.recovery_timeout = min(longer, self._max_recovery_timeout)
            return [self._move(connection, record, CircuitState.OPEN, now, reason)]
        record.probe_successes += 1
        if record.probe_successes < self._half_open_successes:
            return []
        reason = f"{record.probe_successes} probes in a row succeeded"
        return [self._move(connection, record, CircuitState.CLOSED, now, reason)]

    def _move(
        self,
        connection: Connection,
        record: _Record,
        to_state: CircuitState,
        now: float,
        reason: str,
    ) -> Transition:
        transition = Transition(self.name, record.state, to_state, now, reason, _current_run_id())
        if record.state == CircuitState.CLOSED:
            record.recovery_timeout = self.recovery_timeout
        record.state = to_state
        record.probe_successes = 0
        if to_state is CircuitState.OPEN:
            record.opened_at = now
        elif to_state is CircuitState.CLOSED:
            record.consecutive_failures = 0
        self._begin_generation(connection, record, transition)
        return transition

    def _begin_generation(
        self, connection: Connection, record: _Record, transition: Transition
    ) -> None:
        """Store a transition; what was measured in the former state no longer counts."""
        record.generation += 1
        for table in (breaker_probes, breaker_outcomes):
            connection.execute(sa.delete(table).where(table.c.name == self.name))
        connection.execute(sa.insert(breaker_transitions), asdict(transition))
        prune(connection, breaker_transitions, TRANSITIONS_KEPT, name=self.name)

    def _set_by_hand(self, forced: _Forced | None) -> None:
        self._take_pending()
        record, transition = self._store.transact(lambda c: self._force(c, forced))
        self._remember(record)
        _announce([transition])

    def _force(self, connection: Connection, forced: _Forced | None) -> tuple[_Record, Transition]:
        record = self._lock_record(connection)
        now = time.time()
        names = {"open": "FORCED_OPEN", "disabled": "DISABLED"}
        before = names[record.forced] if record.forced else record.state
        after = names[forced] if forced else CircuitState.CLOSED.value
        transition = Transition(self.name, before, after, now, "set by hand", _current_run_id())
        if forced is None:
            record = _Record(
                self.name,
                CircuitState.CLOSED,
                self.recovery_timeout,
                generation=record.generation,
            )
        record.forced = forced
        self._begin_generation(connection, record, transition)
        self._save(connection, record, now)
        return record, transition


def _announce(transitions: list[Transition]) -> None:
    for transition in transitions:
        level = logging.INFO if transition.to_state == CircuitState.CLOSED else logging.WARNING
        logger.log(
            level,
            "Circuit breaker %r went from %s to %s: %s",
            transition.name,
            transition.from_state,
            transition.to_state,
            transition.reason,
        )
        for listener in _listeners:
            try:
                listener(transition)
            except Exception:
                logger.exception("A listener for circuit breaker transitions failed")


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _current_run_id() -> str | None:
    run_id = current_log_fields().get("run_id")
    return None if run_id is None else str(run_id)


@functools.cache
def _private_store() -> StateStore:
    """Return the store of breakers without a name, in the memory of this process."""
    return StateStore(None)


# The registry

_KNOWN_BREAKERS: dict[str, BreakerOptions] = {
    "audio_processing": {"failure_threshold": 3, "recovery_timeout": 30},
    "database_operations": {"failure_threshold": 5, "recovery_timeout": 60},
    "network_operations": {"failure_threshold": 3, "recovery_timeout": 120},
    "feature_extraction": {"failure_threshold": 2, "recovery_timeout": 45},
}

_registry: dict[str, CircuitBreaker] = {}
_breakers: "weakref.WeakSet[CircuitBreaker]" = weakref.WeakSet()


def get_circuit_breaker(name: str) -> CircuitBreaker:
    """Return the breaker of a name, the same object each time.

    ``audio_processing``, ``database_operations``, ``network_operations`` and
    ``feature_extraction`` have thresholds of their own, all others those of the settings.
    """
    breaker = _registry.get(name)
    if breaker is None:
        breaker = CircuitBreaker(name, **_KNOWN_BREAKERS.get(name, {}))
        breaker = _registry.setdefault(name, breaker)
    return breaker


def all_circuit_breakers() -> dict[str, CircuitBreaker]:
    """Return the breakers that the process's store knows, by name, in order."""
    names = sa.select(circuit_breakers.c.name).order_by(circuit_breakers.c.name)
    found = get_state_store().query(lambda c: c.execute(names).scalars().all())
    return {name: get_circuit_breaker(name) for name in found}


def circuit_breaker(
    name: str | None = None, **options: Unpack[BreakerOptions]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Guard a function or coroutine function by a breaker, kept as its attribute ``breaker``.

    Parameters
    ----------
    name : str, optional
        The breaker's name; by default the function's qualified name, which all processes that
        import it share. A function defined inside another one gets a breaker of its own.
    **options
        As for `CircuitBreaker`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        shared = name
        if shared is None and "<locals>" not in function.__qualname__:
            shared = f"{function.__module__}.{function.__qualname__}"
        breaker = CircuitBreaker(shared, **options)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def guarded_coroutine(*args: P.args, **kwargs: P.kwargs) -> object:
                with breaker.call:
                    return await function(*args, **kwargs)

            guarded = cast("Callable[P, R]", guarded_coroutine)
        else:

            @functools.wraps(function)
            def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
                with breaker.call:
                    return function(*args, **kwargs)

        guarded.breaker = breaker  # type: ignore[attr-defined]
        return guarded

    return decorate


@atexit.register
def _flush_all() -> None:
    for breaker in list(_breakers):
        breaker._flush()


def _forget_all() -> None:
    for breaker in list(_breakers):
        breaker._after_fork()


os.register_at_fork(after_in_child=_forget_all)
