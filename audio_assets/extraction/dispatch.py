"""Which stage a worker takes next, and how its attempt is launched."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from audio_assets.extraction.cells import Cell, FileWork, Stage, StageState
from audio_assets.extraction.recovery import DECODE, IDENTIFY
from audio_assets.extraction.results import Flight
from audio_assets.extraction.scratch import Scratch
from audio_assets.extraction.worker import (
    HASH_BLOCK_MIB,
    FileRef,
    decode_file,
    extract,
    identify,
    read_duration,
)
from audio_assets.library import Library
from robustness.adaptive_timeout import TimeoutDecision, get_timeout_manager
from robustness.circuit_breaker import CircuitBreakerOpenError, Permit, get_circuit_breaker
from robustness.worker_pool import WorkerFuture, WorkerPool, WorkerTask


class Dispatcher:
    """Hands the stages of a run's files to workers that have nothing to do.

    A worker stays with its file while that has stages for it. Then it takes another file, and when
    none is left it helps with those that other workers are at. One worker at a time identifies
    files ahead of the others.

    Parameters
    ----------
    library : Library
        Where the files are.
    pool : WorkerPool
        The workers, which draw their tasks from here alone.
    scratch : Scratch
        Where decoded audio goes.

    Attributes
    ----------
    ends : SimpleQueue of Flight or (Stage, CircuitBreakerOpenError)
        Attempts that have ended, and stages that a breaker does not let through.
    """

    def __init__(self, library: Library, pool: WorkerPool, scratch: Scratch) -> None:
        self._library = library
        self._pool = pool
        self._scratch = scratch
        self._timeouts = get_timeout_manager()
        self.ends: queue.SimpleQueue[Flight | tuple[Stage, CircuitBreakerOpenError]] = (
            queue.SimpleQueue()
        )
        # What follows is guarded by the lock. The files keep their order.
        self._lock = threading.Lock()
        self._unidentified: dict[FileWork, None] = {}
        self._identified: dict[FileWork, None] = {}
        self._planned: dict[FileWork, None] = {}
        self._alone: dict[FileWork, None] = {}
        """Files with a stage that runs alone."""
        self._flights: set[Flight] = set()
        self._last_file: dict[int, FileWork] = {}
        """The file that each worker was last at, by process id."""
        pool.draw_from(self._next_task)

    def place(self, *files: FileWork) -> None:
        """Take in how far files are; those that are over are dropped."""
        with self._lock:
            for file in files:
                if file.is_over:
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
        """Return the files that should be planned now.

        To look up what is known costs the same for one file as for many: it is time when no planned
        file waits for a worker, or no file is left to identify.
        """
        with self._lock:
            waits = any(not f.running and next(f.ready(), None) for f in self._planned)
            return [] if self._unidentified and waits else list(self._identified)

    # What follows is called by workers' threads.

    def _next_task(self, pid: int) -> WorkerTask | None:
        """Return what the worker does next; None if there is nothing for it now."""
        with self._lock:
            if any(flight.stage.options.alone for flight in self._flights):
                return None
            alone = (s for f in self._alone for s in f.ready() if s.options.alone)
            candidates = self._candidates(pid)
            if stage := next(alone, None):
                if self._flights:
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
                    # What is under way may be the probe that closes the breaker.
                    if all(flight.stage.breaker != stage.breaker for flight in self._flights):
                        stage.state = StageState.RUNNING
                        self.ends.put((stage, refusal))
            return None

    def _candidates(self, pid: int) -> Iterator[Stage]:
        """Yield the stages that may run now, first what the worker should rather do."""
        if own := self._last_file.get(pid):
            yield from own.ready()
        unidentified = (stage for file in self._unidentified for stage in file.ready())
        if all(flight.stage.file.is_identified for flight in self._flights):
            yield from unidentified
        # A file whose header cannot be read in time may cost a deadline in each stage.
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
        """Return the task that makes an attempt at a stage.

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
            # A probe's permit comes back by itself if this process dies.
            permit = breaker.acquire(lease_seconds=2 * sum(timeouts.values()))
        task = WorkerTask(
            *self._call(stage), timeout=timeouts, fresh_worker=stage.options.fresh_worker
        )
        flight = Flight(
            stage=stage,
            future=task.future,
            permit=permit,
            timeout_s=timeouts[stage.deadlines[-1]],
            decision=decisions[stage.deadlines[-1]],
            breaker_state=breaker_state,
            wait=stage.wait,
            submitted=time.monotonic(),
        )
        stage.state, stage.wait = StageState.RUNNING, None
        stage.file.running += 1
        self._flights.add(flight)
        self._last_file[pid] = stage.file
        task.future.add_done_callback(partial(self._landed, flight))
        return task

    def _timeout(self, stage: Stage, name: str) -> TimeoutDecision:
        if name == "look":
            return self._timeouts.timeout_in_force("metadata", None)
        size_mb = HASH_BLOCK_MIB if name == "hash" else stage.file.size_mb
        return self._timeouts.timeout_in_force(stage.timed_as, stage.length_s, file_size_mb=size_mb)

    def _call(self, stage: Stage) -> tuple[Callable[..., object], *tuple[object, ...]]:
        """Return the function that makes an attempt, and its arguments."""
        file, options = stage.file, stage.options
        if stage.kind == IDENTIFY:
            return identify, self._library, file.key, file.identity or file.known
        assert file.identity is not None
        assert file.stamp is not None
        pcm = self._scratch.path_of(file.identity.content_hash)
        ref = FileRef(self._library.path_of(file.key), file.stamp, pcm)
        if isinstance(stage, Cell):
            block_s = options.block_s or file.block_s
            return extract, ref, stage.feature_set, options.extractor, block_s
        return (decode_file, ref, options.decoder) if stage.kind == DECODE else (read_duration, ref)

    def _landed(self, flight: Flight, future: WorkerFuture[object]) -> None:
        """Take in that an attempt has ended, as far as it decides what runs next."""
        flight.finished = time.monotonic()
        stage = flight.stage
        with self._lock:
            self._flights.discard(flight)
            stage.file.running -= 1
            if stage.kind == DECODE and not future.exception():
                stage.file.audio_s = cast("float", future.result())
                stage.state = StageState.DONE
        self.ends.put(flight)
        self._pool.wake()
