"""Results of a stage: row, attempt record, and breaker, timeout and retry statistics."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from audio_assets.extraction.cells import Cell, CellOutcome, CellStatus, Deferral, FileWork, Stage
from audio_assets.extraction.outbox import Outbox
from audio_assets.extraction.recovery import (
    DECODE,
    is_about_content,
    is_disk_full,
    is_files_own_fault,
)
from audio_assets.extraction.worker import CellResult
from audio_assets.features.base import Row
from audio_assets.library.file_keys import FileKeyError
from audio_assets.library.formats import check_content
from audio_assets.library.scan import Library
from audio_assets.warehouse.backlog import conditions_of
from audio_assets.warehouse.inventory import inventory_row
from audio_assets.warehouse.schema import ATTEMPTS, FILES, feature_table
from robustness.adaptive_timeout import TimeoutDecision, get_timeout_manager
from robustness.circuit_breaker import Permit
from robustness.error_classifier import ErrorInfo, ErrorType, RecoveryStrategy, get_error_classifier
from robustness.quarantine import Quarantine
from robustness.smart_retry import get_retry_manager
from robustness.worker_pool import Measurement, WorkerFuture, WorkerTimeoutError

SHORTEST_RETRY, LONGEST_RETRY = timedelta(minutes=1), timedelta(hours=6)
"""Time after which a degraded row is computed again, if its file is not the cause."""


@dataclass(eq=False)
class Attempt:
    """One try of a stage, by a worker.

    Parameters
    ----------
    stage : Stage
        The stage.
    future : WorkerFuture
        Its result.
    permit : Permit or None
        Its breaker's permit.
    timeout_s : float
        The deadline given (s).
    decision : TimeoutDecision
        How that was decided.
    breaker_state : str
        State of its breaker when it began.
    deferral : Deferral or None
        The delay before it.
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
    deferral: Deferral | None
    submitted: float
    finished: float = 0.0

    @property
    def measurement(self) -> Measurement:
        """Time and memory used; zero if no worker could be started for it."""
        return self.future.measurement or Measurement(0.0, {}, 0.0, 0)

    @property
    def seconds(self) -> float | None:
        """Time spent under its deadline (s); None if it ended before that began."""
        return self.measurement.stage_seconds.get(self.stage.deadlines[-1])


class Results:
    """Records the results of the stages of a run's files.

    Parameters
    ----------
    run_id : str
        The Dagster run.
    library : Library
        Where the files are.
    outbox : Outbox
        Where rows and outcomes go.

    Attributes
    ----------
    quarantined : set of (str, str)
        Failed cells, by file and feature set, that are quarantined.
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
        """Feature sets of which a cell has succeeded at the first attempt."""
        self._last_success: dict[str, float] = {}
        self.quarantined: set[tuple[str, str]] = set()
        self._suspects: dict[str, list[tuple[Cell, str, ErrorInfo]]] = defaultdict(list)

    # Attempts

    def classify(self, exception: BaseException, stage: Stage) -> ErrorInfo:
        """Classify an attempt's exception, with the file as evidence."""
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
        # A file that was decoded holds audio, whatever its first bytes are.
        is_decoded = isinstance(stage, Cell) and stage.feature_set.reads_pcm
        return self._classifier.classify_error(
            exception, context, check_content=None if is_decoded else check_content
        )

    def stage_succeeded(self, attempt: Attempt) -> None:
        """Record an attempt that succeeded."""
        stage = attempt.stage
        self._last_success[stage.operation] = time.monotonic()
        if attempt.permit:
            attempt.permit.succeeded(attempt.seconds)
        self._count(attempt, success=True)
        if stage.error:
            self._classifier.mark_recovered(stage.error)
        self._record_retries(stage, success=True)

    def stage_failed(self, attempt: Attempt, exception: BaseException, error: ErrorInfo) -> None:
        """Record an attempt that failed."""
        stage = attempt.stage
        if attempt.permit:
            # One bad file must not open a breaker: only its first failure counts.
            # A full disk says nothing of what is guarded, and each stage waits for space itself.
            counts = error.systemic and not stage.attempts and not is_disk_full(error)
            attempt.permit.failed(exception, counts=counts)
        stage.error = error
        self._count(attempt, success=False, timed_out=isinstance(exception, WorkerTimeoutError))

    def others_fail_too(self, stage: Stage) -> bool:
        """Return whether no file has passed this kind of stage since its first failure."""
        return self._last_success.get(stage.operation, 0.0) < (stage.began or 0.0)

    def stage_given_up(self, stage: Stage) -> None:
        """Record that a stage failed for good."""
        if stage.error:
            self._classifier.mark_recovered(stage.error, recovered=False)
        self._record_retries(stage, success=False)

    def _count(self, attempt: Attempt, *, success: bool, timed_out: bool = False) -> None:
        stage = attempt.stage
        if stage.has_budget and not stage.attempts:
            self._retries.deposit(stage.operation)
        stage.attempts += 1
        if attempt.seconds is not None:
            self._timeouts.record_performance(
                stage.timed_as,
                stage.file.size_mb,
                attempt.seconds,
                success,
                attempt.timeout_s,
                audio_seconds=stage.length_s,
                timed_out=timed_out,
            )

    def _record_retries(self, stage: Stage, *, success: bool) -> None:
        """Let the retry manager learn from a deferred stage."""
        if stage.deferred_with and stage.began is not None:
            self._retries.record_outcome(
                stage.deferred_with,
                stage.attempts,
                success,
                time.monotonic() - stage.began,
                operation=stage.operation,
            )

    def record_attempt(
        self,
        attempt: Attempt,
        cell: Cell,
        outcome: str,
        *,
        extractor: str | None = None,
        error: ErrorInfo | None = None,
        recovery: RecoveryStrategy | None = None,
        degraded: str | None = None,
    ) -> None:
        """Add the record of an attempt to extract a cell, or to decode audio for it."""
        file, measurement = cell.file, attempt.measurement
        duration_s, decoding = measurement.seconds, None
        if attempt.stage.kind == DECODE:
            decoding = measurement
        elif cell.feature_set.reads != "file" and file.decoded_in:
            decoding, file.decoded_in = file.decoded_in, None
            duration_s += decoding.seconds
        elapsed = attempt.finished - attempt.submitted
        started_at = datetime.now(UTC) - timedelta(
            seconds=time.monotonic() - attempt.finished + duration_s
        )
        row = {
            **self._about(cell, file.key, len(cell.history) + 1, outcome, error),
            "recovery_strategy": recovery and recovery.value,
            "recovered": bool(cell.history) if outcome == "succeeded" else None,
            "retry_strategy": attempt.deferral and attempt.deferral.strategy.value,
            "retry_delay_s": attempt.deferral and attempt.submitted - attempt.deferral.since,
            "extractor": extractor,
            "code_version": cell.feature_set.code_version,
            "decoder": file.source and file.source.decoded_by,
            "timeout_s": attempt.timeout_s,
            "timeout_source": attempt.decision.source,
            "timeout_rate": attempt.decision.quantile_rate,
            "timeout_base_s": attempt.decision.base_seconds,
            "timeout_multiplier": attempt.decision.multiplier
            * attempt.stage.options.timeout_factor,
            "duration_s": duration_s,
            "decode_s": decoding and decoding.seconds,
            "core_wait_s": 0.0 if decoding is measurement else measurement.core_wait_seconds,
            "decode_core_wait_s": decoding and decoding.core_wait_seconds,
            "audio_s": file.length_s,
            "queue_s": max(elapsed - measurement.seconds, 0.0),
            "peak_memory_mib": measurement.peak_memory_mib,
            "worker_pid": measurement.worker_pid,
            "breaker_state": attempt.breaker_state,
            "started_at": started_at,
            "content_hash": file.identity and file.identity.content_hash,
            "degraded": degraded,
        }
        attempt.stage.began = attempt.stage.began or attempt.finished
        cell.history.append(row)
        self._outbox.add(ATTEMPTS.landing_name, row)

    # Cells

    def computed(self, attempt: Attempt, cell: Cell, result: CellResult) -> None:
        """Report a cell that was computed, and its copies."""
        file = cell.file
        assert file.identity is not None
        self._classifier.record_success(cell.operation)
        if cell.attempts == 1:
            self._succeeding.add(cell.operation)
        degraded, is_passing = self._degradation(cell, result.extractor)
        self.record_attempt(
            attempt, cell, "succeeded", extractor=result.extractor, degraded=degraded
        )
        cell.row = {
            **result.row,
            "file_key": file.key,
            "content_hash": file.identity.content_hash,
            "extractor": result.extractor,
            "computed_at": datetime.now(UTC),
            "run_id": self._run_id,
            "code_version": cell.feature_set.code_version,
            "complete_share": file.source.complete_share if file.source else None,
            "degraded": degraded,
            **_retry(degraded is not None, is_passing, cell.former),
        }
        audio_s = (file.audio_s or 0.0) if cell.feature_set.reads_pcm else 0.0
        self._ended_with(cell, cell.row, CellStatus.MATERIALIZED, audio_s)

    def _degradation(self, cell: Cell, extractor: str) -> tuple[str | None, bool]:
        """Return why a cell's values may differ from the best ones, and whether that may pass."""
        reasons = []
        source = cell.file.source
        if source and source.damage:
            reasons.append(f"analysed in part: {source.damage}")
        if source and source.louder_channel is not None and cell.feature_set.reads_pcm:
            reasons.append("its channels are out of phase: the louder one was analysed as mono")
        error = cell.first_error
        if cell.options.extractor == "alternative" and error:
            reasons.append(f"{cell.feature_set.extractor} failed: {error.reason}")
        if extractor.endswith("/blocks"):
            reasons.append("analysed in blocks, as memory was short")
        is_passing = error is not None and bool(reasons) and not self._is_files_fault(cell, error)
        return "; ".join(reasons) or None, is_passing

    def _is_files_fault(self, cell: Cell, error: ErrorInfo) -> bool:
        return is_files_own_fault(
            error,
            others_succeed=cell.operation in self._succeeding
            or (
                cell.former is not None
                and self._timeouts.has_succeeded(cell.operation, cell.former["computed_at"])
            ),
        )

    def kept(self, cell: Cell, error: ErrorInfo) -> None:
        """Report a cell whose degraded row could not be computed again."""
        assert cell.former is not None
        is_passing = not self._is_files_fault(cell, error)
        cell.row = {**cell.former, **_retry(True, is_passing, cell.former)}
        self._ended_with(cell, cell.row, CellStatus.REUSED)

    def _ended_with(self, cell: Cell, row: Row, status: CellStatus, audio_s: float = 0.0) -> None:
        self._outbox.add(feature_table(cell.feature_set).landing_name, row)
        self._outbox.report(self._outcome(cell, cell.file.key, status, row=row, audio_s=audio_s))
        for follower in cell.followers:
            self.copied(cell, follower.key, row)

    def reused(self, cell: Cell, row: Row) -> None:
        """Report a cell whose row is up to date."""
        cell.row = row
        self.note(cell, [cell.file.key], "reused")
        self._outbox.report(self._outcome(cell, cell.file.key, CellStatus.REUSED, row=row))

    def copied(self, cell: Cell, file_key: str, row: Row) -> None:
        """Give a file the row of another file with the same content."""
        self.note(cell, [file_key], "reused")
        # There may be a later row of the file's earlier content.
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
            The cell, or the one of another file that it follows.
        file_key : str
            The file.
        error : ErrorInfo
            Why.
        noted_as : {'skipped', 'given_up', 'quarantined'}, optional
            Outcome to record; none if the record of the last attempt says it.
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
        """Record an outcome of a cell of some files that is not an attempt's."""
        for key in file_keys:
            row = {**self._about(cell, key, 0, outcome, error), "started_at": datetime.now(UTC)}
            self._outbox.add(ATTEMPTS.landing_name, row)
            if outcome == "quarantined":
                self.quarantined.add((key, cell.operation))

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
        """Record a file's identity in the inventory, or that it cannot be read."""
        if file.identity is not None and file.identity == file.known:
            return
        try:
            path = self._library.path_of(file.key)
        except FileKeyError:  # it is in no known library root
            return
        self._outbox.add(FILES.landing_name, inventory_row(file.key, path, file.identity))

    # Quarantine

    def suspect(self, cell: Cell, error: ErrorInfo) -> None:
        """Quarantine a failed cell as soon as its file is known to be the cause."""
        if cell.file.identity:
            content_hash = cell.file.identity.content_hash
            self._suspects[cell.operation].append((cell, content_hash, error))
            self.judge_suspects(cell.operation)

    def judge_suspects(self, feature_set: str) -> None:
        """Quarantine the failed cells of a feature set that failed because of their files."""
        for suspect in self._suspects.pop(feature_set, []):
            cell, content_hash, error = suspect
            # What is tried again from quarantine has its verdict.
            others_succeed = feature_set in self._succeeding or bool(
                self._quarantine.check(content_hash, feature_set)
            )
            if not is_files_own_fault(error, others_succeed=others_succeed):
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
                conditions=_conditions(cell, error),
            )
            self.note(cell, [file.key for file in cell.files], "quarantined", error)


def _conditions(cell: Cell, error: ErrorInfo) -> dict[str, float | str] | None:
    """Return what a verdict depends on; None if the content alone decides it."""
    if is_about_content(error):
        return None
    limits = {ErrorType.TIMEOUT.value, ErrorType.MEMORY.value} - {error.error_type.value}
    return {k: v for k, v in conditions_of(cell.feature_set).items() if k not in limits}


def _retry(is_degraded: bool, is_passing: bool, former: Row | None) -> Row:
    """Return when a row is computed again: after as long as it has been degraded already."""
    if not is_degraded:
        return {"degraded_since": None, "retry_after": None}
    now = datetime.now(UTC)
    since = (former and former["degraded_since"]) or now
    wait = min(max(now - since, SHORTEST_RETRY), LONGEST_RETRY)
    return {"degraded_since": since, "retry_after": now + wait if is_passing else None}
