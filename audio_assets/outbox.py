"""Rows on their way to the landing, and the outcomes that may be told once they are there."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from audio_assets.cells import CellOutcome, CellStatus
from audio_assets.features.base import Row
from audio_assets.warehouse.landing import Landing
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
        self._outcomes: list[CellOutcome] = []
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
        self.error = self._append() if any(self._rows.values()) else None
        self._saved_at = time.monotonic()
        self._failing_since = (self._failing_since or self._saved_at) if self.error else None

    def _append(self) -> ErrorInfo | None:
        breaker = get_circuit_breaker(
            "database_operations" if self._landing.is_local else "network_operations"
        )

        def append() -> None:
            for table, rows in self._rows.items():
                if rows:
                    breaker.call(self._landing.append, table, rows)
                    rows.clear()

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
            outcomes, self._outcomes = self._outcomes, []
            yield from outcomes

    def resume(self) -> set[str]:
        """Forget what was put off, as it is taken up now; return the other outcomes' files."""
        self._outcomes = [o for o in self._outcomes if o.status is not CellStatus.DEFERRED]
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
        outcomes, self._outcomes = self._outcomes, []
        for outcome in outcomes:
            if outcome.status is CellStatus.FAILED:
                yield outcome
                continue
            yield replace(outcome, status=status, row=None, error=error, retry_after=delay)
            if not overdue and outcome.status is not CellStatus.DEFERRED:
                self._outcomes.append(outcome)
