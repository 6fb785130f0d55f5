"""The outbox: rows not yet in the landing, and the outcomes to report once they are."""

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
"""Rows are written at most this long after they came in (s)."""

SAVE_ATTEMPTS = 3
SAVE_S = 10.0
"""Attempts to write rows, and time for them (s), before the cells are deferred."""


class Outbox:
    """The outcomes of a run's cells, reported only when their rows are durable.

    Rows that cannot be written now, because the disk is full or the object store is unreachable,
    are kept: nothing is computed twice for that.

    Parameters
    ----------
    landing : Landing
        Where the rows go.

    Attributes
    ----------
    error : ErrorInfo or None
        Why the last write failed.
    failing_since : float or None
        Since when writes have failed (s, monotonic clock).
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
        """Add rows of a landing table."""
        self._rows[table].extend(rows)

    def report(self, outcome: CellOutcome) -> None:
        """Add an outcome, to be reported after the rows added before it are durable."""
        self._outcomes.append(outcome)

    @property
    def is_empty(self) -> bool:
        """Whether every row is written and every outcome reported."""
        return not (self._parts or self._outcomes or any(self._rows.values()))

    @property
    def row_count(self) -> int:
        """Number of rows that are not written yet."""
        return sum(map(len, self._rows.values())) + sum(len(part.rows) for part in self._parts)

    @property
    def due_at(self) -> float:
        """When to flush (s, monotonic clock)."""
        asked_for = (self.error and self.error.retry_after) or 0.0
        return self._flushed_at + max(FLUSH_S, asked_for)

    @property
    def due_in(self) -> float:
        """Time until then (s)."""
        return max(self.due_at - time.monotonic(), 0.0)

    def flush(self) -> Iterator[CellOutcome]:
        """Write the rows, then yield the outcomes; none if the rows cannot be written.

        An outcome is removed only when the next one is requested: one that could not be reported
        is yielded again by the next call.

        Raises
        ------
        Exception
            The landing's error, if a retry would not help.
        """
        for table, rows in self._rows.items():
            if rows:
                self._parts.append(self._landing.prepare(table, rows))
                rows.clear()
        self.error = self._append() if self._parts else None
        self._flushed_at = time.monotonic()
        self.failing_since = (self.failing_since or self._flushed_at) if self.error else None
        if not self.error:
            # Meanwhile outcomes are added, and some withdrawn, perhaps this one.
            for outcome in list(self._outcomes):
                if outcome in self._outcomes:
                    yield outcome
                    if outcome in self._outcomes:
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
            append,
            RetryStrategy.EXPONENTIAL,
            SAVE_ATTEMPTS,
            SAVE_S,
            operation="landing",
            record=False,
        )
        if saved.error_info is None or not saved.error_info.retryable:
            saved.unwrap()
        return saved.error_info

    def take(self, feature_set: str) -> list[CellOutcome]:
        """Remove and return the outcomes of a feature set, whose rows cannot be written."""
        taken = [o for o in self._outcomes if o.feature_set == feature_set]
        self._outcomes = deque(o for o in self._outcomes if o.feature_set != feature_set)
        return taken

    def withdraw(self, file_key: str) -> None:
        """Remove the outcomes of a file."""
        self._outcomes = deque(o for o in self._outcomes if o.file_key != file_key)
