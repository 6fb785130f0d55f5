"""What a stage's end leaves behind: row, attempt record, breaker, timeout and retry statistics."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from audio_assets.backlog import inventory_row
from audio_assets.extraction.cells import Cell, CellOutcome, CellStatus, FileWork, Stage, Wait
from audio_assets.extraction.outbox import Outbox
from audio_assets.extraction.recovery import DECODE, is_files_own_fault
from audio_assets.extraction.worker import CellResult
from audio_assets.features.base import Row
from audio_assets.file_keys import FileKeyError
from audio_assets.library import Library
from audio_assets.warehouse.schema import ATTEMPTS, FILES, feature_table
from robustness.adaptive_timeout import TimeoutDecision, get_timeout_manager
from robustness.circuit_breaker import Permit
from robustness.error_classifier import ErrorInfo, RecoveryStrategy, get_error_classifier
from robustness.quarantine import Quarantine
from robustness.smart_retry import get_retry_manager
from robustness.worker_pool import Measurement, WorkerFuture, WorkerTimeoutError


@dataclass(eq=False)
class Flight:
    """An attempt at a stage that a worker is at.

    Parameters
    ----------
    stage : Stage
        The stage.
    future : WorkerFuture
        How it ends.
    permit : Permit or None
        Its breaker's leave.
    timeout_s : float
        The deadline given (s).
    decision : TimeoutDecision
        Where it comes from.
    breaker_state : str
        State of its breaker when it began.
    wait : Wait or None
        The wait before it.
    submitted : float
        When it began (s, monotonic clock).
    finished : float
        When it ended (s, monotonic clock).
    """

    stage: Stage
    future: WorkerFuture[object]
    permit: Permit | None
    timeout_s: float
    decision: TimeoutDecision
    breaker_state: str
    wait: Wait | None
    submitted: float
    finished: float = 0.0

    @property
    def measurement(self) -> Measurement:
        """What the attempt took: nothing, if no worker could be started for it."""
        return self.future.measurement or Measurement(0.0, {}, 0.0, 0)

    @property
    def seconds(self) -> float | None:
        """Time spent within its deadline (s); None if it did not come to that."""
        return self.measurement.stage_seconds.get(self.stage.deadlines[-1])


class Results:
    """Records what the stages of a run's files give.

    Parameters
    ----------
    run_id : str
        The Dagster run.
    library : Library
        Where the files are.
    outbox : Outbox
        Where rows and outcomes go.
    """

    def __init__(self, run_id: str, library: Library, outbox: Outbox) -> None:
        self._run_id = run_id
        self._library = library
        self._outbox = outbox
        self._classifier = get_error_classifier()
        self._timeouts = get_timeout_manager()
        self._retries = get_retry_manager()
        self._quarantine = Quarantine()
        self._succeeding: set[str] = set()
        """Feature sets with which a file has succeeded at once."""
        self._last_success: dict[str, float] = {}
        self._suspects: dict[str, list[tuple[Cell, str, ErrorInfo]]] = defaultdict(list)

    # Attempts

    def classify(self, exception: BaseException, stage: Stage) -> ErrorInfo:
        """Classify what an attempt failed of, in the light of what the file looks like."""
        file = stage.file
        context: dict[str, object] = {
            "file": file.key,
            "operation": stage.operation,
            "stage": stage.kind,
            "attempt": stage.attempts + 1,
        }
        try:
            context["file_path"] = str(self._library.path_of(file.key))
            context["library_root"] = str(self._library.root_of(file.key))
        except FileKeyError:
            pass
        return self._classifier.classify_error(exception, context)

    def stage_succeeded(self, flight: Flight) -> None:
        """Record an attempt that succeeded."""
        stage = flight.stage
        self._last_success[stage.operation] = time.monotonic()
        if flight.permit:
            flight.permit.succeeded(flight.seconds)
        self._count(flight, success=True)
        if stage.error:
            self._classifier.mark_recovered(stage.error)
        self._record_retries(stage, success=True)

    def stage_failed(self, flight: Flight, exception: BaseException, error: ErrorInfo) -> None:
        """Record an attempt that failed."""
        stage = flight.stage
        if flight.permit:
            # One bad file must not open a breaker: its first fault counts, no later one.
            flight.permit.failed(exception, counts=error.systemic and not stage.attempts)
        stage.error = error
        self._count(flight, success=False, timed_out=isinstance(exception, WorkerTimeoutError))

    def others_fail_too(self, stage: Stage) -> bool:
        """Tell whether no file has succeeded with what a stage does since its first failure."""
        return self._last_success.get(stage.operation, 0.0) < (stage.began or 0.0)

    def stage_given_up(self, stage: Stage) -> None:
        """Record that a stage is not tried any more."""
        if stage.error:
            self._classifier.mark_recovered(stage.error, recovered=False)
        self._record_retries(stage, success=False)

    def _count(self, flight: Flight, *, success: bool, timed_out: bool = False) -> None:
        stage = flight.stage
        if stage.has_budget and not stage.attempts:
            self._retries.deposit(stage.operation)
        stage.attempts += 1
        if flight.seconds is not None:
            self._timeouts.record_performance(
                stage.timed_as,
                stage.file.size_mb,
                flight.seconds,
                success,
                flight.timeout_s,
                audio_seconds=stage.length_s,
                timed_out=timed_out,
            )

    def _record_retries(self, stage: Stage, *, success: bool) -> None:
        """Let the retry manager learn from a stage that waited."""
        if stage.waited_by and stage.began is not None:
            self._retries.record_outcome(
                stage.waited_by,
                stage.attempts,
                success,
                time.monotonic() - stage.began,
                operation=stage.operation,
            )

    def record_attempt(
        self,
        flight: Flight,
        cell: Cell,
        outcome: str,
        *,
        extractor: str | None = None,
        error: ErrorInfo | None = None,
        recovery: RecoveryStrategy | None = None,
    ) -> None:
        """Add the record of an attempt at a cell: at extracting it, or decoding audio for it."""
        file, measurement = cell.file, flight.measurement
        duration_s, decode_s = measurement.seconds, 0.0
        if flight.stage.kind == DECODE:
            decode_s = duration_s
        elif cell.feature_set.reads_pcm:
            decode_s, file.decode_s = file.decode_s, 0.0
            duration_s += decode_s
        elapsed = flight.finished - flight.submitted
        started_at = datetime.now(UTC) - timedelta(
            seconds=time.monotonic() - flight.finished + duration_s
        )
        row = {
            **self._about(cell, file.key, len(cell.history) + 1, outcome, error),
            "recovery_strategy": recovery and recovery.value,
            "recovered": bool(cell.history) if outcome == "succeeded" else None,
            "retry_strategy": flight.wait and flight.wait.strategy.value,
            "retry_delay_s": flight.wait and flight.submitted - flight.wait.since,
            "extractor": extractor,
            "timeout_s": flight.timeout_s,
            "timeout_source": flight.decision.source,
            "timeout_rate": flight.decision.quantile_rate,
            "timeout_base_s": flight.decision.base_seconds,
            "timeout_multiplier": flight.decision.multiplier * flight.stage.options.timeout_factor,
            "duration_s": duration_s,
            "decode_s": decode_s or None,
            "audio_s": file.length_s,
            "queue_s": max(elapsed - measurement.seconds, 0.0),
            "peak_memory_mib": measurement.peak_memory_mib,
            "worker_pid": measurement.worker_pid,
            "breaker_state": flight.breaker_state,
            "started_at": started_at,
            "content_hash": file.identity and file.identity.content_hash,
        }
        flight.stage.began = flight.stage.began or flight.finished
        cell.history.append(row)
        self._outbox.add(ATTEMPTS.landing_name, row)

    # Cells

    def computed(self, flight: Flight, cell: Cell, result: CellResult) -> None:
        """Report a cell that was computed, and its copies."""
        file = cell.file
        assert file.identity is not None
        self._classifier.record_success(cell.operation)
        self.record_attempt(flight, cell, "succeeded", extractor=result.extractor)
        if cell.attempts == 1:
            self._succeeding.add(cell.operation)
        cell.row = {
            **result.row,
            "file_key": file.key,
            "content_hash": file.identity.content_hash,
            "extractor": result.extractor,
            "computed_at": datetime.now(UTC),
            "run_id": self._run_id,
            "code_version": cell.feature_set.code_version,
        }
        self._outbox.add(feature_table(cell.feature_set).landing_name, cell.row)
        self._outbox.report(
            self._outcome(
                cell,
                file.key,
                CellStatus.MATERIALIZED,
                row=cell.row,
                audio_s=(file.audio_s or 0.0) if cell.feature_set.reads_pcm else 0.0,
            )
        )
        for follower in cell.followers:
            self.copied(cell, follower.key, cell.row)

    def reused(self, cell: Cell, row: Row) -> None:
        """Report a cell whose own row is up to date."""
        cell.row = row
        self.note(cell, [cell.file.key], "reused")
        self._outbox.report(self._outcome(cell, cell.file.key, CellStatus.REUSED, row=row))

    def copied(self, cell: Cell, file_key: str, row: Row) -> None:
        """Give a file the row of another file with the same content."""
        self.note(cell, [file_key], "reused")
        # Of what the file held before there may be a row that was computed later than this one.
        copy = {
            **row,
            "file_key": file_key,
            "run_id": self._run_id,
            "computed_at": datetime.now(UTC),
        }
        self._outbox.add(feature_table(cell.feature_set).landing_name, copy)
        self._outbox.report(CellOutcome(file_key, cell.operation, CellStatus.REUSED, row=copy))

    def failed(
        self, cell: Cell, file_key: str, error: ErrorInfo, *, noted_as: str | None = None
    ) -> None:
        """Report a cell of a file as failed.

        Parameters
        ----------
        cell : Cell
            The cell, or that of another file with the same content which it ends with.
        file_key : str
            The file.
        error : ErrorInfo
            Why.
        noted_as : {'skipped', 'given_up'}, optional
            What to record of it; nothing where the last attempt says it all.
        """
        if noted_as:
            self.note(cell, [file_key], noted_as, error)
        self._outbox.report(self._outcome(cell, file_key, CellStatus.FAILED, error=error))

    def _outcome(
        self,
        cell: Cell,
        file_key: str,
        status: CellStatus,
        *,
        row: Row | None = None,
        error: ErrorInfo | None = None,
        audio_s: float = 0.0,
    ) -> CellOutcome:
        tried = [*(cell.file.decode.tried if cell.feature_set.reads_pcm else ()), *cell.tried]
        return CellOutcome(
            file_key,
            cell.operation,
            status,
            row=row,
            error=error,
            history=tuple(cell.history),
            recoveries=tuple(tried),
            audio_s=audio_s,
        )

    def note(
        self, cell: Cell, file_keys: Iterable[str], outcome: str, error: ErrorInfo | None = None
    ) -> None:
        """Record what became of a cell of some files without an attempt at it."""
        for key in file_keys:
            row = {**self._about(cell, key, 0, outcome, error), "started_at": datetime.now(UTC)}
            self._outbox.add(ATTEMPTS.landing_name, row)

    def _about(
        self, cell: Cell, file_key: str, attempt: int, outcome: str, error: ErrorInfo | None
    ) -> Row:
        return {
            "run_id": self._run_id,
            "file_key": file_key,
            "feature_set": cell.operation,
            "attempt": attempt,
            "outcome": outcome,
            "error_type": error and error.error_type.value,
            "severity": error and error.severity.value,
            "exception_type": error and error.exception_type,
            "message": error and error.reason,
        }

    # Files

    def identified(self, file: FileWork) -> None:
        """Record in the inventory what a file is, or that it cannot be read."""
        if file.identity is not None and file.identity == file.known:
            return
        try:
            path = self._library.path_of(file.key)
        except FileKeyError:  # it belongs to no library that is known
            return
        self._outbox.add(FILES.landing_name, inventory_row(file.key, path, file.identity))

    # Quarantine

    def suspect(self, cell: Cell, error: ErrorInfo) -> None:
        """Quarantine a failed cell, now or when it is clear that its file is to blame."""
        if cell.file.identity:
            content_hash = cell.file.identity.content_hash
            self._suspects[cell.operation].append((cell, content_hash, error))
            self.judge_suspects(cell.operation)

    def judge_suspects(self, feature_set: str) -> None:
        """Quarantine those failed cells of a feature set whose files are to blame."""
        for suspect in self._suspects.pop(feature_set, []):
            cell, content_hash, error = suspect
            if not is_files_own_fault(error, others_succeed=feature_set in self._succeeding):
                self._suspects[feature_set].append(suspect)
                continue
            self._quarantine.add(
                content_hash,
                feature_set,
                file_key=cell.file.key,
                error_type=error.error_type.value,
                reason=error.reason,
                attempts=len(cell.history),
                code_version=cell.feature_set.code_version,
            )
