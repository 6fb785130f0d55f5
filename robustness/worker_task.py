"""A task of a worker pool: what it fails with, what it took, and where it is while it runs."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import psutil

from robustness.memory import process_memory_mib

T = TypeVar("T")

_IDLE_SECONDS = 1.0
"""A task that has used next to no CPU time for so long leaves its core to another."""

_IDLE_SHARE = 0.1
"""What next to no CPU time is, as a share of the time that went by."""


class WorkerError(Exception):
    """A task failed because its worker did, not by an exception of its own."""


class WorkerTimeoutError(WorkerError, TimeoutError):
    """A task was past its deadline, and its worker was killed.

    Parameters
    ----------
    seconds : float
        Its timeout.
    stage : str or None
        The stage it was in.
    """

    def __init__(self, seconds: float, stage: str | None = None) -> None:
        # One argument alone: OSError takes two for an errno and its text.
        super().__init__(f"not done after {seconds:.1f} s{_in_stage(stage)}, worker killed")
        self.seconds = seconds
        self.stage = stage

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.seconds, self.stage)


class WorkerCrashedError(WorkerError):
    """The worker died while it ran the task.

    Parameters
    ----------
    exitcode : int or None
        Exit status, negative for the signal that ended it; None if unknown.
    signal_name : str or None
        Name of that signal, for instance ``SIGSEGV``.
    stage : str or None
        The stage the task was in.
    """

    def __init__(
        self, exitcode: int | None, signal_name: str | None = None, stage: str | None = None
    ) -> None:
        how = f"by {signal_name}" if signal_name else f"with exit status {exitcode}"
        hint = ", not sent by its pool: was the system out of memory?"
        super().__init__(
            f"worker died {how}{_in_stage(stage)}{hint if signal_name == 'SIGKILL' else ''}"
        )
        self.exitcode = exitcode
        self.signal_name = signal_name
        self.stage = stage

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.exitcode, self.signal_name, self.stage)


class WorkerMemoryError(WorkerError, MemoryError):
    """A task held more memory than its budget, and its worker was killed.

    Parameters
    ----------
    rss_mib : float
        Memory held when it was killed, in MiB (see `robustness.memory.process_memory_mib`).
    limit_mib : float
        The budget, in MiB.
    stage : str or None
        The stage the task was in.
    """

    def __init__(self, rss_mib: float, limit_mib: float, stage: str | None = None) -> None:
        super().__init__(
            f"worker held {rss_mib:.0f} MiB{_in_stage(stage)}, over its budget of "
            f"{limit_mib:.0f} MiB, and was killed"
        )
        self.rss_mib = rss_mib
        self.limit_mib = limit_mib
        self.stage = stage

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.rss_mib, self.limit_mib, self.stage)


class WorkerStartError(WorkerError):
    """No worker could be started; the exception's cause says why."""


def _in_stage(stage: str | None) -> str:
    return f" in stage {stage}" if stage else ""


@dataclass(frozen=True)
class Measurement:
    """What running a task took, whether it succeeded or not.

    Parameters
    ----------
    seconds : float
        From handing the task to a worker to its end.
    stage_seconds : mapping of str to float
        The part of it spent in each stage.
    peak_memory_mib : float
        Most memory seen in the worker, in MiB, of measurements every tenth of a second and one at
        the end.
    worker_pid : int
        Process id of the worker.
    core_wait_seconds : float
        Part of the time in which the worker, or the thread that tends it, could have gone on and
        had no core; 0 if the worker died.
    """

    seconds: float
    stage_seconds: Mapping[str, float]
    peak_memory_mib: float
    worker_pid: int
    core_wait_seconds: float = 0.0


class WorkerFuture(Future[T]):
    """The future of a task.

    `measurement` is there as soon as the future is done, also when the task failed. It stays None
    for a task that was never handed to a worker. `progress` is there from then on.
    """

    measurement: Measurement | None = None
    progress: "Progress | None" = None


class WorkerTask:
    """A function to call in a worker, and the future of its result.

    Parameters
    ----------
    fn : callable
        A function at the top level of an importable module.
    *args
        Its arguments. They and its result must be picklable.
    timeout : float or mapping of str to float
        Seconds the task may take in all, or the stages it passes through with the seconds for
        each: it starts in the first and enters others by `report_stage`.
    fresh_worker : bool
        Run it in a new process, with no connection open and nothing left behind by another task.

    Attributes
    ----------
    future : WorkerFuture
        Fails with the exception `fn` raised (its traceback in the worker as a note),
        `WorkerTimeoutError`, `WorkerCrashedError`, `WorkerMemoryError`, `WorkerStartError`, or
        `concurrent.futures.CancelledError` if the pool was killed.

    Raises
    ------
    ValueError
        If `timeout` names no stage, or gives one no time.
    """

    def __init__(
        self,
        fn: Callable[..., object],
        /,
        *args: object,
        timeout: float | Mapping[str, float],
        fresh_worker: bool = False,
    ) -> None:
        seconds = list(timeout.values()) if isinstance(timeout, Mapping) else [timeout]
        if not seconds or min(seconds) <= 0:
            raise ValueError(f"a timeout must be positive, for each stage, not {timeout!r}")
        self.fn = fn
        self.args = args
        self.timeout = timeout
        self.fresh_worker = fresh_worker
        self.future: WorkerFuture[Any] = WorkerFuture()


class Progress:
    """Where a running task is: its stage, the time it has left, the memory it was seen with."""

    def __init__(self, timeout: float | Mapping[str, float], worker_pid: int) -> None:
        self._timeout = timeout
        self.worker_pid = worker_pid
        self.stage = next(iter(timeout)) if isinstance(timeout, Mapping) else None
        self._started = self._entered = time.monotonic()
        self._stage_seconds: dict[str, float] = {}
        self.memory_mib = 0.0
        self._peak_mib = 0.0
        self._cpu_seconds = 0.0
        self.active_seconds: float | None = None
        self._busy_at = self._cpu_seen_at = self._started

    def enter(self, stage: str) -> None:
        """Begin a stage, and so end the one before."""
        self._leave_stage()
        self.stage = stage

    def _leave_stage(self) -> None:
        now = time.monotonic()
        if self.stage is not None:
            spent = self._stage_seconds.get(self.stage, 0.0)
            self._stage_seconds[self.stage] = spent + now - self._entered
        self._entered = now

    @property
    def seconds_allowed(self) -> float:
        """Time given to the stage, or to the task if it has one deadline."""
        if isinstance(self._timeout, Mapping):
            return self._timeout[str(self.stage)]
        return self._timeout

    def seconds_left(self) -> float:
        """Time left until the deadline, 0 or less when it has passed."""
        since = self._entered if isinstance(self._timeout, Mapping) else self._started
        return since + self.seconds_allowed - time.monotonic()

    def see_memory(self) -> None:
        """Measure the memory that the worker holds now."""
        self.memory_mib = process_memory_mib(self.worker_pid) or 0.0
        self._peak_mib = max(self._peak_mib, self.memory_mib)

    @property
    def idle_seconds(self) -> float:
        """Time for which the task has used next to no CPU time."""
        return time.monotonic() - self._busy_at

    def is_idle(self) -> bool:
        """Return whether the task has used next to no CPU time for a while."""
        now = time.monotonic()
        try:
            times = psutil.Process(self.worker_pid).cpu_times()
        except psutil.Error:
            return False
        used = times.user + times.system
        if used - self._cpu_seconds > _IDLE_SHARE * (now - self._cpu_seen_at):
            self._busy_at = now
        self._cpu_seconds, self._cpu_seen_at = used, now
        return self.idle_seconds >= _IDLE_SECONDS

    def measurement(self) -> Measurement:
        """Return what the task took, now that it has ended."""
        self._leave_stage()
        seconds = self._entered - self._started
        active = seconds if self.active_seconds is None else self.active_seconds
        seconds = max(seconds, active)  # this process may have been late
        return Measurement(
            seconds=seconds,
            stage_seconds=self._stage_seconds,
            peak_memory_mib=self._peak_mib,
            worker_pid=self.worker_pid,
            core_wait_seconds=seconds - active,
        )
