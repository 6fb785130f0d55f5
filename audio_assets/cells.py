"""A cell on its way through a run, and what becomes of it."""

from dataclasses import dataclass, field
from enum import StrEnum

from audio_assets.features.base import Row
from audio_assets.recovery import AttemptOptions
from audio_assets.worker import Identity
from robustness.error_classifier import ErrorInfo, RecoveryStrategy
from robustness.smart_retry import RetryStrategy


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
        Why it failed or was deferred; None where a worker is still at it.
    history : tuple of dict
        The attempts made, as rows of ``robustness.attempts``.
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
    history: tuple[Row, ...] = ()
    recoveries: tuple[str, ...] = ()
    retry_after: float = 0.0
    audio_s: float = 0.0

    @property
    def attempts(self) -> int:
        """Attempts made."""
        return len(self.history)


@dataclass(frozen=True)
class Wait:
    """What a cell waits for before its next attempt; times are of the monotonic clock (s)."""

    strategy: RetryStrategy
    since: float
    until: float


@dataclass
class Cell:
    """A cell that is not done yet.

    Parameters
    ----------
    file_key : str
        The file.
    identity : Identity
        What the file is.
    copies : list of str
        Keys of other files with the same content, which get the same row.
    options : AttemptOptions
        How the next attempt is made.
    history : list of dict
        The attempts so far.
    tried : list of RecoveryStrategy
        Recoveries so far.
    error : ErrorInfo or None
        What the last attempt failed of, or what the cell is put off for.
    wait : Wait or None
        What comes before the next attempt.
    waited_by : RetryStrategy or None
        What set the last wait.
    began : float or None
        When the first attempt ended or the cell was first put off (s, monotonic clock).
    refusals : int
        How often an open breaker put it off.
    """

    file_key: str
    identity: Identity
    copies: list[str] = field(default_factory=list)
    options: AttemptOptions = field(default_factory=AttemptOptions)
    history: list[Row] = field(default_factory=list)
    tried: list[RecoveryStrategy] = field(default_factory=list)
    error: ErrorInfo | None = None
    wait: Wait | None = None
    waited_by: RetryStrategy | None = None
    began: float | None = None
    refusals: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all files with this content."""
        return (self.file_key, *self.copies)

    @property
    def attempts(self) -> int:
        """Attempts made."""
        return len(self.history)

    def failed(self, key: str, error: ErrorInfo) -> CellOutcome:
        """Return the outcome, for one of its files, of a cell that is given up."""
        return CellOutcome(
            key,
            CellStatus.FAILED,
            error=error,
            history=tuple(self.history),
            recoveries=tuple(self.tried),
        )

    @property
    def size_mb(self) -> float:
        """Size of the file (MiB)."""
        return self.identity.size / 2**20
