"""What each recovery strategy changes in the next attempt at a cell."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from audio_assets.audio import DecoderName
from audio_assets.worker import Extractor
from robustness.error_classifier import ErrorInfo, ErrorType, RecoveryStrategy

BLOCK_S = 40 * 187 * 256 / 16000
"""Block length of an analysis in bounded memory (s): two minutes, in whole MusiCNN patches."""

TIMEOUT_FACTOR = 1.5

_ESCALATION: dict[ErrorType, Sequence[RecoveryStrategy]] = {
    ErrorType.TIMEOUT: (RecoveryStrategy.INCREASE_TIMEOUT, RecoveryStrategy.AUDIO_FALLBACK),
    ErrorType.MEMORY: (RecoveryStrategy.REDUCE_MEMORY_USAGE, RecoveryStrategy.AUDIO_FALLBACK),
    ErrorType.AUDIO_PROCESSING: (
        RecoveryStrategy.AUDIO_FALLBACK,
        RecoveryStrategy.FORMAT_CONVERSION,
    ),
    ErrorType.UNSUPPORTED_FORMAT: (RecoveryStrategy.FORMAT_CONVERSION,),
    ErrorType.UNKNOWN: (RecoveryStrategy.AUDIO_FALLBACK,),
}


@dataclass(frozen=True)
class AttemptOptions:
    """How an attempt is made; recoveries change it.

    Parameters
    ----------
    decoder, extractor, block_s
        As in `audio_assets.worker.CellTask`.
    timeout_factor : float
        Multiplies the deadlines.
    alone : bool
        Let no other attempt of this run go on beside it, so that it has all the memory.
    """

    decoder: DecoderName = "av"
    extractor: Extractor = "primary"
    block_s: float | None = None
    timeout_factor: float = 1.0
    alone: bool = False


def next_recovery(
    error: ErrorInfo, stage: str, tried: Sequence[RecoveryStrategy]
) -> RecoveryStrategy | None:
    """Choose what to try after a failed attempt.

    The classifier's own advice comes first, then whatever else helps against that type of
    error. Nothing is tried twice.

    Parameters
    ----------
    error : ErrorInfo
        The attempt's classified error.
    stage : str
        Stage it failed in, ``decode`` or ``extract``.
    tried : sequence of RecoveryStrategy
        Recoveries already tried at this cell.

    Returns
    -------
    RecoveryStrategy or None
        None if nothing is left that could help.
    """
    if not error.retryable:
        return None
    for strategy in (error.recovery_strategy, *_ESCALATION.get(error.error_type, ())):
        if strategy is RecoveryStrategy.FORMAT_CONVERSION and stage != "decode":
            continue
        if strategy not in tried and strategy is not RecoveryStrategy.SKIP_FILE:
            return strategy
    return None


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
    stage : str
        Stage it failed in: a fallback changes the decoder in ``decode``, the extractor in
        ``extract``.
    """
    match strategy:
        case RecoveryStrategy.INCREASE_TIMEOUT:
            return replace(options, timeout_factor=options.timeout_factor * TIMEOUT_FACTOR)
        case RecoveryStrategy.REDUCE_MEMORY_USAGE:
            return replace(options, block_s=BLOCK_S, alone=True)
        case RecoveryStrategy.AUDIO_FALLBACK if stage == "decode":
            return replace(options, decoder="soundfile")
        case RecoveryStrategy.AUDIO_FALLBACK:
            return replace(options, extractor="alternative")
        case _:
            return options
