"""What a worker process does: one attempt at one cell, or the identification of one file."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import av
import pyarrow as pa

from audio_assets.audio import SAMPLE_RATE, Audio, DecoderName, decode
from audio_assets.features.base import FeatureSet, Row, check_row
from audio_assets.library import Library, content_hash
from audio_assets.warehouse.schema import arrow_schema
from robustness.file_evidence import FileState, inspect_file
from robustness.worker_pool import report_stage

STAGES = ("decode", "extract")
IDENTIFY_STAGES = ("look", "hash")

_PCM_BYTES_PER_SECOND = SAMPLE_RATE * 2 * 4

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


def identify(library: Library, file_key: str, known: Identity | None) -> Identity:
    """Hash a file and read its duration from its header.

    Its stages are those of `IDENTIFY_STAGES`: only the second takes longer the larger the file.

    Parameters
    ----------
    library : Library
        Where the file is.
    file_key : str
        The file's partition key.
    known : Identity, optional
        What it was when last seen; believed if size and time of change are still the same.

    Raises
    ------
    FileKeyError
        If the key leads to no file of the library.
    OSError
        If the file is missing or cannot be read.
    """
    path = library.checked_path_of(file_key)
    status = path.stat()
    if known and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        with path.open("rb") as file:  # what cannot be read any more is not believed either
            file.read(1)
        return known
    report_stage("hash")
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
    # A value that does not fit its column fails here, alone, and not a part with other rows.
    pa.Table.from_pylist([row], schema=_schema(tuple(feature_set.columns)))
    return CellResult(row, extractor, audio.duration_s if feature_set.reads_pcm else None)


def storage_problem(path: Path, root: Path, scratch: Path, duration_s: float | None) -> str | None:
    """Look whether the storage that an attempt needs is there: the file's, and room for its PCM.

    Parameters
    ----------
    path : Path
        The audio file.
    root : Path
        The library root it is below.
    scratch : Path
        Directory for decoded audio.
    duration_s : float or None
        Duration of the audio, if it is known.

    Returns
    -------
    str or None
        What is wrong as long as waiting may mend it; None otherwise, also where the file alone is
        missing or cannot be read.
    """
    evidence = inspect_file(path, root)
    if evidence.state is FileState.STORAGE_AWAY:
        return evidence.finding
    needed = int((duration_s or 0.0) * _PCM_BYTES_PER_SECOND)
    free = shutil.disk_usage(scratch).free
    if free < needed:
        return f"{needed / 2**20:.0f} MiB are needed in {scratch}, {free / 2**20:.0f} are free"
    return None


_schema = cache(arrow_schema)


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
