"""What a worker process does: one attempt at one cell, or the identification of one file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av

from audio_assets.audio import Audio, DecoderName, decode
from audio_assets.features.base import FeatureSet, Row, check_row
from audio_assets.library import content_hash
from robustness.worker_pool import report_stage

STAGES = ("decode", "extract")

Extractor = Literal["primary", "alternative"]


@dataclass(frozen=True)
class Identity:
    """What a file is, apart from its name.

    Parameters
    ----------
    content_hash : str
        BLAKE3 of the file's bytes, hexadecimal.
    size : int
        Size (bytes).
    mtime_ns : int
        Time of the last change (ns since the epoch).
    duration_s : float or None
        Duration by the container's header (s); None where it names none.
    """

    content_hash: str
    size: int
    mtime_ns: int
    duration_s: float | None


@dataclass(frozen=True)
class CellTask:
    """One attempt at one cell.

    Parameters
    ----------
    path : Path
        The audio file.
    feature_set : FeatureSet
        What to extract; it travels by reference to its functions, which must be importable.
    pcm : Path
        Where the decoded audio is, or goes if it is not there yet.
    decoder : {'av', 'soundfile', 'salvage'}
        Decoder to use if the audio must be decoded.
    extractor : {'primary', 'alternative'}
        Which of the feature set's extractors to call.
    block_s : float, optional
        Analyse in blocks of this length (s), in bounded memory.
    """

    path: Path
    feature_set: FeatureSet
    pcm: Path
    decoder: DecoderName = "av"
    extractor: Extractor = "primary"
    block_s: float | None = None


@dataclass(frozen=True)
class CellResult:
    """What a successful attempt gives.

    Parameters
    ----------
    row : dict
        The feature set's columns.
    extractor : str
        Which extractor made the row, for instance ``essentia`` or ``librosa/blocks``.
    audio_s : float or None
        Duration of the decoded audio (s); None for a feature set that decodes nothing.
    """

    row: Row
    extractor: str
    audio_s: float | None


def identify(path: Path, known: Identity | None) -> Identity:
    """Hash a file and read its duration from its header.

    Parameters
    ----------
    path : Path
        The file.
    known : Identity, optional
        What it was when last seen; believed if size and time of change are still the same.

    Raises
    ------
    OSError
        If the file is missing or cannot be read.
    """
    status = path.stat()
    if known and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        with path.open("rb") as file:  # what cannot be read any more is not believed either
            file.read(1)
        return known
    digest = content_hash(path)
    try:
        with av.open(str(path)) as container:
            duration_s = max((container.duration or 0) / av.time_base, 0.0) or None
    except (av.FFmpegError, ValueError):
        duration_s = None
    return Identity(digest, status.st_size, status.st_mtime_ns, duration_s)


def run_attempt(task: CellTask) -> CellResult:
    """Make one attempt at one cell.

    Raises
    ------
    AudioFileError
        If the file cannot be decoded.
    OSError
        If the file cannot be read or the decoded audio cannot be written.
    """
    feature_set = task.feature_set
    if feature_set.reads_pcm:
        if not task.pcm.exists():
            report_stage("decode")
            decode(task.path, task.pcm, decoder=task.decoder)
        audio = Audio.open(task.pcm, task.path)
    else:
        audio = Audio.without_pcm(task.path)
    report_stage("extract")
    if task.extractor == "primary":
        extract, extractor = feature_set.extract, feature_set.extractor
    else:
        extract, extractor = feature_set.extract_alternative, feature_set.alternative
    if task.block_s is not None and feature_set.reads_pcm:
        row = _extract_in_blocks(audio, extract, task.block_s, feature_set.combine)
        extractor += "/blocks"
    else:
        row = extract(audio)
    check_row(feature_set, row)
    return CellResult(row, extractor, audio.duration_s if feature_set.reads_pcm else None)


def _extract_in_blocks(
    audio: Audio,
    extract: Callable[[Audio], Row],
    block_s: float,
    combine: Callable[[list[Row], list[float]], Row],
) -> Row:
    rows, durations = [], []
    for start, stop in _blocks(audio.duration_s, block_s):
        rows.append(extract(audio.block(start, stop)))
        durations.append(stop - start)
    return combine(rows, durations)


def _blocks(duration_s: float, block_s: float) -> Iterator[tuple[float, float]]:
    """Cut a duration into blocks; a rest of less than half a block goes to the one before it."""
    count = max(1, round(duration_s / block_s))
    for index in range(count):
        is_last = index == count - 1
        yield index * block_s, duration_s if is_last else (index + 1) * block_s
