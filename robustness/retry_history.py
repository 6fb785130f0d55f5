"""The outcomes of retries so far, and the delays learned from them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypedDict, TypeVar, cast

import sqlalchemy as sa

from robustness.instrumentation import emit
from robustness.log_context import get_logger
from robustness.state import StateStore, get_state_store
from robustness.state_schema import insert_into, prune, retry_outcomes, retry_parameters

logger = get_logger("smart_retry")

T = TypeVar("T")

OUTCOMES_KEPT: Final = 1000
"""Outcomes kept per strategy."""

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


def growth(strategy: RetryStrategy, attempt: int, multiplier: float) -> float:
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
    """

    success_rate: float
    avg_attempts: float
    avg_total_time: float
    operations: int


class RetryHistory:
    """The outcomes of retried operations, shared by all processes, and what is learned from them.

    Parameters
    ----------
    store : StateStore, optional
        Where they are kept; the process's store by default.
    """

    def __init__(self, store: StateStore | None = None) -> None:
        self._given_store = store
        self._cached: dict[object, tuple[float, object]] = {}

    @property
    def _store(self) -> StateStore:
        return self._given_store or get_state_store()

    def parameters(self, strategy: RetryStrategy, operation: str | None = None) -> RetryParameters:
        """Return the parameters of a strategy as adjusted from an operation's outcomes so far."""
        return self._recent(
            ("parameters", strategy, operation),
            lambda: self._stored_parameters(strategy, operation)[0],
        )

    def record_outcome(
        self,
        strategy: RetryStrategy,
        attempts: int,
        success: bool,
        total_seconds: float,
        *,
        operation: str | None = None,
    ) -> None:
        """Record how an operation ended, and adjust its parameters of the strategy if that is due.

        Of its retried calls since the last adjustment, ten or more: if less than half succeeded,
        the waits were too short for the fault, and the base delay grows by half; if more than nine
        in ten did, it shrinks by a fifth. It stays within an eighth and eight times its default.

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
            outcome = "succeeded" if success else "failed"
            emit("retried", operation=operation, strategy=strategy.value, outcome=outcome)
            self._adjust(strategy, operation)

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
        return {
            name: RetryStats(
                success_rate=float(success_rate),
                avg_attempts=float(attempts),
                avg_total_time=float(total_seconds),
                operations=operations,
            )
            for name, success_rate, attempts, total_seconds, operations in rows
        }

    def _stored_parameters(
        self, strategy: RetryStrategy, operation: str | None
    ) -> tuple[RetryParameters, float]:
        """Return an operation's parameters and when they were last changed (0: never)."""
        row = self._store.query(
            lambda connection: connection.execute(
                sa.select(retry_parameters).where(
                    retry_parameters.c.strategy == strategy.value,
                    retry_parameters.c.operation == (operation or ""),
                )
            ).one_or_none()
        )
        if row is None:
            return DEFAULT_PARAMETERS[strategy], 0.0
        return RetryParameters(row.base_delay, row.multiplier), row.updated_at

    def _adjust(self, strategy: RetryStrategy, operation: str | None) -> None:
        parameters, changed_at = self._stored_parameters(strategy, operation)
        retried, succeeded = self._retried(
            retry_outcomes.c.strategy == strategy.value,
            retry_outcomes.c.operation == operation,
            retry_outcomes.c.at > changed_at,
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
                .values(strategy=strategy.value, operation=operation or "", **values)
                .on_conflict_do_update(
                    index_elements=["strategy", "operation"],
                    set_=values,
                    # Not if another process was faster: it has used the same outcomes.
                    where=retry_parameters.c.updated_at == changed_at,
                )
            )
        )
        self._cached.pop(("parameters", strategy, operation), None)
        logger.info(
            "Of %d calls of %s retried with strategy %s, %d succeeded; "
            "its base delay is %.2f s now",
            retried,
            operation or "unnamed operations",
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
