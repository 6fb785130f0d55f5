"""Decoded audio: what `decode` writes and every feature set reads."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soxr
from numpy.typing import NDArray

from audio_assets.library.files import FileStamp, open_regular
from robustness.error_rules import ErrorInfo

SAMPLE_RATE = 44100
"""Sample rate (Hz) of all decoded audio."""

_RESAMPLED_AT_ONCE_S = 60

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class SourceInfo:
    """The audio of a file as its decoder reports it.

    Parameters
    ----------
    codec : str
        Codec of the decoded stream, by FFmpeg's name: ``mp3``, ``pcm_s16le``.
    container : str
        The decoder's short name of the container, for instance ``mp3``.
    sample_rate : int
        Sample rate of most of the audio (Hz), before resampling.
    channels : int
        Channels of most of the audio, before downmixing.
    duration_s : float
        Length of the decoded audio (s).
    decoder : str
        ``av``, ``soundfile`` or ``salvage``.
    non_finite : int
        Samples that were NaN or infinite and were set to 0.
    stream_bytes : int or None
        Size of the decoded stream, without container, tags and pictures; None if unknown.
    complete_share : float or None
        Share of the length that the file states for this stream that was decoded, 0 to 1; None if
        it states none.
    damage : str or None
        What is missing of the audio, as a predicate of the file; None if nothing is.
    louder_channel : int or None
        The channel that is the mono signal (0 or 1), as the channels cancel each other in their
        mean; None if that is the mono signal.
    """

    codec: str
    container: str
    sample_rate: int
    channels: int
    duration_s: float
    decoder: str
    non_finite: int
    stream_bytes: int | None = None
    complete_share: float | None = None
    damage: str | None = None
    louder_channel: int | None = None

    @property
    def decoded_by(self) -> str:
        """What decoding took its time for: decoder, codec, sample rate (Hz) and channels."""
        return f"{self.decoder} {self.codec} {self.sample_rate} {self.channels}"


class Audio:
    """The decoded audio of a file, or of a part of it, read from a memory-mapped array.

    Parameters
    ----------
    path : Path
        The audio file.
    source : SourceInfo or None
        The file's format; None if it was not decoded.
    pcm : ndarray of float32, shape (samples, channels), or None
        Samples at `SAMPLE_RATE` with 1 or 2 channels; full scale is ±1.
    stamp : FileStamp, optional
        The file's stamp when it was identified.
    decode_error : ErrorInfo, optional
        Why it could not be decoded.
    """

    def __init__(
        self,
        path: Path,
        source: SourceInfo | None,
        pcm: Samples | None,
        stamp: FileStamp | None = None,
        decode_error: ErrorInfo | None = None,
    ) -> None:
        self.path = path
        self.source = source
        self.decode_error = decode_error
        self._pcm = pcm
        self._stamp = stamp
        self._mono: Samples | None = None

    @classmethod
    def open(cls, scratch_path: Path, path: Path, stamp: FileStamp | None = None) -> "Audio":
        """Open what `decode` wrote.

        Parameters
        ----------
        scratch_path : Path
            The ``target`` given to `decode`.
        path : Path
            The audio file it was decoded from.
        stamp : FileStamp, optional
            That file's stamp when it was identified.
        """
        source = SourceInfo(**json.loads(source_info_path(scratch_path).read_text("utf-8")))
        return cls(path, source, np.load(scratch_path, mmap_mode="r"), stamp)

    @classmethod
    def without_pcm(
        cls,
        path: Path,
        stamp: FileStamp | None = None,
        decoding: SourceInfo | ErrorInfo | None = None,
    ) -> "Audio":
        """Return the audio of a file whose samples are not needed; `pcm` raises.

        Parameters
        ----------
        path : Path
            The audio file.
        stamp : FileStamp, optional
            The file's stamp when it was identified.
        decoding : SourceInfo or ErrorInfo, optional
            The result of its decoding, or why it could not be decoded.
        """
        if isinstance(decoding, ErrorInfo):
            return cls(path, None, None, stamp, decoding)
        return cls(path, decoding, None, stamp)

    def open_file(self) -> BinaryIO:
        """Open the audio file for reading.

        Raises
        ------
        FileChangedError
            If it has changed or been replaced since it was identified.
        OSError
            If it cannot be read.
        """
        return open_regular(self.path, self._stamp)

    @property
    def pcm(self) -> Samples:
        """Samples as decoded: float32, shape (samples, 1 or 2), read-only.

        Raises
        ------
        ValueError
            If the audio was opened without PCM.
        """
        if self._pcm is None:
            raise ValueError(f"{self.path} was opened without its samples")
        return self._pcm

    @property
    def sample_rate(self) -> int:
        """Sample rate (Hz): always `SAMPLE_RATE`."""
        return SAMPLE_RATE

    @property
    def duration_s(self) -> float:
        """Length of the decoded audio (s)."""
        return len(self.pcm) / SAMPLE_RATE

    @property
    def channels(self) -> int:
        """Channels of the decoded audio: 1 or 2."""
        return int(self.pcm.shape[1])

    def stereo(self) -> Samples:
        """Return both channels, shape (samples, 2); a mono file has the same signal in both."""
        return np.ascontiguousarray(np.broadcast_to(self.pcm, (len(self.pcm), 2)))

    def mono(self) -> Samples:
        """Return the mean of the channels, or `SourceInfo.louder_channel`, shape (samples,).

        It is computed once and kept.
        """
        if self._mono is None:
            channel = self.source and self.source.louder_channel
            if self.channels == 2 and channel is None:
                # The result of np.mean in a thirtieth of its time.
                self._mono = self.pcm @ np.full(2, 0.5, np.float32)
            else:
                self._mono = np.array(self.pcm[:, channel or 0])
        return self._mono

    def resampled_mono(self, sample_rate: int) -> Iterator[Samples]:
        """Yield the mono signal at another rate (Hz), in blocks that follow each other."""
        # soxr's default: at VHQ, MusiCNN's reference activations are missed by over 1e-4.
        resampler = soxr.ResampleStream(SAMPLE_RATE, sample_rate, 1, quality="HQ")
        done = 0
        for block in self.blocks(_RESAMPLED_AT_ONCE_S):
            done += len(block.pcm)
            yield resampler.resample_chunk(block.mono(), last=done == len(self.pcm))

    def blocks(self, seconds: float) -> Iterator["Audio"]:
        """Yield parts of this length (s) that follow each other; the last may be shorter."""
        for start in np.arange(0, self.duration_s, seconds):
            yield self.block(start, start + seconds)

    def block(self, start_s: float, stop_s: float) -> "Audio":
        """Return the part between two times (s), without copying samples."""
        start, stop = (round(seconds * SAMPLE_RATE) for seconds in (start_s, stop_s))
        part = Audio(self.path, self.source, self.pcm[start:stop], self._stamp)
        if self._mono is not None:
            part._mono = self._mono[start:stop]
        return part


def source_info_path(scratch_path: Path) -> Path:
    """Return the path of the `SourceInfo` of decoded audio."""
    return scratch_path.with_name(scratch_path.name + ".json")
