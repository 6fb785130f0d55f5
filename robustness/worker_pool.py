"""A pool of worker processes in which a task can harm nothing but itself.

Extractors are native code: they hang without ever coming back to the interpreter, crash, or
allocate without end, and neither a signal handler nor a thread can stop them. So each task runs
in a process that is its own for that time, and the parent process

- kills a worker whose task is past its deadline, whatever the worker is doing;
- kills a worker whose task holds more memory than its budget;
- notices a worker that died (a segmentation fault, ``SIGKILL``, ``os._exit``);

and then fails that task alone and forks a new worker, which takes milliseconds since the fork
server has already imported what the tasks need.

`concurrent.futures.ProcessPoolExecutor` has no deadlines, and one dead worker breaks the pool
with all tasks in it. pebble's ``ProcessPool`` kills late workers, but it has one deadline per
task, no memory budget and a fixed number of workers. Here a task passes through *stages*
(decoding, extracting) with a deadline each, since experience tells how long each takes, not
their sum; each worker has a memory budget; the pool gives up workers while the machine is short
of memory; and what hangs or waits for a disk, using no core, does not keep another task from it.

Nothing stays behind when the parent goes. Each worker holds the reading end of a pipe whose
writing end only the parent has, and has asked the kernel to be killed when that end closes. No
code of the worker has to run for it, so it works while a C function hangs holding the
interpreter lock, and also after ``kill -9`` of the parent (``PR_SET_PDEATHSIG`` would watch the
fork server instead). Processes that a task itself starts are the task's own affair.

Functions given to `WorkerPool.submit` must be importable by name in the worker. As with all of
`multiprocessing`, a new worker runs the parent's main script as a module first: keep what that
imports light, or preload it.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple

import psutil

from robustness.memory import available_memory_mib, memory_limit_mib, process_memory_mib
from robustness.worker_process import (
    Kind,
    Message,
    RemoteError,
    Request,
    pickled,
    report_stage,
    worker_main,
)

__all__ = [
    "Measurement",
    "RemoteError",
    "WorkerCrashedError",
    "WorkerError",
    "WorkerFuture",
    "WorkerMemoryError",
    "WorkerPool",
    "WorkerStartError",
    "WorkerTask",
    "WorkerTimeoutError",
    "report_stage",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_POLL_SECONDS = 0.1
"""How often the memory of a busy worker is measured."""

_JOIN_SECONDS = 0.5
"""How often a pool that is closing looks for a Ctrl-C."""

_PRESSURE_SECONDS = 1.0
"""How often the memory left on the machine is looked at."""

_START_SECONDS = 120.0
"""A worker that is not ready by then never will be (the first waits for the preload)."""

_STALL_SECONDS = 10
"""A worker that stops for so long in the middle of a message is hung."""

_IDLE_SECONDS = 1.0
"""A task that has used next to no CPU time for so long leaves its core to another."""

_IDLE_SHARE = 0.1
"""What next to no CPU time is, as a share of the time that went by."""

_EXIT_SECONDS = 1.0
"""An idle worker that has not exited by then is killed."""

_DEATH_SECONDS = 5.0
"""A killed process that is still there by then waits for a device, and the kernel lets it."""

_HAND_OVER_TRIES = 3
"""How many workers in a row may die before they begin with a task."""

_RETIRE_SHARE = 0.5
"""A worker that still holds more than this share of its budget after a task is replaced."""

# multiprocessing keeps its list of children without a lock: starting a process reaps others, and
# of two threads that reap one process the second gets a wrong exit code.
_processes = threading.Lock()


class WorkerError(Exception):
    """A task failed because its worker did, not by an exception of its own."""


class WorkerTimeoutError(WorkerError, TimeoutError):
    """A task was past its deadline, and its worker was killed.

    Parameters
    ----------
    seconds : float
        The time it had been given.
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
    """

    seconds: float
    stage_seconds: Mapping[str, float]
    peak_memory_mib: float
    worker_pid: int


class WorkerFuture(Future[T]):
    """The future of a task.

    `measurement` is there as soon as the future is done, also when the task failed. It stays None
    for a task that was never handed to a worker.
    """

    measurement: Measurement | None = None


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


TaskSource = Callable[[int], WorkerTask | None]
"""Returns the next task for the worker with this process id (0: not started yet), or None."""


class WorkerPool:
    """Worker processes that run one task at a time each.

    Tasks are queued by `submit`, or drawn from a source when a worker has nothing to do (see
    `draw_from`).

    Use as a context manager: leaving the block waits for what has been submitted, leaving it by
    an exception (`KeyboardInterrupt` too) kills the workers at once.

    Parameters
    ----------
    size : int
        Number of workers that compute, 1 or more. For each whose task waits, having used next to
        no CPU time for a second, there is one more until the task ends or goes on, up to twice
        the number.
    memory_limit_mib : float, optional
        Memory budget of each worker in MiB (see `robustness.memory.process_memory_mib` for what
        counts); None for no budget.
    preload : sequence of str
        Modules the fork server imports once, so that workers start with them (Linux; elsewhere
        workers import what they need). They must bear a fork once imported, as NumPy, librosa,
        essentia and onnxruntime do; sessions, models and threads belong in `initializer` or the
        tasks. The fork server is one per process: the first pool's choice holds for later ones.
    initializer : callable, optional
        Called with `initargs` in each new worker before its first task.
    initargs : tuple
        Arguments of `initializer`.
    memory_high : float, optional
        Share (0 to 1) of the machine's or control group's memory in use above which the pool
        gives up workers that are not busy, one a second, down to one; it takes them back when
        twice as much is free. None to keep all workers always.

    Raises
    ------
    ValueError
        If `size` is smaller than 1.
    """

    def __init__(
        self,
        size: int,
        *,
        memory_limit_mib: float | None = None,
        preload: Sequence[str] = (),
        initializer: Callable[..., object] | None = None,
        initargs: tuple[object, ...] = (),
        memory_high: float | None = 0.9,
    ) -> None:
        self._memory_limit_mib = memory_limit_mib
        self._recipe = _Recipe(tuple(preload), initializer, initargs)
        self._pressure = None if memory_high is None else _MemoryPressure(memory_high)
        self._changed = threading.Condition()
        # What follows is guarded by the condition.
        self._tasks: deque[WorkerTask] = deque()
        self._source: TaskSource | None = None
        self._wake_ups = 0
        self._lanes: list[threading.Thread] = []
        self._workers: set[_Worker] = set()
        self._size = 0
        self._shed = 0
        self._idle_tasks = 0
        self._working_lanes = 0
        self._closing = False
        self._killed = False
        self.resize(size)
        atexit.register(self.kill)

    def submit(
        self,
        fn: Callable[[*Ts], T],
        /,
        *args: *Ts,
        timeout: float | Mapping[str, float],
        fresh_worker: bool = False,
    ) -> WorkerFuture[T]:
        """Queue a task; see `WorkerTask` for the parameters and what the future fails with.

        Raises
        ------
        RuntimeError
            If the pool is closed.
        ValueError
            If `timeout` names no stage, or gives one no time.
        """
        task = WorkerTask(fn, *args, timeout=timeout, fresh_worker=fresh_worker)
        with self._changed:
            if self._closing:
                raise RuntimeError("the worker pool is closed")
            self._tasks.append(task)
            self._changed.notify_all()
        return task.future

    def draw_from(self, source: TaskSource) -> None:
        """Have workers that find nothing queued ask `source` for a task.

        So what runs next is decided when a worker is free, and knowing which one. `source` is
        called by several threads at once, at least once a second per idle worker; `wake` has all
        idle workers ask again at once.
        """
        with self._changed:
            self._source = source
        self.wake()

    def wake(self) -> None:
        """Have idle workers ask the source of tasks again."""
        with self._changed:
            self._wake_ups += 1
            self._changed.notify_all()

    def resize(self, size: int) -> None:
        """Change the number of workers; if they become fewer, busy ones finish their task first.

        Raises
        ------
        ValueError
            If `size` is smaller than 1.
        """
        if size < 1:
            raise ValueError(f"a worker pool needs at least one worker, not {size}")
        with self._changed:
            self._size = size
            self._shed = min(self._shed, size - 1)
            self._add_lanes()

    def _add_lanes(self) -> None:
        """Have a lane for each worker that may be wanted; to be called under the condition."""
        while len(self._lanes) < self._size + self._lent and not self._closing:
            lane = threading.Thread(target=self._run_lane, name="worker-lane", daemon=True)
            self._lanes.append(lane)
            lane.start()
        self._changed.notify_all()

    @property
    def _lent(self) -> int:
        return min(self._idle_tasks, self._size)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers there are now."""
        with self._changed:
            return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """Finish what has been submitted, then stop the workers.

        If the waiting is interrupted (`KeyboardInterrupt`) the workers are killed at once.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        try:
            for lane in self._lanes:
                # An endless join misses a Ctrl-C that comes just before it begins to wait.
                while lane.is_alive():
                    lane.join(_JOIN_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the workers now; tasks that are not done fail as cancelled."""
        with self._changed:
            self._closing = self._killed = True
            waiting = list(self._tasks)
            self._tasks.clear()
            for worker in self._workers:
                worker.kill()
            self._changed.notify_all()
        for task in waiting:
            task.future.cancel()
            task.future.set_running_or_notify_cancel()  # tells those who wait for it
        for lane in self._lanes:
            if lane is not threading.current_thread():  # it may be in a future's callback
                lane.join(_DEATH_SECONDS)
        atexit.unregister(self.kill)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.close()
        else:
            self.kill()

    # Each lane is a thread of the parent that tends one worker at a time.

    def _run_lane(self) -> None:
        while self._start_working():
            worker: _Worker | None = None
            while True:
                if worker is None:
                    # A worker that died is replaced before a task waits for it; why one cannot
                    # be started is told to the task that needs it.
                    with contextlib.suppress(WorkerStartError):
                        worker = self._new_worker()
                task = self._next_task(worker.pid if worker else 0)
                if task is None:
                    break
                if task.fresh_worker and worker is not None:
                    self._discard(worker, grace=_EXIT_SECONDS)
                    worker = None
                try:
                    worker = self._run(task, worker)
                except Exception as error:
                    logger.exception("the worker pool failed a task by a defect of its own")
                    if worker is not None and worker in self._workers:
                        self._discard(worker)
                    worker = None
                    if not task.future.done():
                        self._fail(task, error)
            if worker is not None:
                self._discard(worker, grace=_EXIT_SECONDS)

    def _start_working(self) -> bool:
        """Wait until one more worker is wanted; False when the pool is done."""
        with self._changed:
            while not self._killed and (self._tasks or not self._closing):
                if self._working_lanes < self._wanted():
                    self._working_lanes += 1
                    return True
                self._changed.wait(_PRESSURE_SECONDS)
            return False

    def _next_task(self, pid: int) -> WorkerTask | None:
        """Wait for a task; None when this lane is to put its worker down."""
        while True:
            with self._changed:
                if self._killed or self._working_lanes > self._wanted():
                    break
                while self._tasks:
                    task = self._tasks.popleft()
                    if task.future.set_running_or_notify_cancel():
                        return task
                if self._closing:
                    break
                source, wake_ups = self._source, self._wake_ups
            # Not under the condition: the source may wake the pool.
            drawn = self._draw(source, pid) if source else None
            with self._changed:
                if drawn is not None:
                    drawn.future.set_running_or_notify_cancel()
                    return drawn
                if self._wake_ups == wake_ups and not self._tasks:
                    self._changed.wait(_PRESSURE_SECONDS)
        with self._changed:
            self._working_lanes -= 1
            self._changed.notify_all()
        return None

    def _draw(self, source: TaskSource, pid: int) -> WorkerTask | None:
        try:
            return source(pid)
        except Exception:
            logger.exception("the worker pool's source of tasks failed")
            return None

    def _wanted(self) -> int:
        """Return how many workers there should be now; to be called under the condition."""
        change = self._pressure.change() if self._pressure else 0
        shed = min(max(self._shed + change, 0), self._size - 1)
        if shed != self._shed:
            logger.warning(
                "%s: %d of %d workers from now on",
                "memory is running out" if shed > self._shed else "memory is free again",
                self._size - shed,
                self._size,
            )
            self._shed = shed
            self._changed.notify_all()
        return self._size - self._shed + self._lent

    def _new_worker(self) -> "_Worker":
        """Start a worker.

        Raises
        ------
        WorkerStartError
            If it does not come to the point where it takes tasks, or the pool was killed.
        """
        if self._killed:
            raise WorkerStartError("the worker pool was killed")
        worker = _Worker(self._recipe)
        with self._changed:
            self._workers.add(worker)
            if self._killed:
                worker.kill()
        try:
            worker.wait_until_ready()
        except WorkerStartError:
            self._discard(worker)
            raise
        return worker

    def _discard(self, worker: "_Worker", grace: float = 0) -> int | None:
        """End a worker, killing it after `grace` seconds, and return its exit status."""
        with self._changed:
            self._workers.discard(worker)
        return worker.end(grace)

    def _run(self, task: WorkerTask, worker: "_Worker | None") -> "_Worker | None":
        """Run a task to its end, whatever that is; return the worker if it can go on."""
        stages = tuple(task.timeout) if isinstance(task.timeout, Mapping) else None
        try:
            request = pickled(Request(task.fn, task.args, stages))
        except Exception as error:  # noqa: BLE001 - pickling calls the arguments' own code
            self._fail(task, error)
            return worker
        try:
            worker = self._hand_over(request, worker)
        except WorkerStartError as error:
            self._fail(task, error)
            return None
        progress = _Progress(task.timeout)
        result: object = None
        failure: BaseException | None = None
        usable = True
        try:
            reply = self._supervise(worker, progress)
            if reply.kind is Kind.ERROR:
                failure = reply.payload.unpack()
            else:
                result = reply.payload
        except Exception as error:  # noqa: BLE001 - the task has to end, the lane has to go on
            failure = self._end_failed(worker, error, progress.stage)
            usable = False
        task.future.measurement = progress.measurement(worker)
        if failure is None:
            task.future.set_result(result)
        else:
            self._fail(task, failure)
        limit = self._memory_limit_mib
        if usable and limit is not None and progress.memory_mib > _RETIRE_SHARE * limit:
            # The next task should not pay for what this one has left behind.
            self._discard(worker, grace=_EXIT_SECONDS)
            usable = False
        return worker if usable else None

    def _hand_over(self, request: bytes, worker: "_Worker | None") -> "_Worker":
        """Give a request to the worker, or to a new one if it died or hung while it was idle.

        Raises
        ------
        WorkerStartError
            If there is no worker that takes it.
        """
        for _ in range(_HAND_OVER_TRIES):
            worker = worker or self._new_worker()
            if worker.take(request):
                return worker
            logger.warning("worker %d died or hung while it was idle", worker.pid)
            self._discard(worker)
            worker = None
        raise WorkerStartError("new workers die or hang before they begin with their task")

    def _end_failed(self, worker: "_Worker", error: Exception, stage: str | None) -> Exception:
        """End a worker that failed its task; return what the task fails with."""
        if isinstance(error, _WorkerGoneError):
            exitcode = self._discard(worker, grace=_EXIT_SECONDS)
            return WorkerCrashedError(exitcode, _signal_name(exitcode), stage)
        self._discard(worker)
        if isinstance(error, BlockingIOError):
            return WorkerTimeoutError(_STALL_SECONDS, stage)
        return error

    def _supervise(self, worker: "_Worker", progress: "_Progress") -> Message:
        """Wait for a task's reply.

        Raises
        ------
        WorkerTimeoutError, WorkerMemoryError
            If the worker has to be killed.
        _WorkerGoneError
            If it died.
        """
        next_look = time.monotonic() + _POLL_SECONDS
        lends_core = False
        try:
            while True:
                if worker.wait(min(_POLL_SECONDS, progress.seconds_left())):
                    message = worker.receive()
                    if message.kind is not Kind.STAGE:
                        progress.see_memory(worker)
                        return message
                    progress.enter(message.payload)
                if progress.seconds_left() <= 0:
                    raise WorkerTimeoutError(progress.seconds_allowed, progress.stage)
                if time.monotonic() < next_look:
                    continue
                next_look = time.monotonic() + _POLL_SECONDS
                progress.see_memory(worker)
                limit = self._memory_limit_mib
                if limit is not None and progress.memory_mib > limit:
                    raise WorkerMemoryError(progress.memory_mib, limit, progress.stage)
                if progress.is_idle(worker) is not lends_core:
                    lends_core = not lends_core
                    self._note_idle(1 if lends_core else -1)
        finally:
            if lends_core:
                self._note_idle(-1)

    def _note_idle(self, change: int) -> None:
        with self._changed:
            self._idle_tasks += change
            self._add_lanes()

    def _fail(self, task: WorkerTask, error: BaseException) -> None:
        if self._killed:
            error = CancelledError("the worker pool was killed")
        task.future.set_exception(error)
        if isinstance(error, WorkerError):
            logger.warning("%s: %s", getattr(task.fn, "__qualname__", task.fn), error)


class _Progress:
    """Where a running task is: its stage, the time it has left, the memory it was seen with."""

    def __init__(self, timeout: float | Mapping[str, float]) -> None:
        self._timeout = timeout
        self.stage = next(iter(timeout)) if isinstance(timeout, Mapping) else None
        self._started = self._entered = time.monotonic()
        self._stage_seconds: dict[str, float] = {}
        self.memory_mib = 0.0
        self._peak_mib = 0.0
        self._cpu_seconds = 0.0
        self._busy_at = self._cpu_seen_at = self._started

    def enter(self, stage: str) -> None:
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

    def see_memory(self, worker: "_Worker") -> None:
        self.memory_mib = process_memory_mib(worker.pid) or 0.0
        self._peak_mib = max(self._peak_mib, self.memory_mib)

    def is_idle(self, worker: "_Worker") -> bool:
        """Tell whether the task has used next to no CPU time for a while."""
        now = time.monotonic()
        try:
            times = psutil.Process(worker.pid).cpu_times()
        except psutil.Error:
            return False
        used = times.user + times.system
        if used - self._cpu_seconds > _IDLE_SHARE * (now - self._cpu_seen_at):
            self._busy_at = now
        self._cpu_seconds, self._cpu_seen_at = used, now
        return now - self._busy_at >= _IDLE_SECONDS

    def measurement(self, worker: "_Worker") -> Measurement:
        """Return what the task took, now that it has ended."""
        self._leave_stage()
        seconds = self._entered - self._started
        return Measurement(seconds, self._stage_seconds, self._peak_mib, worker.pid)


class _MemoryPressure:
    """Tells when memory is short."""

    def __init__(self, high: float) -> None:
        self._scarce_mib = (1 - high) * memory_limit_mib()
        self._next_look = 0.0

    def change(self) -> int:
        """Return 1 if one more worker should go, -1 if one may come back, else 0."""
        now = time.monotonic()
        if now < self._next_look:
            return 0
        self._next_look = now + _PRESSURE_SECONDS
        available = available_memory_mib()
        if available < self._scarce_mib:
            return 1
        return -1 if available > 2 * self._scarce_mib else 0


class _Recipe:
    """How to make a worker process."""

    def __init__(
        self,
        preload: tuple[str, ...],
        initializer: Callable[..., object] | None,
        initargs: tuple[object, ...],
    ) -> None:
        # System libraries of macOS do not survive a fork.
        self._context: ForkServerContext | SpawnContext = (
            multiprocessing.get_context("forkserver")
            if sys.platform == "linux"
            else multiprocessing.get_context("spawn")
        )
        self._context.set_forkserver_preload([worker_main.__module__, *preload])
        self._initializer = initializer
        self._initargs = initargs

    def start(self) -> tuple[BaseProcess, Connection, Connection]:
        """Start a process.

        Returns
        -------
        tuple
            The process, the connection to it, and its lifeline: closing that kills it.

        Raises
        ------
        WorkerStartError
            If the system or the fork server refuses.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as workers:
            try:
                connection, workers_connection = self._context.Pipe()
                ours.enter_context(connection)
                workers.enter_context(workers_connection)
                workers_lifeline, lifeline = self._context.Pipe(duplex=False)
                ours.enter_context(lifeline)
                workers.enter_context(workers_lifeline)
                _limit_stalls(connection)
                process = self._context.Process(
                    target=worker_main,
                    args=(workers_connection, workers_lifeline, self._initializer, self._initargs),
                    daemon=True,
                )
                _start(process)
            except Exception as error:
                raise WorkerStartError(f"cannot start a worker process: {error!r}") from error
            ours.pop_all()
        return process, connection, lifeline


def _start(process: BaseProcess) -> None:
    """Start a process, by a new fork server if the old one is dying."""
    deadline = time.monotonic() + _DEATH_SECONDS
    while True:
        try:
            with _processes:
                process.start()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


def _limit_stalls(connection: Connection) -> None:
    """Let no message that stops in the middle hold anyone for long."""
    stall = struct.pack("ll", _STALL_SECONDS, 0)  # a struct timeval
    with socket.socket(fileno=os.dup(connection.fileno())) as same_socket:
        same_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
        same_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)


class _WorkerGoneError(Exception):
    """The worker's end of the connection is closed: it died."""


class _Worker:
    """A worker process as its lane sees it.

    Raises
    ------
    WorkerStartError
        If it cannot be started.
    """

    def __init__(self, recipe: _Recipe) -> None:
        self._process, self._connection, self._lifeline = recipe.start()
        self.pid = self._process.pid or 0

    def wait_until_ready(self) -> None:
        """Wait for the end of the initializer.

        Raises
        ------
        WorkerStartError
            If it fails or does not end.
        """
        if not self.wait(_START_SECONDS):
            raise WorkerStartError(f"a worker process was not ready after {_START_SECONDS:.0f} s")
        try:
            message = self.receive()
        except _WorkerGoneError:
            raise WorkerStartError("a worker process died while it started") from None
        if message.kind is Kind.ERROR:
            error = message.payload.unpack()
            raise WorkerStartError(f"the initializer of a worker failed: {error!r}") from error

    def wait(self, seconds: float) -> bool:
        """Wait for a message or the worker's death; return whether there is one of them.

        Death shows as the end of the connection. The process's sentinel would also tell of the
        death of the fork server, of which a worker does not die.
        """
        return self._connection.poll(max(seconds, 0))

    def take(self, request: bytes) -> bool:
        """Send a pickled request; return whether the worker begins with it."""
        try:
            self._connection.send_bytes(request)
            return self.wait(_STALL_SECONDS) and self.receive().kind is Kind.STARTED
        except (_WorkerGoneError, OSError):
            return False

    def receive(self) -> Message:
        """Receive a message.

        Raises
        ------
        _WorkerGoneError
            If there is none, since the worker died.
        BlockingIOError
            If it stops in the middle.
        """
        try:
            data = self._connection.recv_bytes()
        except (EOFError, ConnectionError) as error:
            raise _WorkerGoneError from error
        message: Message = pickle.loads(data)
        return message

    def kill(self) -> None:
        """Kill the process; from any thread, and without waiting."""
        self._lifeline.close()
        self._process.kill()

    def end(self, grace: float) -> int | None:
        """Close the connection, upon which an idle worker exits; kill it if it does not.

        Parameters
        ----------
        grace : float
            Seconds to wait before killing it.

        Returns
        -------
        int or None
            Exit status as `multiprocessing` gives it; None if it could not be killed.
        """
        self._connection.close()
        wait([self._process.sentinel], grace)
        self.kill()
        if not wait([self._process.sentinel], _DEATH_SECONDS):
            # It goes as soon as the system call it is in returns.
            logger.error("worker %d was killed but is still there, left alone", self.pid)
            return None
        with _processes:
            self._process.join()
            exitcode = self._process.exitcode
            self._process.close()
        return exitcode


def _signal_name(exitcode: int | None) -> str | None:
    """Return the name of the signal behind a process's exit status, None if it was none."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:  # a real-time signal
        return f"signal {-exitcode}"
