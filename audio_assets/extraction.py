"""The way of a batch of files through the workers, one feature set at a time.

For each cell: is it done already, is it quarantined, does the breaker let it through, how long
may it take; then attempts in worker processes until one succeeds or nothing is left to try.
What goes another way is tried at once; what must wait is deferred, and the op comes back for it.
A cell's outcome is told only when its row is durable in the landing.
"""

import queue
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from audio_assets.cells import Cell, CellOutcome, CellStatus, Wait
from audio_assets.features.base import FeatureSet, Row
from audio_assets.identification import Identification, file_context
from audio_assets.library import Library
from audio_assets.outbox import Outbox
from audio_assets.recovery import (
    WAITS,
    AttemptOptions,
    apply_recovery,
    is_files_own_fault,
    next_recovery,
)
from audio_assets.scratch import Scratch
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import ATTEMPTS, FILES, feature_table
from audio_assets.worker import STAGES, CellResult, CellTask, run_attempt, storage_problem
from robustness.adaptive_timeout import TimeoutDecision, get_timeout_manager
from robustness.circuit_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenError,
    Permit,
    get_circuit_breaker,
)
from robustness.error_classifier import (
    ErrorInfo,
    ErrorSeverity,
    ErrorType,
    RecoveryStrategy,
    get_error_classifier,
)
from robustness.log_context import log_context
from robustness.quarantine import Quarantine, QuarantinedCell
from robustness.settings import get_settings
from robustness.smart_retry import RetryStrategy, get_retry_manager, unchanged
from robustness.state import get_state_store
from robustness.worker_pool import Measurement, WorkerFuture, WorkerPool, WorkerTimeoutError

WAIT_SLACK_S = 0.5
"""A wait that is over but for this much is over (s)."""

LOOK_S = 0.5
"""How often the pool is looked at for workers that have nothing to do (s)."""

LEFT_S = 2.0
"""What is left to other feature sets' steps is asked after no sooner (s)."""

LATE_S = 1.0
LATE_SHARE = 0.25
"""A first attempt that has taken so long, and this share of its timeout, is late."""

MAX_REFUSALS = 3
"""How often an open breaker may put a cell off before it is given up."""


@dataclass
class _Flight:
    """An attempt that a worker is at."""

    batch: "_Batch"
    cell: Cell
    permits: dict[str, Permit]
    timeouts: Mapping[str, float]
    decision: TimeoutDecision
    breaker_state: str
    wait: Wait | None
    submitted: float
    finished: float = 0.0

    def is_late(self, now: float) -> bool:
        """Tell whether it takes longer than such attempts do, or than is known of them."""
        share = 0.0 if self.cell.history else LATE_SHARE
        return now - self.submitted >= max(LATE_S, share * self.timeouts["extract"])


class Extraction:
    """What the ops of one run share: workers, decoded audio, what is known of the files.

    Parameters
    ----------
    run_id : str
        The Dagster run.
    library : Library
        Where the files are.
    landing : Landing
        Where rows are made durable.
    pool : WorkerPool
        The workers.
    workers : int
        Their number.
    scratch : Scratch
        Decoded audio.
    """

    def __init__(
        self,
        run_id: str,
        library: Library,
        landing: Landing,
        pool: WorkerPool,
        workers: int,
        scratch: Scratch,
    ) -> None:
        self.run_id = run_id
        self.workers = workers
        self.library = library
        self.landing = landing
        self.pool = pool
        self.scratch = scratch
        self.files = Identification(library, landing, pool, workers)
        self.undecodable: dict[str, ErrorInfo] = {}
        # What the first feature set had to find out about a content helps the later ones.
        self.options: dict[str, AttemptOptions] = {}
        self.released: set[str] = set()
        """Feature sets whose cells were let out of quarantine for this run."""
        self.failing_since: dict[str, float] = {}
        """Since when each feature set's step has got nowhere, in monotonic time (s)."""
        self.batches: dict[str, _Batch] = {}
        self.landed: queue.SimpleQueue[tuple[_Flight, WorkerFuture[CellResult]]] = (
            queue.SimpleQueue()
        )

    def run(
        self,
        feature_set: FeatureSet,
        file_keys: Sequence[str],
        *,
        others: Collection[str] = (),
        force: bool = False,
    ) -> Iterator[CellOutcome]:
        """Bring each file's cell of a feature set to an end, and tell each outcome once.

        A second call in the same run (a step retry) takes up only what the first one deferred,
        where it stopped.

        Where the last cells of a batch take long, and other feature sets are still to come, the
        workers that have nothing to do are left to them: those cells are deferred, while they go
        on beside the next feature set's.

        Parameters
        ----------
        feature_set : FeatureSet
            What to extract.
        file_keys : sequence of str
            The batch.
        others : collection of str
            The run's other feature sets.
        force : bool
            Compute also what is done and unchanged, and what is quarantined.

        Yields
        ------
        CellOutcome
            In the order of completion.
        """
        batch = self.batches.get(feature_set.name)
        if batch is None:
            batch = self.batches[feature_set.name] = _Batch(self, feature_set, force=force)
        yield from batch.run(file_keys, others)

    def failed(self, feature_set: FeatureSet) -> list[CellOutcome]:
        """Return the cells given up so far, those of a step's earlier tries too."""
        return self.batches[feature_set.name].failed

    def is_over(self, feature_set: str) -> bool:
        """Tell whether every cell of a feature set is done or given up."""
        return feature_set in self.batches and self.batches[feature_set].is_over

    def see_to_workers(self) -> None:
        """Take in what has ended and launch what can be launched, without waiting."""
        while self.conclude_next(timeout=0.0):
            pass
        for batch in self.batches.values():
            batch.advance()

    def conclude_next(self, *, timeout: float) -> bool:
        """Take in how the next attempt ended; False if none has within the time (s)."""
        try:
            flight, future = self.landed.get(timeout=timeout)
        except queue.Empty:
            return False
        flight.batch.conclude(flight, future)
        return True


class _Batch:
    """One feature set's cells of a run.

    It outlives the step that began it: what that step left in flight or put off is taken up by
    the step's next retry; meanwhile the steps of other feature sets see to what is in flight.
    """

    def __init__(self, extraction: Extraction, feature_set: FeatureSet, *, force: bool) -> None:
        self._run = extraction
        self._feature_set = feature_set
        self._force = force
        self._settings = get_settings()
        self._classifier = get_error_classifier()
        self._timeouts = get_timeout_manager()
        self._retries = get_retry_manager()
        self._quarantine = Quarantine()
        self._table = feature_table(feature_set).landing_name
        self.is_over = False
        self.failed: list[CellOutcome] = []
        self.in_flight: dict[str, _Flight] = {}
        self._settled: set[str] = set()
        self._waiting: deque[Cell] = deque()
        self._put_off_cells: list[Cell] = []
        self._has_succeeded = False
        self._suspects: list[tuple[str, str, ErrorInfo, int]] = []
        self.outbox = Outbox(extraction.landing)

    def run(self, file_keys: Sequence[str], others: Collection[str]) -> Iterator[CellOutcome]:
        """Bring what is not settled yet to an end; see `Extraction.run`."""
        shares = not all(map(self._run.is_over, others))
        for outcome in self._bring_to_an_end(file_keys, shares=shares):
            yield outcome
            # It is told now; otherwise the step's next retry would have to.
            self._run.failing_since.pop(self._feature_set.name, None)
            if outcome.status is not CellStatus.DEFERRED:
                self._settled.add(outcome.file_key)
            if outcome.status is CellStatus.FAILED:
                self.failed.append(outcome)
        self.is_over = self._settled.issuperset(file_keys)

    def _bring_to_an_end(self, file_keys: Sequence[str], *, shares: bool) -> Iterator[CellOutcome]:
        self.outbox.resume()
        yield from self._flush()  # what an earlier call could not save or tell
        self._resume()
        at_hand = self._settled | self.outbox.file_keys | self._keys_at_hand()
        self._plan([key for key in file_keys if key not in at_hand])
        while self._waiting or self.in_flight:
            self._run.see_to_workers()
            if shares and self._keeps_workers_waiting():
                self._leave_in_flight()
                break
            if self.in_flight:
                self._run.conclude_next(timeout=min(self.outbox.due_in, LOOK_S))
            if not self.outbox.due_in:
                for batch in self._run.batches.values():
                    if batch is not self:
                        batch.outbox.save()
                yield from self._flush()
        self._bar_suspects()
        yield from self._flush()
        if error := self.outbox.error:
            delay = self._delay(RetryStrategy.ADAPTIVE, 1, error)
            yield from self.outbox.give_account(error, delay, self._settings.retry_total_seconds)

    @property
    def runs_alone(self) -> bool:
        """Whether an attempt is under way that no other may run beside."""
        return any(flight.cell.options.alone for flight in self.in_flight.values())

    def advance(self) -> None:
        """Launch what can be launched."""
        if self.outbox.error:
            self._put_off_waiting(self.outbox.error)
        refusal = self._launch_waiting()
        if refusal and not self.in_flight:
            self._refused(refusal)

    def _keeps_workers_waiting(self) -> bool:
        """Tell whether workers have nothing to do until attempts end that are late already."""
        if self._waiting or self.runs_alone or not self._run.pool.spare_workers:
            return False
        now = time.monotonic()
        return all(flight.is_late(now) for flight in self.in_flight.values())

    def _leave_in_flight(self) -> None:
        """Let other feature sets' steps see to what is in flight, until this step is retried."""
        now = time.monotonic()
        for flight in self.in_flight.values():
            # The longer one has taken, the less it matters to know soon that it is over.
            wait = max(LEFT_S, (now - flight.submitted) / 2)
            for key in flight.cell.keys:
                self.outbox.tell(CellOutcome(key, CellStatus.DEFERRED, retry_after=wait))

    # What there is to do

    def _keys_at_hand(self) -> set[str]:
        """Return the files of all cells that are waiting, in flight or put off."""
        in_flight = [flight.cell for flight in self.in_flight.values()]
        return {
            key for cell in (*self._waiting, *in_flight, *self._put_off_cells) for key in cell.keys
        }

    def _resume(self) -> None:
        """Take up what was put off, where its time has come and its storage is there again."""
        put_off, self._put_off_cells = self._put_off_cells, []
        now, cells = time.monotonic(), []
        for cell in put_off:
            left = cell.wait.until - now if cell.wait else 0.0
            if cell.error and left > WAIT_SLACK_S:
                self._defer(cell, cell.error, left)
            else:
                cells.append(cell)
        timeout = self._timeouts.calculate_timeout(0.0, "metadata")
        looks = {
            cell.file_key: self._run.pool.submit(
                storage_problem,
                self._run.library.path_of(cell.file_key),
                self._run.library.root_of(cell.file_key),
                self._run.scratch.directory,
                cell.identity.duration_s,
                timeout=timeout,
            )
            for cell in cells
            if cell.options.check_storage
        }
        for cell in cells:
            look = looks.get(cell.file_key)
            problem = look and (look.exception() or look.result())
            if cell.error and problem:
                self._put_off(
                    cell, replace(cell.error, message=str(problem)), RetryStrategy.ADAPTIVE
                )
            else:
                self._waiting.append(cell)

    def _plan(self, file_keys: Sequence[str]) -> None:
        """Settle what needs no work; queue the rest, files of one content together."""
        if not file_keys:
            return
        run, reads_pcm = self._run, self._feature_set.reads_pcm
        self.outbox.add(FILES.landing_name, *run.files.look_at(file_keys))
        known = run.files.identities
        hashes = {known[key].content_hash for key in file_keys if key in known}
        done = {} if self._force else self._done(hashes)
        barred = {} if self._force else self._barred(hashes)
        by_content: dict[str, Cell] = {}
        for key in file_keys:
            if key not in known:
                self._settle_unidentified(key)
                continue
            content_hash = known[key].content_hash
            rows = done.get(content_hash, {})
            if key in rows:
                self._note(key, "reused")
                self.outbox.tell(CellOutcome(key, CellStatus.REUSED, row=rows[key]))
            elif rows and reads_pcm:
                self._settle_copy(key, next(iter(rows.values())))
            elif content_hash in barred:
                self._settle_skipped(key, _quarantined_error(barred[content_hash]))
            elif content_hash in run.undecodable and reads_pcm:
                self._suspects.append((content_hash, key, run.undecodable[content_hash], 0))
                self._settle_skipped(key, run.undecodable[content_hash])
            elif content_hash in by_content and reads_pcm:
                by_content[content_hash].copies.append(key)
            else:
                cell = Cell(key, known[key])
                if reads_pcm:
                    cell.options = run.options.get(content_hash, cell.options)
                by_content[content_hash] = cell
                self._waiting.append(cell)

    def _done(self, hashes: Collection[str]) -> dict[str, dict[str, Row]]:
        """Return the rows of these contents that are up to date, by content and file key."""
        rows: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in self._run.landing.latest(self._table, where=("content_hash", hashes)):
            if row["code_version"] == self._feature_set.code_version:
                rows[row["content_hash"]][row["file_key"]] = row
        return rows

    def _barred(self, hashes: Collection[str]) -> dict[str, QuarantinedCell]:
        return self._quarantine.check_many(
            hashes, self._feature_set.name, self._feature_set.code_version
        )

    # Attempts

    def _launch_waiting(self) -> CircuitBreakerOpenError | None:
        """Keep the workers busy; return the breaker's refusal if it lets nothing through."""
        pool, queued = self._run.pool, 2 * self._run.workers
        while self._waiting and not self.runs_alone:
            if len(self.in_flight) >= queued and not pool.spare_workers:
                break
            cell = self._waiting[0]
            if cell.options.alone and self.in_flight:
                break
            try:
                self._launch(cell)
            except CircuitBreakerOpenError as refusal:
                return refusal
            self._waiting.popleft()
        return None

    def _launch(self, cell: Cell) -> None:
        run, feature_set = self._run, self._feature_set
        pcm = run.scratch.path_of(cell.identity.content_hash)
        decodes = feature_set.reads_pcm and not pcm.exists()
        stages = STAGES if decodes else STAGES[1:]
        decisions = {
            stage: self._timeouts.timeout_in_force(
                self._timed_as(cell, stage), cell.identity.duration_s, file_size_mb=cell.size_mb
            )
            for stage in stages
        }
        timeouts = {
            stage: decision.seconds * cell.options.timeout_factor
            for stage, decision in decisions.items()
        }
        breaker_state = self._breaker("extract").get_state().name
        # A probe's permit comes back by itself if this process dies; it may queue for as long.
        lease = 2 * sum(timeouts.values())
        permits: dict[str, Permit] = {}
        try:
            for stage in stages:
                permits[stage] = self._breaker(stage).acquire(lease_seconds=lease)
        except CircuitBreakerOpenError:
            for permit in permits.values():
                permit.release()
            raise
        if not cell.history:
            self._retries.deposit(feature_set.name)
        flight = _Flight(
            self,
            cell,
            permits,
            timeouts,
            decisions["extract"],
            breaker_state,
            wait=cell.wait,
            submitted=time.monotonic(),
        )
        cell.wait = None
        self.in_flight[cell.file_key] = flight
        if cell.options.alone:
            run.pool.resize(1)
        task = CellTask(
            path=run.library.path_of(cell.file_key),
            feature_set=feature_set,
            pcm=pcm,
            decoder=cell.options.decoder,
            extractor=cell.options.extractor,
            block_s=cell.options.block_s,
        )
        future = run.pool.submit(
            run_attempt, task, timeout=timeouts, fresh_worker=cell.options.fresh_worker
        )

        def landed(_: object) -> None:
            flight.finished = time.monotonic()
            run.landed.put((flight, future))

        future.add_done_callback(landed)

    def _breaker(self, stage: str) -> CircuitBreaker:
        return get_circuit_breaker(
            "audio_processing" if stage == "decode" else f"feature:{self._feature_set.name}"
        )

    def _timed_as(self, cell: Cell, stage: str) -> str:
        """Name whose history of times applies: each extractor has one of its own."""
        if stage == "decode":
            return stage
        name = self._feature_set.name
        return name if cell.options.extractor == "primary" else f"{name}/alternative"

    def conclude(self, flight: _Flight, future: WorkerFuture[CellResult]) -> None:
        """Take in how an attempt ended."""
        del self.in_flight[flight.cell.file_key]
        others = self._run.batches.values()
        if flight.cell.options.alone and not any(batch.runs_alone for batch in others):
            self._run.pool.resize(self._run.workers)
        cell = flight.cell
        with log_context(
            run_id=self._run.run_id,
            file=cell.file_key,
            feature_set=self._feature_set.name,
            attempt=cell.attempts + 1,
        ):
            error = future.exception()
            if error is None:
                self._succeeded(flight, future)
            else:
                self._failed(flight, future, error)
        self._run.scratch.trim(cell.identity.content_hash)

    def _succeeded(self, flight: _Flight, future: WorkerFuture[CellResult]) -> None:
        cell, result, measurement = flight.cell, future.result(), _measurement(future)
        for stage, permit in flight.permits.items():
            seconds = measurement.stage_seconds[stage]
            permit.succeeded(seconds)
            self._timeouts.record_performance(
                self._timed_as(cell, stage),
                cell.size_mb,
                seconds,
                True,
                flight.timeouts[stage],
                # What reads the file itself knows no length, but its timeout goes by one.
                audio_seconds=result.audio_s or cell.identity.duration_s,
            )
        self._classifier.record_success(self._feature_set.name)
        if cell.error:
            self._classifier.mark_recovered(cell.error)
        self._record(flight, future, "succeeded", extractor=result.extractor)
        self._record_retries(flight, success=True)
        self._has_succeeded |= cell.attempts == 1
        self._remember_options(cell)
        row = {
            **result.row,
            "file_key": cell.file_key,
            "content_hash": cell.identity.content_hash,
            "extractor": result.extractor,
            "computed_at": datetime.now(UTC),
            "run_id": self._run.run_id,
            "code_version": self._feature_set.code_version,
        }
        self.outbox.add(self._table, row)
        self.outbox.tell(
            CellOutcome(
                cell.file_key,
                CellStatus.MATERIALIZED,
                row=row,
                history=tuple(cell.history),
                recoveries=tuple(cell.tried),
                audio_s=result.audio_s or 0.0,
            )
        )
        for key in cell.copies:
            self._settle_copy(key, row)

    def _failed(
        self, flight: _Flight, future: WorkerFuture[CellResult], exception: BaseException
    ) -> None:
        cell, run = flight.cell, self._run
        stage_seconds = _measurement(future).stage_seconds
        reached = [stage for stage in flight.permits if stage in stage_seconds]
        stage = reached[-1] if reached else next(iter(flight.permits))
        error = self._classify(exception, cell.file_key, stage, cell.attempts + 1)
        for name, permit in flight.permits.items():
            if name == stage:
                # One bad file must not open a breaker: its first fault counts, no later one.
                is_news = error.systemic and not cell.history
                permit.failed(exception, counts=is_news)
            elif name in reached:
                permit.succeeded(stage_seconds[name])
            else:
                permit.release()
        self._timeouts.record_performance(
            self._timed_as(cell, stage),
            cell.size_mb,
            stage_seconds.get(stage, 0.0),
            False,
            flight.timeouts[stage],
            audio_seconds=cell.identity.duration_s,
            timed_out=isinstance(exception, WorkerTimeoutError),
        )
        cell.error = error
        if stage == "decode":
            run.scratch.drop(cell.identity.content_hash)
        recovery = None
        if cell.attempts + 1 < self._settings.retry_max_attempts:
            recovery = next_recovery(error, stage, cell.tried)
        self._record(flight, future, "failed", error=error, recovery=recovery)
        if recovery is None:
            self._record_retries(flight, success=False)
            self._give_up(cell, error, stage)
            return
        within_budget = self._retries.try_spend(self._feature_set.name)
        cell.tried.append(recovery)
        cell.options = apply_recovery(recovery, cell.options, stage)
        if recovery is RecoveryStrategy.DATABASE_RECOVERY:
            get_state_store().close()  # the next use opens new connections
        if recovery in WAITS:
            self._put_off(cell, error, WAITS[recovery])
        elif not within_budget:
            self._put_off(cell, error, RetryStrategy.ADAPTIVE)
        else:
            self._waiting.appendleft(cell)

    def _remember_options(self, cell: Cell) -> None:
        """Let the other feature sets read this content the way that has worked."""
        worked = AttemptOptions(decoder=cell.options.decoder, block_s=cell.options.block_s)
        if worked != AttemptOptions() and self._feature_set.reads_pcm:
            self._run.options[cell.identity.content_hash] = worked

    def _record_retries(self, flight: _Flight, *, success: bool) -> None:
        """Let the retry manager learn from a cell that was waited for."""
        cell = flight.cell
        if cell.waited_by and cell.began is not None:
            self._retries.record_outcome(
                cell.waited_by,
                cell.attempts,
                success,
                flight.finished - cell.began,
                operation=self._feature_set.name,
            )

    # Cells that wait

    def _refused(self, refusal: CircuitBreakerOpenError) -> None:
        """Put off what an open breaker does not let through."""
        error = self._classifier.classify_error(refusal, {"operation": self._feature_set.name})
        for cell in self._waiting:
            cell.refusals += 1
        self._put_off_waiting(error)

    def _put_off_waiting(self, error: ErrorInfo) -> None:
        while self._waiting:
            self._put_off(self._waiting.popleft(), error, RetryStrategy.ADAPTIVE)

    def _put_off(self, cell: Cell, error: ErrorInfo, strategy: RetryStrategy) -> None:
        """Defer a cell to the step's next retry; give it up if it has waited long enough."""
        now = time.monotonic()
        cell.began = cell.began or now
        delay = self._delay(strategy, len(cell.tried), error, cell.size_mb)
        overdue = now + delay - cell.began > self._settings.retry_total_seconds
        if overdue or cell.refusals > MAX_REFUSALS:
            last = cell.error or error
            waited = f"{last.message} (given up after {now - cell.began:.0f} s of waiting)"
            self._give_up(cell, replace(last, message=waited), "wait")
            return
        cell.error = cell.error or error
        cell.wait = Wait(strategy, since=now, until=now + delay)
        cell.waited_by = strategy
        for key in cell.keys:
            self._note(key, "deferred", error)
        self._defer(cell, error, delay)

    def _defer(self, cell: Cell, error: ErrorInfo, delay: float) -> None:
        """Leave a cell to the step's next retry."""
        self._put_off_cells.append(cell)
        for key in cell.keys:
            self.outbox.tell(
                replace(cell.failed(key, error), status=CellStatus.DEFERRED, retry_after=delay)
            )

    def _delay(
        self, strategy: RetryStrategy, attempt: int, error: ErrorInfo, size_mb: float = 0.0
    ) -> float:
        return self._retries.calculate_delay(
            strategy,
            attempt,
            error_info=unchanged(error),
            operation=self._feature_set.name,
            file_size_mb=size_mb,
        )

    # Outcomes

    def _give_up(self, cell: Cell, error: ErrorInfo, stage: str) -> None:
        self._classifier.mark_recovered(error, recovered=False)
        content_hash = cell.identity.content_hash
        if stage == "decode" and is_files_own_fault(error, others_succeed=True):
            self._run.undecodable[content_hash] = error
        if stage != "wait":
            self._suspects.append((content_hash, cell.file_key, error, cell.attempts))
        # The last attempt says it of the cell itself, unless it waited.
        for key in cell.keys if stage == "wait" else cell.copies:
            self._note(key, "given_up", error)
        for key in cell.keys:
            self.outbox.tell(cell.failed(key, error))

    def _bar_suspects(self) -> None:
        """Quarantine the cells that failed by their file's own fault."""
        suspects, self._suspects = self._suspects, []
        for suspect in suspects:
            content_hash, key, error, attempts = suspect
            if not is_files_own_fault(error, others_succeed=self._has_succeeded):
                self._suspects.append(suspect)  # others may still succeed
                continue
            self._quarantine.add(
                content_hash,
                self._feature_set.name,
                file_key=key,
                error_type=error.error_type.value,
                reason=error.reason,
                attempts=attempts,
                code_version=self._feature_set.code_version,
            )

    def _settle_unidentified(self, key: str) -> None:
        """Defer or fail a file whose content could not be read."""
        unidentified = self._run.files.unidentified[key]
        error = unidentified.error
        delay = self._delay(RetryStrategy.ADAPTIVE, 0, error)
        waited = time.monotonic() - unidentified.since
        if error.retryable and waited + delay <= self._settings.retry_total_seconds:
            self._note(key, "deferred", error)
            self.outbox.tell(CellOutcome(key, CellStatus.DEFERRED, error=error, retry_after=delay))
        else:
            self._settle_skipped(key, error, "given_up" if error.retryable else "skipped")

    def _settle_skipped(self, key: str, error: ErrorInfo, outcome: str = "skipped") -> None:
        """Fail a cell that no attempt was made at."""
        self._note(key, outcome, error)
        self.outbox.tell(CellOutcome(key, CellStatus.FAILED, error=error))

    def _settle_copy(self, key: str, row: Row) -> None:
        """Give a file the row of another file with the same content."""
        self._note(key, "reused")
        # Of what the file held before there may be a row that was computed later than this one.
        copy = {
            **row,
            "file_key": key,
            "run_id": self._run.run_id,
            "computed_at": datetime.now(UTC),
        }
        self.outbox.add(self._table, copy)
        self.outbox.tell(CellOutcome(key, CellStatus.REUSED, row=copy))

    def _flush(self) -> Iterator[CellOutcome]:
        """Make rows durable, then tell the outcomes that rest on them."""
        for outcome in self.outbox.flush():
            yield outcome
            self._run.see_to_workers()  # to tell Dagster of a cell takes its time

    def _classify(
        self, exception: BaseException, file_key: str, stage: str, attempt: int
    ) -> ErrorInfo:
        context = {
            "file": file_key,
            "operation": self._feature_set.name,
            "stage": stage,
            "attempt": attempt,
            **file_context(self._run.library, file_key),
        }
        return self._classifier.classify_error(exception, context)

    def _note(self, key: str, outcome: str, error: ErrorInfo | None = None) -> None:
        """Record what became of a cell without an attempt at it."""
        row = {**self._about(key, 0, outcome, error), "started_at": datetime.now(UTC)}
        self.outbox.add(ATTEMPTS.landing_name, row)

    def _about(self, key: str, attempt: int, outcome: str, error: ErrorInfo | None) -> Row:
        return {
            "run_id": self._run.run_id,
            "file_key": key,
            "feature_set": self._feature_set.name,
            "attempt": attempt,
            "outcome": outcome,
            "error_type": error and error.error_type.value,
            "severity": error and error.severity.value,
            "exception_type": error and error.exception_type,
            "message": error and error.reason,
        }

    def _record(
        self,
        flight: _Flight,
        future: WorkerFuture[CellResult],
        outcome: str,
        *,
        extractor: str | None = None,
        error: ErrorInfo | None = None,
        recovery: RecoveryStrategy | None = None,
    ) -> None:
        cell, measurement = flight.cell, _measurement(future)
        elapsed = flight.finished - flight.submitted
        started_at = datetime.now(UTC) - timedelta(
            seconds=time.monotonic() - flight.finished + measurement.seconds
        )
        row = {
            **self._about(cell.file_key, cell.attempts + 1, outcome, error),
            "recovery_strategy": recovery and recovery.value,
            "recovered": bool(cell.history) if outcome == "succeeded" else None,
            "retry_strategy": flight.wait and flight.wait.strategy.value,
            "retry_delay_s": flight.wait and flight.submitted - flight.wait.since,
            "extractor": extractor,
            "timeout_s": flight.timeouts["extract"],
            "timeout_source": flight.decision.source,
            "timeout_rate": flight.decision.quantile_rate,
            "timeout_base_s": flight.decision.base_seconds,
            "timeout_multiplier": flight.decision.multiplier * cell.options.timeout_factor,
            "duration_s": measurement.seconds,
            "decode_s": measurement.stage_seconds.get("decode"),
            "audio_s": cell.identity.duration_s,
            "queue_s": max(elapsed - measurement.seconds, 0.0),
            "peak_memory_mib": measurement.peak_memory_mib,
            "worker_pid": measurement.worker_pid,
            "breaker_state": flight.breaker_state,
            "started_at": started_at,
            "content_hash": cell.identity.content_hash,
        }
        cell.began = cell.began or flight.finished
        cell.history.append(row)
        self.outbox.add(ATTEMPTS.landing_name, row)


def _measurement(future: WorkerFuture[CellResult]) -> Measurement:
    """Return what the attempt took: nothing, if no worker could be started for it."""
    return future.measurement or Measurement(0.0, {}, 0.0, 0)


def _quarantined_error(cell: QuarantinedCell) -> ErrorInfo:
    since = datetime.fromtimestamp(cell.first_failed_at, UTC)
    return ErrorInfo(
        error_type=ErrorType(cell.error_type),
        severity=ErrorSeverity.MEDIUM,
        retryable=False,
        systemic=False,
        recovery_strategy=RecoveryStrategy.SKIP_FILE,
        message=f"in quarantine since {since:%Y-%m-%d %H:%M} UTC: {cell.reason}",
        exception_type="",
    )
