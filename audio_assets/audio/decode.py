"""Decoding of audio files to 44.1 kHz PCM on disk.

`decode` runs once per file: it streams the file's audio into a memory-mappable array, so that its
memory does not grow with the file. Every feature set then opens that array as an `Audio`.
"""

import errno
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, cast

import av
import numpy as np
import soundfile
import soxr
from mutagen import MutagenError
from mutagen.mp3 import MPEGInfo

from audio_assets.audio.completeness import (
    CONTAINERS_STATING_LENGTH,
    check_complete,
    mp3_states_length,
)
from audio_assets.audio.errors import CorruptFileError, UnsupportedFormatError
from audio_assets.audio.opening import audio_stream, open_container, translated, unrecognized
from audio_assets.audio.pcm import SAMPLE_RATE, Samples, SourceInfo, source_info_path
from audio_assets.library.files import FileStamp, open_regular
from audio_assets.library.formats import STREAM_START

DecoderName = Literal["av", "soundfile", "salvage"]

# From 48 kHz, "HQ" departs from "VHQ" by -91 dB below 0.8 of the band and -79 dB up to 0.92 of it,
# above the noise of 16-bit audio, to save about 0.05 s on 205 s of stereo (white noise, soxr 1.1).
_RESAMPLER_QUALITY = "VHQ"

_BLOCK_SAMPLES = 1 << 16

LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Sample rates (Hz) that audio has; resampling a lower one would take memory without bound."""

MOST_CHANNELS = 64

_SPACE_CHECK_BYTES = 16 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_SALVAGE_BYTES = 4 << 20
"""How far into a file a stream is searched for."""

_WAVE_CHANNELS = {
    1: ("FC",),
    2: ("FL", "FR"),
    3: ("FL", "FR", "FC"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    7: ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}
"""Speaker positions in the order of WAVE files, for files that name none."""

_SOUNDFILE_SAMPLES = {"PCM_16": "s16", "PCM_24": "s24", "PCM_32": "s32"}
_SOUNDFILE_SAMPLES |= {"FLOAT": "f32", "DOUBLE": "f64"}
_SOUNDFILE_CODECS = {
    "PCM_U8": "pcm_u8",
    "PCM_S8": "pcm_s8",
    "ULAW": "pcm_mulaw",
    "ALAW": "pcm_alaw",
    "IMA_ADPCM": "adpcm_ima_wav",
    "MS_ADPCM": "adpcm_ms",
    "GSM610": "gsm_ms",
    "MPEG_LAYER_I": "mp1",
    "MPEG_LAYER_II": "mp2",
    "MPEG_LAYER_III": "mp3",
}
"""FFmpeg's names of libsndfile's codecs."""

_BIG_ENDIAN_FORMATS = ("AIFF", "AU", "CAF")


@dataclass(frozen=True)
class Limits:
    """What the decoded audio of a file may take.

    Parameters
    ----------
    longest_h : float
        Longest audio (h), AUDIO_MAX_HOURS.
    reserve_mib : int
        Space to leave free on its disk (MiB), AUDIO_RESERVE_MIB.
    """

    longest_h: float = math.inf
    reserve_mib: int = 0


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
    rates best is decoded. Mono stays mono; more than two channels are mixed to stereo by the
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
        FFmpeg (through PyAV), libsndfile, or FFmpeg on what follows the junk before the file's
        first audio stream.
    stamp : FileStamp, optional
        What the file must still be.
    limits : Limits, optional
        What the decoded audio may take. Default: no limits.

    Returns
    -------
    SourceInfo
        What the file holds.

    Raises
    ------
    CorruptFileError
        If the stream ends before the length that the header promises, or cannot be decoded.
    UnsupportedFormatError
        If the decoder does not know the format, or there is no audio in the file, or none that is
        within the limits and has a sample rate and a number of channels that exist.
    DecoderError
        If the decoder fails for another reason.
    FileChangedError
        If the file has changed or been replaced since `stamp`.
    OSError
        If the file cannot be read or the target cannot be written, for instance as less than
        the reserve would be left on its disk.
    """
    open_stream = _open_with_soundfile if decoder == "soundfile" else _open_with_av
    with open_regular(path, stamp) as file, ExitStack() as stack:
        if decoder == "salvage":
            file = stack.enter_context(_from_first_stream(file, target))
        return _write(stack.enter_context(open_stream(file)), file, target, decoder, limits)


@contextmanager
def _from_first_stream(file: BinaryIO, target: Path) -> Iterator[BinaryIO]:
    """Open a copy of a file without the junk before its first audio stream."""
    start = _start_of_stream(file)
    with tempfile.TemporaryFile(dir=target.parent) as copy:
        file.seek(start)
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.seek(0)
        yield cast("BinaryIO", copy)


def _start_of_stream(file: BinaryIO) -> int:
    file.seek(0)
    match = STREAM_START.search(file.read(_SALVAGE_BYTES))
    starts = [match.start()] if match else []
    with suppress(MutagenError):
        frames = MPEGInfo(file)
        if not frames.sketchy and frames.frame_offset < _SALVAGE_BYTES:
            starts.append(frames.frame_offset)
    if not starts:
        raise UnsupportedFormatError("holds no audio stream that any decoder knows")
    return min(starts)


@dataclass(frozen=True)
class _Block:
    """Consecutive samples of one rate and channel layout, shape (samples, channels)."""

    samples: Samples
    sample_rate: int
    speakers: tuple[str, ...]


@dataclass
class _Stream:
    """An open audio stream.

    `stated_s` is the length (s) that the file's header states; `size` counts the bytes of the
    stream that have been read, None if they are unknown.
    """

    codec: str
    container: str
    stated_s: float | None
    size: int | None = None
    blocks: Iterator[_Block] = field(default_factory=lambda: iter(()))


@contextmanager
def _open_with_av(file: BinaryIO) -> Iterator[_Stream]:
    with open_container(file) as container:
        stream = audio_stream(container)
        name = container.format.name.split(",")[0]
        stated_s = None
        if name in CONTAINERS_STATING_LENGTH or (name == "mp3" and mp3_states_length(file)):
            if stream.duration is not None and stream.time_base is not None:
                stated_s = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                stated_s = container.duration / 1e6
        opened = _Stream(stream.codec_context.codec.canonical_name, name, stated_s, size=0)
        opened.blocks = _blocks_with_av(container, stream, opened)
        yield opened


def _blocks_with_av(
    container: "av.container.InputContainer", stream: "av.AudioStream", opened: _Stream
) -> Iterator[_Block]:
    packets = broken = 0
    shape: tuple[object, ...] | None = None
    packer: av.AudioResampler | None = None
    try:
        for packet in container.demux(stream):
            packets += 1
            opened.size = (opened.size or 0) + packet.size
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                broken += 1
                continue
            for frame in frames:
                if shape != (shape := (frame.format.name, frame.layout.name, frame.sample_rate)):
                    yield from _packed(packer, None)
                    _check_shape(frame.sample_rate, frame.layout.nb_channels)
                    # Only interleaves and scales to float, in blocks large enough for Python.
                    # PyAV's own conversion of planar frames reads past the eighth channel.
                    packer = av.AudioResampler(
                        "flt", frame.layout, frame.sample_rate, _BLOCK_SAMPLES
                    )
                yield from _packed(packer, frame)
    except av.error.FFmpegError as error:
        raise translated(error) from error
    yield from _packed(packer, None)
    if broken > packets / 2:
        raise CorruptFileError(f"{broken} of its {packets} packets cannot be decoded")


def _packed(packer: "av.AudioResampler | None", frame: "av.AudioFrame | None") -> Iterator[_Block]:
    """Yield the blocks a frame completes; the last ones for None."""
    if packer is None:
        return
    for block in packer.resample(frame):
        channels = block.layout.nb_channels
        speakers = tuple(channel.name for channel in block.layout.channels)
        if len(speakers) != channels:
            speakers = _WAVE_CHANNELS.get(channels, ())
        samples = cast("Samples", block.to_ndarray()).reshape(-1, channels)
        yield _Block(samples, block.sample_rate, speakers)


@contextmanager
def _open_with_soundfile(file: BinaryIO) -> Iterator[_Stream]:
    is_stated = mp3_states_length(file)
    try:
        # By its descriptor: an error in a callback to Python would be printed and lost.
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        sound = soundfile.SoundFile(file.fileno(), closefd=False)
    except soundfile.LibsndfileError as error:
        raise unrecognized(file, by_soundfile=True) from error
    with sound:
        _check_shape(sound.samplerate, sound.channels)
        states_length = sound.format != "MP3" or is_stated
        yield _Stream(
            _codec_of(sound),
            sound.format.lower(),
            sound.frames / sound.samplerate if states_length else None,
            blocks=_blocks_with_soundfile(sound),
        )


def _codec_of(sound: soundfile.SoundFile) -> str:
    """Return FFmpeg's name of a file's codec."""
    subtype: str = sound.subtype
    if sound.format == "FLAC":
        return "flac"
    if subtype.startswith("ALAC_"):
        return "alac"
    if subtype in _SOUNDFILE_SAMPLES:
        big_by_default = sound.endian == "FILE" and sound.format in _BIG_ENDIAN_FORMATS
        order = "be" if sound.endian == "BIG" or big_by_default else "le"
        return f"pcm_{_SOUNDFILE_SAMPLES[subtype]}{order}"
    return _SOUNDFILE_CODECS.get(subtype, subtype.lower())


def _blocks_with_soundfile(sound: soundfile.SoundFile) -> Iterator[_Block]:
    speakers = _WAVE_CHANNELS.get(sound.channels, ())
    while True:
        try:
            samples = sound.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise CorruptFileError(f"cannot be decoded: {error}") from error
        if len(samples) == 0:
            return
        yield _Block(samples, sound.samplerate, speakers)


def _write(
    stream: _Stream, file: BinaryIO, target: Path, decoder: str, limits: Limits
) -> SourceInfo:
    """Write a stream to `target`, whole and complete."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary_info = source_info_path(temporary)
    try:
        with temporary.open("wb") as output:
            writer = _Writer(output, limits.reserve_mib << 20)
            seconds = 0.0
            shapes = Counter[tuple[int, int]]()
            for block in stream.blocks:
                seconds += len(block.samples) / block.sample_rate
                shapes[block.sample_rate, block.samples.shape[1]] += len(block.samples)
                if seconds > limits.longest_h * 3600:
                    raise UnsupportedFormatError(
                        f"is longer than {limits.longest_h:g} h, which AUDIO_MAX_HOURS allows"
                    )
                writer.add(block)
            writer.close()
        check_complete(file, seconds, stream.stated_s)
        if writer.samples == 0:
            raise UnsupportedFormatError("holds no audio: not one sample could be decoded")
        [((sample_rate, channels), _)] = shapes.most_common(1)
        source = SourceInfo(
            stream.codec,
            stream.container,
            sample_rate,
            channels,
            writer.samples / SAMPLE_RATE,
            decoder,
            writer.non_finite,
            stream.size,
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


def _check_shape(sample_rate: int, channels: int) -> None:
    if not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
        raise UnsupportedFormatError(
            f"has a sample rate of {sample_rate} Hz: audio has {LOWEST_RATE} to {HIGHEST_RATE} Hz"
        )
    if channels > MOST_CHANNELS:
        raise UnsupportedFormatError(f"has {channels} channels, more than {MOST_CHANNELS}")


class _Writer:
    """Converts blocks to one sample rate and channel count, and appends them to a ``.npy`` file."""

    def __init__(self, output: BinaryIO, reserve: int) -> None:
        self.samples = 0
        self.non_finite = 0
        self._output = output
        self._channels = 0
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None
        self._until_check = 0
        self._reserve = reserve

    def add(self, block: _Block) -> None:
        samples = block.samples
        finite = np.isfinite(samples)
        if not finite.all():
            self.non_finite += int(samples.size - np.count_nonzero(finite))
            samples = np.where(finite, samples, np.float32(0))
        if self._channels == 0:
            self._channels = min(samples.shape[1], 2)
            self._write_header()
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

    def _append(self, samples: Samples) -> None:
        self._leave_reserve(samples.nbytes)
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
