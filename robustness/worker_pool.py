"""A pool of worker processes in which a task can harm nothing but itself.

Extractors are native code: they hang, crash or allocate without end, and neither a signal handler
nor a thread can stop them. So each task has a process for itself while it runs, and the parent

- kills a worker whose task is past its deadline, whatever the worker is doing;
- kills a worker whose task holds more memory than its budget;
- notices a worker that died (a segmentation fault, ``SIGKILL``, ``os._exit``);

and then fails that task alone and forks a new worker, which takes milliseconds since the fork
server has already imported what the tasks need.

`concurrent.futures.ProcessPoolExecutor` has no deadlines, and one dead worker breaks the whole
pool. pebble's ``ProcessPool`` kills late workers, but has one deadline per task, no memory budget
and a fixed number of workers. Here a task passes through *stages* (decoding, extracting) with a
deadline each; each worker has a memory budget; the pool gives up workers while the machine is short
of memory; and a task that hangs or waits for a disk, using no core, does not hold up another.

No worker survives the parent. Each holds the reading end of a pipe whose writing end only the
parent has, and has asked the kernel to be killed when that end closes. This works while a C
function hangs holding the interpreter lock, and after ``kill -9`` of the parent
(``PR_SET_PDEATHSIG`` would watch the fork server instead). Processes that a task starts are not
covered.

Functions given to `WorkerPool.submit` must be importable by name in the worker. As with all of
`multiprocessing`, a new worker runs the parent's main script as a module first: keep what that
imports light, or preload it.
"""

import atexit
import contextlib
import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from multiprocessing import forkserver, resource_tracker
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple

from robustness.instrumentation import emit
from robustness.log_context import get_logger
from robustness.memory import available_memory_mib, memory_limit_mib
from robustness.worker_handle import (
    DEATH_SECONDS,
    STALL_SECONDS,
    Worker,
    WorkerGoneError,
    signal_name,
)
from robustness.worker_process import (
    Kind,
    Message,
    RemoteError,
    Request,
    pickled,
    report_stage,
    worker_main,
)
from robustness.worker_task import (
    Measurement,
    Progress,
    WorkerCrashedError,
    WorkerError,
    WorkerFuture,
    WorkerMemoryError,
    WorkerStartError,
    WorkerTask,
    WorkerTimeoutError,
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

logger = get_logger("worker_pool")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_POLL_SECONDS = 0.1
"""How often the memory of a busy worker is measured."""

_JOIN_SECONDS = 0.5
"""How often a pool that is closing checks for a Ctrl-C."""

_PRESSURE_SECONDS = 1.0
"""How often the memory left on the machine is measured."""

_EXIT_SECONDS = 1.0
"""An idle worker that has not exited by then is killed."""

_HAND_OVER_TRIES = 3
"""How many workers in a row may die before they begin with a task."""

_RETIRE_SHARE = 0.5
"""A worker that still holds more than this share of its budget after a task is replaced."""


TaskSource = Callable[[int], WorkerTask | None]
"""Returns the next task for the worker with this process id (0: not started yet), or None."""


def start_fork_server(preload: Sequence[str] = ()) -> None:
    """Start the fork server of all pools of this process, unless it is running.

    The first pool would do so, and wait: started before, it imports beside the caller.

    Parameters
    ----------
    preload : sequence of str
        As for `WorkerPool`.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_modules(preload))
    # While it imports, an interrupt of the terminal would have it print a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        resource_tracker.ensure_running()  # as it starts, it unblocks the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _modules(preload: Sequence[str]) -> list[str]:
    return [worker_main.__module__, *preload]


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
        Modules the fork server imports once, so that workers start with them. They must bear a
        fork once imported, as NumPy, librosa, essentia and onnxruntime do; sessions, models and
        threads belong in the tasks. The fork server is one per process: the first pool's choice
        holds for later ones.
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
        memory_high: float | None = 0.9,
    ) -> None:
        if size < 1:
            raise ValueError(f"a worker pool needs at least one worker, not {size}")
        self._memory_limit_mib = memory_limit_mib
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_modules(preload))
        self._pressure = None if memory_high is None else _MemoryPressure(memory_high)
        self._changed = threading.Condition()
        # What follows is guarded by the condition.
        self._tasks: deque[WorkerTask] = deque()
        self._source: TaskSource | None = None
        self._wake_ups = 0
        self._lanes: list[threading.Thread] = []
        self._workers: set[Worker] = set()
        self._size = size
        self._shed = 0
        self._idle_tasks = 0
        self._working_lanes = 0
        self._closing = False
        self._killed = False
        with self._changed:
            self._add_lanes()
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
    def size(self) -> int:
        """Number of workers that compute, with those given up."""
        return self._size

    @property
    def given_up(self) -> int:
        """Number of workers given up for now, as memory is short."""
        return self._shed

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
            task.future.set_running_or_notify_cancel()  # wakes those who wait for it
        for lane in self._lanes:
            if lane is not threading.current_thread():  # it may be in a future's callback
                lane.join(DEATH_SECONDS)
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
            worker: Worker | None = None
            while True:
                if worker is None:
                    # A worker that died is replaced before a task waits for it; a task that needs
                    # one which cannot be started fails with the reason.
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

    def _new_worker(self) -> Worker:
        """Start a worker.

        Raises
        ------
        WorkerStartError
            If it does not come to the point where it takes tasks, or the pool was killed.
        """
        if self._killed:
            raise WorkerStartError("the worker pool was killed")
        worker = Worker(self._context)
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

    def _discard(self, worker: Worker, grace: float = 0) -> int | None:
        """End a worker, killing it after `grace` seconds, and return its exit status."""
        with self._changed:
            self._workers.discard(worker)
        return worker.end(grace)

    def _run(self, task: WorkerTask, worker: Worker | None) -> Worker | None:
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
        task.future.progress = progress = Progress(task.timeout, worker.pid)
        result: object = None
        failure: BaseException | None = None
        usable = True
        try:
            reply = self._supervise(worker, progress)
            progress.active_seconds = reply.active_seconds
            if reply.kind is Kind.ERROR:
                failure = reply.payload.unpack()
            else:
                result = reply.payload
        except Exception as error:  # noqa: BLE001 - the task has to end, the lane has to go on
            failure = self._end_failed(worker, error, progress.stage)
            usable = False
        task.future.measurement = progress.measurement()
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

    def _hand_over(self, request: bytes, worker: Worker | None) -> Worker:
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

    def _end_failed(self, worker: Worker, error: Exception, stage: str | None) -> Exception:
        """End a worker that failed its task; return what the task fails with."""
        if isinstance(error, WorkerGoneError):
            exitcode = self._discard(worker, grace=_EXIT_SECONDS)
            return WorkerCrashedError(exitcode, signal_name(exitcode), stage)
        self._discard(worker)
        if isinstance(error, BlockingIOError):
            return WorkerTimeoutError(STALL_SECONDS, stage)
        return error

    def _supervise(self, worker: Worker, progress: Progress) -> Message:
        """Wait for a task's reply.

        Raises
        ------
        WorkerTimeoutError, WorkerMemoryError
            If the worker has to be killed.
        WorkerGoneError
            If it died.
        """
        next_look = time.monotonic() + _POLL_SECONDS
        lends_core = False
        try:
            while True:
                if worker.wait(min(_POLL_SECONDS, progress.seconds_left())):
                    message = worker.receive()
                    if message.kind is not Kind.STAGE:
                        progress.see_memory()
                        return message
                    progress.enter(message.payload)
                if progress.seconds_left() <= 0:
                    raise WorkerTimeoutError(progress.seconds_allowed, progress.stage)
                if time.monotonic() < next_look:
                    continue
                next_look = time.monotonic() + _POLL_SECONDS
                progress.see_memory()
                limit = self._memory_limit_mib
                if limit is not None and progress.memory_mib > limit:
                    raise WorkerMemoryError(progress.memory_mib, limit, progress.stage)
                if progress.is_idle() is not lends_core:
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
            emit("worker_failures", error=type(error).__name__)
            logger.warning("%s: %s", getattr(task.fn, "__qualname__", task.fn), error)


class _MemoryPressure:
    """Whether memory is short."""

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
