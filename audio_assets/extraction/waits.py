"""How long a stage waits, and whether its storage is there when the wait is over."""

import time
from collections.abc import Iterator
from dataclasses import replace

from audio_assets.extraction.cells import Stage, StageState, Wait
from audio_assets.extraction.scratch import Scratch
from audio_assets.extraction.worker import storage_problem
from audio_assets.library import Library
from robustness.adaptive_timeout import get_timeout_manager
from robustness.error_classifier import ErrorInfo
from robustness.settings import get_settings
from robustness.smart_retry import RetryStrategy, get_retry_manager
from robustness.worker_pool import WorkerFuture, WorkerPool

WAIT_SLACK_S = 0.1
"""A wait that is over but for this much is over (s)."""

MAX_REFUSALS = 3
"""How often an open breaker may defer a stage before it is given up."""


class Waits:
    """The stages of a run that wait.

    Parameters
    ----------
    library : Library
        Where the files are.
    pool : WorkerPool
        Inspects storage, which may hang.
    scratch : Scratch
        Where room for decoded audio is needed.
    """

    def __init__(self, library: Library, pool: WorkerPool, scratch: Scratch) -> None:
        self._library = library
        self._pool = pool
        self._scratch = scratch
        self._waiting: list[Stage] = []
        self._inspections: list[tuple[Stage, WorkerFuture[str | None]]] = []

    def defer(self, stage: Stage, error: ErrorInfo, strategy: RetryStrategy) -> ErrorInfo | None:
        """Have a stage wait, by a retry strategy.

        Returns
        -------
        ErrorInfo or None
            Why it is to be given up, if it has waited long enough.
        """
        now = time.monotonic()
        stage.began = stage.began or now
        delay = get_retry_manager().calculate_delay(
            strategy,
            len(stage.tried),
            error_info=error,
            operation=stage.operation,
            file_size_mb=stage.file.size_mb,
        )
        waited = now - stage.began
        overdue = waited + delay > get_settings().retry_total_seconds
        last = stage.error or error
        if overdue or stage.refusals > MAX_REFUSALS:
            message = f"{last.message} (given up after {waited:.0f} s of waiting)"
            return replace(last, message=message)
        stage.error, stage.state = last, StageState.WAITING
        stage.wait, stage.waited_by = Wait(strategy, since=now, until=now + delay), strategy
        self._waiting.append(stage)
        return None

    @property
    def next_end_in(self) -> float:
        """Time until the next wait is over (s)."""
        now = time.monotonic()
        return min((s.wait.until - now for s in self._waiting if s.wait), default=float("inf"))

    def over(self) -> Iterator[tuple[Stage, ErrorInfo | None]]:
        """Yield each stage whose wait is over, and what of its storage is still away."""
        now = time.monotonic()
        over = [s for s in self._waiting if not s.wait or s.wait.until <= now + WAIT_SLACK_S]
        self._waiting = [stage for stage in self._waiting if stage not in over]
        for stage in over:
            if stage.options.check_storage:
                stage.state = StageState.RUNNING
                self._inspections.append((stage, self._inspect(stage)))
            else:
                yield stage, None
        inspections, self._inspections = self._inspections, []
        for stage, inspection in inspections:
            if not inspection.done():
                self._inspections.append((stage, inspection))
            elif (problem := inspection.exception() or inspection.result()) and stage.error:
                yield stage, replace(stage.error, message=str(problem))
            else:
                yield stage, None

    def _inspect(self, stage: Stage) -> WorkerFuture[str | None]:
        return self._pool.submit(
            storage_problem,
            self._library.path_of(stage.file.key),
            self._library.root_of(stage.file.key),
            self._scratch.directory,
            stage.file.length_s,
            timeout=get_timeout_manager().calculate_timeout(0.0, "metadata"),
        )
