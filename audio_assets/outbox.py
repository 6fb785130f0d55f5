"""Rows on their way to the landing, and the outcomes that may be told once they are there."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import replace

from audio_assets.cells import CellOutcome, CellStatus
from audio_assets.features.base import Row
from audio_assets.warehouse.landing import Landing, Part
from robustness.circuit_breaker import get_circuit_breaker
from robustness.error_classifier import ErrorInfo
from robustness.smart_retry import RetryStrategy, get_retry_manager

FLUSH_S = 2.0
"""Rows wait at most this long before they are made durable (s)."""

SAVE_ATTEMPTS = 3
SAVE_S = 10.0
"""Tries to make rows durable, and the time for them (s), before the cells are put off."""


class Outbox:
    """What one feature set's cells have come to, told only when their rows are durable.

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
    """

    def __init__(self, landing: Landing) -> None:
        self._landing = landing
        self._rows: dict[str, list[Row]] = defaultdict(list)
        self._parts: deque[Part] = deque()
        self._outcomes: deque[CellOutcome] = deque()
        self._saved_at = time.monotonic()
        self._failing_since: float | None = None
        self.error: ErrorInfo | None = None

    def add(self, table: str, *rows: Row) -> None:
        """Take in rows of a landing table."""
        self._rows[table].extend(rows)

    def tell(self, outcome: CellOutcome) -> None:
        """Take in an outcome, which rests on the rows that were added before it."""
        self._outcomes.append(outcome)

    @property
    def due_in(self) -> float:
        """Time until the rows should be made durable (s)."""
        return max(self._saved_at + FLUSH_S - time.monotonic(), 0.0)

    def save(self) -> None:
        """Make the rows durable, if they can be now.

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
        self._saved_at = time.monotonic()
        self._failing_since = (self._failing_since or self._saved_at) if self.error else None

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

    def flush(self) -> Iterator[CellOutcome]:
        """Make the rows durable and tell the outcomes; none while they cannot be."""
        self.save()
        if not self.error:
            # While these are told, others come in that are not durable yet.
            for _ in range(len(self._outcomes)):
                yield self._outcomes[0]
                self._outcomes.popleft()

    def resume(self) -> None:
        """Forget what was put off, as it is taken up now."""
        self._outcomes = deque(o for o in self._outcomes if o.status is not CellStatus.DEFERRED)

    @property
    def file_keys(self) -> set[str]:
        """The files whose outcomes are to be told."""
        return {outcome.file_key for outcome in self._outcomes}

    def give_account(self, error: ErrorInfo, delay: float, longest: float) -> Iterator[CellOutcome]:
        """Tell what becomes of cells whose rows cannot be saved.

        Parameters
        ----------
        error : ErrorInfo
            Why not.
        delay : float
            When to come back (s).
        longest : float
            How long they may be kept (s); then they are given up.
        """
        waited = time.monotonic() - (self._failing_since or time.monotonic())
        overdue = waited + delay > longest
        status = CellStatus.FAILED if overdue else CellStatus.DEFERRED
        outcomes = self._outcomes
        kept = (CellStatus.MATERIALIZED, CellStatus.REUSED)
        self._outcomes = deque(o for o in outcomes if o.status in kept and not overdue)
        for outcome in outcomes:
            if outcome.status is CellStatus.FAILED:
                yield outcome
            else:
                yield replace(outcome, status=status, row=None, error=error, retry_after=delay)
