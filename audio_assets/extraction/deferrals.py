"""How long a stage is deferred, and whether its storage is reachable after that."""

import time
from collections.abc import Iterator
from dataclasses import replace

from audio_assets.extraction.cells import Deferral, Stage, StageState
from audio_assets.extraction.scratch import Scratch
from audio_assets.extraction.worker import storage_problem
from audio_assets.library.scan import Library
from robustness.adaptive_timeout import get_timeout_manager
from robustness.error_classifier import ErrorInfo
from robustness.settings import get_settings
from robustness.smart_retry import RetryStrategy, get_retry_manager
from robustness.worker_pool import WorkerFuture, WorkerPool

SLACK_S = 0.1
"""A stage may go on this much early (s)."""

MAX_REFUSALS = 3
"""How often an open breaker may defer a stage before its cells fail."""


class Deferrals:
    """The deferred stages of a run.

    Parameters
    ----------
    library : Library
        Where the files are.
    pool : WorkerPool
        Inspects storage, which may hang.
    scratch : Scratch
        Where space for decoded audio is needed.

    Attributes
    ----------
    waited_before_s : float
        Time for which the stages were deferred in earlier runs (s).
    """

    def __init__(self, library: Library, pool: WorkerPool, scratch: Scratch) -> None:
        self._library = library
        self._pool = pool
        self._scratch = scratch
        self.waited_before_s = 0.0
        self._deferred: list[Stage] = []
        self._inspections: list[tuple[Stage, WorkerFuture[str | None]]] = []

    def defer(self, stage: Stage, error: ErrorInfo, strategy: RetryStrategy) -> ErrorInfo | None:
        """Defer a stage, with the delay of a retry strategy.

        Returns
        -------
        ErrorInfo or None
            Why its cells fail instead, if it was deferred for long enough.
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
        waited = self.waited_before_s + now - stage.began
        overdue = waited + delay > get_settings().retry_total_seconds
        last = stage.error or error
        if overdue or stage.refusals > MAX_REFUSALS:
            message = f"{last.message} (given up after {waited:.0f} s of waiting)"
            return replace(last, message=message)
        stage.error, stage.state = last, StageState.DEFERRED
        stage.deferral = Deferral(strategy, since=now, until=now + delay)
        stage.deferred_with = strategy
        self._deferred.append(stage)
        return None

    @property
    def waited_s(self) -> float:
        """Time for which a stage has been deferred, earlier runs included (s)."""
        now = time.monotonic()
        return self.waited_before_s + max(
            (now - (s.began or now) for s in self._deferred), default=0
        )

    @property
    def next_due_in(self) -> float:
        """Time until the next stage is due (s)."""
        now = time.monotonic()
        due = (stage.deferral.until - now for stage in self._deferred if stage.deferral)
        return min(due, default=float("inf"))

    def due(self) -> Iterator[tuple[Stage, ErrorInfo | None]]:
        """Yield each stage that is due, and why its storage is still unreachable."""
        now = time.monotonic()
        due = [s for s in self._deferred if not s.deferral or s.deferral.until <= now + SLACK_S]
        self._deferred = [stage for stage in self._deferred if stage not in due]
        for stage in due:
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
