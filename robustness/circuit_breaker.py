"""Circuit breakers that all processes of a deployment share.

A breaker that has seen too many failures opens: calls are refused at once, until a bounded number
of probes (over all processes) has shown that the work succeeds again. The model is the circuit
breaker of M. Nygard, *Release It!* (2007), with the sliding-window failure and slow-call rates of
resilience4j.
"""

import functools
import inspect
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from types import TracebackType
from typing import ParamSpec, TypedDict, TypeVar, Unpack, cast

import sqlalchemy as sa

import robustness.log_context  # noqa: F401 - its fields belong on this module's log records
from robustness.breaker_policy import BreakerPolicy, CircuitState, Outcome, Report, Transition
from robustness.breaker_store import Admission, BreakerState, Refusal
from robustness.settings import get_settings
from robustness.state import StateStore, circuit_breakers, get_state_store

__all__ = [
    "BreakerOptions",
    "BreakerStats",
    "CircuitBreaker",
    "CircuitBreakerOpenError",
    "CircuitState",
    "GuardedCall",
    "Permit",
    "Transition",
    "add_transition_listener",
    "all_circuit_breakers",
    "circuit_breaker",
    "get_circuit_breaker",
]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


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


class Permit:
    """Leave to make one call; its holder says how the call went, once.

    A permit of a half-open breaker is a lease in the store: if its holder dies, another process
    gets it when the lease is over.
    """

    __slots__ = ("_admission", "_breaker", "_settled", "_started")

    def __init__(self, breaker: "CircuitBreaker", admission: Admission) -> None:
        self._breaker = breaker
        self._admission = admission
        self._started = time.perf_counter()
        self._settled = False

    @property
    def is_probe(self) -> bool:
        """Whether the call tries out a half-open breaker."""
        return self._admission.token is not None

    def succeeded(self, seconds: float | None = None) -> None:
        """Record a success and the time it took; by default, the time since the permit."""
        self._settle("success", seconds=seconds)

    def failed(
        self, error: BaseException, seconds: float | None = None, *, counts: bool | None = None
    ) -> None:
        """Record a failure.

        What is no `Exception` (an interrupt, a cancellation) says nothing about the work and
        only gives the permit back.

        Parameters
        ----------
        error : BaseException
            What the call failed of.
        seconds : float, optional
            The time it took; by default, the time since the permit.
        counts : bool, optional
            Whether it counts; by default, what the breaker's `counts` says.
        """
        if not isinstance(error, Exception):
            self.release()
        elif self._breaker.counts(error) if counts is None else counts:
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
        outcome: Outcome,
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
        admission = self._admission
        self._breaker._state.report(
            Report(admission.generation, admission.token, outcome, error, slow)
        )


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
        TypeError
            If it is a coroutine or generator function: calling one runs nothing yet.
        """
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(
                f"calling {function.__qualname__} runs nothing yet: guard where it is awaited or "
                "iterated over by `with breaker:`"
            )
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
    A call that meets a closed breaker costs no access to the store, see
    `robustness.breaker_store`.
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
        self._policy = BreakerPolicy(
            failure_threshold=failure_threshold,
            recovery_timeout=recovery_timeout,
            recovery_multiplier=recovery_multiplier,
            max_recovery_timeout=max_recovery_timeout,
            failure_rate_threshold=failure_rate_threshold,
            slow_call_seconds=slow_call_seconds,
            slow_call_rate_threshold=slow_call_rate_threshold,
            window_size=window_size,
            window_seconds=window_seconds,
            minimum_calls=min(10, window_size) if minimum_calls is None else minimum_calls,
            half_open_permits=(
                settings.half_open_permits if half_open_permits is None else half_open_permits
            ),
            half_open_successes=half_open_successes,
        )
        self.counts = counts or _is_systemic
        if name is None:
            name = f"unnamed-{uuid.uuid4().hex[:12]}"
            store = store or _private_store()
        self.name = name
        self._state = BreakerState(name, self._policy, store, _announce)
        if store is None:
            _registry.setdefault(name, self)

    @property
    def failure_threshold(self) -> int:
        """Consecutive failures that open it."""
        return self._policy.failure_threshold

    @property
    def recovery_timeout(self) -> float:
        """Seconds from opening to the first probe, before it grows with failed probes."""
        return self._policy.recovery_timeout

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
        answer = self._state.admit(lease_seconds or get_settings().timeout_max_delay)
        if isinstance(answer, Refusal):
            raise CircuitBreakerOpenError(self.name, answer.retry_after, answer.why)
        return Permit(self, answer)

    def is_slow(self, seconds: float) -> bool:
        """Tell whether a call that took this long is slow."""
        return self._policy.is_slow(seconds)

    def get_state(self) -> CircuitState:
        """Return what a call would meet now.

        A breaker forced open is OPEN, a disabled one CLOSED; an open one whose recovery timeout
        is over is HALF_OPEN.
        """
        return self._state.recent().effective_state(time.time())

    def get_stats(self) -> BreakerStats:
        """Return the state and the counts since the last reset, as stored for all processes."""
        record, rates = self._state.current()
        now = time.time()
        return BreakerStats(
            state=record.effective_state(now).value,
            forced=record.forced,
            failure_count=record.failure_count,
            success_count=record.success_count,
            ignored_count=record.ignored_count,
            rejected_count=record.rejected_count,
            consecutive_failures=record.consecutive_failures,
            failure_rate=rates.failed if rates else None,
            slow_call_rate=rates.slow if rates else None,
            opened_at=record.opened_at,
            last_failure_at=record.last_failure_at,
            last_error=record.last_error,
            failure_threshold=self.failure_threshold,
            recovery_timeout=record.recovery_timeout,
            retry_after=record.retry_after(now),
        )

    def reset(self) -> None:
        """Close the breaker, forget its counts, and lift `force_open` and `disable`."""
        self._state.force(None)

    def force_open(self) -> None:
        """Refuse every call, in all processes, until `reset`."""
        self._state.force("open")

    def disable(self) -> None:
        """Let every call through, in all processes, until `reset`; outcomes are still counted."""
        self._state.force("disabled")


def _announce(transitions: Sequence[Transition]) -> None:
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


def get_circuit_breaker(name: str) -> CircuitBreaker:
    """Return the breaker of a name, the same object each time.

    ``audio_processing``, ``database_operations``, ``network_operations`` and
    ``feature_extraction`` have thresholds of their own, all others those of the settings.
    """
    if name not in _registry:
        CircuitBreaker(name, **_KNOWN_BREAKERS.get(name, {}))  # it registers itself
    return _registry[name]


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

    Raises
    ------
    TypeError
        If it decorates a generator function: calling one runs nothing that could be guarded.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator function, which cannot be guarded"
            )
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
