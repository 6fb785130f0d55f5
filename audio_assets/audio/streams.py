"""The audio streams of a file, decoded block by block, by FFmpeg or libsndfile."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Literal, cast

import av
import numpy as np
import soundfile

from audio_assets.audio.errors import AudioFileError, UnsupportedFormatError
from audio_assets.audio.opening import audio_stream, open_container, unrecognized
from audio_assets.audio.pcm import Samples
from audio_assets.audio.structure import (
    Section,
    ends_in_mid_box,
    ends_in_mid_frame,
    ends_in_mid_page,
    is_protected_asf,
    ogg_links,
    stated_seconds,
    stored_share,
    streams_within,
    without_tags,
)
from audio_assets.library.formats import HEAD_BYTES, format_of

DecoderName = Literal["av", "soundfile", "salvage"]

LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Sample rates (Hz) that audio has; resampling a lower one would take memory without bound."""

MOST_CHANNELS = 64

_BLOCK_SAMPLES = 1 << 16
_BLOCK_FRAMES = 1 << 10
"""The frames of a block are kept until it is full."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "s16": np.dtype(np.int16),
    "s32": np.dtype(np.int32),
    "flt": np.dtype(np.float32),
    "dbl": np.dtype(np.float64),
}
"""Types of samples by FFmpeg's name."""

_MOST_PLANES = 7
"""PyAV counts planes up to a pointer that is NULL: behind the eighth there is none."""

_MOST_STARTS = 16
"""How many possible starts of a stream are tried."""

_MOST_READ_ERRORS = 3
"""How often in a row FFmpeg may fail to read on."""

_STATING_LENGTH = ("ape", "tta", "wv", "mpc", "mpc8", "tak", "dsf", "iff")
"""FFmpeg's demuxers that take the stream's length from a header; many others estimate it."""

_FRAMES_ONLY = ("mp3", "aac", "ac3", "eac3", "dts")
"""Formats without a container: what lies between two frames is lost."""

_TIMED = ("ogg", "matroska", "mov", "asf")
"""Containers that state the time of packets."""

_LEAST_GAP_S = 0.02

_CHECKED = ("flac", "wavpack", "tta", "ape")
"""Codecs whose frames have checksums; without them, damage would be decoded to noise."""

_MATROSKA_DURATION = re.compile(rb"\x44\x89[\x84\x88]")

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
class Block:
    """Consecutive samples of one rate and channel layout, shape (samples, channels)."""

    samples: Samples
    sample_rate: int
    speakers: tuple[str, ...]


class Stream:
    """An open audio stream; iterating decodes it, once.

    Attributes
    ----------
    codec, container : str
        FFmpeg's names.
    stated_s : float or None
        The length that the file states for this stream in seconds, if it states one.
    size : int or None
        Bytes of the stream that have been read; None if unknown.
    packets, broken : int
        Packets so far, and those that could not be decoded.
    seconds : float
        Length so far (s).
    gap_s : float
        Length of what was missing between two packets so far (s).
    problem : str or None
        What ended decoding before the end of the audio, if something did; known at the end.
    is_protected : bool
        Whether its content is encrypted.
    """

    def __init__(
        self,
        file: Section,
        codec: str,
        container: str,
        stated_s: float | None,
        *,
        is_protected: bool = False,
    ) -> None:
        self.codec, self.container, self.stated_s = codec, container, stated_s
        self.is_protected = is_protected
        self._file = file
        self.size: int | None = None
        self.packets = self.broken = 0
        self.seconds = self.gap_s = 0.0
        self.problem: str | None = None

    def __iter__(self) -> Iterator[Block]:
        for block in self._blocks():
            self.seconds += len(block.samples) / block.sample_rate
            yield block

    def _blocks(self) -> Iterator[Block]:
        raise NotImplementedError

    @property
    def length_s(self) -> float | None:
        """Length (s) that the file states, in seconds or bytes; None if it states none."""
        share = stored_share(self._file)
        return self.stated_s if share is None else self.seconds / share

    @property
    def lost_s(self) -> float:
        """Length of what was lost on the way (s)."""
        mean_packet = self.seconds / max(self.packets - self.broken, 1)
        return max(self.broken * mean_packet, self.gap_s)


def open_streams(file: BinaryIO, decoder: DecoderName) -> Iterator[Stream]:
    """Open the streams that follow one another in a file; each is to be read before the next.

    A file has one, but a chained Ogg file.

    Parameters
    ----------
    file : file object
        The file.
    decoder : {'av', 'soundfile', 'salvage'}
        See `audio_assets.audio.decode.decode`.

    Raises
    ------
    AudioFileError
        If the first one cannot be opened.
    """
    if decoder == "soundfile":
        yield from _open_with_soundfile(file)
    elif decoder == "av":
        yield from _open_links(without_tags(file))
    else:
        yield from _salvage(without_tags(file))


def _open_links(file: Section, demuxer: str | None = None) -> Iterator[Stream]:
    stream: Stream | None = None
    for link in ogg_links(file):
        try:
            for stream in _open_with_av(link, demuxer):
                yield stream
        except AudioFileError as error:
            if stream is None:
                raise
            stream.problem = f"has a further stream that {error}"


def _salvage(file: Section) -> Iterator[Stream]:
    """Open the first stream that begins behind other bytes, by its own demuxer alone."""
    first: AudioFileError | None = None
    for section, known in islice(streams_within(file), _MOST_STARTS):
        try:
            yield from _open_links(section, known.demuxer)
        except AudioFileError as error:
            first = first or error
        else:
            return
    raise first or UnsupportedFormatError("holds no audio stream that any decoder knows")


class _AvStream(Stream):
    def __init__(
        self, file: Section, container: "av.container.InputContainer", stream: "av.AudioStream"
    ) -> None:
        name = container.format.name.split(",")[0]
        codec = stream.codec_context
        super().__init__(
            file,
            codec.codec.canonical_name,
            name,
            _stated_by_av(file, name, container, stream),
            is_protected=codec.codec_tag in ("drms", "enca")
            or (name == "asf" and is_protected_asf(file)),
        )
        self.size = 0
        self._container, self._stream = container, stream
        if self.codec in _CHECKED:
            codec.options = {"err_detect": "crccheck+explode"}

    def _blocks(self) -> Iterator[Block]:
        frames: list[av.AudioFrame] = []
        shape, samples = None, 0
        for frame in self._frames():
            before, shape = shape, (frame.format.name, frame.layout.name, frame.sample_rate)
            if shape != before:
                check_shape(frame.sample_rate, frame.layout.nb_channels)
            is_full = samples >= _BLOCK_SAMPLES or len(frames) >= _BLOCK_FRAMES
            if frames and (is_full or shape != before):
                yield _joined(frames)
                frames, samples = [], 0
            if frame.samples:  # an empty one has no planes
                frames.append(frame)
                samples += frame.samples
        if frames:
            yield _joined(frames)

    def _frames(self) -> Iterator["av.AudioFrame"]:
        last, end, skipped = b"", 0, 0
        frames_end: float | None = None
        for packet in self._packets():
            if packet is not None:
                self.packets += 1
                self.size = (self.size or 0) + packet.size
                if self.container in _FRAMES_ONLY:
                    if end and packet.pos is not None:
                        skipped += max(packet.pos - end, 0)
                    last, end = bytes(packet), (packet.pos or end) + packet.size
            try:
                frames = self._stream.codec_context.decode(packet)
            except av.error.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                self.broken += 1
                continue
            for frame in frames:
                if frame.time is not None and self.container in _TIMED:
                    gap = frame.time - (frame.time if frames_end is None else frames_end)
                    self.gap_s += gap if gap > _LEAST_GAP_S else 0.0
                    frames_end = frame.time + frame.samples / frame.sample_rate
                yield frame
        if skipped and self.size:
            self.gap_s = skipped / self.size * self.seconds
        if self._is_cut(last):
            self.problem = "breaks off"

    def _packets(self) -> Iterator["av.Packet[av.AudioStream] | None"]:
        """Yield packets, going on behind what cannot be read; None at the end."""
        errors, position = 0, -1
        while errors < _MOST_READ_ERRORS:
            try:
                for packet in self._container.demux(self._stream):
                    if packet.size:
                        yield packet
                break
            except av.error.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                is_stuck = self._file.tell() <= position
                errors, position = errors + 1 if is_stuck else 0, self._file.tell()
        else:
            # Behind its last page, an Ogg file holds no audio.
            self.problem = None if self.container == "ogg" else "cannot be read further"
        yield None

    def _is_cut(self, last_packet: bytes) -> bool:
        match self.container:
            case "ogg":
                return ends_in_mid_page(self._file)
            case "mov":
                return ends_in_mid_box(self._file)
            case "mp3" | "aac":
                return ends_in_mid_frame(last_packet)
        return False


def _open_with_av(file: Section, demuxer: str | None) -> Iterator[Stream]:
    with open_container(cast("BinaryIO", file), demuxer) as container:
        yield _AvStream(file, container, audio_stream(container))


def _stated_by_av(
    file: Section,
    name: str,
    container: "av.container.InputContainer",
    stream: "av.AudioStream",
) -> float | None:
    seconds = float(stream.duration * (stream.time_base or 0)) if stream.duration else None
    if name == "mov":
        return seconds if stream.frames else None
    if name in _STATING_LENGTH:
        return seconds
    if name == "matroska":
        if tagged := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
            return int(tagged[1]) * 3600 + int(tagged[2]) * 60 + float(tagged[3])
        is_alone = len(container.streams) == 1 and _MATROSKA_DURATION.search(file.at(0, 1 << 16))
        return container.duration / 1e6 if is_alone and container.duration else None
    return stated_seconds(file)


def _joined(frames: Sequence["av.AudioFrame"]) -> Block:
    """Join frames of one shape, interleaved and scaled to float."""
    layout, sample_format = frames[0].layout, frames[0].format
    channels = layout.nb_channels
    speakers = tuple(channel.name for channel in layout.channels)
    if len(speakers) != channels:
        speakers = _WAVE_CHANNELS.get(channels, ())
    dtype = _DTYPES.get(sample_format.packed.name)
    if dtype is None or (sample_format.is_planar and channels > _MOST_PLANES):
        frames, dtype = _converted(frames), _DTYPES["flt"]
    samples = np.empty((sum(frame.samples for frame in frames), channels), np.float32)
    start = 0
    for frame in frames:
        part = samples[start : (start := start + frame.samples)]
        targets = part.T if frame.format.is_planar else [part.reshape(-1)]
        for plane, target in zip(frame.planes, targets, strict=True):
            target[:] = np.frombuffer(cast("memoryview", plane), dtype, len(target))
    if dtype.kind == "i":
        samples *= 0.5 ** (8 * dtype.itemsize - 1)
    return Block(samples, frames[0].sample_rate, speakers)


def _converted(frames: Sequence["av.AudioFrame"]) -> Sequence["av.AudioFrame"]:
    """Have FFmpeg interleave frames and scale them to float, which costs more than some codecs."""
    resampler = av.AudioResampler("flt", frames[0].layout, frames[0].sample_rate)
    return [part for frame in (*frames, None) for part in resampler.resample(frame)]


class _SoundfileStream(Stream):
    def __init__(self, file: Section, sound: soundfile.SoundFile) -> None:
        super().__init__(file, _codec_of(sound), sound.format.lower(), stated_seconds(file))
        self._sound = sound

    def _blocks(self) -> Iterator[Block]:
        speakers = _WAVE_CHANNELS.get(self._sound.channels, ())
        while True:
            try:
                samples = self._sound.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                self.problem = f"cannot be decoded further (libsndfile: {error.error_string})"
                return
            if len(samples) == 0:
                break
            yield Block(samples, self._sound.samplerate, speakers)
        if ends_in_mid_page(self._file):
            self.problem = "breaks off"


def _open_with_soundfile(file: BinaryIO) -> Iterator[Stream]:
    try:
        # By its descriptor: an error in a callback to Python would be printed and lost.
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        sound = soundfile.SoundFile(file.fileno(), closefd=False)
    except soundfile.LibsndfileError as error:
        raise unrecognized(file, by_soundfile=True) from error
    section = without_tags(file)
    with sound:
        # It looks for an MPEG frame behind other bytes, and finds one in any.
        if sound.format == "MP3" and not format_of(section.at(0, HEAD_BYTES)):
            raise unrecognized(file, by_soundfile=True)
        check_shape(sound.samplerate, sound.channels)
        yield _SoundfileStream(section, sound)


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


def check_shape(sample_rate: int, channels: int) -> None:
    """Raise if there is no audio of such a sample rate (Hz) or number of channels.

    Raises
    ------
    UnsupportedFormatError
        Always then.
    """
    if not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
        raise UnsupportedFormatError(
            f"has a sample rate of {sample_rate} Hz: audio has {LOWEST_RATE} to {HIGHEST_RATE} Hz"
        )
    if channels > MOST_CHANNELS:
        raise UnsupportedFormatError(f"has {channels} channels, more than {MOST_CHANNELS}")
