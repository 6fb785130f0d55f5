"""The stages that run in a worker process: identify a file, decode it, extract a feature set."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import av
import pyarrow as pa

from audio_assets.audio.decode import Limits, decode
from audio_assets.audio.errors import AudioFileError
from audio_assets.audio.opening import open_container
from audio_assets.audio.pcm import SAMPLE_RATE, Audio, SourceInfo
from audio_assets.audio.streams import DecoderName
from audio_assets.features.base import FeatureSet, Row, check_row
from audio_assets.library.files import (
    FileChangedError,
    FileStamp,
    Identity,
    content_hash,
    open_regular,
)
from audio_assets.library.scan import Library
from robustness.error_rules import ErrorInfo
from robustness.file_evidence import FileState, inspect_file
from robustness.worker_pool import report_stage

IDENTIFY_STAGES = ("inspect", "hash")

HASH_BLOCK_MIB = 64
"""Bytes hashed within one deadline (MiB)."""

_PCM_BYTES_PER_SECOND = SAMPLE_RATE * 2 * 4

Extractor = Literal["primary", "alternative"]


@dataclass(frozen=True)
class FileRef:
    """A file as it was when it was identified, and where its decoded audio is or goes.

    Parameters
    ----------
    path : Path
        The audio file.
    stamp : FileStamp
        Its identity; a file with another one is not analysed.
    pcm : Path
        Its decoded audio, see `audio_assets.audio.decode`.
    """

    path: Path
    stamp: FileStamp
    pcm: Path


@dataclass(frozen=True)
class CellResult:
    """The result of extracting a feature set.

    Parameters
    ----------
    row : dict
        The feature set's columns.
    extractor : str
        Which extractor made the row, for instance ``essentia`` or ``librosa/blocks``.
    """

    row: Row
    extractor: str


def identify(library: Library, file_key: str, known: Identity | None) -> tuple[Identity, FileStamp]:
    """Hash a file's content.

    Its deadlines are those of `IDENTIFY_STAGES`; the second starts anew for each `HASH_BLOCK_MIB`,
    so that files of any size pass and a hang is noticed soon.

    Parameters
    ----------
    library : Library
        Where the file is.
    file_key : str
        The file's partition key.
    known : Identity, optional
        Its last known identity, taken over if size and modification time are the same.

    Returns
    -------
    (Identity, FileStamp)
        Its identity, with a duration only if taken over, and the stamp that tells any change.

    Raises
    ------
    FileKeyError
        If the key is of no file of the library.
    FileChangedError
        If it changes while it is read.
    OSError
        If the file is missing or cannot be read.
    """
    path = library.checked_path_of(file_key)
    with open_regular(path) as file:
        stamp = FileStamp.of(os.fstat(file.fileno()))
        if known and (known.size, known.mtime_ns) == (stamp.size, stamp.mtime_ns):
            file.read(1)  # a file that cannot be read is not taken over
            return known, stamp
        digest = content_hash(file, HASH_BLOCK_MIB, before_block=lambda: report_stage("hash"))
        if FileStamp.of(os.fstat(file.fileno())) != stamp:
            raise FileChangedError
    return Identity(digest, stamp.size, stamp.mtime_ns, None), stamp


def read_duration(file: FileRef) -> float | None:
    """Return the duration (s) by a file's header; None if that states none.

    Raises
    ------
    FileChangedError
        If the file is no longer the one that was identified.
    OSError
        If the file cannot be read.
    """
    with _unchanged(file), open_regular(file.path, file.stamp) as opened:
        try:
            with open_container(opened) as container:
                return max((container.duration or 0) / av.time_base, 0.0) or None
        except (AudioFileError, ValueError):
            return None


def decode_file(file: FileRef, decoder: DecoderName, limits: Limits) -> SourceInfo:
    """Decode a file's audio to `file.pcm` and return its properties.

    Raises
    ------
    AudioFileError
        If the file cannot be decoded.
    FileChangedError
        If the file is no longer the one that was identified.
    OSError
        If the file cannot be read or the decoded audio cannot be written.
    """
    _audio.cache_clear()  # this worker is done with the file before
    with _unchanged(file):
        return decode(file.path, file.pcm, decoder=decoder, stamp=file.stamp, limits=limits)


def extract(
    file: FileRef,
    feature_set: FeatureSet,
    schema: pa.Schema,
    extractor: Extractor,
    block_s: float | None,
    decoding: SourceInfo | ErrorInfo | None = None,
) -> CellResult:
    """Extract one feature set of a file; audio that it needs is decoded already.

    Parameters
    ----------
    file : FileRef
        The file.
    feature_set : FeatureSet
        What to extract; it travels by reference to its functions, which must be importable.
    schema : pyarrow.Schema
        Its columns.
    extractor : {'primary', 'alternative'}
        Which of the feature set's extractors to call.
    block_s : float or None
        Analyse in blocks of this length (s), in bounded memory.
    decoding : SourceInfo or ErrorInfo, optional
        How decoding ended, for a feature set that reads that.

    Raises
    ------
    FileChangedError
        If the file is no longer the one that was identified.
    ImplausibleValueError
        If a value is none that its column can have.
    ValueError, pyarrow.ArrowInvalid, pyarrow.ArrowTypeError
        If the row does not fit the feature set's table.
    """
    if extractor == "primary":
        function, name = feature_set.extract, feature_set.extractor
    else:
        function, name = feature_set.extract_alternative, feature_set.alternative
    with _unchanged(file):
        if feature_set.reads_pcm:
            audio = _audio(file)
        else:
            audio = Audio.without_pcm(file.path, file.stamp, decoding)
        if block_s is None or not feature_set.reads_pcm:
            row = function(audio)
        else:
            row = _extract_in_blocks(audio, function, block_s, feature_set.combine)
            name += "/blocks"
    check_row(feature_set, row, audio.duration_s if feature_set.reads_pcm else None)
    # A value that does not fit its column fails here, alone, and not a part with other rows.
    pa.Table.from_pylist([row], schema=schema)
    return CellResult(row, name)


@contextmanager
def _unchanged(file: FileRef) -> Iterator[None]:
    """Refuse results from another file than the one that was identified.

    A file that is gone or unreachable has not changed; reading it raises its own error.

    Raises
    ------
    FileChangedError
        If the file has changed, at the start or at the end of the block.
    """
    _check_unchanged(file)
    try:
        yield
    finally:
        _check_unchanged(file)


def _check_unchanged(file: FileRef) -> None:
    try:
        status = file.path.stat()
    except OSError:
        return
    if FileStamp.of(status) != file.stamp:
        raise FileChangedError


@lru_cache(maxsize=1)
def _audio(file: FileRef) -> Audio:
    """Return a file's decoded audio, with what earlier stages derived from it."""
    return Audio.open(file.pcm, file.path, file.stamp)


def storage_problem(path: Path, root: Path, scratch: Path, duration_s: float | None) -> str | None:
    """Check the storage that an attempt needs: the file's, and space for its PCM.

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
        The problem, if it may pass; None otherwise, also if only the file is missing or cannot be
        read.
    """
    evidence = inspect_file(path, root)
    if evidence.state is FileState.STORAGE_UNREACHABLE:
        return evidence.finding
    needed = int((duration_s or 0.0) * _PCM_BYTES_PER_SECOND)
    free = shutil.disk_usage(scratch).free
    if free < needed:
        return f"{needed / 2**20:.0f} MiB are needed in {scratch}, {free / 2**20:.0f} are free"
    return None


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
