"""Decoding of audio files to 44.1 kHz PCM on disk, and reading that PCM back.

`decode` runs once per file: it streams the file's audio into a memory-mappable array, so that its
memory does not grow with the file. Every feature set then opens that array as an `Audio`.
"""

import errno
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import av
import numpy as np
import soundfile
import soxr
from mutagen import MutagenError
from mutagen.mp3 import MPEGInfo
from numpy.typing import NDArray

from audio_assets.errors import CorruptFileError, DecoderError, UnsupportedFormatError
from audio_assets.library import FileStamp, open_regular

SAMPLE_RATE = 44100
"""Sample rate (Hz) of all decoded audio."""

Samples = NDArray[np.float32]
DecoderName = Literal["av", "soundfile", "salvage"]

# From 48 kHz, "HQ" departs from "VHQ" by -91 dB below 0.8 of the band and -79 dB up to 0.92 of it,
# above the noise of 16-bit audio, to save about 0.05 s on 205 s of stereo (white noise, soxr 1.1).
_RESAMPLER_QUALITY = "VHQ"

_BLOCK_SAMPLES = 1 << 16

# A file counts as truncated when more than this share, and more than this many seconds, of what
# its header promises is missing; encoder delay and padding account for less.
_MISSING_SHARE = 0.02
_MISSING_SECONDS = 0.1

# Containers whose header states the length of the audio. FFmpeg estimates it elsewhere.
_CONTAINERS_STATING_LENGTH = {"flac", "mov", "matroska"}

# Sizes written by recorders that could not go back to fill in the length: 0, 0x7FFF...,
# 0xFFFF....
_LARGEST_STATED_CHUNK = 0x7FFF0000

# How files of formats begin that each decoder knows.
_SIGNATURES_SOUNDFILE = (b"RIFF", b"RF64", b"FORM", b"fLaC", b"OggS", b"ID3")
_ASF_SIGNATURE = b"\x30\x26\xb2\x75"
_MATROSKA_SIGNATURE = b"\x1a\x45\xdf\xa3"
_SIGNATURES_AV = (*_SIGNATURES_SOUNDFILE, _ASF_SIGNATURE, _MATROSKA_SIGNATURE)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# How far into a file a stream is looked for, and how one begins whose frames have no pattern.
_SALVAGE_BYTES = 4 << 20
_STREAM_START = re.compile(
    rb"fLaC\0\0\0\x22|OggS\0\x02|R(?:IFF|F64)....WAVE|FORM....AIF[FC]|caff\0\x01\0\0"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x1a\x45\xdf\xa3|\0\0\0.ftyp",
    re.DOTALL,
)

_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")

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


@dataclass(frozen=True)
class SourceInfo:
    """What a file holds, as its decoder saw it.

    Parameters
    ----------
    codec, container : str
        Short names in the decoder's words, for instance ``mp3float`` and ``mp3``.
    sample_rate : int
        Sample rate of the file (Hz), before resampling.
    channels : int
        Channels of the file, before downmixing.
    duration_s : float
        Length of the decoded audio (s).
    decoder : str
        ``av``, ``soundfile`` or ``salvage``.
    non_finite : int
        Samples that were NaN or infinite and were set to 0.
    """

    codec: str
    container: str
    sample_rate: int
    channels: int
    duration_s: float
    decoder: str
    non_finite: int


class Audio:
    """The decoded audio of a file, or of a part of it, read from a memory-mapped array.

    Parameters
    ----------
    path : Path
        The audio file itself.
    source : SourceInfo or None
        What the file holds; None without PCM.
    pcm : ndarray of float32, shape (samples, channels), or None
        Samples at `SAMPLE_RATE` with 1 or 2 channels; full scale is ±1.
    stamp : FileStamp, optional
        What the file was when it was identified.
    """

    def __init__(
        self,
        path: Path,
        source: SourceInfo | None,
        pcm: Samples | None,
        stamp: FileStamp | None = None,
    ) -> None:
        self.path = path
        self.source = source
        self._pcm = pcm
        self._stamp = stamp
        self._mono: dict[int, Samples] = {}

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
            What that was when it was identified.
        """
        source = SourceInfo(**json.loads(_source_info_path(scratch_path).read_text("utf-8")))
        return cls(path, source, np.load(scratch_path, mmap_mode="r"), stamp)

    @classmethod
    def without_pcm(cls, path: Path, stamp: FileStamp | None = None) -> "Audio":
        """Stand for a file whose samples are not needed; `pcm` raises."""
        return cls(path, None, None, stamp)

    def open_file(self) -> BinaryIO:
        """Open the file itself for reading, if it is still the one that was identified.

        Raises
        ------
        FileChangedError
            If it is not.
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

    def mono(self, sample_rate: int = SAMPLE_RATE) -> Samples:
        """Return the mean of the channels, shape (samples,).

        Parameters
        ----------
        sample_rate : int
            Sample rate (Hz) of the result, resampled by soxr where it is not `SAMPLE_RATE`.
            Each rate is computed once and kept.
        """
        if sample_rate not in self._mono:
            if sample_rate == SAMPLE_RATE:
                samples = np.array(self.pcm[:, 0])
                if self.channels == 2:
                    # The numbers that np.mean gives, in an eighth of its time.
                    samples += self.pcm[:, 1]
                    samples *= np.float32(0.5)
            else:
                # soxr's default: MusiCNN's reference activations are met within 1e-4, at VHQ not.
                samples = soxr.resample(self.mono(), SAMPLE_RATE, sample_rate, quality="HQ")
            self._mono[sample_rate] = samples
        return self._mono[sample_rate]

    def block(self, start_s: float, stop_s: float) -> "Audio":
        """Return the part between two times (s), without copying samples."""
        start, stop = (round(seconds * SAMPLE_RATE) for seconds in (start_s, stop_s))
        return Audio(self.path, self.source, self.pcm[start:stop], self._stamp)


def decode(
    path: Path, target: Path, *, decoder: DecoderName = "av", stamp: FileStamp | None = None
) -> SourceInfo:
    """Decode a file's audio to a NumPy array on disk, in bounded memory.

    The format is told by content; the file's name plays no part. Of several audio streams the one
    FFmpeg deems best is taken. Mono stays mono; more than two channels are mixed to stereo by the
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
        FFmpeg (through PyAV), libsndfile, or FFmpeg from where an audio stream begins within the
        file: it passes over whatever was put before it.
    stamp : FileStamp, optional
        What the file must still be.

    Returns
    -------
    SourceInfo
        What the file holds.

    Raises
    ------
    CorruptFileError
        If the stream breaks off before the length the file promises, or cannot be decoded.
    UnsupportedFormatError
        If the decoder does not know the format, or there is no audio in the file.
    DecoderError
        If the decoder fails for another reason.
    FileChangedError
        If the file is another one than `stamp` says, or has changed.
    OSError
        If the file cannot be read or the target cannot be written.
    """
    open_stream = _open_with_soundfile if decoder == "soundfile" else _open_with_av
    with open_regular(path, stamp) as file, ExitStack() as stack:
        if decoder == "salvage":
            file = stack.enter_context(_from_first_stream(file, target))
        return _write(stack.enter_context(open_stream(file)), file, target, decoder)


@contextmanager
def _from_first_stream(file: BinaryIO, target: Path) -> Iterator[BinaryIO]:
    """Copy what follows the junk before a file's audio stream, and open the copy.

    Raises
    ------
    UnsupportedFormatError
        If no stream begins in the first `_SALVAGE_BYTES`.
    """
    start = _start_of_stream(file)
    with tempfile.TemporaryFile(dir=target.parent) as copy:
        file.seek(start)
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.seek(0)
        yield cast("BinaryIO", copy)


def _start_of_stream(file: BinaryIO) -> int:
    file.seek(0)
    head = file.read(_SALVAGE_BYTES)
    starts = [match.start() for match in _STREAM_START.finditer(head)]
    try:
        frames = MPEGInfo(file)
    except MutagenError:
        pass
    else:
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


@dataclass(frozen=True)
class _Stream:
    """An opened audio stream; `stated_s` is the length (s) its header states, if it does."""

    codec: str
    container: str
    sample_rate: int
    channels: int
    stated_s: float | None
    blocks: Iterator[_Block]


@contextmanager
def open_container(file: BinaryIO) -> Iterator["av.container.InputContainer"]:
    """Open a file with FFmpeg, by its content alone.

    Raises
    ------
    CorruptFileError, UnsupportedFormatError, DecoderError, OSError
        As `decode`.
    """
    if os.fstat(file.fileno()).st_size == 0:
        raise CorruptFileError("holds no audio: the file is empty")
    try:
        # Without protocols, playlists cannot make FFmpeg open other files or addresses.
        container = av.open(
            file, mode="r", metadata_errors="replace", options={"protocol_whitelist": "none"}
        )
    except (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError) as error:
        raise _unrecognized(file, _SIGNATURES_AV) from error
    except av.error.FFmpegError as error:
        raise _translated(error) from error
    with container:
        yield container


def audio_stream(container: "av.container.InputContainer") -> "av.AudioStream":
    """Return the audio stream FFmpeg deems best.

    Raises
    ------
    UnsupportedFormatError
        If there is none.
    """
    stream = container.streams.best("audio")
    if stream is None:
        if any(other.type == "video" for other in container.streams):
            raise UnsupportedFormatError("holds no audio, only a picture or video")
        raise UnsupportedFormatError("holds no audio that can be decoded")
    return cast("av.AudioStream", stream)


@contextmanager
def _open_with_av(file: BinaryIO) -> Iterator[_Stream]:
    with open_container(file) as container:
        stream = audio_stream(container)
        name = container.format.name.split(",")[0]
        stated_s = None
        if name in _CONTAINERS_STATING_LENGTH or (name == "mp3" and _mp3_states_length(file)):
            if stream.duration is not None and stream.time_base is not None:
                stated_s = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                stated_s = container.duration / 1e6
        codec = stream.codec_context
        yield _Stream(
            codec.name,
            name,
            codec.sample_rate,
            codec.channels,
            stated_s,
            _blocks_with_av(container, stream),
        )


def _blocks_with_av(
    container: "av.container.InputContainer", stream: "av.AudioStream"
) -> Iterator[_Block]:
    packets = broken = 0
    shape: tuple[object, ...] | None = None
    packer: av.AudioResampler | None = None
    try:
        for packet in container.demux(stream):
            packets += 1
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                broken += 1
                continue
            for frame in frames:
                if shape != (shape := (frame.format.name, frame.layout.name, frame.sample_rate)):
                    yield from _packed(packer, None)
                    # Only interleaves and scales to float, in blocks worth Python's while.
                    # PyAV's own conversion of planar frames reads past the eighth channel.
                    packer = av.AudioResampler(
                        "flt", frame.layout, frame.sample_rate, _BLOCK_SAMPLES
                    )
                yield from _packed(packer, frame)
    except av.error.FFmpegError as error:
        raise _translated(error) from error
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
    if os.fstat(file.fileno()).st_size == 0:
        raise CorruptFileError("holds no audio: the file is empty")
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        raise _unrecognized(file, _SIGNATURES_SOUNDFILE) from error
    with sound:
        states_length = sound.format != "MP3" or _mp3_states_length(file)
        yield _Stream(
            sound.subtype.lower(),
            sound.format.lower(),
            sound.samplerate,
            sound.channels,
            sound.frames / sound.samplerate if states_length else None,
            _blocks_with_soundfile(sound),
        )


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


def _write(stream: _Stream, file: BinaryIO, target: Path, decoder: str) -> SourceInfo:
    """Write a stream to `target` and check that it is as long as the file says."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary_info = _source_info_path(temporary)
    try:
        with temporary.open("wb") as output:
            writer = _Writer(output)
            seconds = 0.0
            for block in stream.blocks:
                seconds += len(block.samples) / block.sample_rate
                writer.add(block)
            writer.close()
        _check_complete(file, seconds, stream.stated_s)
        if writer.samples == 0:
            raise UnsupportedFormatError("holds no audio: not one sample could be decoded")
        source = SourceInfo(
            stream.codec,
            stream.container,
            stream.sample_rate,
            stream.channels,
            writer.samples / SAMPLE_RATE,
            decoder,
            writer.non_finite,
        )
        # The array's name is what others look for, so it comes last. Two processes decoding the
        # same file write the same bytes.
        temporary_info.write_text(json.dumps(asdict(source)), "utf-8")
        temporary_info.replace(_source_info_path(target))
        temporary.replace(target)
    except OSError as error:
        if error.errno in _DISK_FULL and error.filename is None:
            error.filename = str(target)  # writing says why it failed, not where
        raise
    finally:
        temporary.unlink(missing_ok=True)
        temporary_info.unlink(missing_ok=True)
    return source


class _Writer:
    """Brings blocks to one rate and channel count and appends them to a ``.npy`` file."""

    def __init__(self, output: BinaryIO) -> None:
        self.samples = 0
        self.non_finite = 0
        self._output = output
        self._channels = 0
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None

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
        self._output.write(np.ascontiguousarray(samples).data)
        self.samples += len(samples)

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first axis to grow.
        np.lib.format.write_array_header_1_0(
            self._output,
            {"descr": "<f4", "fortran_order": False, "shape": (self.samples, self._channels)},
        )


def _downmix(speakers: tuple[str, ...], channels: int) -> Samples:
    """Gains from speaker positions to stereo, shape (channels, 2)."""
    side, centre = float(np.sqrt(0.5)), float(np.sqrt(0.5))
    gains = np.zeros((channels, 2), np.float32)
    for row, name in zip(gains, speakers or ("",) * channels, strict=True):
        if name in ("FL", "DL"):
            row[:] = 1, 0
        elif name in ("FR", "DR"):
            row[:] = 0, 1
        elif name == "FC":
            row[:] = centre
        elif name.startswith("LFE"):
            row[:] = 0
        elif name.endswith(("L", "FLC")):
            row[:] = side, 0
        elif name.endswith(("R", "FRC")):
            row[:] = 0, side
        elif name.endswith("C"):
            row[:] = 0.5
        else:
            row[:] = 1 / channels
    return gains


def _check_complete(file: BinaryIO, seconds: float, stated_s: float | None) -> None:
    """Raise `CorruptFileError` if the file ends before its audio does."""
    stored = _stored_share(file)
    if stored is not None:
        stated_s = seconds / stored if stored else None
    if stated_s is not None:
        missing = stated_s - seconds
        if missing > _MISSING_SECONDS and missing > _MISSING_SHARE * stated_s:
            raise CorruptFileError(
                f"breaks off after {seconds:.1f} s of the {stated_s:.1f} s its header promises"
            )
    if not _ends_like_ogg(file):
        raise CorruptFileError(
            f"breaks off after {seconds:.1f} s: the page that ends an Ogg stream is missing"
        )


def _stored_share(file: BinaryIO) -> float | None:
    """Return which share of the data a WAV, AIFF or WMA file announces it really holds.

    Decoders take the file's end for the end of these without a word.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        layout, data = "<4sI", b"data"
    elif head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        layout, data = ">4sI", b"SSND"
    elif head[:4] == _ASF_SIGNATURE:
        return _stored_share_of_asf(file.read(4096), size)
    else:
        return None
    data_size_64: int | None = None
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack(layout, header)
        if name == b"ds64":
            data_size_64 = struct.unpack("<8xQ", file.read(16))[0]
            length -= 16
        elif name == data:
            if data_size_64 is not None:
                length = data_size_64
            elif not 0 < length < _LARGEST_STATED_CHUNK:
                return None
            return min(1.0, (size - file.tell()) / length) if length else None
        file.seek(length + length % 2, os.SEEK_CUR)
    return None


def _stored_share_of_asf(head: bytes, size: int) -> float | None:
    """Compare a WMA file's size with what its File Properties Object states."""
    properties = head[head.find(_ASF_FILE_PROPERTIES) :][:92]
    if len(properties) < 92 or not properties.startswith(_ASF_FILE_PROPERTIES):
        return None
    (stated,) = struct.unpack_from("<Q", properties, 40)
    is_broadcast = properties[88] & 1
    return None if is_broadcast or not stated else min(1.0, size / stated)


def _mp3_states_length(file: BinaryIO) -> bool:
    """Return whether an MP3's first frame is a Xing, Info or VBRI header."""
    position = file.tell()
    file.seek(0)
    head = file.read(10)
    start = 0
    if len(head) == 10 and head[:3] == b"ID3":
        # Four bytes of seven bits each, the ten bytes of the tag's header not counted.
        start = 10 + sum(
            (byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)
        )
    file.seek(start)
    frame = file.read(256)
    file.seek(position)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def _ends_like_ogg(file: BinaryIO) -> bool:
    """Return False for an Ogg file whose last page is cut or does not end its stream."""
    file.seek(0)
    if file.read(4) != b"OggS":
        return True
    largest_page = 65307
    file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * largest_page))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    end = 27 + page[26] + sum(page[27 : 27 + page[26]])
    return bool(page[5] & 4) and len(page) >= end


def _unrecognized(
    file: BinaryIO, signatures: tuple[bytes, ...]
) -> UnsupportedFormatError | CorruptFileError:
    """Say why no decoder takes a file, from how it begins."""
    file.seek(0)
    head = file.read(4096)
    if head.startswith(signatures) or (signatures is _SIGNATURES_AV and head[4:8] == b"ftyp"):
        return CorruptFileError("its header is damaged or incomplete")
    if not head.strip(b"\0"):
        return UnsupportedFormatError("holds no audio: it begins with nothing but zero bytes")
    try:
        # A character may be cut in two at the end of what was read.
        text = head.decode("utf-8", errors="strict" if len(head) < 4096 else "ignore")
    except UnicodeDecodeError:
        text = ""
    if text and all(character.isprintable() or character.isspace() for character in text):
        return UnsupportedFormatError("holds no audio: it is a text file")
    return UnsupportedFormatError("is in no audio format that the decoder knows")


def _translated(error: "av.error.FFmpegError") -> Exception:
    """Return FFmpeg's error in this package's terms; the system's errors stay what they are."""
    if isinstance(error, OSError | MemoryError):
        return error
    if isinstance(error, av.error.DecoderNotFoundError):
        return UnsupportedFormatError("its codec is not known to the decoder")
    if isinstance(error, av.error.InvalidDataError):
        return CorruptFileError("its stream cannot be read to the end")
    return DecoderError(f"FFmpeg failed: {error.strerror}")


def _source_info_path(scratch_path: Path) -> Path:
    return scratch_path.with_name(scratch_path.name + ".json")
