"""A file in processing: its stages, its cells, and the outcome of each cell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from functools import cached_property

from blake3 import blake3

from audio_assets.audio.pcm import SourceInfo
from audio_assets.extraction.recovery import DECODE, EXTRACT, IDENTIFY, AttemptOptions
from audio_assets.extraction.worker import IDENTIFY_STAGES
from audio_assets.features.base import FeatureSet, Row
from audio_assets.library.file_keys import decode_key
from audio_assets.library.files import FileStamp, Identity
from robustness.error_classifier import ErrorInfo, RecoveryStrategy
from robustness.smart_retry import RetryStrategy
from robustness.worker_pool import Measurement


class CellStatus(StrEnum):
    """The outcome of a cell in this run."""

    MATERIALIZED = "materialized"
    REUSED = "reused"
    FAILED = "failed"


@dataclass(frozen=True, eq=False)
class CellOutcome:
    """The outcome of one cell; that of a file replaced meanwhile is another one.

    Parameters
    ----------
    file_key : str
        The file's partition key.
    feature_set : str
        The feature set.
    status : CellStatus
        ``materialized`` and ``reused`` cells have a durable row.
    row : dict or None
        The row, if there is one.
    error : ErrorInfo or None
        Why it failed.
    history : tuple of dict
        The attempts made, as rows of ``robustness.attempts``.
    recoveries : tuple of str
        Recovery strategies tried, in order.
    audio_s : float
        Audio analysed for it in this run (s).
    """

    file_key: str
    feature_set: str
    status: CellStatus
    row: Row | None = None
    error: ErrorInfo | None = None
    history: tuple[Row, ...] = ()
    recoveries: tuple[str, ...] = ()
    audio_s: float = 0.0

    @property
    def attempts(self) -> int:
        """Attempts made."""
        return len(self.history)


class StageState(StrEnum):
    """State of a stage."""

    READY = auto()
    RUNNING = auto()
    DEFERRED = auto()
    FOLLOWING = auto()
    """It ends as the same cell of another file with the same content does."""
    DONE = auto()
    FAILED = auto()


@dataclass(frozen=True)
class Deferral:
    """A delay before a stage's next attempt; times are of the monotonic clock (s)."""

    strategy: RetryStrategy
    since: float
    until: float


@dataclass(eq=False)
class Stage:
    """A step of a file's processing that succeeds or fails by itself.

    Parameters
    ----------
    file : FileWork
        The file.
    kind : {'identify', 'duration', 'decode', 'extract'}
        What it does.
    state : StageState
        Its state.
    options : AttemptOptions
        Options of the next attempt.
    attempts : int
        Attempts made.
    tried : list of RecoveryStrategy
        Recoveries so far.
    error : ErrorInfo or None
        Why the last attempt failed, or why it is deferred.
    first_error : ErrorInfo or None
        Why the first attempt failed.
    deferral : Deferral or None
        The delay before the next attempt.
    deferred_with : RetryStrategy or None
        The strategy of the last deferral.
    began : float or None
        When the first attempt ended or it was first deferred (s, monotonic clock).
    refusals : int
        How often an open breaker deferred it.
    """

    file: "FileWork"
    kind: str
    state: StageState = StageState.READY
    options: AttemptOptions = field(default_factory=AttemptOptions)
    attempts: int = 0
    tried: list[RecoveryStrategy] = field(default_factory=list)
    error: ErrorInfo | None = None
    first_error: ErrorInfo | None = None
    deferral: Deferral | None = None
    deferred_with: RetryStrategy | None = None
    began: float | None = None
    refusals: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it has neither succeeded nor been given up."""
        return self.state not in (StageState.DONE, StageState.FAILED)

    @property
    def cells(self) -> "Sequence[Cell]":
        """The open cells of its file that need it, the next one first."""
        return self.file.needs_audio if self.kind == DECODE else self.file.open_cells

    @property
    def has_budget(self) -> bool:
        """Whether its retries are taken from a retry budget."""
        return self.kind in (DECODE, EXTRACT)

    @property
    def length_s(self) -> float | None:
        """Length of the audio (s) that its deadline depends on; None if that is the file's size."""
        return self.file.length_s if self.has_budget else None

    @property
    def operation(self) -> str:
        """Name under which its retries and errors are counted."""
        return self.kind

    @property
    def breaker(self) -> str | None:
        """The circuit breaker that guards it."""
        match self.kind:
            case "identify":
                return f"storage:{self.file.root}"
            case "decode":
                return "audio_processing"
            case _:
                return None

    @property
    def timed_as(self) -> str:
        """Name of the timing history that applies."""
        return self.deadlines[-1]

    @property
    def deadlines(self) -> Sequence[str]:
        """Names of the deadlines that an attempt passes through."""
        return IDENTIFY_STAGES if self.kind == IDENTIFY else (self.kind,)


@dataclass(eq=False, kw_only=True)
class Cell(Stage):
    """The stage that extracts one feature set.

    Parameters
    ----------
    feature_set : FeatureSet
        The feature set.
    history : list of dict
        The attempts so far, as rows of ``robustness.attempts``, including attempts to decode if the
        audio was decoded for this cell.
    followers : list of FileWork
        Other files with the same content, whose cells end as this one does.
    leader : Cell or None
        The cell of another file with the same content that this one follows.
    former : dict or None
        Its degraded row, which stays in force if it cannot be computed again.
    row : dict or None
        Its row, when it is done.
    """

    feature_set: FeatureSet
    kind: str = EXTRACT
    history: list[Row] = field(default_factory=list)
    followers: list["FileWork"] = field(default_factory=list)
    leader: "Cell | None" = None
    former: Row | None = None
    row: Row | None = None

    @property
    def cells(self) -> "Sequence[Cell]":  # noqa: D102
        return (self,)

    @property
    def operation(self) -> str:  # noqa: D102
        return self.feature_set.name

    @property
    def breaker(self) -> str:  # noqa: D102
        return f"feature:{self.feature_set.name}"

    @property
    def timed_as(self) -> str:
        """Name of the timing history that applies: each extractor has its own."""
        name = self.feature_set.name
        return name if self.options.extractor == "primary" else f"{name}/alternative"

    @property
    def files(self) -> Sequence["FileWork"]:
        """Its file and those whose cells follow it."""
        return (self.file, *self.followers)

    def follow(self, leader: "Cell") -> None:
        """End as the cell of another file with the same content does."""
        self.leader, self.state = leader, StageState.FOLLOWING
        leader.followers.append(self.file)

    def end_followers(self) -> None:
        """End the followers' cells as this one ended."""
        for follower in self.followers:
            follower.cells[self.operation].state = StageState.DONE

    def follow_nobody(self) -> None:
        """Be computed for its own file."""
        if self.leader:
            self.leader.followers.remove(self.file)
            self.leader, self.state = None, StageState.READY


@dataclass(eq=False)
class FileWork:
    """A file of the run, and what remains to be done for it.

    Parameters
    ----------
    key : str
        The file's partition key.
    feature_sets : sequence of FeatureSet
        The run's feature sets.
    known : Identity or None
        What it was when last seen.
    identity : Identity or None
        What it is, once it is identified.
    stamp : FileStamp or None
        What it must be from then on.
    is_planned : bool
        Whether it is known which cells must be computed.
    running : int
        Stages that are running.
    source : SourceInfo or None
        Properties of its audio, once it is decoded.
    decoded_in : Measurement or None
        What decoding took, until it is part of an attempt's record.
    block_s : float or None
        Block length (s) with which a stage stayed within its memory.
    changes : int
        How often it was found changed after it was identified.
    """

    key: str
    feature_sets: Sequence[FeatureSet]
    known: Identity | None = None
    identity: Identity | None = None
    stamp: FileStamp | None = None
    is_planned: bool = False
    running: int = 0
    source: SourceInfo | None = None
    decoded_in: Measurement | None = None
    block_s: float | None = None
    changes: int = 0

    def __post_init__(self) -> None:
        self.cells: dict[str, Cell] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Reset the file, whose content has changed."""
        for cell in self.cells.values():
            cell.follow_nobody()
            for follower in list(cell.followers):
                follower.cells[cell.operation].follow_nobody()
        self.is_planned = False
        self.source, self.decoded_in, self.block_s = None, None, None
        self.identify = Stage(self, IDENTIFY)
        self.duration = Stage(self, "duration")
        self.decode = Stage(self, DECODE)
        self.cells = {s.name: Cell(self, feature_set=s) for s in self.feature_sets}

    @cached_property
    def root(self) -> str:
        """Name of its library root."""
        return decode_key(self.key)[0]

    @property
    def size_mb(self) -> float:
        """Size of the file (MiB); 0 if it is not known."""
        known = self.identity or self.known
        return known.size / 2**20 if known else 0.0

    @property
    def scratch_name(self) -> str:
        """Name of its decoded audio: of this content, and apart from that of copies."""
        assert self.identity is not None
        return f"{self.identity.content_hash}-{blake3(self.key.encode()).hexdigest(8)}"

    @property
    def audio_s(self) -> float | None:
        """Length of its decoded audio (s); None if it is not decoded yet."""
        return self.source.duration_s if self.source else None

    @property
    def decoding(self) -> SourceInfo | ErrorInfo | None:
        """How its decoding ended; None if it has not."""
        failed = self.decode.state is StageState.FAILED
        return self.decode.error if failed else self.source

    @property
    def length_s(self) -> float | None:
        """Length of the audio (s), decoded or by its header; None if neither is known."""
        return self.audio_s or (self.identity.duration_s if self.identity else None)

    @property
    def is_identified(self) -> bool:
        """Whether planning has all that it needs to know of it."""
        return not (self.identify.is_open or self.duration.is_open)

    @property
    def is_finished(self) -> bool:
        """Whether none of its cells is open."""
        return not any(cell.is_open for cell in self.cells.values())

    @property
    def open_cells(self) -> list[Cell]:
        """Its open cells that do not follow another file's."""
        return [cell for cell in self.cells.values() if cell.is_open and cell.leader is None]

    @property
    def needs_audio(self) -> list[Cell]:
        """Its open cells that need decoded audio."""
        return [cell for cell in self.open_cells if cell.feature_set.reads_pcm]

    @property
    def runs_alone(self) -> bool:
        """Whether an open stage of it must run with nothing beside it."""
        stages = (self.identify, self.decode, *self.cells.values())
        return any(stage.options.alone and stage.is_open for stage in stages)

    def is_stale(self, stage: Stage) -> bool:
        """Tell whether a stage belongs to an earlier content of the file."""
        return stage not in (self.identify, self.duration, self.decode, *self.cells.values())

    def ready(self) -> Iterator[Stage]:
        """Yield the stages that may start now, in order."""
        if self.identify.is_open:
            stages = [self.identify]
        elif self.duration.is_open:
            stages = [self.duration]
        elif not self.is_planned:
            stages = []
        else:
            stages = [
                cell if self._has_input(cell) else self.decode for cell in self.cells.values()
            ]
        yield from (stage for stage in dict.fromkeys(stages) if stage.state is StageState.READY)

    def deferred_by(self, cell: Cell) -> Stage | None:
        """Return the deferred stage that a cell depends on."""
        if cell.leader:
            return cell.leader.file.deferred_by(cell.leader)
        stages = (self.identify, cell if self._has_input(cell) else self.decode)
        return next((stage for stage in stages if stage.state is StageState.DEFERRED), None)

    def _has_input(self, cell: Cell) -> bool:
        # A cell that has ended, or follows another file's, needs no decoding.
        if cell.feature_set.reads == "file" or cell.state is not StageState.READY:
            return True
        if cell.feature_set.reads == "decoding":
            return self.decoding is not None
        return self.decode.state is StageState.DONE
