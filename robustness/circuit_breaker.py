"""Circuit breakers that all processes of a deployment share.

After too many failures a breaker opens: it refuses calls until a bounded number of probes, over
all processes, has succeeded. This is the circuit breaker of M. Nygard, *Release It!* (2007), with
the sliding-window failure and slow-call rates of resilience4j.
"""

import functools
import inspect
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import ParamSpec, TypedDict, TypeVar, Unpack, cast
from weakref import WeakValueDictionary

import sqlalchemy as sa

from robustness.breaker_policy import BreakerPolicy, CircuitState, Outcome, Report, Transition
from robustness.breaker_store import Admission, BreakerState, Refusal
from robustness.instrumentation import emit
from robustness.log_context import get_logger
from robustness.settings import get_settings
from robustness.state import StateStore, get_state_store
from robustness.state_schema import circuit_breakers

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

logger = get_logger("circuit_breaker")

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
    """The options of a breaker; their defaults are those of `BreakerPolicy` and the settings.

    Parameters
    ----------
    failure_threshold : int
        Consecutive failures that open it; CIRCUIT_BREAKER_FAILURE_THRESHOLD by default.
    recovery_timeout : float
        Seconds from opening to the first probe; CIRCUIT_BREAKER_RECOVERY_TIMEOUT by default.
    failure_rate_threshold : float
        Share of failures in the sliding window (0 to 1) that opens it, too.
    slow_call_seconds : float
        Calls that take longer are slow.
    slow_call_rate_threshold : float
        Share of slow calls in the sliding window (0 to 1) that opens it, too; a slow probe then
        counts as failed.
    window_size : int
        Calls in the sliding window; 100 by default.
    window_seconds : float
        Leaves calls out of the window that are older than this.
    minimum_calls : int
        Calls in the window before its rates count; 10, or the window if it is smaller.
    half_open_permits : int
        Probes in flight at once, over all processes; ROBUSTNESS_HALF_OPEN_PERMITS by default.
    half_open_successes : int
        Successful probes that close it; 1 by default.
    """

    failure_threshold: int
    recovery_timeout: float
    failure_rate_threshold: float
    slow_call_seconds: float
    slow_call_rate_threshold: float
    window_size: int
    window_seconds: float
    minimum_calls: int
    half_open_permits: int
    half_open_successes: int


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
    """Permission to make one call; its holder reports once how the call went.

    A permit of a half-open breaker is a lease in the store: if its holder dies, another process
    gets it when the lease is over.
    """

    __slots__ = ("_admission", "_breaker", "_reported", "_started")

    def __init__(self, breaker: "CircuitBreaker", admission: Admission) -> None:
        self._breaker = breaker
        self._admission = admission
        self._started = time.perf_counter()
        self._reported = False

    @property
    def is_probe(self) -> bool:
        """Whether the call is a probe of a half-open breaker."""
        return self._admission.token is not None

    def succeeded(self, seconds: float | None = None) -> None:
        """Record a success and the time it took; by default, the time since the permit."""
        self._report("success", seconds=seconds)

    def failed(
        self, error: BaseException, seconds: float | None = None, *, counts: bool | None = None
    ) -> None:
        """Record a failure.

        An interrupt or a cancellation (no `Exception`) only gives the permit back.

        Parameters
        ----------
        error : BaseException
            The exception.
        seconds : float, optional
            The time it took; by default, the time since the permit.
        counts : bool, optional
            Whether it counts; by default, what the breaker's `counts` says.
        """
        if not isinstance(error, Exception):
            self.release()
        elif self._breaker.counts(error) if counts is None else counts:
            self._report("failure", error=error, seconds=seconds)
        else:
            self.ignored(error)

    def ignored(self, error: BaseException | None = None) -> None:
        """Record a failure that does not count."""
        self._report("ignored", error=error)

    def release(self) -> None:
        """Give the permit back unused."""
        self._report("released")

    def _report(
        self,
        outcome: Outcome,
        *,
        error: BaseException | None = None,
        seconds: float | None = None,
    ) -> None:
        if self._reported:
            return
        self._reported = True
        if seconds is None:
            seconds = time.perf_counter() - self._started
        slow = self._breaker._policy.is_slow(seconds)
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
                "iterated over by `with breaker.call:`"
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


def _is_systemic(error: Exception) -> bool:
    """Ask the error classifier whether an error concerns more than one file."""
    from robustness.error_classifier import get_error_classifier

    return get_error_classifier().classify_error(error, {}).systemic


class CircuitBreaker:
    """A circuit breaker.

    Parameters
    ----------
    name : str, optional
        Breakers of one name share one state, in all processes that use the same store. Without a
        name, the state is this object's alone, listed in its process under a made-up name.
    counts : callable, optional
        Whether an exception counts as a failure; one that does not is recorded as ignored. By
        default the error classifier decides: systemic errors count, a file's own fault does not.
    store : StateStore, optional
        Where the state lives; the process's store (`get_state_store`) for a breaker with a name.
    **options
        See `BreakerOptions`.

    Raises
    ------
    ValueError
        If an option is out of its range.

    Notes
    -----
    A call that meets a closed breaker costs no access to the store, see
    `robustness.breaker_store`.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        counts: Callable[[Exception], bool] | None = None,
        store: StateStore | None = None,
        **options: Unpack[BreakerOptions],
    ) -> None:
        settings = get_settings()
        defaults: BreakerOptions = {
            "failure_threshold": settings.circuit_breaker_failure_threshold,
            "recovery_timeout": settings.circuit_breaker_recovery_timeout,
            "half_open_permits": settings.half_open_permits,
        }
        self._policy = BreakerPolicy(**(defaults | options))
        self.counts = counts or _is_systemic
        self.name = f"unnamed-{uuid.uuid4().hex[:12]}" if name is None else name
        if name is None:
            store = store or _private_store()
        self._state = BreakerState(self.name, self._policy, store, _announce)
        if name is None:
            _unnamed[self.name] = self
        elif store is None:
            _registry.setdefault(name, self)

    @property
    def failure_threshold(self) -> int:
        """Consecutive failures that open it."""
        return self._policy.failure_threshold

    @property
    def recovery_timeout(self) -> float:
        """Seconds from opening to the first probe."""
        return self._policy.recovery_timeout

    @property
    def call(self) -> GuardedCall:
        """Calls a function under the breaker; also a context manager that guards its block.

        ``breaker.call(function, *args, **kwargs)`` returns the function's result;
        ``with breaker.call:`` guards a block. Each raises `CircuitBreakerOpenError` if the breaker
        refuses.
        """
        return GuardedCall(self)

    def acquire(self, *, lease_seconds: float | None = None) -> Permit:
        """Ask for a permit for one call, which may end in another thread.

        Parameters
        ----------
        lease_seconds : float, optional
            Seconds after which a probe's permit is given to others, longer than the call can take;
            TIMEOUT_MAX_DELAY by default.

        Raises
        ------
        CircuitBreakerOpenError
            If the breaker refuses.
        """
        answer = self._state.admit(lease_seconds or get_settings().timeout_max_delay)
        if isinstance(answer, Refusal):
            emit("breaker_refusals", breaker=_label(self.name))
            raise CircuitBreakerOpenError(self.name, answer.retry_after, answer.why)
        return Permit(self, answer)

    def get_state(self) -> CircuitState:
        """Return the state for a call now.

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
        emit(
            "breaker_transitions",
            breaker=_label(transition.name),
            to_state=transition.to_state.lower(),
        )
        for listener in _listeners:
            try:
                listener(transition)
            except Exception:
                logger.exception("A listener for circuit breaker transitions failed")


def _label(name: str) -> str:
    return "unnamed" if name in _unnamed else name


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
_unnamed: WeakValueDictionary[str, CircuitBreaker] = WeakValueDictionary()


def get_circuit_breaker(name: str) -> CircuitBreaker:
    """Return the breaker of a name, the same object each time.

    ``audio_processing``, ``database_operations``, ``network_operations`` and
    ``feature_extraction`` have thresholds of their own, all others those of the settings.
    """
    if name not in _registry:
        CircuitBreaker(name, **_KNOWN_BREAKERS.get(name, {}))  # it registers itself
    return _registry[name]


def all_circuit_breakers() -> dict[str, CircuitBreaker]:
    """Return the breakers of all processes that share the store, by name, in order.

    Then come those of this process that have no name, under made-up ones, while they are in use.
    """
    names = sa.select(circuit_breakers.c.name).order_by(circuit_breakers.c.name)
    found = get_state_store().query(lambda c: c.execute(names).scalars().all())
    unnamed = [breaker for reference in _unnamed.valuerefs() if (breaker := reference())]
    return {name: get_circuit_breaker(name) for name in found} | {b.name: b for b in unnamed}


def circuit_breaker(
    name: str | None = None,
    *,
    counts: Callable[[Exception], bool] | None = None,
    store: StateStore | None = None,
    **options: Unpack[BreakerOptions],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Guard a function or coroutine function by a breaker, kept as its attribute ``breaker``.

    Parameters
    ----------
    name : str, optional
        The breaker's name; by default the function's qualified name, which all processes that
        import it share. A function defined inside another one gets a breaker of its own.
    counts, store, **options
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
        breaker = CircuitBreaker(shared, counts=counts, store=store, **options)

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
