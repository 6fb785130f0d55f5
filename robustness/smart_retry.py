"""Retries with learned delays, which stop where retrying does harm.

The delays follow the usual formulas with jitter (M. Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015: the variant "equal jitter"). A token bucket that all processes share
bounds the share of attempts that are retries (as the retry budgets of gRPC, proposal A6, and
Finagle do), so that an outage is not made worse by everybody asking again.
"""

import asyncio
import functools
import inspect
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, ParamSpec, TypedDict, TypeVar, Unpack, cast

from tenacity import AsyncRetrying, RetryCallState, Retrying

from robustness import retry_budget
from robustness.error_classifier import ErrorClassifier, ErrorInfo, get_error_classifier
from robustness.instrumentation import emit
from robustness.log_context import get_logger
from robustness.retry_history import RetryHistory, RetryStrategy, growth
from robustness.settings import RobustnessSettings, get_settings
from robustness.state import StateStore

__all__ = [
    "DeferredError",
    "RetryOptions",
    "RetryResult",
    "RetryStrategy",
    "SmartRetryManager",
    "get_retry_manager",
    "set_testing",
    "smart_retry",
]

logger = get_logger("smart_retry")

T = TypeVar("T")
P = ParamSpec("P")

MAX_DELAY: Final = 60.0
"""Longest delay (s) between two attempts, unless the error asks for more."""
JITTER: Final = 0.5
"""Share of a delay that is random, downwards."""
StoppedBy = Literal["success", "not_retryable", "attempts", "time", "budget"]


class DeferredError(Exception):
    """Work is deferred: it has not failed, but can only go on later.

    Parameters
    ----------
    message : str
        What is deferred, and why.
    retry_after : float
        When to try again (s).
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class RetryResult(Generic[T]):
    """How retrying ended.

    Parameters
    ----------
    success : bool
        Whether an attempt succeeded.
    result : object
        What it returned; None without success.
    attempts : int
        Attempts made.
    total_time : float
        Seconds from the first attempt to the end, waits included.
    error : Exception or None
        What the last attempt raised; None on success.
    error_info : ErrorInfo or None
        Its classification.
    stopped_by : str
        Why there was no further attempt: ``success``, ``not_retryable`` (the error), ``attempts``,
        ``time`` (there was none for the next wait) or ``budget`` (too many retries elsewhere).
    delays : tuple of float
        The waits (s) between the attempts.
    strategy : RetryStrategy
        The strategy used.
    """

    success: bool
    result: T | None
    attempts: int
    total_time: float
    error: Exception | None
    error_info: ErrorInfo | None
    stopped_by: StoppedBy
    delays: tuple[float, ...]
    strategy: RetryStrategy

    def unwrap(self) -> T:
        """Return the result, or raise the last error.

        Raises
        ------
        Exception
            The error of the last attempt.
        """
        if self.error is not None:
            raise self.error
        return cast("T", self.result)


class RetryOptions(TypedDict, total=False):
    """Options common to all ways of retrying.

    Parameters
    ----------
    operation : str
        Name under which outcomes are recorded and budgets kept; the function's by default.
    context : mapping of str to object
        Context for the error classifier; a ``file_size_mb`` makes the adaptive strategy more
        patient.
    base_delay : float
        First delay (s), in place of the learned one.
    record : bool
        Whether the outcome goes into the retry history (True by default). False for frequent
        housekeeping, which would push everything else out of it.
    """

    operation: str
    context: Mapping[str, object]
    base_delay: float
    record: bool


@dataclass(frozen=True)
class _Testing:
    attempts: int
    cap: bool


_testing: _Testing | None = None


def set_testing(
    testing: bool, *, attempts: int = 1, cap: bool = False
) -> AbstractContextManager[object]:
    """Make waits instant and limit attempts in the whole process; for tests.

    Parameters
    ----------
    testing : bool
        True switches it on, False off.
    attempts : int, optional
        Attempts of each operation while it holds.
    cap : bool, optional
        Take `attempts` as an upper limit only, not in place of the operation's own number.

    Returns
    -------
    context manager
        The switch is already made; used with ``with``, it is undone at the end of the block.
    """
    global _testing
    undo = ExitStack()
    undo.callback(_restore_testing, _testing)
    _testing = _Testing(attempts, cap) if testing else None
    return undo


def _restore_testing(previous: _Testing | None) -> None:
    global _testing
    _testing = previous


class SmartRetryManager(RetryHistory):
    """Retries operations, learns from how that ended, and keeps the retry budget.

    What it learns is kept in the state store and shared by all processes.

    Parameters
    ----------
    store : StateStore, optional
        The process's store by default.
    classifier : ErrorClassifier, optional
        Decides which errors are retried; the process's classifier by default.
    settings : RobustnessSettings, optional
        The process's settings by default; used are `retry_total_seconds` and
        `retry_budget_ratio`.
    """

    def __init__(
        self,
        *,
        store: StateStore | None = None,
        classifier: ErrorClassifier | None = None,
        settings: RobustnessSettings | None = None,
    ) -> None:
        super().__init__(store)
        self._given_classifier = classifier
        self._settings = settings or get_settings()

    @property
    def classifier(self) -> ErrorClassifier:
        """The classifier that decides which errors are retried."""
        return self._given_classifier or get_error_classifier()

    def exponential_backoff(
        self,
        function: Callable[[], T],
        max_attempts: int = 3,
        timeout: float | None = None,
        **options: Unpack[RetryOptions],
    ) -> RetryResult[T]:
        """Retry after ``base_delay * 2 ** attempt`` seconds; see `retry`."""
        return self.retry(function, RetryStrategy.EXPONENTIAL, max_attempts, timeout, **options)

    def retry(
        self,
        function: Callable[[], T],
        strategy: RetryStrategy = RetryStrategy.EXPONENTIAL,
        max_attempts: int = 3,
        timeout: float | None = None,
        **options: Unpack[RetryOptions],
    ) -> RetryResult[T]:
        """Call a function until it succeeds or cannot be retried.

        Errors that are not retryable are not retried. A wait that does not fit into the time left
        ends the attempts at once. KeyboardInterrupt and its like pass through.

        Parameters
        ----------
        function : callable
            Takes nothing. It is not interrupted: to bound a single attempt, use
            `robustness.adaptive_timeout.timeout_context` or a worker pool within it.
        strategy : RetryStrategy, optional
            How the delay grows.
        max_attempts : int, optional
            Attempts at most, the first included.
        timeout : float, optional
            Seconds for all attempts and waits together; the setting
            ROBUSTNESS_RETRY_TOTAL_SECONDS by default.
        **options : Unpack[RetryOptions]
            See `RetryOptions`.

        Returns
        -------
        RetryResult
            The result or the error, which is not raised.

        Raises
        ------
        TypeError
            If the function is a coroutine function: `retry_async` is for those.
        """
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{_name(function)} is a coroutine function: use retry_async")
        work = _Work(self, function, RetryStrategy(strategy), max_attempts, timeout, options)
        try:
            value: T = Retrying(**work.hooks)(function)
        except Exception as error:  # noqa: BLE001
            return work.ended(None, error)
        return work.ended(value, None)

    async def retry_async(
        self,
        function: Callable[[], Awaitable[T]],
        strategy: RetryStrategy = RetryStrategy.EXPONENTIAL,
        max_attempts: int = 3,
        timeout: float | None = None,
        **options: Unpack[RetryOptions],
    ) -> RetryResult[T]:
        """Do the same with a function that returns an awaitable; see `retry`."""
        work = _Work(self, function, RetryStrategy(strategy), max_attempts, timeout, options)

        async def attempt() -> T:
            return await function()

        try:
            value: T = await AsyncRetrying(sleep=asyncio.sleep, **work.hooks)(attempt)
        except Exception as error:  # noqa: BLE001
            return work.ended(None, error)
        return work.ended(value, None)

    def calculate_delay(
        self,
        strategy: RetryStrategy,
        attempt: int,
        *,
        error_info: ErrorInfo | None = None,
        operation: str | None = None,
        file_size_mb: float | None = None,
        base_delay: float | None = None,
    ) -> float:
        """Return how long to wait before trying again.

        Parameters
        ----------
        strategy : RetryStrategy
            How the delay grows.
        attempt : int
            Number of the attempt that failed, from 0.
        error_info : ErrorInfo, optional
            Its error; the wait is at least its `retry_after`.
        operation : str, optional
            The operation, by whose history the first delay and the adaptive strategy go.
        file_size_mb : float, optional
            Size (MB) of the file worked on: the adaptive strategy is more patient where another
            failed attempt costs more, up to double from 1000 MB.
        base_delay : float, optional
            First delay (s), in place of the learned one.

        Returns
        -------
        float
            Seconds, at least 0, drawn between half the formula's value and all of it.
        """
        if _testing:
            return 0.0
        asked_for = (error_info.retry_after if error_info else None) or 0.0
        strategy = RetryStrategy(strategy)
        learned = self.parameters(strategy, operation)
        base = learned.base_delay if base_delay is None else base_delay
        delay = base * growth(strategy, min(attempt, 100), learned.multiplier)
        if strategy is RetryStrategy.ADAPTIVE:
            delay *= self._patience(operation) * (1 + min(1.0, (file_size_mb or 0.0) / 1000))
        delay = max(min(delay, MAX_DELAY) * (1 - JITTER * random.random()), asked_for)
        emit("retry_delay_seconds", delay, operation=operation, strategy=strategy.value)
        return delay

    def deposit(self, scope: str) -> None:
        """Credit a first attempt to the retry budget of a scope, such as an operation, soon."""
        retry_budget.deposit(self._store, scope, self._settings.retry_budget_ratio)

    def try_spend(self, scope: str) -> bool:
        """Take one retry out of the budget of a scope; return whether it may be made."""
        return retry_budget.try_spend(self._store, scope)


class _Work:
    """One operation and its attempts: the hooks of tenacity's loop."""

    def __init__(
        self,
        manager: SmartRetryManager,
        function: Callable[..., object],
        strategy: RetryStrategy,
        max_attempts: int,
        timeout: float | None,
        options: RetryOptions,
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {max_attempts}")
        if _testing:
            own = max_attempts if _testing.cap else _testing.attempts
            max_attempts = min(own, _testing.attempts)
        self._manager = manager
        self._strategy = strategy
        self._max_attempts = max_attempts
        self._seconds = manager._settings.retry_total_seconds if timeout is None else timeout
        self._options = options
        self._operation = options.get("operation") or _name(function)
        self._context = {"operation": self._operation, **options.get("context", {})}
        self._started = time.monotonic()
        self._attempts = 1
        self._stopped_by: StoppedBy = "not_retryable"
        self._errors: list[ErrorInfo] = []
        self._delays: list[float] = []
        manager.deposit(self._operation)
        self.hooks: dict[str, Any] = {
            "retry": self.should_retry,
            "wait": self.wait,
            "stop": self.should_stop,
            "before_sleep": self.before_sleep,
            "reraise": True,
        }

    def should_retry(self, state: RetryCallState) -> bool:
        assert state.outcome is not None
        self._attempts = state.attempt_number
        error = state.outcome.exception()
        if not isinstance(error, Exception):
            return False
        self._errors.append(self._manager.classifier.classify_error(error, self._context))
        return self._errors[-1].retryable

    def wait(self, state: RetryCallState) -> float:
        size = self._context.get("file_size_mb")
        return self._manager.calculate_delay(
            self._strategy,
            state.attempt_number - 1,
            error_info=self._errors[-1],
            operation=self._operation,
            file_size_mb=size if isinstance(size, int | float) else None,
            base_delay=self._options.get("base_delay"),
        )

    def should_stop(self, state: RetryCallState) -> bool:
        if state.attempt_number >= self._max_attempts:
            self._stopped_by = "attempts"
        elif time.monotonic() - self._started + state.upcoming_sleep > self._seconds:
            self._stopped_by = "time"
        elif not _testing and not self._manager.try_spend(self._operation):
            self._stopped_by = "budget"
            logger.warning("The retry budget of %s is used up", self._operation)
        else:
            return False
        return True

    def before_sleep(self, state: RetryCallState) -> None:
        self._delays.append(state.upcoming_sleep)
        logger.warning(
            "Attempt %d of %d at %s failed (%s); next one in %.1f s",
            state.attempt_number,
            self._max_attempts,
            self._operation,
            self._errors[-1].reason,
            state.upcoming_sleep,
        )

    def ended(self, value: T | None, error: Exception | None) -> RetryResult[T]:
        success = error is None
        total_time = time.monotonic() - self._started
        if success:
            self._stopped_by = "success"
            self._manager.classifier.record_success(self._operation)
        for info in self._errors:
            self._manager.classifier.mark_recovered(info, success)
        if self._options.get("record", True):
            self._manager.record_outcome(
                self._strategy, self._attempts, success, total_time, operation=self._operation
            )
        return RetryResult(
            success=success,
            result=value,
            attempts=self._attempts,
            total_time=total_time,
            error=error,
            error_info=self._errors[-1] if error else None,
            stopped_by=self._stopped_by,
            delays=tuple(self._delays),
            strategy=self._strategy,
        )


def _name(function: Callable[..., object]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None)
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


@functools.cache
def get_retry_manager() -> SmartRetryManager:
    """Return the process's retry manager."""
    return SmartRetryManager()


def smart_retry(
    strategy: RetryStrategy = RetryStrategy.EXPONENTIAL,
    max_attempts: int = 3,
    timeout: float | None = None,
    **options: Unpack[RetryOptions],
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function or coroutine function so that calling it retries.

    The decorated function returns what the first successful attempt returns, or raises what the
    last one raised.

    Parameters
    ----------
    strategy, max_attempts, timeout, **options
        As for `SmartRetryManager.retry`.

    Raises
    ------
    TypeError
        If it decorates a generator function: calling one runs nothing that could be retried.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{_name(function)} is a generator function, which cannot be retried")
        named: RetryOptions = {"operation": _name(function), **options}

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: P.args, **kwargs: P.kwargs) -> object:
                result = await get_retry_manager().retry_async(
                    lambda: function(*args, **kwargs), strategy, max_attempts, timeout, **named
                )
                return result.unwrap()

            return cast("Callable[P, T]", call_async)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return (
                get_retry_manager()
                .retry(lambda: function(*args, **kwargs), strategy, max_attempts, timeout, **named)
                .unwrap()
            )

        return call

    return decorate
