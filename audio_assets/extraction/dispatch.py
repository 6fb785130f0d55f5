"""Which stage a worker runs next, and how its attempt is launched."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from audio_assets.audio.decode import Limits
from audio_assets.audio.pcm import SourceInfo
from audio_assets.extraction.cells import Cell, FileWork, Stage, StageState
from audio_assets.extraction.recovery import DECODE, EXTRACT, IDENTIFY
from audio_assets.extraction.results import Attempt
from audio_assets.extraction.scratch import Scratch
from audio_assets.extraction.worker import (
    HASH_BLOCK_MIB,
    FileRef,
    decode_file,
    extract,
    identify,
    read_duration,
)
from audio_assets.extraction.worker_time import WorkerTime
from audio_assets.features.base import Row
from audio_assets.library.scan import Library
from audio_assets.settings import get_settings
from audio_assets.warehouse.schema import arrow_schema
from robustness.adaptive_timeout import TimeoutDecision, get_timeout_manager
from robustness.circuit_breaker import CircuitBreakerOpenError, Permit, get_circuit_breaker
from robustness.worker_pool import WorkerFuture, WorkerPool, WorkerTask

_TIME_OF = {DECODE: "decoding_s", EXTRACT: "computing_s"}
"""What a worker's time in a stage counts as; in any other it reads."""


class Dispatcher:
    """Gives the stages of a run's files to idle workers.

    A worker stays with its file while that has stages that may start. Then it takes another file,
    and when none is left it helps with the files of other workers. One worker at a time identifies
    files ahead of the others.

    Parameters
    ----------
    library : Library
        Where the files are.
    pool : WorkerPool
        The workers, which draw all their tasks from here.
    scratch : Scratch
        Where decoded audio goes.

    Attributes
    ----------
    ends : SimpleQueue of Attempt or (Stage, CircuitBreakerOpenError)
        Attempts that have ended, and stages refused by their breaker.
    worker_time : WorkerTime
        What the workers' time goes to.
    """

    def __init__(self, library: Library, pool: WorkerPool, scratch: Scratch) -> None:
        self._library = library
        self._pool = pool
        self._scratch = scratch
        settings = get_settings()
        self._limits = Limits(
            settings.audio_max_hours,
            settings.audio_reserve_mib,
            settings.audio_min_seconds if settings.audio_partial == "accept" else math.inf,
        )
        self._timeouts = get_timeout_manager()
        self.ends: queue.SimpleQueue[Attempt | tuple[Stage, CircuitBreakerOpenError]] = (
            queue.SimpleQueue()
        )
        self.worker_time = WorkerTime(pool)
        # The lock guards all of the following. Files keep their order.
        self._lock = threading.Lock()
        self._unidentified: dict[FileWork, None] = {}
        self._identified: dict[FileWork, None] = {}
        self._planned: dict[FileWork, None] = {}
        self._alone: dict[FileWork, None] = {}
        """Files with a stage that runs alone."""
        self._running: set[Attempt] = set()
        self._last_file: dict[int, FileWork] = {}
        """The last file of each worker, by process id."""
        pool.draw_from(self._next_task)

    def place(self, *files: FileWork) -> None:
        """Update in which phase files are; finished ones are dropped."""
        with self._lock:
            for file in files:
                if file.is_finished:
                    place = None
                elif not file.is_identified:
                    place = self._unidentified
                else:
                    place = self._planned if file.is_planned else self._identified
                for files_there in (self._unidentified, self._identified, self._planned):
                    if files_there is not place:
                        files_there.pop(file, None)
                if place is not None:
                    place.setdefault(file)
                if file.runs_alone:
                    self._alone.setdefault(file)
                else:
                    self._alone.pop(file, None)
        self._pool.wake()

    def to_plan(self) -> list[FileWork]:
        """Return the files to plan now.

        Planning reads the landing, at the same cost for one file as for many: it is due when no
        planned file is ready for a worker, or no file remains to be identified.
        """
        with self._lock:
            is_supplied = any(not f.running and next(f.ready(), None) for f in self._planned)
            return [] if self._unidentified and is_supplied else list(self._identified)

    def running(self) -> list[Row]:
        """Return what each worker is at: its process, file, stage, and for how long (s).

        ``idle_s`` is for how long it has used next to no CPU time, as what hangs does.
        """
        now = time.monotonic()
        with self._lock:
            running = list(self._running)
        return [
            {
                "pid": progress.worker_pid,
                "file_key": attempt.stage.file.key,
                "operation": attempt.stage.operation,
                "stage": progress.stage,
                "seconds": now - attempt.submitted,
                "timeout_s": progress.seconds_allowed,
                "idle_s": progress.idle_seconds,
                "memory_mib": progress.memory_mib,
            }
            for attempt in running
            if (progress := attempt.future.progress)
        ]

    # Called by the workers' threads

    def _next_task(self, pid: int) -> WorkerTask | None:
        """Return a worker's next task; None if there is none now."""
        with self._lock:
            if any(attempt.stage.options.alone for attempt in self._running):
                return None
            alone = (s for f in self._alone for s in f.ready() if s.options.alone)
            candidates = self._candidates(pid)
            if stage := next(alone, None):
                if self._running:
                    return None
                candidates = iter((stage, *candidates))
            refused: set[str | None] = set()
            for stage in candidates:
                if stage.breaker in refused:
                    continue
                try:
                    return self._launch(stage, pid)
                except CircuitBreakerOpenError as refusal:
                    refused.add(stage.breaker)
                    # A running attempt may be the probe that closes the breaker.
                    if all(attempt.stage.breaker != stage.breaker for attempt in self._running):
                        stage.state = StageState.RUNNING
                        self.ends.put((stage, refusal))
            return None

    def _candidates(self, pid: int) -> Iterator[Stage]:
        """Yield the stages that may start now, best first for the worker."""
        if own := self._last_file.get(pid):
            yield from own.ready()
        unidentified = (stage for file in self._unidentified for stage in file.ready())
        if all(attempt.stage.file.is_identified for attempt in self._running):
            yield from unidentified
        # Each stage of a file whose header took too long may take its full deadline.
        slow, busy = [], []
        for file in self._planned:
            if file.running:
                busy.append(file)
            elif file.duration.state is StageState.FAILED:
                slow.append(file)
            else:
                yield from file.ready()
        yield from unidentified
        for file in (*slow, *busy):
            yield from file.ready()

    def _launch(self, stage: Stage, pid: int) -> WorkerTask:
        """Return the task of a stage's next attempt.

        Raises
        ------
        CircuitBreakerOpenError
            If the stage's breaker refuses.
        """
        decisions = {name: self._timeout(stage, name) for name in stage.deadlines}
        timeouts = {
            name: decision.seconds * stage.options.timeout_factor
            for name, decision in decisions.items()
        }
        permit: Permit | None = None
        breaker_state = ""
        if stage.breaker:
            breaker = get_circuit_breaker(stage.breaker)
            breaker_state = breaker.get_state().name
            # A probe's permit expires if this process dies.
            permit = breaker.acquire(lease_seconds=2 * sum(timeouts.values()))
        task = WorkerTask(
            *self._call(stage), timeout=timeouts, fresh_worker=stage.options.fresh_worker
        )
        attempt = Attempt(
            stage=stage,
            future=task.future,
            permit=permit,
            timeout_s=timeouts[stage.deadlines[-1]],
            decision=decisions[stage.deadlines[-1]],
            breaker_state=breaker_state,
            deferral=stage.deferral,
            submitted=time.monotonic(),
        )
        stage.state, stage.deferral = StageState.RUNNING, None
        stage.file.running += 1
        self._running.add(attempt)
        self.worker_time.task_begins(alone=stage.options.alone)
        self._last_file[pid] = stage.file
        task.future.add_done_callback(partial(self._ended, attempt))
        return task

    def _timeout(self, stage: Stage, name: str) -> TimeoutDecision:
        if name == "inspect":
            return self._timeouts.timeout_in_force("metadata", None)
        size_mb = HASH_BLOCK_MIB if name == "hash" else stage.file.size_mb
        return self._timeouts.timeout_in_force(stage.timed_as, stage.length_s, file_size_mb=size_mb)

    def _call(self, stage: Stage) -> tuple[Callable[..., object], *tuple[object, ...]]:
        """Return the function of a stage's next attempt, and its arguments."""
        file, options = stage.file, stage.options
        if stage.kind == IDENTIFY:
            return identify, self._library, file.key, file.identity or file.known
        assert file.identity is not None
        assert file.stamp is not None
        pcm = self._scratch.path_of(file.scratch_name)
        ref = FileRef(self._library.path_of(file.key), file.stamp, pcm)
        if isinstance(stage, Cell):
            block_s = options.block_s or file.block_s
            feature_set = stage.feature_set
            schema = arrow_schema(tuple(feature_set.columns))
            return extract, ref, feature_set, schema, options.extractor, block_s, file.decoding
        if stage.kind == DECODE:
            return decode_file, ref, options.decoder, self._limits
        return read_duration, ref

    def _ended(self, attempt: Attempt, future: WorkerFuture[object]) -> None:
        """Update what the choice of the next stage depends on, and pass the attempt on."""
        attempt.finished = time.monotonic()
        stage = attempt.stage
        self.worker_time.task_ends(
            _TIME_OF.get(stage.kind, "reading_s"),
            attempt.finished - attempt.submitted,
            attempt.measurement.core_wait_seconds,
        )
        with self._lock:
            self._running.discard(attempt)
            stage.file.running -= 1
            if stage.kind == DECODE and not future.exception():
                stage.file.source = cast("SourceInfo", future.result())
                stage.state = StageState.DONE
        self.ends.put(attempt)
        self._pool.wake()
