"""Where the robustness layer meets Dagster: step retries and the run's log."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from dagster import DagsterLogManager, Failure, RetryPolicy

from robustness.error_classifier import get_error_classifier
from robustness.log_context import FIELDS, log_context
from robustness.settings import get_settings
from robustness.smart_retry import DeferredError, RetryStrategy, get_retry_manager


class SmartRetryPolicy(RetryPolicy):
    """A retry policy whose delays come from the smart retry manager.

    Dagster asks it for the delay when a step raised, crashed or was interrupted. A
    `robustness.smart_retry.DeferredError` has its own delay. Any other exception is classified: an
    open circuit breaker sets the delay, an error that is not retryable fails the step at once, and
    an interruption (the run was terminated) is raised again.

    While Dagster sleeps it does not notice that the run is terminated. A step that can wait by
    itself sets `longest_sleep`, and waits for `time_left` when it is retried.

    Parameters
    ----------
    max_retries : int, optional
        Retries at most.
    strategy : RetryStrategy or str, optional
        How the delay grows.
    operation : str, optional
        The operation whose history the adaptive strategy goes by.
    longest_sleep : float, optional
        Longest delay that Dagster is given (s).
    """

    strategy: RetryStrategy
    operation: str | None
    longest_sleep: float | None
    _due: float

    def __new__(  # noqa: D102
        cls,
        max_retries: int = 2,
        strategy: RetryStrategy | str = RetryStrategy.ADAPTIVE,
        operation: str | None = None,
        longest_sleep: float | None = None,
    ) -> Self:
        policy: Self = super().__new__(cls, max_retries=max_retries)
        policy.strategy = RetryStrategy(strategy)
        policy.operation = operation
        policy.longest_sleep = longest_sleep
        policy._due = 0.0
        return policy

    def __getnewargs__(self) -> tuple[int, RetryStrategy, str | None, float | None]:
        # That of a named tuple would give the base class's fields to this constructor.
        return (self.max_retries, self.strategy, self.operation, self.longest_sleep)

    @property
    def time_left(self) -> float:
        """What is left of the last delay (s): in a step that is retried, what it has to wait."""
        return max(self._due - time.monotonic(), 0.0)

    def calculate_delay(self, attempt_num: int) -> float:
        """Return how long to wait before the next attempt at a step.

        Parameters
        ----------
        attempt_num : int
            Number of the attempt that failed, from 1.

        Returns
        -------
        float
            Seconds.

        Raises
        ------
        dagster.Failure
            If what the step raised is not retryable, or asks for a wait that is longer than
            ROBUSTNESS_RETRY_TOTAL_SECONDS.
        BaseException
            The interruption, if that is what ended the step.
        """
        delay = self._delay(attempt_num, sys.exception())
        self._due = time.monotonic() + delay
        return delay if self.longest_sleep is None else min(delay, self.longest_sleep)

    def _delay(self, attempt_num: int, error: BaseException | None) -> float:
        if isinstance(error, DeferredError):
            return error.retry_after
        if error is not None and not isinstance(error, Exception):
            raise error
        info = None
        if error is not None:
            info = get_error_classifier().classify(error, {"operation": self.operation})
            longest = get_settings().retry_total_seconds
            no_use = None
            if not info.retryable:
                no_use = "it would fail again"
            elif (info.retry_after or 0.0) > longest:
                no_use = (
                    f"it should wait {info.retry_after:.0f} s, and "
                    f"ROBUSTNESS_RETRY_TOTAL_SECONDS is {longest:g}"
                )
            if no_use:
                raise Failure(
                    description=f"Not retried, as {no_use}: {info.reason}",
                    metadata={"error_type": info.error_type.value, "severity": info.severity.value},
                    allow_retries=False,
                ) from error
        return get_retry_manager().calculate_delay(
            self.strategy, attempt_num - 1, error_info=info, operation=self.operation
        )


class _Forward(logging.Handler):
    def __init__(self, log: DagsterLogManager, run_id: str) -> None:
        super().__init__()
        self._log = log
        self._run_id = run_id

    def emit(self, record: logging.LogRecord) -> None:
        about = {name: getattr(record, name, None) for name in FIELDS}
        # Another run of the same process has a log of its own.
        if about.pop("run_id") not in (None, self._run_id):
            return
        fields = ", ".join(f"{name}={value}" for name, value in about.items() if value is not None)
        message = self.format(record)
        try:
            self._log.log(record.levelno, f"{message} [{fields}]" if fields else message)
        except Exception:  # noqa: BLE001 - Dagster's storage fails; who logs is not to fail with it
            self.handleError(record)


@contextmanager
def log_to(log: DagsterLogManager, run_id: str) -> Iterator[None]:
    """Show what the robustness layer logs, breaker transitions among it, in a Dagster run's log.

    Records logged within the block carry the run id; file, feature set and attempt come from
    `robustness.log_context.log_context`. What the loggers ``robustness.*`` let through by their
    levels is forwarded. Do not list them under ``managed_python_loggers`` in ``dagster.yaml`` as
    well, or the run's log has each record twice.

    Parameters
    ----------
    log : DagsterLogManager
        The ``log`` of an op's or asset's context.
    run_id : str
        The run.
    """
    handler = _Forward(log, run_id)
    logger = logging.getLogger("robustness")
    logger.addHandler(handler)
    try:
        with log_context(run_id=run_id):
            yield
    finally:
        logger.removeHandler(handler)
