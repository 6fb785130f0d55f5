"""The engine of a run: it processes the run's files, whichever of the ops drives it.

A worker takes a file: it decodes it once, then extracts one feature set after another, each a
*stage* with its own deadline, memory budget and result. The worker's thread in this process draws
each stage when the one before has ended (see `dispatch`), so that permits, deadlines and skips are
decided at the last moment. The result of a stage counts as soon as it is sent, whatever happens to
the file later.

The ops of a run share one engine. The running op drives it: it processes the ends of stages,
decides what follows, writes rows to the landing and yields the outcomes.
"""

import queue
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import Enum
from typing import cast

from audio_assets.extraction import traces
from audio_assets.extraction.cells import (
    Cell,
    CellOutcome,
    CellStatus,
    FileWork,
    Stage,
    StageState,
)
from audio_assets.extraction.deferrals import Deferrals
from audio_assets.extraction.dispatch import Dispatcher
from audio_assets.extraction.outbox import Outbox
from audio_assets.extraction.planning import Compute, Copy, Known, Reuse, Skip, plan_file
from audio_assets.extraction.recovery import (
    DECODE,
    DEFERRING,
    IDENTIFY,
    apply_recovery,
    concerns_copies,
    is_about_file,
    most_attempts,
    next_recovery,
)
from audio_assets.extraction.results import Attempt, Results
from audio_assets.extraction.scratch import Scratch
from audio_assets.extraction.worker import CellResult
from audio_assets.features.base import FeatureSet, Row
from audio_assets.library.file_keys import FileKeyError
from audio_assets.library.files import FileChangedError, FileStamp, Identity
from audio_assets.library.scan import Library
from audio_assets.library.text import counted
from audio_assets.warehouse.backlog import conditions_of, release_contents
from audio_assets.warehouse.inventory import known_identities
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import feature_table
from robustness.activity import report_activity
from robustness.circuit_breaker import CircuitBreakerOpenError
from robustness.error_classifier import ErrorInfo, RecoveryStrategy
from robustness.log_context import log_context
from robustness.quarantine import Quarantine
from robustness.settings import get_settings
from robustness.smart_retry import DeferredError, RetryStrategy, get_retry_manager
from robustness.state import get_state_store
from robustness.worker_pool import WorkerPool, WorkerStartError

LONGEST_SLEEP_S = 0.5
"""Longest sleep of the driver between two checks of what is due (s)."""

ACTIVITY_S = 5.0
"""How often a run reports its activity, for those who watch it (s)."""

MAX_START_FAILURES = 3
"""After how many failures to start its first worker a run ends."""

MAX_CHANGES = 3
"""How often a file may change during its analysis before it is deferred."""


class RunResult(Enum):
    """Result of a run: whether it needs a person."""

    COMPLETE = "complete"
    """Every cell has a row."""
    BAD_FILES = "bad_files"
    """The cells without a row are quarantined: their files are at fault."""
    DEFERRED = "deferred"
    """Every cell without a row is deferred, and another run continues them."""
    INCOMPLETE = "incomplete"
    """Cells failed for another reason, or the run was ended before its last cell."""


@dataclass(frozen=True)
class Wait:
    """What a run waits for in which every open cell is deferred.

    Parameters
    ----------
    seconds : float
        Time until the first cell is due (s).
    waited_s : float
        Time for which cells have been deferred already (s).
    reason : str
        Error of the cell that is due first.
    cells : int
        Number of open cells.
    feature_sets : list of str
        Feature sets with open cells.
    """

    seconds: float
    waited_s: float
    reason: str
    cells: int
    feature_sets: list[str]


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Parameters
    ----------
    files, cells : int
        Files and cells of the run.
    files_finished, cells_finished : int
        Those that were reported.
    cells_computed : int
        Those computed in this run.
    audio_s : float
        Audio analysed (s); each computed cell counts for its share of the file.
    """

    files: int
    cells: int
    files_finished: int
    cells_finished: int
    cells_computed: int
    audio_s: float


class Engine:
    """Processes the files of one run.

    Parameters
    ----------
    run_id : str
        The Dagster run.
    library : Library
        Where the files are.
    landing : Landing
        Where rows are written.
    pool : WorkerPool
        The workers, which draw all their tasks from this engine.
    scratch : Scratch
        Decoded audio.
    """

    def __init__(
        self, run_id: str, library: Library, landing: Landing, pool: WorkerPool, scratch: Scratch
    ) -> None:
        self._run_id = run_id
        self._library = library
        self._landing = landing
        self._scratch = scratch
        self._settings = get_settings()
        self._dispatcher = Dispatcher(library, pool, scratch)
        self._deferrals = Deferrals(library, pool, scratch)
        self._outbox = Outbox(landing)
        self._results = Results(run_id, library, self._outbox)
        self._feature_sets: Sequence[FeatureSet] = ()
        self._conditions: dict[str, dict[str, float | str]] = {}
        self._traces = traces.begin(run_id)
        self._has_begun = False
        self._force = False
        self._ends_deferred = False
        self._start_failures: int | None = 0
        """How often no worker could be started; None once one has worked."""
        self._files: dict[str, FileWork] = {}
        self._leaders: dict[str, FileWork] = {}
        """Of the files with the same content, the one that is analysed."""
        self._unreported: dict[str, set[str]] = {}
        """Keys of the files whose cells are not reported yet, by feature set."""
        self._failed: dict[tuple[str, str], CellOutcome] = {}
        """Failed cells, by file and feature set."""
        self._failing_since: dict[str, float] = {}
        self._due: dict[str, datetime] = {}
        """When the first degraded row is due again, by feature set."""
        self._cells_computed, self._audio_s = 0, 0.0
        self._cell_at = time.time()
        self._activity_due = float("-inf")

    def begin(
        self,
        feature_sets: Sequence[FeatureSet],
        file_keys: Sequence[str],
        *,
        force: bool = False,
        release: bool = False,
        waited_before_s: float = 0.0,
    ) -> None:
        """Set the files and feature sets of the run; only the first call counts.

        Parameters
        ----------
        feature_sets : sequence of FeatureSet
            The feature sets of the run, in the order in which a file's cells are computed.
        file_keys : sequence of str
            The files.
        force : bool
            Compute also cells that are up to date, and quarantined ones.
        release : bool
            Release the files' cells from quarantine.
        waited_before_s : float
            Time for which the cells were deferred in earlier runs (s).
        """
        if self._has_begun:
            return
        known = known_identities(self._landing, file_keys)
        if release:
            contents = {identity.content_hash for identity in known.values()}
            release_contents(contents, [feature_set.name for feature_set in feature_sets])
        self._conditions = {s.name: conditions_of(s) for s in feature_sets}
        self._deferrals.waited_before_s = waited_before_s
        self._has_begun, self._force, self._feature_sets = True, force, feature_sets
        self._files = {key: FileWork(key, feature_sets, known.get(key)) for key in file_keys}
        self._unreported = {feature_set.name: set(file_keys) for feature_set in feature_sets}
        for file in self._files.values():
            try:
                self._library.path_of(file.key)
            except FileKeyError as error:
                self._give_up(file.identify, self._results.classify(error, file.identify))
        self._dispatcher.place(*self._files.values())

    def drive(
        self,
        feature_set: str,
        *,
        hold_s: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[CellOutcome]:
        """Process files until every cell of a feature set has ended; yield outcomes.

        Cells of all feature sets of the run are processed and yielded meanwhile, each once and when
        its row is durable. An outcome counts as reported when the next one is requested.

        Parameters
        ----------
        feature_set : str
            The feature set whose op drives.
        hold_s : float
            Go on with other feature sets at least this long while this one's are deferred (s).
        check : callable
            Called at least twice a second; what it raises ends the call.

        Yields
        ------
        CellOutcome
            In the order of completion.

        Raises
        ------
        DeferredError
            If all open cells of the feature set are deferred.
        Exception
            If something failed that belongs to no file; the next call yields what is durable.
        """
        with self._dispatcher.worker_time.waiting_for("planning_s"):
            yield from self._drive(feature_set, time.monotonic() + hold_s, check)
        if not any(self._unreported.values()):
            self._dispatcher.worker_time.wait_for("publishing_s")

    def _drive(
        self, feature_set: str, hold_until: float, check: Callable[[], None]
    ) -> Iterator[CellOutcome]:
        if not self._outbox.error:
            yield from self._report()  # what an earlier call could not report
        while self._unreported[feature_set]:
            with self._dispatcher.worker_time.waiting_for("events_s"):
                check()
            self._advance()
            if self._should_report(feature_set):
                yield from self._report()
                yield from self._give_up_unsaved(feature_set)
                continue
            due = self._next_due(feature_set)
            if due and time.monotonic() >= hold_until:
                seconds = max(due[0] - time.monotonic(), 0.0)
                files = len(self._unreported[feature_set])
                raise DeferredError(
                    f"{counted(files, 'file')} deferred for {seconds:.0f} s: {due[1]}", seconds
                )
            self._sleep()
        self._results.judge_suspects(feature_set)
        yield from self._report()

    @property
    def result(self) -> RunResult:
        """Result of the run, if it ends now."""
        if not self._has_begun or any(self._unreported.values()):
            return RunResult.DEFERRED if self._ends_deferred else RunResult.INCOMPLETE
        if self._failed.keys() - self._results.quarantined:
            return RunResult.INCOMPLETE
        return RunResult.BAD_FILES if self._failed else RunResult.COMPLETE

    @property
    def wait(self) -> Wait | None:
        """What the run waits for; None if a cell can be computed or a row is not written yet."""
        if not self._outbox.is_empty:
            return None
        open_sets = [name for name, keys in self._unreported.items() if keys]
        due = [due for name in open_sets if (due := self._next_due(name))]
        if not due or len(due) < len(open_sets):
            return None
        until, reason = min(due)
        return Wait(
            seconds=until - time.monotonic(),
            waited_s=self._deferrals.waited_s,
            reason=reason,
            cells=sum(map(len, self._unreported.values())),
            feature_sets=open_sets,
        )

    @property
    def worker_time(self) -> dict[str, float]:
        """What the workers' time went to so far (s), by the columns of `WORKER_TIME`."""
        return self._dispatcher.worker_time.so_far()

    def end_trace(self) -> None:
        """Send what is left of the run's trace."""
        if self._traces:
            self._traces.end()

    def end_deferred(self) -> None:
        """Declare that another run continues the open cells."""
        self._ends_deferred = True

    def failed(self, feature_set: str) -> list[CellOutcome]:
        """Return a feature set's failed cells, whichever op reported them."""
        return [o for o in self._failed.values() if o.feature_set == feature_set]

    @property
    def retry(self) -> tuple[datetime, list[str]] | None:
        """When degraded rows of this run are due again, and their feature sets; None if none is."""
        return (min(self._due.values()), sorted(self._due)) if self._due else None

    @property
    def progress(self) -> Progress:
        """Progress of the run."""
        left = set().union(*self._unreported.values())
        cells = len(self._files) * len(self._feature_sets)
        return Progress(
            files=len(self._files),
            cells=cells,
            files_finished=len(self._files) - len(left),
            cells_finished=cells - sum(map(len, self._unreported.values())),
            cells_computed=self._cells_computed,
            audio_s=self._audio_s,
        )

    def failing_for(self, feature_set: str) -> float:
        """Return for how long a feature set's op has failed without a cell being reported (s)."""
        now = time.monotonic()
        return now - self._failing_since.setdefault(feature_set, now)

    # The driver

    def _sleep(self) -> None:
        """Deferral for a stage to end, or for something to be due."""
        seconds = min(LONGEST_SLEEP_S, self._deferrals.next_due_in, self._outbox.due_in)
        self._process_end(max(seconds, 0.0))

    def _advance(self) -> None:
        """Process ended attempts, resume deferred stages that are due, plan identified files."""
        while self._process_end(0.0):
            pass
        self._resume_deferred()
        self._plan()
        self._report_activity()

    def _report_activity(self) -> None:
        """Report what the run is at; `cell_at` is when a cell last ended, or the run began."""
        now = time.monotonic()
        if now < self._activity_due:
            return
        self._activity_due = now + ACTIVITY_S
        wait, failing_since = self.wait, self._outbox.failing_since
        body = {
            **asdict(self.progress),
            "cell_at": self._cell_at,
            "waits_for": wait and wait.reason,
            "outbox_rows": self._outbox.row_count,
            "outbox_failing_s": failing_since and now - failing_since,
            "outbox_error": self._outbox.error and self._outbox.error.reason,
            "workers": self._dispatcher.running(),
        }
        report_activity(self._run_id, body)

    def _process_end(self, seconds: float) -> bool:
        """Process the next end of an attempt; return False if there is none within the time."""
        try:
            with self._dispatcher.worker_time.waiting_for("idle_s"):
                end = self._dispatcher.ends.get(timeout=seconds)
        except queue.Empty:
            return False
        if isinstance(end, Attempt):
            if self._traces:
                self._traces.attempt_ended(end)
            self._conclude(end)
        else:
            self._refused(*end)
        return True

    def _should_report(self, feature_set: str) -> bool:
        """Return whether rows are due to be written, or nothing else remains to be done."""
        if not self._outbox.due_in:
            return True
        return not self._outbox.error and not any(
            self._files[key].cells[feature_set].is_open for key in self._unreported[feature_set]
        )

    def _report(self) -> Iterator[CellOutcome]:
        """Write the rows, then yield their outcomes."""
        time_of = self._dispatcher.worker_time
        with time_of.waiting_for("publishing_s"):
            for outcome in self._outbox.flush():
                with time_of.waiting_for("events_s"):
                    yield outcome
                with time_of.waiting_for("planning_s"):
                    self._failing_since.clear()
                    self._reported(outcome)
                    self._advance()  # reporting a cell takes a while

    def _reported(self, outcome: CellOutcome) -> None:
        self._cell_at = time.time()
        if self._traces:
            self._traces.cell_ended(outcome)
        self._unreported[outcome.feature_set].discard(outcome.file_key)
        if outcome.row and (due := outcome.row["retry_after"]):
            self._due[outcome.feature_set] = min(due, self._due.get(outcome.feature_set, due))
        # Files with the same content find the row in the landing from now on.
        self._files[outcome.file_key].cells[outcome.feature_set].row = None
        if outcome.status is CellStatus.FAILED:
            self._failed[outcome.file_key, outcome.feature_set] = outcome
        elif outcome.status is CellStatus.MATERIALIZED:
            self._cells_computed += 1
            self._audio_s += outcome.audio_s / len(self._feature_sets)

    def _give_up_unsaved(self, feature_set: str) -> Iterator[CellOutcome]:
        """Fail the cells whose rows could not be written for too long."""
        error, since = self._outbox.error, self._outbox.failing_since
        if error is None or since is None:
            return
        if time.monotonic() - since > self._settings.retry_total_seconds:
            for outcome in self._outbox.take(feature_set):
                if outcome.status is not CellStatus.FAILED:
                    outcome = replace(outcome, status=CellStatus.FAILED, row=None, error=error)
                yield outcome
                self._reported(outcome)

    def _next_due(self, feature_set: str) -> tuple[float, str] | None:
        """Return when a feature set's next deferred cell is due, and why it is deferred.

        None if one of its cells is not deferred.
        """
        deferred: list[tuple[float, str]] = []
        for key in self._unreported[feature_set]:
            file = self._files[key]
            cell = file.cells[feature_set]
            stage = file.deferred_by(cell) if cell.is_open else None
            if stage and stage.deferral and stage.error:
                deferred.append((stage.deferral.until, stage.error.message))
            elif not cell.is_open and self._outbox.error:
                deferred.append((self._outbox.due_at, self._outbox.error.message))
            else:
                return None
        return min(deferred)

    # Planning

    def _plan(self) -> None:
        """Plan the files that are identified."""
        if files := self._dispatcher.to_plan():
            known = self._find_known(
                {file.identity.content_hash for file in files if file.identity}
            )
            for file in files:
                self._plan_file(file, known)
            self._dispatcher.place(*files)

    def _find_known(self, hashes: Collection[str]) -> dict[str, Known]:
        if self._force:
            return {feature_set.name: Known() for feature_set in self._feature_sets}
        quarantine = Quarantine()
        known = {}
        for feature_set in self._feature_sets:
            rows: dict[str, dict[str, Row]] = defaultdict(dict)
            table = feature_table(feature_set).landing_name
            for row in self._landing.latest(table, where=("content_hash", hashes)):
                if row["code_version"] == feature_set.code_version:
                    rows[row["content_hash"]][row["file_key"]] = row
            quarantined = quarantine.check_many(
                hashes,
                feature_set.name,
                feature_set.code_version,
                self._conditions[feature_set.name],
            )
            known[feature_set.name] = Known(rows, quarantined)
        return known

    def _plan_file(self, file: FileWork, known: Mapping[str, Known]) -> None:
        assert file.identity is not None
        content_hash = file.identity.content_hash
        plans = plan_file(file.key, content_hash, self._feature_sets, known)
        leader = self._leaders.setdefault(content_hash, file)
        for name, plan in plans.items():
            cell = file.cells[name]
            match plan:
                case Reuse(row):
                    cell.state = StageState.DONE
                    self._results.reused(cell, row)
                case Copy(row):
                    cell.state = StageState.DONE
                    cell.row = row
                    self._results.copied(cell, file.key, row)
                case Skip(error):
                    cell.state = StageState.FAILED
                    self._results.failed(cell, file.key, error, noted_as="quarantined")
                case Compute(former):
                    cell.former = former
                    if leader is not file and cell.feature_set.reads_pcm:
                        self._follow(file, cell, leader.cells[name])
        file.is_planned = True

    def _follow(self, file: FileWork, cell: Cell, leader: Cell) -> None:
        """Have a cell end as that of another file with the same content does."""
        if leader.row is not None:
            cell.state = StageState.DONE
            self._results.copied(leader, file.key, leader.row)
        elif leader.is_open:
            cell.follow(leader)
        elif leader.state is StageState.FAILED and leader.error and concerns_copies(leader.error):
            cell.state = StageState.FAILED
            self._results.failed(leader, file.key, leader.error, noted_as="given_up")

    # How stages end

    def _conclude(self, attempt: Attempt) -> None:
        """Process the end of an attempt."""
        stage, file = attempt.stage, attempt.stage.file
        with log_context(
            run_id=self._run_id,
            file=file.key,
            feature_set=stage.operation if isinstance(stage, Cell) else None,
            attempt=stage.attempts + 1,
        ):
            exception = attempt.future.exception()
            self._check_workers_start(exception)
            if isinstance(exception, FileChangedError) or file.is_stale(stage):
                self._discard(attempt, exception)
            elif exception is None:
                self._succeeded(attempt)
            else:
                self._failed_attempt(attempt, exception)
        self._drop_audio(file)
        self._dispatcher.place(file)

    def _check_workers_start(self, exception: BaseException | None) -> None:
        """Raise if workers cannot be started at all: that is a fault of the installation.

        Raises
        ------
        WorkerStartError
            The error of the last one.
        """
        if not isinstance(exception, WorkerStartError):
            self._start_failures = None
        elif self._start_failures is not None:
            self._start_failures += 1
            if self._start_failures >= MAX_START_FAILURES:
                raise exception

    def _succeeded(self, attempt: Attempt) -> None:
        stage, file = attempt.stage, attempt.stage.file
        result = attempt.future.result()
        self._results.stage_succeeded(attempt)
        if isinstance(stage, Cell):
            file.block_s = stage.options.block_s or file.block_s
            self._results.computed(attempt, stage, cast("CellResult", result))
            stage.end_followers()
        elif stage.kind == DECODE:
            file.decoded_in = attempt.measurement
        elif stage.kind == IDENTIFY:
            self._identified_as(file, *cast("tuple[Identity, FileStamp]", result))
        elif file.identity:
            file.identity = replace(file.identity, duration_s=cast("float | None", result))
        stage.state = StageState.DONE
        if stage in (file.identify, file.duration) and file.is_identified:
            self._results.identified(file)

    def _failed_attempt(self, attempt: Attempt, exception: BaseException) -> None:
        stage, file = attempt.stage, attempt.stage.file
        error = self._results.classify(exception, stage)
        self._results.stage_failed(attempt, exception, error)
        if is_about_file(error):
            stage.first_error = stage.first_error or error
        if stage is file.duration:
            stage.state = StageState.FAILED
            self._results.identified(file)
            return
        if stage.kind == DECODE and file.identity:
            self._scratch.drop(file.scratch_name)  # what a killed worker left
        recovery = None
        others_fail = self._results.others_fail_too(stage)
        if stage.attempts < most_attempts(
            error, self._settings.retry_max_attempts, others_fail=others_fail
        ):
            recovery = next_recovery(error, stage.kind, stage.tried)
        if stage.cells:
            # A failed decode counts as an attempt of the first cell that needs the audio.
            self._results.record_attempt(
                attempt, stage.cells[0], "failed", error=error, recovery=recovery
            )
        if recovery is None:
            # What a fallback stumbles over says less than the first error.
            first = stage.first_error if is_about_file(error) else None
            self._give_up(stage, first or error)
            return
        within_budget = not stage.has_budget or get_retry_manager().try_spend(stage.operation)
        stage.tried.append(recovery)
        stage.options = apply_recovery(recovery, stage.options, stage.kind)
        if recovery is RecoveryStrategy.DATABASE_RECOVERY:
            get_state_store().close()  # the next use opens new connections
        if recovery in DEFERRING:
            self._defer(stage, error, DEFERRING[recovery])
        elif not within_budget:
            self._defer(stage, error, RetryStrategy.ADAPTIVE)
        else:
            stage.state = StageState.READY

    def _give_up(self, stage: Stage, error: ErrorInfo, *, was_deferred: bool = False) -> None:
        """Fail the cells that depend on a stage."""
        file, cells = stage.file, stage.cells
        was_tried = stage is not file.identify and not was_deferred
        self._results.stage_given_up(stage)
        last, stage.error, stage.state = stage.error, error, StageState.FAILED
        if stage is file.identify:
            self._results.identified(file)
        for cell in cells:
            if cell.former:
                cell.state = StageState.DONE
                self._results.kept(cell, error)
                cell.end_followers()
                continue
            cell.error, cell.state = error, StageState.FAILED
            if was_tried:
                self._results.suspect(cell, error)
            has_record = was_tried and cell is cells[0]
            # The record of the last attempt, or of the quarantine, says it.
            says_it = (file.key, cell.operation) in self._results.quarantined or (
                has_record and error is last
            )
            waited = was_deferred or (stage is file.identify and error.retryable)
            noted_as = "given_up" if waited or has_record else "skipped"
            self._results.failed(cell, file.key, error, noted_as=None if says_it else noted_as)
            for follower in list(cell.followers):
                follows = follower.cells[cell.operation]
                if concerns_copies(error):
                    follows.state = StageState.FAILED
                    self._results.failed(cell, follower.key, error, noted_as="given_up")
                else:
                    follows.follow_nobody()

    # Changed files, and decoded audio

    def _identified_as(self, file: FileWork, identity: Identity, stamp: FileStamp) -> None:
        """Set a file's identity; start the file anew if its content has changed in this run."""
        before = file.identity
        if before and before.content_hash != identity.content_hash:
            if self._leaders.get(before.content_hash) is file:
                del self._leaders[before.content_hash]
            self._scratch.drop(file.scratch_name)
            self._outbox.withdraw(file.key)
            for name in file.cells:
                self._results.quarantined.discard((file.key, name))
                self._failed.pop((file.key, name), None)
            for keys in self._unreported.values():
                keys.add(file.key)
            file.begin_anew()
        elif before:
            identity = replace(identity, duration_s=before.duration_s)
        file.identity, file.stamp = identity, stamp
        file.identify.state = StageState.DONE
        if before == identity or identity == file.known:
            file.duration.state = StageState.DONE

    def _discard(self, attempt: Attempt, exception: BaseException | None) -> None:
        """Ignore an attempt whose file is no longer the one that was hashed."""
        stage, file = attempt.stage, attempt.stage.file
        if attempt.permit:
            attempt.permit.release()
        if file.is_stale(stage):
            return
        stage.state = StageState.READY
        assert exception is not None
        if stage is not file.identify and file.identify.is_open:
            return  # another stage has noticed it already
        error = self._results.classify(exception, stage)
        for cell in stage.cells[:1]:
            self._results.note(cell, [file.key], "deferred", error)
        file.changes += 1
        if stage is not file.identify:
            file.identify = Stage(file, IDENTIFY)
        if file.changes > MAX_CHANGES:
            self._defer(file.identify, error, RetryStrategy.ADAPTIVE)

    def _drop_audio(self, file: FileWork) -> None:
        """Remove decoded audio after the last cell, or if scratch is full and all are deferred."""
        if not file.identity or file.running or file.decode.state is not StageState.DONE:
            return
        cells = file.needs_audio
        if cells and not (
            all(cell.state is StageState.DEFERRED for cell in cells) and self._scratch.is_full
        ):
            return
        self._scratch.drop(file.scratch_name)
        if cells:
            file.decode = Stage(file, DECODE, options=file.decode.options)

    # Deferrals

    def _refused(self, stage: Stage, refusal: CircuitBreakerOpenError) -> None:
        """Defer a stage that its breaker refused."""
        if not stage.file.is_stale(stage):
            stage.refusals += 1
            error = self._results.classify(refusal, stage)
            self._defer(stage, error, RetryStrategy.ADAPTIVE)
            self._dispatcher.place(stage.file)

    def _defer(self, stage: Stage, error: ErrorInfo, strategy: RetryStrategy) -> None:
        """Defer a stage, or fail its cells if it was deferred for long enough."""
        if why := self._deferrals.defer(stage, error, strategy):
            self._give_up(stage, why, was_deferred=True)
            return
        for cell in stage.cells:
            self._results.note(cell, [file.key for file in cell.files], "deferred", error)

    def _resume_deferred(self) -> None:
        """Resume deferred stages that are due and whose storage is reachable."""
        for stage, problem in self._deferrals.due():
            if problem and not stage.file.is_stale(stage):
                self._defer(stage, problem, RetryStrategy.ADAPTIVE)
            else:
                stage.state = StageState.READY
            self._dispatcher.place(stage.file)
