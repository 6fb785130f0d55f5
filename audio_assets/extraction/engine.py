"""The engine of a run: works off its files, whichever of the run's ops is at work.

A worker takes a file: it decodes it once, then extracts one feature set after another, each a
*stage* with a deadline, a memory budget and a result of its own. The worker's thread in this
process draws each stage when the one before it has ended (see `dispatch`), so that permits,
deadlines and skips are decided at the last moment. What a stage gives counts as soon as it is
there, whatever becomes of the file later.

The ops of a run share one engine. The op at work drives it: it takes in how stages ended, decides
what follows, makes rows durable and yields the outcomes.
"""

import queue
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from audio_assets.backlog import known_identities, release_contents
from audio_assets.errors import FileChangedError
from audio_assets.extraction.cells import (
    Cell,
    CellOutcome,
    CellStatus,
    FileWork,
    Stage,
    StageState,
)
from audio_assets.extraction.dispatch import Dispatcher
from audio_assets.extraction.outbox import Outbox
from audio_assets.extraction.planning import Compute, Copy, Known, Reuse, Skip, plan_file
from audio_assets.extraction.recovery import (
    DECODE,
    IDENTIFY,
    WAITS,
    apply_recovery,
    concerns_copies,
    most_attempts,
    next_recovery,
)
from audio_assets.extraction.results import Flight, Results
from audio_assets.extraction.scratch import Scratch
from audio_assets.extraction.waits import Waits
from audio_assets.extraction.worker import CellResult, Identity
from audio_assets.features.base import FeatureSet, Row
from audio_assets.file_keys import FileKeyError
from audio_assets.library import FileStamp, Library
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import feature_table
from robustness.circuit_breaker import CircuitBreakerOpenError
from robustness.error_classifier import ErrorInfo, RecoveryStrategy
from robustness.log_context import log_context
from robustness.quarantine import Quarantine
from robustness.settings import get_settings
from robustness.smart_retry import DeferredError, RetryStrategy, get_retry_manager
from robustness.state import get_state_store
from robustness.worker_pool import WorkerPool

LONGEST_SLEEP_S = 0.5
"""How long the driver waits at most before it looks at what is due (s)."""

MAX_CHANGES = 3
"""How often a file may change under the analysis before it must wait."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Parameters
    ----------
    files, cells : int
        Files and cells of the run.
    files_over, cells_over : int
        Those that are reported.
    cells_computed : int
        Cells of them that were computed in this run.
    audio_s : float
        Audio analysed (s): of each computed cell its share of the file's.
    """

    files: int
    cells: int
    files_over: int
    cells_over: int
    cells_computed: int
    audio_s: float


class Engine:
    """Works off the files of one run.

    Parameters
    ----------
    run_id : str
        The Dagster run.
    library : Library
        Where the files are.
    landing : Landing
        Where rows are made durable.
    pool : WorkerPool
        The workers, which draw from this engine alone.
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
        self._waits = Waits(library, pool, scratch)
        self._outbox = Outbox(landing)
        self._results = Results(run_id, library, self._outbox)
        self._feature_sets: Sequence[FeatureSet] = ()
        self._has_begun = False
        self._force = False
        self._files: dict[str, FileWork] = {}
        self._leaders: dict[str, FileWork] = {}
        """The file, of those with the same content, whose audio is analysed."""
        self._unreported: dict[str, set[str]] = {}
        """Keys of the files whose cells are not reported yet, by feature set."""
        self._failed: dict[str, list[CellOutcome]] = defaultdict(list)
        self._failing_since: dict[str, float] = {}
        self._cells_computed, self._audio_s = 0, 0.0

    def begin(
        self,
        feature_sets: Sequence[FeatureSet],
        file_keys: Sequence[str],
        *,
        force: bool = False,
        release: bool = False,
    ) -> None:
        """Take in the work of a run; what is begun already is not begun again.

        Parameters
        ----------
        feature_sets : sequence of FeatureSet
            What to extract, in the order in which a file's cells are computed.
        file_keys : sequence of str
            The files.
        force : bool
            Compute also what is done and unchanged, and what is quarantined.
        release : bool
            Let the files' cells out of quarantine.
        """
        if self._has_begun:
            return
        known = known_identities(self._landing, file_keys)
        if release:
            contents = {identity.content_hash for identity in known.values()}
            release_contents(contents, [feature_set.name for feature_set in feature_sets])
        self._has_begun, self._force, self._feature_sets = True, force, feature_sets
        self._files = {key: FileWork(key, feature_sets, known.get(key)) for key in file_keys}
        self._unreported = {feature_set.name: set(file_keys) for feature_set in feature_sets}
        for file in self._files.values():
            try:
                self._library.path_of(file.key)
            except FileKeyError as error:
                self._give_up(file.identify, self._results.classify(error, file.identify))
        self._dispatcher.place(*self._files.values())

    def drive(self, feature_set: str, *, hold_s: float = 0.0) -> Iterator[CellOutcome]:
        """Work until every cell of a feature set is over, and yield what becomes durable.

        Cells of all feature sets of the run are worked at and yielded meanwhile, each once. An
        outcome counts as reported when the next one is asked for.

        Parameters
        ----------
        feature_set : str
            The feature set whose op drives.
        hold_s : float
            How long to go on with other feature sets at least while this one's cells wait (s).

        Yields
        ------
        CellOutcome
            In the order of completion.

        Raises
        ------
        DeferredError
            If all that is left of the feature set must wait.
        Exception
            If something failed that concerns no file: what is durable is yielded by the next call.
        """
        hold_until = time.monotonic() + hold_s
        if not self._outbox.error:
            yield from self._report()  # what an earlier call could not
        while self._unreported[feature_set]:
            self._advance()
            if self._should_report(feature_set):
                yield from self._report()
                yield from self._give_up_unsaved(feature_set)
                continue
            due = self._next_due(feature_set)
            if due and time.monotonic() >= hold_until:
                seconds = max(due[0] - time.monotonic(), 0.0)
                files = len(self._unreported[feature_set])
                raise DeferredError(f"{files} files wait {seconds:.0f} s: {due[1]}", seconds)
            self._sleep()
        self._results.judge_suspects(feature_set)

    def failed(self, feature_set: str) -> list[CellOutcome]:
        """Return a feature set's failed cells, whichever op reported them."""
        return self._failed[feature_set]

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        left = set().union(*self._unreported.values())
        cells = len(self._files) * len(self._feature_sets)
        return Progress(
            files=len(self._files),
            cells=cells,
            files_over=len(self._files) - len(left),
            cells_over=cells - sum(map(len, self._unreported.values())),
            cells_computed=self._cells_computed,
            audio_s=self._audio_s,
        )

    def failing_for(self, feature_set: str) -> float:
        """Return for how long a feature set's op has failed without a cell being reported (s)."""
        now = time.monotonic()
        return now - self._failing_since.setdefault(feature_set, now)

    # The driver

    def _sleep(self) -> None:
        """Wait for a stage to end, or for something to be due."""
        seconds = min(LONGEST_SLEEP_S, self._waits.next_end_in, self._outbox.due_in)
        self._take_end(max(seconds, 0.0))

    def _advance(self) -> None:
        """Take in what has ended, end waits that are over, plan what is identified."""
        while self._take_end(0.0):
            pass
        self._end_waits()
        self._plan()

    def _take_end(self, seconds: float) -> bool:
        """Take in the next end of an attempt; False if there is none within the time."""
        try:
            end = self._dispatcher.ends.get(timeout=seconds)
        except queue.Empty:
            return False
        if isinstance(end, Flight):
            self._conclude(end)
        else:
            self._refused(*end)
        return True

    def _should_report(self, feature_set: str) -> bool:
        """Tell whether it is time to make rows durable, or nothing else is left to do."""
        if not self._outbox.due_in:
            return True
        return not self._outbox.error and not any(
            self._files[key].cells[feature_set].is_open for key in self._unreported[feature_set]
        )

    def _report(self) -> Iterator[CellOutcome]:
        """Make rows durable, then yield the outcomes that rest on them."""
        for outcome in self._outbox.flush():
            yield outcome
            self._failing_since.clear()
            self._reported(outcome)
            self._advance()  # to report a cell takes its time

    def _reported(self, outcome: CellOutcome) -> None:
        self._unreported[outcome.feature_set].discard(outcome.file_key)
        # Who has the same content finds the row in the landing from now on.
        self._files[outcome.file_key].cells[outcome.feature_set].row = None
        if outcome.status is CellStatus.FAILED:
            self._failed[outcome.feature_set].append(outcome)
        elif outcome.status is CellStatus.MATERIALIZED:
            self._cells_computed += 1
            self._audio_s += outcome.audio_s / len(self._feature_sets)

    def _give_up_unsaved(self, feature_set: str) -> Iterator[CellOutcome]:
        """Fail the cells whose rows could not be made durable for too long."""
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
        """Return when the next cell of a feature set can go on, and what it waits for.

        None if one of them need not wait.
        """
        waits: list[tuple[float, str]] = []
        for key in self._unreported[feature_set]:
            file = self._files[key]
            cell = file.cells[feature_set]
            stage = file.kept_waiting_by(cell) if cell.is_open else None
            if stage and stage.wait and stage.error:
                waits.append((stage.wait.until, stage.error.message))
            elif not cell.is_open and self._outbox.error:
                waits.append((self._outbox.due_at, self._outbox.error.message))
            else:
                return None
        return min(waits)

    # Planning

    def _plan(self) -> None:
        """Decide what must be computed of the files that are identified."""
        if files := self._dispatcher.to_plan():
            known = self._look_up({file.identity.content_hash for file in files if file.identity})
            for file in files:
                self._plan_file(file, known)
            self._dispatcher.place(*files)

    def _look_up(self, hashes: Collection[str]) -> dict[str, Known]:
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
            quarantined = quarantine.check_many(hashes, feature_set.name, feature_set.code_version)
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
                    self._results.failed(cell, file.key, error, noted_as="skipped")
                case Compute() if leader is not file and cell.feature_set.reads_pcm:
                    self._follow(file, cell, leader.cells[name])
        file.is_planned = True

    def _follow(self, file: FileWork, cell: Cell, leader: Cell) -> None:
        """Let a cell end as that of another file with the same content does."""
        if leader.row is not None:
            cell.state = StageState.DONE
            self._results.copied(leader, file.key, leader.row)
        elif leader.is_open:
            cell.follow(leader)
        elif leader.state is StageState.FAILED and leader.error and concerns_copies(leader.error):
            cell.state = StageState.FAILED
            self._results.failed(leader, file.key, leader.error, noted_as="given_up")

    # How stages end

    def _conclude(self, flight: Flight) -> None:
        """Take in how an attempt ended."""
        stage, file = flight.stage, flight.stage.file
        with log_context(
            run_id=self._run_id,
            file=file.key,
            feature_set=stage.operation if isinstance(stage, Cell) else None,
            attempt=stage.attempts + 1,
        ):
            exception = flight.future.exception()
            if isinstance(exception, FileChangedError) or file.has_lost(stage):
                self._discard(flight, exception)
            elif exception is None:
                self._succeeded(flight)
            else:
                self._failed_attempt(flight, exception)
        self._drop_audio(file)
        self._dispatcher.place(file)

    def _succeeded(self, flight: Flight) -> None:
        stage, file = flight.stage, flight.stage.file
        result = flight.future.result()
        self._results.stage_succeeded(flight)
        if isinstance(stage, Cell):
            file.block_s = stage.options.block_s or file.block_s
            self._results.computed(flight, stage, cast("CellResult", result))
            for follower in stage.followers:
                follower.cells[stage.operation].state = StageState.DONE
        elif stage.kind == DECODE:
            file.decode_s = flight.measurement.seconds
        elif stage.kind == IDENTIFY:
            self._identified_as(file, *cast("tuple[Identity, FileStamp]", result))
        elif file.identity:
            file.identity = replace(file.identity, duration_s=cast("float | None", result))
        stage.state = StageState.DONE
        if stage in (file.identify, file.duration) and file.is_identified:
            self._results.identified(file)

    def _failed_attempt(self, flight: Flight, exception: BaseException) -> None:
        stage, file = flight.stage, flight.stage.file
        error = self._results.classify(exception, stage)
        self._results.stage_failed(flight, exception, error)
        if stage is file.duration:
            stage.state = StageState.FAILED
            self._results.identified(file)
            return
        if stage.kind == DECODE and file.identity:
            self._scratch.drop(file.identity.content_hash)  # what a killed worker left of it
        recovery = None
        others_fail = self._results.others_fail_too(stage)
        if stage.attempts < most_attempts(
            error, self._settings.retry_max_attempts, others_fail=others_fail
        ):
            recovery = next_recovery(error, stage.kind, stage.tried)
        if stage.cells:
            # A failed decode is an attempt at the cell that needed the audio first.
            self._results.record_attempt(
                flight, stage.cells[0], "failed", error=error, recovery=recovery
            )
        if recovery is None:
            self._give_up(stage, error)
            return
        within_budget = not stage.has_budget or get_retry_manager().try_spend(stage.operation)
        stage.tried.append(recovery)
        stage.options = apply_recovery(recovery, stage.options, stage.kind)
        if recovery is RecoveryStrategy.DATABASE_RECOVERY:
            get_state_store().close()  # the next use opens new connections
        if recovery in WAITS:
            self._defer(stage, error, WAITS[recovery])
        elif not within_budget:
            self._defer(stage, error, RetryStrategy.ADAPTIVE)
        else:
            stage.state = StageState.READY

    def _give_up(self, stage: Stage, error: ErrorInfo, *, waited: bool = False) -> None:
        """Fail the cells that cannot be computed without a stage."""
        file, cells = stage.file, stage.cells
        self._results.stage_given_up(stage)
        stage.error, stage.state = error, StageState.FAILED
        if stage is file.identify:
            self._results.identified(file)
        for cell in cells:
            cell.error, cell.state = error, StageState.FAILED
            # The last attempt says it of its own cell, unless that waited.
            says_it = cell is cells[0] and stage is not file.identify and not waited
            tried = waited or (stage is file.identify and error.retryable)
            noted_as = "given_up" if tried else "skipped"
            self._results.failed(cell, file.key, error, noted_as=None if says_it else noted_as)
            if stage is not file.identify and not waited:
                self._results.suspect(cell, error)
            for follower in list(cell.followers):
                follows = follower.cells[cell.operation]
                if concerns_copies(error):
                    follows.state = StageState.FAILED
                    self._results.failed(cell, follower.key, error, noted_as="given_up")
                else:
                    follows.follow_nobody()

    # Files that change, and their audio

    def _identified_as(self, file: FileWork, identity: Identity, stamp: FileStamp) -> None:
        """Take in what a file is; begin it anew if it is another than it was in this run."""
        before = file.identity
        if before and before.content_hash != identity.content_hash:
            if self._leaders.get(before.content_hash) is file:
                del self._leaders[before.content_hash]
                self._scratch.drop(before.content_hash)
            self._outbox.withdraw(file.key)
            for keys in self._unreported.values():
                keys.add(file.key)
            file.begin_anew()
        elif before:
            identity = replace(identity, duration_s=before.duration_s)
        file.identity, file.stamp = identity, stamp
        file.identify.state = StageState.DONE
        if before == identity or identity == file.known:
            file.duration.state = StageState.DONE

    def _discard(self, flight: Flight, exception: BaseException | None) -> None:
        """Let an attempt count for nothing: its file is not the one any more that was hashed."""
        stage, file = flight.stage, flight.stage.file
        if flight.permit:
            flight.permit.release()
        if file.has_lost(stage):
            return
        stage.state = StageState.READY
        assert exception is not None
        if stage is not file.identify and file.identify.is_open:
            return  # another stage has found it already
        error = self._results.classify(exception, stage)
        for cell in stage.cells[:1]:
            self._results.note(cell, [file.key], "deferred", error)
        file.changes += 1
        if stage is not file.identify:
            file.identify = Stage(file, IDENTIFY)
        if file.changes > MAX_CHANGES:
            self._defer(file.identify, error, RetryStrategy.ADAPTIVE)

    def _drop_audio(self, file: FileWork) -> None:
        """Remove a file's decoded audio with its last cell, or while it waits and room is short."""
        if not file.identity or file.running or file.decode.state is not StageState.DONE:
            return
        cells = file.needs_audio
        if cells and not (
            all(cell.state is StageState.WAITING for cell in cells) and self._scratch.is_full
        ):
            return
        self._scratch.drop(file.identity.content_hash)
        if cells:
            file.decode = Stage(file, DECODE, options=file.decode.options)

    # Waits

    def _refused(self, stage: Stage, refusal: CircuitBreakerOpenError) -> None:
        """Defer a stage that its breaker does not let through."""
        if not stage.file.has_lost(stage):
            stage.refusals += 1
            error = self._results.classify(refusal, stage)
            self._defer(stage, error, RetryStrategy.ADAPTIVE)
            self._dispatcher.place(stage.file)

    def _defer(self, stage: Stage, error: ErrorInfo, strategy: RetryStrategy) -> None:
        """Have a stage wait; give it up if it has waited long enough."""
        if why := self._waits.defer(stage, error, strategy):
            self._give_up(stage, why, waited=True)
            return
        for cell in stage.cells:
            self._results.note(cell, [file.key for file in cell.files], "deferred", error)

    def _end_waits(self) -> None:
        """Let stages go on whose waits are over, once their storage is there."""
        for stage, away in self._waits.over():
            if away and not stage.file.has_lost(stage):
                self._defer(stage, away, RetryStrategy.ADAPTIVE)
            else:
                stage.state = StageState.READY
            self._dispatcher.place(stage.file)
