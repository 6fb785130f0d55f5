"""Retries that wait as long as experience says, and stop where retrying does harm.

The delays follow the usual formulas with jitter (M. Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015: the variant "equal jitter"). A token bucket that all processes share
bounds the share of attempts that are retries (as the retry budgets of gRPC, proposal A6, and
Finagle do), so that an outage is not made worse by everybody asking again.
"""

import asyncio
import functools
import inspect
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Generic, Literal, ParamSpec, TypedDict, TypeVar, Unpack, cast

import sqlalchemy as sa
from tenacity import AsyncRetrying, RetryCallState, Retrying

import robustness.log_context  # noqa: F401 - its fields belong on this module's log records
from robustness.error_classifier import (
    ErrorClassifier,
    ErrorInfo,
    get_error_classifier,
)
from robustness.settings import RobustnessSettings, get_settings
from robustness.state import (
    StateStore,
    get_state_store,
    insert_into,
    prune,
    retry_budget,
    retry_outcomes,
    retry_parameters,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

MAX_DELAY: Final = 60.0
"""Longest delay (s) between two attempts, unless whoever refused asks for more."""
JITTER: Final = 0.5
"""Share of a delay that is random, downwards."""
OUTCOMES_KEPT: Final = 1000
"""Outcomes kept per strategy."""

BUDGET_RESERVE: Final = 10.0
"""Retries that a new or long idle scope may make before it has done any work."""
BUDGET_CAPACITY: Final = 100.0
"""Most retries a scope can save up."""
BUDGET_REFILL_SECONDS: Final = 600.0
"""Time (s) in which an exhausted budget gets its reserve back, with no work done at all."""

_ADJUST_AFTER = 10
_ADJUST_RANGE = 8.0
_CACHE_SECONDS = 2.0


class RetryStrategy(StrEnum):
    """How the delay grows with the attempts."""

    EXPONENTIAL = "exponential"
    LINEAR = "linear"
    ADAPTIVE = "adaptive"
    FIBONACCI = "fibonacci"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class RetryParameters:
    """What the formulas of a strategy work with.

    Parameters
    ----------
    base_delay : float
        Delay (s) before the first retry, before jitter.
    multiplier : float
        Exponential and adaptive: ratio of one delay to the one before. Linear: increment, as a
        multiple of `base_delay`. Without meaning for the others.
    """

    base_delay: float
    multiplier: float


DEFAULT_PARAMETERS: Mapping[RetryStrategy, RetryParameters] = {
    RetryStrategy.EXPONENTIAL: RetryParameters(1.0, 2.0),
    RetryStrategy.LINEAR: RetryParameters(1.0, 1.0),
    RetryStrategy.ADAPTIVE: RetryParameters(1.0, 2.0),
    RetryStrategy.FIBONACCI: RetryParameters(1.0, 1.0),
    RetryStrategy.CONSTANT: RetryParameters(1.0, 1.0),
}
"""The parameters before any outcome has been seen."""

StoppedBy = Literal["success", "not_retryable", "attempts", "time", "budget"]


class DeferredError(Exception):
    """Work that cannot go on yet, and is no failure; come back later.

    Parameters
    ----------
    message : str
        What waits, and for what.
    retry_after : float
        When to come back (s).
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


class RejectedResultError(Exception):
    """The last attempt returned a value that `retry_if_result` does not accept."""


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
        What is known of the circumstances, for the error classifier; a ``file_size_mb`` makes the
        adaptive strategy more patient.
    retry_on : exception class, tuple of them, or callable
        Which exceptions to retry (a callable takes the exception and returns a bool), in place of
        the error classifier's judgement.
    retry_if_result : callable
        Takes a returned value and says whether to try for another.
    base_delay : float
        First delay (s), in place of the learned one.
    max_delay : float
        Longest delay (s), `MAX_DELAY` by default.
    on_retry : callable
        Called before each wait with the attempt's number (from 1), its error (None for a rejected
        result) and the wait (s).
    """

    operation: str
    context: Mapping[str, object]
    retry_on: type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]
    retry_if_result: Callable[[object], bool]
    base_delay: float
    max_delay: float
    on_retry: Callable[[int, Exception | None, float], None]


class RetryStats(TypedDict):
    """Performance of one strategy over its newest outcomes.

    Parameters
    ----------
    success_rate : float
        Share of operations that succeeded in the end, 0 to 1.
    avg_attempts : float
        Attempts per operation.
    avg_total_time : float
        Seconds per operation, waits included.
    operations : int
        How many operations these figures are from.
    base_delay, multiplier : float
        The parameters in force, see `RetryParameters`.
    """

    success_rate: float
    avg_attempts: float
    avg_total_time: float
    operations: int
    base_delay: float
    multiplier: float


@dataclass(frozen=True)
class _Testing:
    attempts: int
    cap: bool


_testing: _Testing | None = None


def set_testing(
    testing: bool, *, attempts: int = 1, cap: bool = False
) -> AbstractContextManager[object]:
    """Make waits instant and limit attempts, in the whole process; for tests.

    Parameters
    ----------
    testing : bool
        Whether to.
    attempts : int, optional
        Attempts of each operation meanwhile.
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


class SmartRetryManager:
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
        self._given_store = store
        self._given_classifier = classifier
        self._settings = settings or get_settings()
        self._cached: dict[object, tuple[float, object]] = {}

    @property
    def _store(self) -> StateStore:
        return self._given_store or get_state_store()

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

    def linear_backoff(
        self,
        function: Callable[[], T],
        max_attempts: int = 3,
        timeout: float | None = None,
        **options: Unpack[RetryOptions],
    ) -> RetryResult[T]:
        """Retry after ``base_delay + increment * attempt`` seconds; see `retry`."""
        return self.retry(function, RetryStrategy.LINEAR, max_attempts, timeout, **options)

    def adaptive_retry(
        self,
        function: Callable[[], T],
        max_attempts: int = 3,
        timeout: float | None = None,
        **options: Unpack[RetryOptions],
    ) -> RetryResult[T]:
        """Retry after exponential delays scaled by the operation's own history; see `retry`."""
        return self.retry(function, RetryStrategy.ADAPTIVE, max_attempts, timeout, **options)

    def fibonacci_backoff(
        self,
        function: Callable[[], T],
        max_attempts: int = 3,
        timeout: float | None = None,
        **options: Unpack[RetryOptions],
    ) -> RetryResult[T]:
        """Retry after ``base_delay`` times 1, 1, 2, 3, 5, ... seconds; see `retry`."""
        return self.retry(function, RetryStrategy.FIBONACCI, max_attempts, timeout, **options)

    def constant_delay(
        self,
        function: Callable[[], T],
        max_attempts: int = 3,
        timeout: float | None = None,
        **options: Unpack[RetryOptions],
    ) -> RetryResult[T]:
        """Retry after ``base_delay`` seconds each time; see `retry`."""
        return self.retry(function, RetryStrategy.CONSTANT, max_attempts, timeout, **options)

    def retry(
        self,
        function: Callable[[], T],
        strategy: RetryStrategy = RetryStrategy.EXPONENTIAL,
        max_attempts: int = 3,
        timeout: float | None = None,
        **options: Unpack[RetryOptions],
    ) -> RetryResult[T]:
        """Call a function until it succeeds, or until trying again is no use.

        Errors that are not retryable are not retried, and nothing is waited for that could not
        be used: a wait that does not fit into the time left ends the attempts at once. Exceptions
        that are no `Exception`, such as KeyboardInterrupt, pass through.

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
            What came of it; errors are in there, not raised.

        Raises
        ------
        TypeError
            If the function is a coroutine function: `retry_async` is for those.
        """
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{_name(function)} is a coroutine function: use retry_async")
        work = _Work(self, function, RetryStrategy(strategy), max_attempts, timeout, options)
        loop = Retrying(
            retry=work.should_retry,
            wait=work.wait,
            stop=work.should_stop,
            before_sleep=work.before_sleep,
            reraise=True,
        )
        try:
            value: T = loop(function)
        except Exception as error:  # noqa: BLE001
            return work.failed(error)
        return work.succeeded(value)

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
        loop = AsyncRetrying(
            retry=work.should_retry,
            wait=work.wait,
            stop=work.should_stop,
            before_sleep=work.before_sleep,
            sleep=asyncio.sleep,
            reraise=True,
        )

        async def attempt() -> T:
            return await function()

        try:
            value: T = await loop(attempt)
        except Exception as error:  # noqa: BLE001
            return work.failed(error)
        return work.succeeded(value)

    def calculate_delay(
        self,
        strategy: RetryStrategy,
        attempt: int,
        *,
        error_info: ErrorInfo | None = None,
        operation: str | None = None,
        file_size_mb: float | None = None,
        base_delay: float | None = None,
        max_delay: float = MAX_DELAY,
    ) -> float:
        """Return how long to wait before trying again.

        Parameters
        ----------
        strategy : RetryStrategy
            How the delay grows.
        attempt : int
            Number of the attempt that failed, from 0.
        error_info : ErrorInfo, optional
            What it failed of: where whoever refused has said when to come back, the wait is at
            least that long.
        operation : str, optional
            The operation, whose history the adaptive strategy goes by.
        file_size_mb : float, optional
            Size (MB) of the file worked on: the adaptive strategy is more patient where another
            failed attempt costs more, up to double from 1000 MB.
        base_delay : float, optional
            First delay (s), in place of the learned one.
        max_delay : float, optional
            Longest delay (s).

        Returns
        -------
        float
            Seconds, at least 0, drawn between half the formula's value and all of it.
        """
        if _testing:
            return 0.0
        asked_for = (error_info.retry_after if error_info else None) or 0.0
        strategy = RetryStrategy(strategy)
        learned = self.parameters(strategy)
        base = learned.base_delay if base_delay is None else base_delay
        delay = base * _growth(strategy, min(attempt, 100), learned.multiplier)
        if strategy is RetryStrategy.ADAPTIVE:
            delay *= self._patience(operation) * (1 + min(1.0, (file_size_mb or 0.0) / 1000))
        delay = min(delay, max_delay) * (1 - JITTER * random.random())
        return max(delay, asked_for)

    def parameters(self, strategy: RetryStrategy) -> RetryParameters:
        """Return the parameters of a strategy as adjusted from outcomes so far."""
        return self._recent(("parameters", strategy), lambda: self._stored_parameters(strategy)[0])

    def record_outcome(
        self,
        strategy: RetryStrategy,
        attempts: int,
        success: bool,
        total_seconds: float,
        *,
        operation: str | None = None,
    ) -> None:
        """Record how an operation ended, and adjust the strategy's parameters if that is due.

        If of the operations that had to be retried less than half succeeded in the end, their
        waits did not outlast the fault: the base delay grows by half. If more than nine in ten
        did, it shrinks by a fifth. Each change rests on ten operations or more after the last
        one, and the base delay stays within an eighth and eight times its default.

        Parameters
        ----------
        strategy : RetryStrategy
            The strategy.
        attempts : int
            Attempts made.
        success : bool
            Whether the last one succeeded.
        total_seconds : float
            Time from the first attempt to the end (s).
        operation : str, optional
            The operation.
        """
        strategy = RetryStrategy(strategy)

        def write(connection: sa.Connection) -> None:
            key = connection.execute(
                sa.insert(retry_outcomes).values(
                    strategy=strategy.value,
                    operation=operation,
                    at=time.time(),
                    attempts=attempts,
                    success=success,
                    total_seconds=total_seconds,
                )
            ).inserted_primary_key
            if key and key[0] % 50 == 0:
                prune(connection, retry_outcomes, OUTCOMES_KEPT, strategy=strategy.value)

        self._store.transact(write)
        if attempts > 1:
            self._adjust(strategy)

    def get_retry_stats(self) -> dict[str, RetryStats]:
        """Return the performance of each strategy that has been used, by its name."""
        rows = self._store.query(
            lambda connection: connection.execute(
                sa.select(
                    retry_outcomes.c.strategy,
                    sa.func.avg(sa.cast(retry_outcomes.c.success, sa.Integer) * 1.0),
                    sa.func.avg(retry_outcomes.c.attempts * 1.0),
                    sa.func.avg(retry_outcomes.c.total_seconds),
                    sa.func.count(),
                ).group_by(retry_outcomes.c.strategy)
            ).all()
        )
        stats = {}
        for name, success_rate, attempts, total_seconds, operations in rows:
            in_force = self.parameters(RetryStrategy(name))
            stats[str(name)] = RetryStats(
                success_rate=float(success_rate),
                avg_attempts=float(attempts),
                avg_total_time=float(total_seconds),
                operations=operations,
                base_delay=in_force.base_delay,
                multiplier=in_force.multiplier,
            )
        return stats

    def deposit(self, scope: str) -> None:
        """Credit a first attempt to the retry budget of a scope.

        Parameters
        ----------
        scope : str
            What the budget is for, for instance an operation.
        """
        self._change_budget(scope, self._settings.retry_budget_ratio)

    def try_spend(self, scope: str) -> bool:
        """Take one retry out of the budget of a scope, if there is one.

        Parameters
        ----------
        scope : str
            As for `deposit`.

        Returns
        -------
        bool
            Whether the retry may be made.
        """
        return self._change_budget(scope, -1.0)

    def _change_budget(self, scope: str, change: float) -> bool:
        def write(connection: sa.Connection) -> bool:
            now = time.time()
            row = connection.execute(
                sa.select(retry_budget.c.tokens, retry_budget.c.updated_at)
                .where(retry_budget.c.scope == scope)
                .with_for_update()
            ).one_or_none()
            tokens = BUDGET_RESERVE
            if row:
                idle = max(0.0, now - row.updated_at)
                refilled = row.tokens + idle * BUDGET_RESERVE / BUDGET_REFILL_SECONDS
                tokens = max(row.tokens, min(refilled, BUDGET_RESERVE))
            if tokens + change < 0:
                return False
            values = {"tokens": min(tokens + change, BUDGET_CAPACITY), "updated_at": now}
            connection.execute(
                insert_into(connection, retry_budget)
                .values(scope=scope, **values)
                .on_conflict_do_update(index_elements=["scope"], set_=values)
            )
            return True

        return self._store.transact(write)

    def _stored_parameters(self, strategy: RetryStrategy) -> tuple[RetryParameters, float]:
        """Return a strategy's parameters and when they were last changed (0: never)."""
        row = self._store.query(
            lambda connection: connection.execute(
                sa.select(retry_parameters).where(retry_parameters.c.strategy == strategy.value)
            ).one_or_none()
        )
        if row is None:
            return DEFAULT_PARAMETERS[strategy], 0.0
        return RetryParameters(row.base_delay, row.multiplier), row.updated_at

    def _adjust(self, strategy: RetryStrategy) -> None:
        parameters, changed_at = self._stored_parameters(strategy)
        retried, succeeded = self._retried(
            retry_outcomes.c.strategy == strategy.value, retry_outcomes.c.at > changed_at
        )
        if retried < _ADJUST_AFTER or 0.5 <= succeeded / retried <= 0.9:
            return
        default = DEFAULT_PARAMETERS[strategy].base_delay
        factor = 1.5 if succeeded / retried < 0.5 else 0.8
        base_delay = min(
            max(parameters.base_delay * factor, default / _ADJUST_RANGE), default * _ADJUST_RANGE
        )
        values = {
            "base_delay": base_delay,
            "multiplier": parameters.multiplier,
            "updated_at": time.time(),
        }
        self._store.transact(
            lambda connection: connection.execute(
                insert_into(connection, retry_parameters)
                .values(strategy=strategy.value, **values)
                .on_conflict_do_update(
                    index_elements=["strategy"],
                    set_=values,
                    # Not if another process was faster: it has used the same outcomes.
                    where=retry_parameters.c.updated_at == changed_at,
                )
            )
        )
        self._cached.pop(("parameters", strategy), None)
        logger.info(
            "Of %d operations retried with strategy %s, %d succeeded; its base delay is %.2f s now",
            retried,
            strategy,
            succeeded,
            base_delay,
        )

    def _patience(self, operation: str | None) -> float:
        """Return by how much to stretch a wait, 0.5 to 2.5, from how retries ended so far.

        It is 1 where three of four retried operations succeeded, which is also assumed to begin
        with, at the weight of three operations.
        """
        of_operation = () if operation is None else (retry_outcomes.c.operation == operation,)
        retried, succeeded = self._recent(
            ("patience", operation), lambda: self._retried(*of_operation)
        )
        return 2.5 - 2.0 * (succeeded + 2.25) / (retried + 3)

    def _retried(self, *conditions: sa.ColumnElement[bool]) -> tuple[int, int]:
        """Count operations that were retried, and those of them that succeeded."""
        row = self._store.query(
            lambda connection: connection.execute(
                sa.select(
                    sa.func.count(),
                    sa.func.coalesce(sa.func.sum(sa.cast(retry_outcomes.c.success, sa.Integer)), 0),
                ).where(retry_outcomes.c.attempts > 1, *conditions)
            ).one()
        )
        return row[0], row[1]

    def _recent(self, key: object, read: Callable[[], T]) -> T:
        """Return a value read from the store not long ago."""
        expires, value = self._cached.get(key, (0.0, None))
        now = time.monotonic()
        if now >= expires:
            value = read()
            self._cached[key] = (now + _CACHE_SECONDS, value)
        return cast("T", value)


def _growth(strategy: RetryStrategy, attempt: int, multiplier: float) -> float:
    """Return a strategy's delay in multiples of the base delay."""
    match strategy:
        case RetryStrategy.EXPONENTIAL | RetryStrategy.ADAPTIVE:
            return float(multiplier**attempt)
        case RetryStrategy.LINEAR:
            return 1 + multiplier * attempt
        case RetryStrategy.FIBONACCI:
            this, following = 1, 1
            for _ in range(attempt):
                this, following = following, this + following
            return float(this)
        case RetryStrategy.CONSTANT:
            return 1.0


class _Work:
    """One operation and its attempts: what tenacity's loop asks, and what is made of the end."""

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
        self._rejected = False
        self._errors: list[ErrorInfo] = []
        self._delays: list[float] = []
        manager.deposit(self._operation)

    def should_retry(self, state: RetryCallState) -> bool:
        assert state.outcome is not None
        self._attempts = state.attempt_number
        error = state.outcome.exception()
        if error is None:
            unwanted = self._options.get("retry_if_result")
            self._rejected = unwanted is not None and unwanted(state.outcome.result())
            return self._rejected
        if not isinstance(error, Exception):
            return False
        info = self._manager.classifier.classify_error(error, self._context)
        self._errors.append(info)
        retry_on = self._options.get("retry_on")
        if retry_on is None:
            return info.retryable
        if isinstance(retry_on, type | tuple):
            return isinstance(error, retry_on)
        return retry_on(error)

    def wait(self, state: RetryCallState) -> float:
        size = self._context.get("file_size_mb")
        return self._manager.calculate_delay(
            self._strategy,
            state.attempt_number - 1,
            error_info=None if self._rejected else self._errors[-1],
            operation=self._operation,
            file_size_mb=size if isinstance(size, int | float) else None,
            base_delay=self._options.get("base_delay"),
            max_delay=self._options.get("max_delay", MAX_DELAY),
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
        assert state.outcome is not None
        error = state.outcome.exception()
        self._delays.append(state.upcoming_sleep)
        logger.warning(
            "Attempt %d of %d at %s failed (%s); next one in %.1f s",
            state.attempt_number,
            self._max_attempts,
            self._operation,
            "result rejected" if self._rejected else self._errors[-1].reason,
            state.upcoming_sleep,
        )
        if on_retry := self._options.get("on_retry"):
            on_retry(state.attempt_number, cast("Exception | None", error), state.upcoming_sleep)

    def succeeded(self, value: T) -> RetryResult[T]:
        self._stopped_by = "success"
        self._manager.classifier.record_success(self._operation)
        return self._end(success=True, value=value, error=None)

    def failed(self, error: Exception) -> RetryResult[T]:
        if self._rejected:
            error = RejectedResultError(
                f"{self._operation} returned no acceptable value in {self._attempts} attempts"
            )
        return self._end(success=False, value=None, error=error)

    def _end(self, *, success: bool, value: T | None, error: Exception | None) -> RetryResult[T]:
        total_time = time.monotonic() - self._started
        for info in self._errors:
            self._manager.classifier.mark_recovered(info, success)
        self._manager.record_outcome(
            self._strategy, self._attempts, success, total_time, operation=self._operation
        )
        return RetryResult(
            success=success,
            result=value,
            attempts=self._attempts,
            total_time=total_time,
            error=error,
            error_info=self._errors[-1] if error and self._errors else None,
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
