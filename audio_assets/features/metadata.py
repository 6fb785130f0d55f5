"""Tags, read from the file itself, and technical properties, by its decoding."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from audio_assets.audio.errors import (
    AudioFileError,
    CorruptFileError,
    DecoderError,
    UnsupportedFormatError,
)
from audio_assets.audio.opening import audio_stream, open_container
from audio_assets.audio.pcm import Audio, SourceInfo
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.statistics import finite
from audio_assets.features.tags import (
    COLUMNS,
    LONGEST_TAGS,
    MOST_TAGS,
    NamedFile,
    Tags,
    read_with_mutagen,
    tag_columns,
    tags_of_ffmpeg,
)
from robustness.error_rules import ErrorType

# Containers by FFmpeg's and libsndfile's names, where another one is usual.
_CONTAINERS = {"mov": "mp4", "rf64": "wav", "wavex": "wav"}

# Container and codec by the class mutagen recognizes a file as; None where it may be any.
_FORMATS = {
    "MP3": ("mp3", "mp3"),
    "OggVorbis": ("ogg", "vorbis"),
    "OggOpus": ("ogg", "opus"),
    "OggFLAC": ("ogg", "flac"),
    "OggSpeex": ("ogg", "speex"),
    "FLAC": ("flac", "flac"),
    "WAVE": ("wav", None),
    "AIFF": ("aiff", None),
    "MP4": ("mp4", None),
    "ASF": ("asf", None),
    "AAC": ("aac", "aac"),
    "AC3": ("ac3", None),
    "WavPack": ("wv", "wavpack"),
    "Musepack": ("mpc", None),
    "MonkeysAudio": ("ape", "ape"),
    "TrueAudio": ("tta", "tta"),
}

_ERRORS = {
    ErrorType.CORRUPT_FILE: CorruptFileError,
    ErrorType.UNSUPPORTED_FORMAT: UnsupportedFormatError,
}


def _extract(audio: Audio) -> Row:
    with NamedFile(audio.open_file()) as file:
        parsed, tags = read_with_mutagen(file, audio.path.name)
    return _row(audio, tags, _by_mutagen(parsed))


def _extract_alternative(audio: Audio) -> Row:
    return _row(audio, [], {})


def _row(audio: Audio, tags: list[Tags], by_mutagen: Row) -> Row:
    """Return what decoding found, or else FFmpeg's demuxer, or else mutagen.

    Raises
    ------
    AudioFileError
        If nothing is known: why the file could not be decoded, or opened.
    """
    by_demuxer: Row = {}
    error: AudioFileError | None = None
    try:
        by_demuxer, found = _read_with_ffmpeg(audio)
        tags = [*tags, found]
    except AudioFileError as failure:
        error = failure
    if audio.source:
        properties = _by_decoding(audio.source)
    else:
        properties = {name: by_demuxer.get(name) or by_mutagen.get(name) for name in _properties()}
    columns = tag_columns(tags)
    known = {**columns, **properties, "container": None}  # which says nothing by itself
    if error and all(value in (None, "{}") for value in known.values()):
        if audio.decode_error:
            first = audio.decode_error
            raise _ERRORS.get(first.error_type, DecoderError)(first.message)
        raise error
    status = audio.path.stat()
    if not properties["bit_rate"] and properties["duration_s"]:
        properties["bit_rate"] = round(8 * status.st_size / properties["duration_s"])
    return {
        **columns,
        **properties,
        "file_size": status.st_size,
        "mtime": datetime.fromtimestamp(status.st_mtime, UTC).replace(tzinfo=None),
    }


def _properties(
    duration_s: float | None = None,
    sample_rate: float | None = None,
    channels: int | None = None,
    bit_rate: float | None = None,
    codec: str | None = None,
    container: str | None = None,
) -> Row:
    """Return the columns; none is 0 or less."""
    return {
        "duration_s": finite(max(duration_s or 0, 0)) or None,
        "sample_rate": int(max(sample_rate or 0, 0)) or None,
        "channels": int(max(channels or 0, 0)) or None,
        "bit_rate": round(max(bit_rate or 0, 0)) or None,
        "codec": codec,
        "container": _CONTAINERS.get(container, container) if container else None,
    }


def _by_decoding(source: SourceInfo) -> Row:
    size, seconds = source.stream_bytes, source.duration_s
    return _properties(
        seconds,
        source.sample_rate,
        source.channels,
        8 * size / seconds if size and seconds else None,
        source.codec,
        source.container,
    )


def _read_with_ffmpeg(audio: Audio) -> tuple[Row, Tags]:
    with NamedFile(audio.open_file()) as file:
        try:
            with open_container(file) as container:
                stream = audio_stream(container)
                duration = None if container.duration is None else container.duration / 1e6
                if stream.duration is not None and stream.time_base is not None:
                    duration = float(stream.duration * stream.time_base)
                codec = stream.codec_context
                properties = _properties(
                    duration,
                    codec.sample_rate,
                    codec.channels,
                    stream.bit_rate or container.bit_rate,
                    codec.codec.canonical_name,
                    container.format.name.split(",")[0],
                )
                return properties, tags_of_ffmpeg(container.metadata, stream.metadata)
        except (AudioFileError, MemoryError):
            raise
        except Exception as error:  # a reader of headers raises whatever they lead it to
            if file.error is not None:
                raise file.error from None
            raise DecoderError(f"its header cannot be read ({type(error).__name__})") from error


def _by_mutagen(parsed: Any) -> Row:
    info = getattr(parsed, "info", None)
    if info is None:
        return {}
    name = type(parsed).__name__
    container, codec = _FORMATS.get(name, (name.lower(), None))
    return _properties(
        getattr(info, "length", None),
        # mutagen leaves out what is the same for every Opus file.
        48000 if codec == "opus" else getattr(info, "sample_rate", None),
        getattr(info, "channels", None),
        getattr(info, "bitrate", None),
        codec,
        container,
    )


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    return rows[0]


FEATURE_SET = FeatureSet(
    name="metadata",
    description=(
        "Tags (ID3, Vorbis comments, APEv2, MP4, ASF, RIFF INFO and others) and technical "
        "properties of the decoded audio. Of a file that cannot be decoded, the properties are "
        "those its headers state. Pictures are left out, and so is what goes beyond "
        f"{MOST_TAGS:,} tags or {LONGEST_TAGS:,} characters."
    ),
    columns=(
        *COLUMNS,
        Column(
            "duration_s",
            "DOUBLE",
            "Length of the decoded audio; if it cannot be decoded, the length the file states",
            "s",
            low=0,
        ),
        Column("sample_rate", "INTEGER", "Sample rate", "Hz", low=1),
        Column("channels", "INTEGER", "Number of channels", low=1),
        Column(
            "bit_rate",
            "BIGINT",
            "Bit rate of the audio alone; that of the whole file where the decoder gives no other",
            "bit/s",
            low=1,
        ),
        Column(
            "codec", "VARCHAR", "Codec by FFmpeg's name, for instance mp3, vorbis, aac, pcm_s16le"
        ),
        Column("container", "VARCHAR", "Container, for instance mp3, ogg, wav, mp4"),
        Column("file_size", "BIGINT", "Size of the file", "byte", low=0),
        Column("mtime", "TIMESTAMP", "When the file was last modified, UTC"),
    ),
    licence="GPL-2.0-or-later (mutagen), BSD-3-Clause (PyAV)",
    citation="None: what the file states and what decoding found",
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    headline="title",
    plotted=("duration_s", "bit_rate"),
    extractor="mutagen",
    alternative="av",
    reads="decoding",
    position=10,
    code_version="3",
    kinds=frozenset({"python", "mutagen"}),
)
