"""Rows on their way to the landing, and the outcomes that may be reported once they are there."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator

from audio_assets.extraction.cells import CellOutcome
from audio_assets.features.base import Row
from audio_assets.warehouse.landing import Landing, Part
from robustness.circuit_breaker import get_circuit_breaker
from robustness.error_classifier import ErrorInfo
from robustness.smart_retry import RetryStrategy, get_retry_manager

FLUSH_S = 4.0
"""Rows wait at most this long before they are made durable (s)."""

SAVE_ATTEMPTS = 3
SAVE_S = 10.0
"""Tries to make rows durable, and the time for them (s), before the cells must wait."""


class Outbox:
    """The outcomes of a run's cells, reported only when their rows are durable.

    What cannot be made durable now, because the disk is full or the object store is away, is kept:
    nothing is computed twice for want of a disk.

    Parameters
    ----------
    landing : Landing
        Where the rows go.

    Attributes
    ----------
    error : ErrorInfo or None
        Why the rows could not be made durable when that was last tried.
    failing_since : float or None
        Since when not (s, monotonic clock).
    """

    def __init__(self, landing: Landing) -> None:
        self._landing = landing
        self._rows: dict[str, list[Row]] = defaultdict(list)
        self._parts: deque[Part] = deque()
        self._outcomes: deque[CellOutcome] = deque()
        self._flushed_at = time.monotonic()
        self.error: ErrorInfo | None = None
        self.failing_since: float | None = None

    def add(self, table: str, *rows: Row) -> None:
        """Take in rows of a landing table."""
        self._rows[table].extend(rows)

    def report(self, outcome: CellOutcome) -> None:
        """Take in an outcome, which rests on the rows that were added before it."""
        self._outcomes.append(outcome)

    @property
    def due_at(self) -> float:
        """When rows and outcomes should be flushed (s, monotonic clock)."""
        asked_for = (self.error and self.error.retry_after) or 0.0
        return self._flushed_at + max(FLUSH_S, asked_for)

    @property
    def due_in(self) -> float:
        """Time until then (s)."""
        return max(self.due_at - time.monotonic(), 0.0)

    def flush(self) -> Iterator[CellOutcome]:
        """Make the rows durable and yield the outcomes; none while they cannot be.

        An outcome is dropped only when the next one is asked for: one that could not be reported
        is yielded again by the next call.

        Raises
        ------
        Exception
            What the landing failed of, if it would do so again.
        """
        for table, rows in self._rows.items():
            if rows:
                self._parts.append(self._landing.prepare(table, rows))
                rows.clear()
        self.error = self._append() if self._parts else None
        self._flushed_at = time.monotonic()
        self.failing_since = (self.failing_since or self._flushed_at) if self.error else None
        if not self.error:
            # While these are reported others come in, and some may be withdrawn.
            for outcome in list(self._outcomes):
                if outcome in self._outcomes:
                    yield outcome
                    self._outcomes.remove(outcome)

    def _append(self) -> ErrorInfo | None:
        breaker = get_circuit_breaker(
            "database_operations" if self._landing.is_local else "network_operations"
        )

        def append() -> None:
            while self._parts:
                breaker.call(self._landing.save, self._parts[0])
                self._parts.popleft()

        saved = get_retry_manager().retry(
            append, RetryStrategy.EXPONENTIAL, SAVE_ATTEMPTS, SAVE_S, operation="landing"
        )
        if saved.error_info is None or not saved.error_info.retryable:
            saved.unwrap()
        return saved.error_info

    def take(self, feature_set: str) -> list[CellOutcome]:
        """Remove the outcomes of a feature set, which cannot be made durable, and return them."""
        taken = [o for o in self._outcomes if o.feature_set == feature_set]
        self._outcomes = deque(o for o in self._outcomes if o.feature_set != feature_set)
        return taken

    def withdraw(self, file_key: str) -> None:
        """Report nothing of a file any more but what comes from now on."""
        self._outcomes = deque(o for o in self._outcomes if o.file_key != file_key)
