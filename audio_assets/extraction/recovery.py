"""Recovery: what follows a failed attempt. It is decided here and nowhere else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from audio_assets.audio.streams import DecoderName
from audio_assets.extraction.worker import Extractor
from robustness.error_classifier import ErrorInfo, ErrorType, RecoveryStrategy
from robustness.smart_retry import RetryStrategy

BLOCK_S = 40 * 187 * 256 / 16000
"""Block length of an analysis in bounded memory (s): two minutes, in whole MusiCNN patches."""

TIMEOUT_FACTOR = 1.5

DEFERRING: Mapping[RecoveryStrategy, RetryStrategy] = {
    RecoveryStrategy.FILE_SYSTEM_CHECK: RetryStrategy.ADAPTIVE,
    RecoveryStrategy.DATABASE_RECOVERY: RetryStrategy.ADAPTIVE,
    RecoveryStrategy.NETWORK_RETRY: RetryStrategy.EXPONENTIAL,
    RecoveryStrategy.NONE: RetryStrategy.ADAPTIVE,
}
"""Recoveries that defer the stage, and the strategy of the delay."""

IDENTIFY, DECODE, EXTRACT = "identify", "decode", "extract"
"""The stages whose failure can be recovered from."""

_ESCALATION: Mapping[ErrorType, Sequence[RecoveryStrategy]] = {
    ErrorType.TIMEOUT: (RecoveryStrategy.INCREASE_TIMEOUT, RecoveryStrategy.AUDIO_FALLBACK),
    ErrorType.MEMORY: (RecoveryStrategy.REDUCE_MEMORY_USAGE, RecoveryStrategy.AUDIO_FALLBACK),
    ErrorType.AUDIO_PROCESSING: (
        RecoveryStrategy.AUDIO_FALLBACK,
        RecoveryStrategy.FORMAT_CONVERSION,
    ),
    ErrorType.CORRUPT_FILE: (RecoveryStrategy.FORMAT_CONVERSION,),
    ErrorType.UNSUPPORTED_FORMAT: (
        RecoveryStrategy.FORMAT_CONVERSION,
        RecoveryStrategy.AUDIO_FALLBACK,
    ),
    ErrorType.UNKNOWN: (RecoveryStrategy.AUDIO_FALLBACK,),
}

# A file that cannot be identified may be on storage that does not respond.
_ESCALATION_OF_IDENTIFY = (RecoveryStrategy.FILE_SYSTEM_CHECK,)

_HELPS_IN: Mapping[RecoveryStrategy, Sequence[str]] = {
    RecoveryStrategy.SKIP_FILE: (),
    RecoveryStrategy.AUDIO_FALLBACK: (DECODE, EXTRACT),
    RecoveryStrategy.FORMAT_CONVERSION: (DECODE,),
}
"""The stages that a recovery can help; those not listed here help all."""

_ABOUT_CONTENT = {ErrorType.CORRUPT_FILE, ErrorType.UNSUPPORTED_FORMAT}
_ABOUT_COMPUTING = {
    ErrorType.TIMEOUT,
    ErrorType.MEMORY,
    ErrorType.AUDIO_PROCESSING,
    ErrorType.UNKNOWN,
}
_ABOUT_ACCESS = {ErrorType.FILE_SYSTEM, ErrorType.PERMISSION}
_ABOUT_SERVICES = {ErrorType.NETWORK, ErrorType.DATABASE}


@dataclass(frozen=True)
class AttemptOptions:
    """Options of an attempt, which recoveries change.

    Parameters
    ----------
    decoder : {'av', 'soundfile', 'salvage'}
        Decoder to use.
    extractor : {'primary', 'alternative'}
        Extractor to call.
    block_s : float, optional
        Analyse in blocks of this length (s).
    timeout_factor : float
        Multiplies the deadlines.
    alone : bool
        Run no other stage meanwhile, so that it has all the memory.
    fresh_worker : bool
        Run in a new process, without open connections.
    check_storage : bool
        Check first that the file's storage is reachable and scratch has space for its audio.
    """

    decoder: DecoderName = "av"
    extractor: Extractor = "primary"
    block_s: float | None = None
    timeout_factor: float = 1.0
    alone: bool = False
    fresh_worker: bool = False
    check_storage: bool = False


def next_recovery(
    error: ErrorInfo, stage: str, tried: Sequence[RecoveryStrategy]
) -> RecoveryStrategy | None:
    """Choose what to try after a failed attempt.

    The classifier's own advice comes first, then whatever else helps against that type of
    error. A recovery that changes options is tried once; one that defers may be repeated.

    Parameters
    ----------
    error : ErrorInfo
        The attempt's classified error.
    stage : {'identify', 'decode', 'extract'}
        Stage that failed.
    tried : sequence of RecoveryStrategy
        Recoveries already tried at this stage of the file.

    Returns
    -------
    RecoveryStrategy or None
        None if no recovery is left that could help.
    """
    if not error.retryable:
        return None
    escalation = (
        _ESCALATION_OF_IDENTIFY if stage == IDENTIFY else _ESCALATION.get(error.error_type, ())
    )
    for strategy in (error.recovery_strategy, *escalation):
        if stage in _HELPS_IN.get(strategy, (stage,)) and strategy not in tried:
            return strategy
    return error.recovery_strategy if error.recovery_strategy in DEFERRING else None


def apply_recovery(
    strategy: RecoveryStrategy, options: AttemptOptions, stage: str
) -> AttemptOptions:
    """Return the options of the next attempt.

    Parameters
    ----------
    strategy : RecoveryStrategy
        What to try.
    options : AttemptOptions
        Options of the failed attempt.
    stage : {'identify', 'decode', 'extract'}
        Stage that failed: a fallback changes the decoder in ``decode``, the extractor in
        ``extract``.
    """
    match strategy:
        case RecoveryStrategy.INCREASE_TIMEOUT:
            return replace(options, timeout_factor=options.timeout_factor * TIMEOUT_FACTOR)
        case RecoveryStrategy.REDUCE_MEMORY_USAGE:
            return replace(options, block_s=BLOCK_S, alone=True)
        case RecoveryStrategy.AUDIO_FALLBACK if stage == DECODE:
            return replace(options, decoder="soundfile")
        case RecoveryStrategy.AUDIO_FALLBACK:
            # Its own deadlines have not been exceeded yet.
            return replace(options, extractor="alternative", timeout_factor=1.0)
        case RecoveryStrategy.FORMAT_CONVERSION:
            return replace(options, decoder="salvage")
        case RecoveryStrategy.FILE_SYSTEM_CHECK:
            return replace(options, check_storage=True)
        case RecoveryStrategy.DATABASE_RECOVERY:
            return replace(options, fresh_worker=True)
        case _:
            return options


def is_files_own_fault(error: ErrorInfo, *, others_succeed: bool) -> bool:
    """Return whether a failed cell would fail again, however often it is tried.

    Parameters
    ----------
    error : ErrorInfo
        The error of its last attempt.
    others_succeed : bool
        Whether the feature set succeeds with other files meanwhile: then a hang, a crash or a
        shortage of memory through all recoveries is the file's own fault.
    """
    return error.error_type in _ABOUT_CONTENT or (
        others_succeed and error.error_type in _ABOUT_COMPUTING
    )


def is_about_content(error: ErrorInfo) -> bool:
    """Return whether an error says that the file's content is at fault."""
    return error.error_type in _ABOUT_CONTENT


def is_about_file(error: ErrorInfo) -> bool:
    """Return whether an error came from computing with the file, and not from what is around."""
    return error.error_type in _ABOUT_CONTENT | _ABOUT_COMPUTING


def is_disk_full(error: ErrorInfo) -> bool:
    """Return whether a disk had no space left."""
    return (
        error.error_type is ErrorType.SYSTEM_RESOURCE
        and error.recovery_strategy is RecoveryStrategy.FILE_SYSTEM_CHECK
    )


def most_attempts(error: ErrorInfo, usual: int, *, others_fail: bool) -> int:
    """Return the maximum number of attempts of a stage.

    While a service is unreachable for other files as well, failures say nothing about the file:
    twice as many attempts are made, with longer delays, until the breaker opens.

    Parameters
    ----------
    error : ErrorInfo
        The error of the last attempt.
    usual : int
        ROBUSTNESS_RETRY_MAX_ATTEMPTS.
    others_fail : bool
        Whether no other file has succeeded meanwhile.
    """
    return 2 * usual if others_fail and error.error_type in _ABOUT_SERVICES else usual


def concerns_copies(error: ErrorInfo) -> bool:
    """Return whether an error would occur for another file with the same content too."""
    return error.error_type not in _ABOUT_ACCESS
