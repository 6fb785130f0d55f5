"""What the time of a run's workers goes to: work, or what they wait for.

The time of a worker that has a task is that of the task's stage. The time of one that has none is
that of what the run's own process is at meanwhile, as only that can give it a task.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from audio_assets.warehouse.schema import WORKER_TIME
from robustness.worker_pool import WorkerPool


class WorkerTime:
    """Adds up the time of the workers of a run, from now on.

    Parameters
    ----------
    pool : WorkerPool
        The workers.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._seconds = {column.name: 0.0 for column in WORKER_TIME}
        self._tasks = 0
        self._runs_alone = False
        self._waits_for = "events_s"
        self._counted_until = time.monotonic()

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Have workers without a task wait for this while the block lasts.

        Parameters
        ----------
        what : str
            A column of `WORKER_TIME`.
        """
        before = self.wait_for(what)
        try:
            yield
        finally:
            self.wait_for(before)

    def wait_for(self, what: str) -> str:
        """Have workers without a task wait for this from now on; return for what until now."""
        with self._lock:
            self._count()
            before, self._waits_for = self._waits_for, what
        return before

    def task_begins(self, *, alone: bool) -> None:
        """Count a task; `alone` if the other workers wait for it, as it needs their memory."""
        with self._lock:
            self._count()
            self._tasks += 1
            self._runs_alone = alone

    def task_ends(self, what: str, seconds: float, core_wait_s: float) -> None:
        """Count what a task took (s), and the part of that without a free core (s)."""
        with self._lock:
            self._count()
            self._tasks -= 1
            self._runs_alone = False
            self._seconds[what] += seconds - core_wait_s
            self._seconds["core_wait_s"] += core_wait_s

    def so_far(self) -> dict[str, float]:
        """Return the workers' time (s) by the columns of `WORKER_TIME`, without running tasks."""
        with self._lock:
            self._count()
            return dict(self._seconds)

    def _count(self) -> None:
        now = time.monotonic()
        seconds, self._counted_until = now - self._counted_until, now
        without_task = max(self._pool.size - self._tasks, 0)
        without_memory = without_task if self._runs_alone else self._pool.given_up
        without_memory = min(without_memory, without_task)
        self._seconds["memory_wait_s"] += seconds * without_memory
        self._seconds[self._waits_for] += seconds * (without_task - without_memory)
