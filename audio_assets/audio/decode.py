"""Decoding of audio files to 44.1 kHz PCM on disk.

`decode` runs once per file: it streams the file's audio into a memory-mappable array, so that its
memory does not grow with the file. Every feature set then opens that array as an `Audio`.
"""

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soxr

from audio_assets.audio.errors import CorruptFileError, DecoderError, UnsupportedFormatError
from audio_assets.audio.pcm import SAMPLE_RATE, Samples, SourceInfo, source_info_path
from audio_assets.audio.streams import Block, DecoderName, Stream, open_streams
from audio_assets.library.files import FileStamp, open_regular

# From 48 kHz, "HQ" departs from "VHQ" by -91 dB below 0.8 of the band and -79 dB up to 0.92 of it,
# above the noise of 16-bit audio, to save about 0.05 s on 205 s of stereo (white noise, soxr 1.1).
_RESAMPLER_QUALITY = "VHQ"

_LOST_SHARE = 0.01
"""Share of the louder channel's energy (-20 dB) below which the channels cancel each other.

Unrelated channels leave -3 dB in their mean, a silent one -6 dB.
"""

_SPACE_CHECK_BYTES = 16 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_TOLERANCE_S, _TOLERANCE_SHARE = 0.1, 0.001
"""Missing audio that is no damage: encoder delay, padding and rounded lengths are less."""


@dataclass(frozen=True)
class Limits:
    """Bounds of what is decoded of a file.

    Parameters
    ----------
    longest_h : float
        Longest audio (h), AUDIO_MAX_HOURS; of longer audio, the beginning is decoded.
    reserve_mib : int
        Space to leave free on the disk of the decoded audio (MiB), AUDIO_RESERVE_MIB.
    shortest_s : float
        Shortest part of damaged audio to accept (s), AUDIO_MIN_SECONDS; infinite if none is.
    """

    longest_h: float = math.inf
    reserve_mib: int = 0
    shortest_s: float = 3.0


def decode(
    path: Path,
    target: Path,
    *,
    decoder: DecoderName = "av",
    stamp: FileStamp | None = None,
    limits: Limits = Limits(),
) -> SourceInfo:
    """Decode a file's audio to a NumPy array on disk, in bounded memory.

    The format is recognized by content, not by name. Of several audio streams the one that FFmpeg
    rates best is decoded. What cannot be decoded is skipped, and reported in the result.

    Mono stays mono; more than two channels are mixed to stereo by the
    gains of Recommendation ITU-R BS.775-4, table 2 (front centre and surrounds -3 dB, rear centre
    -6 dB, low-frequency effects left out; channels without a name by their mean), without
    renormalization: float samples do not clip. Non-finite samples become 0. Other sample rates
    are resampled to 44.1 kHz by soxr.

    Parameters
    ----------
    path : Path
        The audio file.
    target : Path
        Where to write: ``.npy``, float32, C order, shape (samples, 1 or 2). It appears whole or
        not at all. The `SourceInfo` is kept beside it as ``<target>.json``.
    decoder : {"av", "soundfile", "salvage"}
        FFmpeg (through PyAV), libsndfile, or FFmpeg on the first audio that begins within the
        file, behind other bytes.
    stamp : FileStamp, optional
        What the file must still be.
    limits : Limits, optional
        Bounds of what is decoded.

    Returns
    -------
    SourceInfo
        What the file holds, and what of it is missing.

    Raises
    ------
    CorruptFileError
        If the file is damaged and less than `Limits.shortest_s` can be decoded.
    DecoderError
        If ``av`` fails to decode more than a quarter of the packets.
    UnsupportedFormatError
        If the decoder does not know the format, the file is protected, or there is no audio in it
        that has a sample rate and a number of channels that exist.
    FileChangedError
        If the file has changed or been replaced since `stamp`.
    OSError
        If the file cannot be read or the target cannot be written, for instance as less than
        the reserve would be left on its disk.
    """
    with open_regular(path, stamp) as file:
        return _write(file, target, decoder, limits)


def _write(file: BinaryIO, target: Path, decoder: DecoderName, limits: Limits) -> SourceInfo:
    """Decode a file to `target`, which appears whole or not at all."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary_info = source_info_path(temporary)
    streams: list[Stream] = []
    shapes = Counter[tuple[int, int]]()
    try:
        with temporary.open("wb") as output:
            writer = _Writer(output, limits)
            for stream in open_streams(file, decoder):
                streams.append(stream)
                for block in stream:
                    shapes[block.sample_rate, block.samples.shape[1]] += len(block.samples)
                    if not writer.add(block):
                        break
                if writer.full:
                    break
            writer.close()
        complete_share, damage = _completeness(streams, writer.full)
        seconds = writer.samples / SAMPLE_RATE
        if any(stream.is_protected and stream.broken for stream in streams):
            raise UnsupportedFormatError("is protected (DRM)")
        if damage and seconds < limits.shortest_s:
            raise CorruptFileError(damage)
        if decoder == "av" and any(4 * stream.broken > stream.packets for stream in streams):
            # FFmpeg may take the codec for another one; if no other decoder knows it, "salvage"
            # decodes what it can.
            raise DecoderError(damage)
        if writer.samples == 0:
            raise UnsupportedFormatError("holds no audio: not one sample could be decoded")
        [((sample_rate, channels), _)] = shapes.most_common(1)
        sizes = [stream.size for stream in streams]
        source = SourceInfo(
            streams[0].codec,
            streams[0].container,
            sample_rate,
            channels,
            seconds,
            decoder,
            writer.non_finite,
            None if None in sizes else sum(filter(None, sizes)),
            complete_share,
            damage,
            writer.louder_channel,
        )
        # The array is renamed last: where it exists, the info does too.
        temporary_info.write_text(json.dumps(asdict(source)), "utf-8")
        temporary_info.replace(source_info_path(target))
        temporary.replace(target)
    except OSError as error:
        if error.errno in _DISK_FULL and error.filename is None:
            error.filename = str(target)  # errors of `write` do not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)
        temporary_info.unlink(missing_ok=True)
    return source


def _completeness(streams: Sequence[Stream], bound: str | None) -> tuple[float | None, str | None]:
    """Return the share of the stated length that was decoded, and what is missing.

    Parameters
    ----------
    streams : sequence of Stream
        The streams, decoded.
    bound : str or None
        The bound at which decoding ended.
    """
    seconds = sum(stream.seconds for stream in streams)
    stated = None
    if len(streams) == 1:
        # By bytes, the length is only known at the end.
        stated = streams[0].stated_s if bound else streams[0].length_s
    tolerance = max(_TOLERANCE_S, _TOLERANCE_SHARE * (stated or 0))
    missing = stated - seconds if stated else None
    lost = sum(stream.lost_s for stream in streams)
    broken, packets = (sum(getattr(s, n) for s in streams) for n in ("broken", "packets"))
    if broken and not seconds:
        return 0.0 if stated else None, f"none of its {packets:,} packets can be decoded"
    is_short = missing is not None and missing > tolerance
    damage = []
    if broken and (is_short or lost > _TOLERANCE_S):
        damage.append(f"{broken:,} of its {packets:,} packets cannot be decoded")
    elif lost > _TOLERANCE_S:
        damage.append(f"{lost:.1f} s are missing within it")
    if bound:
        damage.append(bound)
    elif missing is None:
        problems = (stream.problem for stream in streams)
        damage += [f"{problem} after {seconds:.1f} s" for problem in problems if problem]
    elif is_short and (missing - lost > tolerance or not damage):
        damage.append(f"breaks off after {seconds:.1f} s of the {stated:.1f} s that it states")
    share = None
    if stated:
        share = seconds / stated if is_short else 1.0
    return share, "; ".join(damage) or None


class _Writer:
    """Converts blocks to one sample rate and channel count, and appends them to a ``.npy`` file."""

    def __init__(self, output: BinaryIO, limits: Limits) -> None:
        self.samples = 0
        self.non_finite = 0
        self.full: str | None = None
        """The bound that the audio has reached, if it has reached one."""
        self._output = output
        self._channels = 0
        self._energies = np.zeros(3)
        """Of the channels and of their mean."""
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None
        self._until_check = 0
        self._reserve = limits.reserve_mib << 20
        self._limits = limits
        self._most_samples = math.inf

    def add(self, block: Block) -> bool:
        """Append a block; return False if no more is wanted."""
        samples = block.samples
        finite = np.isfinite(samples)
        if not finite.all():
            self.non_finite += int(samples.size - np.count_nonzero(finite))
            samples = np.where(finite, samples, np.float32(0))
        if self._channels == 0:
            self._channels = min(samples.shape[1], 2)
            self._write_header()
            self._most_samples, self._bound = self._find_bound()
        if samples.shape[1] > 2:
            samples = samples @ _downmix(block.speakers, samples.shape[1])
        if samples.shape[1] > self._channels:
            samples = samples.mean(axis=1, dtype=np.float32, keepdims=True)
        elif samples.shape[1] < self._channels:
            samples = np.repeat(samples, 2, axis=1)
        if block.sample_rate != self._rate:
            self._flush()
            self._rate = block.sample_rate
            if self._rate != SAMPLE_RATE:
                self._resampler = soxr.ResampleStream(
                    self._rate, SAMPLE_RATE, self._channels, quality=_RESAMPLER_QUALITY
                )
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(np.ascontiguousarray(samples))
        self._append(samples)
        if self.samples >= self._most_samples:
            self.full = self._bound
        return self.full is None

    def _find_bound(self) -> tuple[float, str]:
        """Return how many samples there may be, and what is said of files with more."""
        disk = os.statvfs(self._output.fileno())
        space = disk.f_blocks * disk.f_frsize - self._reserve
        return min(
            (
                self._limits.longest_h * 3600 * SAMPLE_RATE,
                f"is longer than {self._limits.longest_h:g} h, which AUDIO_MAX_HOURS allows",
            ),
            (
                space / (4 * self._channels),
                "is longer than the disk of AUDIO_SCRATCH can ever hold",
            ),
        )

    def close(self) -> None:
        self._flush()
        if self._channels:
            self._output.seek(0)
            self._write_header()

    def _flush(self) -> None:
        if self._resampler is not None:
            rest = np.empty((0, self._channels), np.float32)
            self._append(self._resampler.resample_chunk(rest, last=True))
            self._resampler = None

    @property
    def louder_channel(self) -> int | None:
        """The louder channel, if the channels cancel each other in their mean."""
        left, right, mean = self._energies
        is_lost = self._channels == 2 and mean < _LOST_SHARE * max(left, right)
        return int(right > left) if is_lost else None

    def _append(self, samples: Samples) -> None:
        self._leave_reserve(samples.nbytes)
        if self._channels == 2:
            left, right = samples[:, 0], samples[:, 1]
            both, cross = [float(left @ left), float(right @ right)], float(left @ right)
            self._energies += *both, (sum(both) + 2 * cross) / 4
        self._output.write(np.ascontiguousarray(samples).data)
        self.samples += len(samples)

    def _leave_reserve(self, size: int) -> None:
        """Raise before the disk, which may be that of Dagster's databases, is full."""
        self._until_check -= size
        if self._until_check <= 0:
            self._until_check = _SPACE_CHECK_BYTES
            free = os.statvfs(self._output.fileno())
            if free.f_bavail * free.f_frsize < self._reserve + size:
                raise OSError(
                    errno.ENOSPC,
                    f"No space left on device but the {self._reserve >> 20} MiB that are kept free",
                )

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first axis to grow.
        np.lib.format.write_array_header_1_0(
            self._output,
            {"descr": "<f4", "fortran_order": False, "shape": (self.samples, self._channels)},
        )


def _downmix(speakers: tuple[str, ...], channels: int) -> Samples:
    """Gains from speaker positions to stereo, shape (channels, 2)."""
    minus_3_db = float(np.sqrt(0.5))
    gains = np.zeros((channels, 2), np.float32)
    for row, name in zip(gains, speakers or ("",) * channels, strict=True):
        if name in ("FL", "DL"):
            row[:] = 1, 0
        elif name in ("FR", "DR"):
            row[:] = 0, 1
        elif name == "FC":
            row[:] = minus_3_db
        elif name.startswith("LFE"):
            row[:] = 0
        elif name.endswith(("L", "FLC")):
            row[:] = minus_3_db, 0
        elif name.endswith(("R", "FRC")):
            row[:] = 0, minus_3_db
        elif name.endswith("C"):
            row[:] = 0.5
        else:
            row[:] = 1 / channels
    return gains
