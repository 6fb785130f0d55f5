"""The way of a batch of files through the workers, one feature set at a time.

For each cell: is it done already, is it quarantined, does the breaker let it through, how long
may it take; then attempts in worker processes until one succeeds or nothing is left to try.
A cell's outcome is told only when its row is durable in the landing.
"""

import contextlib
import queue
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from audio_assets.backlog import inventory_row, known_identities
from audio_assets.features.base import FeatureSet, Row
from audio_assets.file_keys import FileKeyError, decode_key
from audio_assets.library import Library
from audio_assets.recovery import AttemptOptions, apply_recovery, next_recovery
from audio_assets.scratch import Scratch
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import ATTEMPTS, FILES, feature_table
from audio_assets.worker import STAGES, CellResult, CellTask, Identity, identify, run_attempt
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
from robustness.smart_retry import RetryStrategy, get_retry_manager
from robustness.worker_pool import Measurement, WorkerFuture, WorkerPool, WorkerTimeoutError

FLUSH_S = 2.0
"""Rows wait at most this long before they are made durable (s)."""


class CellStatus(StrEnum):
    """What became of a cell in this run."""

    MATERIALIZED = "materialized"
    REUSED = "reused"
    FAILED = "failed"
    DEFERRED = "deferred"


@dataclass(frozen=True)
class CellOutcome:
    """What became of one cell.

    Parameters
    ----------
    file_key : str
        The file's partition key.
    status : CellStatus
        ``materialized`` and ``reused`` cells have a durable row.
    row : dict or None
        The row, if there is one.
    error : ErrorInfo or None
        Why it failed or was deferred.
    attempts : int
        Attempts made.
    recoveries : tuple of str
        Recovery strategies tried, in order.
    retry_after : float
        For a deferred cell, when to come back (s).
    audio_s : float
        Audio analysed for it in this run (s).
    """

    file_key: str
    status: CellStatus
    row: Row | None = None
    error: ErrorInfo | None = None
    attempts: int = 0
    recoveries: tuple[str, ...] = ()
    retry_after: float = 0.0
    audio_s: float = 0.0


@dataclass
class _Cell:
    """A cell on its way; `copies` are the keys of files with the same content."""

    file_key: str
    identity: Identity
    copies: list[str] = field(default_factory=list)
    options: AttemptOptions = field(default_factory=AttemptOptions)
    attempts: int = 0
    tried: list[RecoveryStrategy] = field(default_factory=list)
    error: ErrorInfo | None = None

    @property
    def size_mb(self) -> float:
        return self.identity.size / 2**20


@dataclass
class _Flight:
    """An attempt that a worker is at."""

    cell: _Cell
    permits: dict[str, Permit]
    timeouts: Mapping[str, float]
    decision: TimeoutDecision
    started_at: datetime


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
        self.identities: dict[str, Identity] = {}
        self.unidentified: dict[str, ErrorInfo] = {}
        self.undecodable: dict[str, ErrorInfo] = {}
        self._settled: dict[str, set[str]] = defaultdict(set)

    def run(
        self, feature_set: FeatureSet, file_keys: Sequence[str], *, force: bool = False
    ) -> Iterator[CellOutcome]:
        """Bring each file's cell of a feature set to an end, and tell each outcome once.

        A second call in the same run (a step retry) takes up only what the first one deferred.

        Parameters
        ----------
        feature_set : FeatureSet
            What to extract.
        file_keys : sequence of str
            The batch.
        force : bool
            Compute also what is done and unchanged, and what is quarantined.

        Yields
        ------
        CellOutcome
            In the order of completion.
        """
        settled = self._settled[feature_set.name]
        todo = [key for key in file_keys if key not in settled]
        for outcome in _Batch(self, feature_set, force=force).run(todo):
            if outcome.status is not CellStatus.DEFERRED:
                settled.add(outcome.file_key)
            yield outcome


class _Batch:
    """One feature set's pass over files of a run."""

    def __init__(self, extraction: Extraction, feature_set: FeatureSet, *, force: bool) -> None:
        self._run = extraction
        self._feature_set = feature_set
        self._force = force
        self._settings = get_settings()
        self._classifier = get_error_classifier()
        self._timeouts = get_timeout_manager()
        self._retries = get_retry_manager()
        self._quarantine = Quarantine()
        self._table = feature_table(feature_set)
        self._waiting: deque[_Cell] = deque()
        self._in_flight = 0
        self._alone = False
        self._finished: queue.SimpleQueue[tuple[_Flight, WorkerFuture[CellResult]]] = (
            queue.SimpleQueue()
        )
        self._rows: list[Row] = []
        self._records: list[Row] = []
        self._unconfirmed: list[CellOutcome] = []
        self._flushed_at = time.monotonic()

    def run(self, file_keys: Sequence[str]) -> Iterator[CellOutcome]:
        self._identify(file_keys)
        self._plan(file_keys)
        yield from self._flush()
        while self._waiting or self._in_flight:
            refusal = self._launch_waiting()
            if refusal and not self._in_flight:
                self._defer_waiting(refusal)
                break
            timeout = max(self._flushed_at + FLUSH_S - time.monotonic(), 0.0)
            with contextlib.suppress(queue.Empty):
                self._conclude(*self._finished.get(timeout=timeout))
            if time.monotonic() >= self._flushed_at + FLUSH_S:
                yield from self._flush()
        yield from self._flush()

    # What there is to do

    def _identify(self, file_keys: Sequence[str]) -> None:
        """Find out what each file is, once per run, in the workers: a file system can hang."""
        run = self._run
        new = [
            key for key in file_keys if key not in run.identities and key not in run.unidentified
        ]
        known = known_identities(run.landing, new)
        timeout = self._timeouts.calculate_timeout(0.0, "metadata")
        futures: dict[str, WorkerFuture[Identity]] = {}
        for key in new:
            try:
                path = run.library.path_of(key)
            except FileKeyError as error:
                run.unidentified[key] = self._classify(error, key, "identify", 1)
            else:
                futures[key] = run.pool.submit(identify, path, known.get(key), timeout=timeout)
        seen = []
        for key, future in futures.items():
            path = run.library.path_of(key)
            try:
                identity = future.result()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this file's
                run.unidentified[key] = self._classify(error, key, "identify", 1)
                seen.append(inventory_row(key, path, None))
            else:
                run.identities[key] = identity
                if identity != known.get(key):
                    seen.append(inventory_row(key, path, identity))
        if seen:
            run.landing.append(FILES.landing_name, seen)

    def _plan(self, file_keys: Sequence[str]) -> None:
        """Settle what needs no work; queue the rest, files of one content together."""
        run, reads_pcm = self._run, self._feature_set.reads_pcm
        identities = {key: run.identities[key] for key in file_keys if key in run.identities}
        hashes = {identity.content_hash for identity in identities.values()}
        done = {} if self._force else self._done(hashes)
        barred = {} if self._force else self._quarantine.check_many(hashes, self._feature_set.name)
        by_content: dict[str, _Cell] = {}
        for key in file_keys:
            if key in run.unidentified:
                self._settle_failed(key, run.unidentified[key])
                continue
            content_hash = identities[key].content_hash
            rows = done.get(content_hash, {})
            if key in rows:
                self._note(key, "reused")
                self._unconfirmed.append(CellOutcome(key, CellStatus.REUSED, row=rows[key]))
            elif rows and reads_pcm:
                self._settle_copy(key, next(iter(rows.values())))
            elif content_hash in barred:
                self._settle_failed(key, _quarantined_error(barred[content_hash]))
            elif content_hash in run.undecodable and reads_pcm:
                error = run.undecodable[content_hash]
                self._bar(content_hash, key, error, attempts=0)
                self._settle_failed(key, error)
            elif content_hash in by_content and reads_pcm:
                by_content[content_hash].copies.append(key)
            else:
                by_content[content_hash] = _Cell(key, identities[key])
                self._waiting.append(by_content[content_hash])

    def _done(self, hashes: Collection[str]) -> dict[str, dict[str, Row]]:
        """Return the rows of these contents that are up to date, by content and file key."""
        rows: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in self._run.landing.latest(
            self._table.landing_name, where=("content_hash", hashes)
        ):
            if row["code_version"] == self._feature_set.code_version:
                rows[row["content_hash"]][row["file_key"]] = row
        return rows

    # Attempts

    def _launch_waiting(self) -> CircuitBreakerOpenError | None:
        """Keep the workers busy; return the breaker's refusal if it lets nothing through."""
        while self._waiting and not self._alone and self._in_flight < 2 * self._run.workers:
            cell = self._waiting[0]
            if cell.options.alone and self._in_flight:
                break
            try:
                self._launch(cell)
            except CircuitBreakerOpenError as refusal:
                return refusal
            self._waiting.popleft()
        return None

    def _launch(self, cell: _Cell) -> None:
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
        cell.attempts += 1
        if cell.attempts == 1:
            self._retries.deposit(feature_set.name)
        self._in_flight += 1
        self._alone = cell.options.alone
        flight = _Flight(cell, permits, timeouts, decisions["extract"], datetime.now(UTC))
        task = CellTask(
            path=run.library.path_of(cell.file_key),
            feature_set=feature_set,
            pcm=pcm,
            decoder=cell.options.decoder,
            extractor=cell.options.extractor,
            block_s=cell.options.block_s,
        )
        future = run.pool.submit(run_attempt, task, timeout=timeouts)
        future.add_done_callback(lambda _: self._finished.put((flight, future)))

    def _breaker(self, stage: str) -> CircuitBreaker:
        return get_circuit_breaker(
            "audio_processing" if stage == "decode" else f"feature:{self._feature_set.name}"
        )

    def _timed_as(self, cell: _Cell, stage: str) -> str:
        """Name whose history of times applies: each extractor has one of its own."""
        if stage == "decode":
            return stage
        name = self._feature_set.name
        return name if cell.options.extractor == "primary" else f"{name}/alternative"

    def _conclude(self, flight: _Flight, future: WorkerFuture[CellResult]) -> None:
        self._in_flight -= 1
        self._alone = False
        cell = flight.cell
        with log_context(
            run_id=self._run.run_id,
            file=cell.file_key,
            feature_set=self._feature_set.name,
            attempt=cell.attempts,
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
                audio_seconds=result.audio_s,
            )
        self._classifier.record_success(self._feature_set.name)
        if cell.error:
            self._classifier.mark_recovered(cell.error)
        self._record(flight, future, "succeeded", extractor=result.extractor)
        row = {
            **result.row,
            "file_key": cell.file_key,
            "content_hash": cell.identity.content_hash,
            "extractor": result.extractor,
            "computed_at": datetime.now(UTC),
            "run_id": self._run.run_id,
            "code_version": self._feature_set.code_version,
        }
        self._rows.append(row)
        self._unconfirmed.append(
            CellOutcome(
                cell.file_key,
                CellStatus.MATERIALIZED,
                row=row,
                attempts=cell.attempts,
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
        error = self._classify(exception, cell.file_key, stage, cell.attempts)
        for name, permit in flight.permits.items():
            if name == stage:
                # One bad file must not open a breaker: its first fault counts, no later one.
                permit.ignored(exception) if cell.error else permit.failed(exception)
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
        if cell.attempts < self._settings.retry_max_attempts:
            recovery = next_recovery(error, stage, cell.tried)
        self._record(flight, future, "failed", error=error, recovery=recovery)
        if recovery is None:
            self._give_up(cell, error, stage)
        elif not self._retries.try_spend(self._feature_set.name):
            delay = self._retries.calculate_delay(
                RetryStrategy.ADAPTIVE, cell.attempts - 1, operation=self._feature_set.name
            )
            self._defer(cell, delay)
        else:
            cell.tried.append(recovery)
            cell.options = apply_recovery(recovery, cell.options, stage)
            self._waiting.appendleft(cell)

    def _give_up(self, cell: _Cell, error: ErrorInfo, stage: str) -> None:
        run, content_hash = self._run, cell.identity.content_hash
        self._classifier.mark_recovered(error, recovered=False)
        if stage == "decode":
            run.undecodable[content_hash] = error
        self._bar(content_hash, cell.file_key, error, attempts=cell.attempts)
        for key in (cell.file_key, *cell.copies):
            self._settle_failed(key, error, cell)

    def _bar(self, content_hash: str, key: str, error: ErrorInfo, *, attempts: int) -> None:
        """Quarantine a cell whose failure is its file's own fault."""
        if not error.systemic:
            self._quarantine.add(
                content_hash,
                self._feature_set.name,
                file_key=key,
                error_type=error.error_type.value,
                reason=error.message,
                attempts=attempts,
            )

    def _defer_waiting(self, refusal: CircuitBreakerOpenError) -> None:
        error = self._classifier.classify_error(refusal, {"feature_set": self._feature_set.name})
        while self._waiting:
            cell = self._waiting.popleft()
            cell.error = cell.error or error
            self._note(cell.file_key, "deferred", cell.error)
            self._defer(cell, refusal.retry_after)

    def _defer(self, cell: _Cell, retry_after: float) -> None:
        self._unconfirmed.extend(
            CellOutcome(
                key,
                CellStatus.DEFERRED,
                error=cell.error,
                attempts=cell.attempts,
                recoveries=tuple(cell.tried),
                retry_after=retry_after,
            )
            for key in (cell.file_key, *cell.copies)
        )

    # Outcomes

    def _settle_failed(self, key: str, error: ErrorInfo, cell: _Cell | None = None) -> None:
        if cell is None:
            self._note(key, "skipped", error)
        self._unconfirmed.append(
            CellOutcome(
                key,
                CellStatus.FAILED,
                error=error,
                attempts=cell.attempts if cell else 0,
                recoveries=tuple(cell.tried) if cell else (),
            )
        )

    def _settle_copy(self, key: str, row: Row) -> None:
        """Give a file the row of another file with the same content."""
        self._note(key, "reused")
        copy = {**row, "file_key": key, "run_id": self._run.run_id}
        self._rows.append(copy)
        self._unconfirmed.append(CellOutcome(key, CellStatus.REUSED, row=copy))

    def _flush(self) -> Iterator[CellOutcome]:
        """Make rows durable, then tell the outcomes that rest on them."""
        landing = self._run.landing
        if self._rows:
            landing.append(self._table.landing_name, self._rows)
        if self._records:
            landing.append(ATTEMPTS.landing_name, self._records)
        outcomes, self._rows, self._records, self._unconfirmed = self._unconfirmed, [], [], []
        self._flushed_at = time.monotonic()
        yield from outcomes

    def _classify(
        self, exception: BaseException, file_key: str, stage: str, attempt: int
    ) -> ErrorInfo:
        context = {
            "file": file_key,
            "operation": self._feature_set.name,
            "stage": stage,
            "attempt": attempt,
        }
        with contextlib.suppress(FileKeyError):
            context["file_path"] = str(self._run.library.path_of(file_key))
            context["library_root"] = str(self._run.library.roots[decode_key(file_key)[0]])
        return self._classifier.classify_error(exception, context)

    def _note(self, key: str, outcome: str, error: ErrorInfo | None = None) -> None:
        """Record what became of a cell without an attempt at it."""
        self._records.append(
            {
                "run_id": self._run.run_id,
                "file_key": key,
                "feature_set": self._feature_set.name,
                "attempt": 0,
                "outcome": outcome,
                "error_type": error and error.error_type.value,
                "severity": error and error.severity.value,
                "message": error and error.message,
                "started_at": datetime.now(UTC),
            }
        )

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
        self._records.append(
            {
                "run_id": self._run.run_id,
                "file_key": cell.file_key,
                "feature_set": self._feature_set.name,
                "attempt": cell.attempts,
                "outcome": outcome,
                "error_type": error and error.error_type.value,
                "severity": error and error.severity.value,
                "exception_type": error and error.exception_type,
                "message": error and error.message,
                "recovery_strategy": recovery and recovery.value,
                "recovered": bool(cell.tried) if outcome == "succeeded" else None,
                "extractor": extractor,
                "timeout_s": flight.timeouts["extract"],
                "timeout_source": flight.decision.source,
                "timeout_rate": flight.decision.quantile_rate,
                "timeout_base_s": flight.decision.base_seconds,
                "timeout_multiplier": flight.decision.multiplier * cell.options.timeout_factor,
                "duration_s": measurement.seconds,
                "decode_s": measurement.stage_seconds.get("decode"),
                "audio_s": cell.identity.duration_s,
                "peak_memory_mib": measurement.peak_memory_mib,
                "worker_pid": measurement.worker_pid,
                "breaker_state": self._breaker("extract").get_state().name,
                "started_at": flight.started_at,
                "content_hash": cell.identity.content_hash,
            }
        )


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
