"""Tags and technical properties, read from the file itself."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import mutagen
from mutagen.mp4 import MP4FreeForm

from audio_assets.audio import Audio, audio_stream, open_container
from audio_assets.errors import DecoderError, UnsupportedFormatError
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.statistics import finite

_LONGEST_TEXT = 4096

# Column by tag name, in the words of ID3v2, Vorbis comments, APEv2, MP4 and ASF.
_TAG_COLUMNS = {
    "title": "title",
    "tit2": "title",
    "©nam": "title",
    "artist": "artist",
    "tpe1": "artist",
    "©art": "artist",
    "author": "artist",
    "album": "album",
    "talb": "album",
    "©alb": "album",
    "wm/albumtitle": "album",
    "album_artist": "album_artist",
    "albumartist": "album_artist",
    "album artist": "album_artist",
    "tpe2": "album_artist",
    "aart": "album_artist",
    "wm/albumartist": "album_artist",
    "genre": "genre",
    "tcon": "genre",
    "©gen": "genre",
    "wm/genre": "genre",
    "date": "date",
    "tdrc": "date",
    "tyer": "date",
    "year": "date",
    "©day": "date",
    "wm/year": "date",
    "track": "track",
    "tracknumber": "track",
    "trck": "track",
    "trkn": "track",
    "wm/tracknumber": "track",
}
_PICTURE_TAGS = ("metadata_block_picture", "coverart")
_TEXT_COLUMNS = ("title", "artist", "album", "album_artist", "genre", "date", "track")

# Container and codec by the class mutagen recognizes a file as; MP4 and WMA name their codec.
_FORMATS = {
    "MP3": ("mp3", "mp3"),
    "OggVorbis": ("ogg", "vorbis"),
    "OggOpus": ("ogg", "opus"),
    "OggFLAC": ("ogg", "flac"),
    "OggSpeex": ("ogg", "speex"),
    "FLAC": ("flac", "flac"),
    "WAVE": ("wav", "pcm"),
    "AIFF": ("aiff", "pcm"),
    "MP4": ("mp4", "aac"),
    "ASF": ("asf", "wma"),
    "AAC": ("aac", "aac"),
    "AC3": ("ac3", "ac3"),
    "WavPack": ("wv", "wavpack"),
    "Musepack": ("mpc", "musepack"),
    "MonkeysAudio": ("ape", "ape"),
    "TrueAudio": ("tta", "tta"),
}

_AV_CONTAINERS = {"mov": "mp4"}


def _extract(audio: Audio) -> Row:
    with audio.open_file() as file:
        try:
            parsed = mutagen.File(file)
        except mutagen.MutagenError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise DecoderError(f"mutagen cannot read its tags: {error}") from error
    if parsed is None:
        raise UnsupportedFormatError("mutagen does not know its format")
    info = parsed.info
    container, codec = _FORMATS.get(type(parsed).__name__, (type(parsed).__name__.lower(),) * 2)
    if container == "mp4" and not info.codec.startswith("mp4a"):
        codec = info.codec
    # mutagen leaves out what is the same for every Opus file.
    sample_rate = 48000 if codec == "opus" else getattr(info, "sample_rate", None)
    return _row(
        audio.path,
        {name: list(_texts(value)) for name, value in (parsed.tags or {}).items()},
        duration_s=getattr(info, "length", None),
        sample_rate=sample_rate,
        channels=getattr(info, "channels", None),
        bit_rate=getattr(info, "bitrate", None),
        codec=codec,
        container=container,
    )


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a tag of any of mutagen's kinds; pictures and other bytes have none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bool | int | float):
        yield str(value)
    elif isinstance(value, tuple):
        # MP4 numbers tracks as (number, total), 0 for unknown.
        yield "/".join(str(part) for part in value if part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, MP4FreeForm):
        yield value.decode("utf-8", "replace")
    elif hasattr(value, "text"):
        yield from (str(part) for part in _as_list(value.text))
    elif isinstance(plain := getattr(value, "value", None), str | int):
        yield str(plain)


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _extract_alternative(audio: Audio) -> Row:
    with audio.open_file() as file, open_container(file) as container:
        stream = audio_stream(container)
        tags = {**container.metadata, **stream.metadata}
        duration = container.duration
        name = container.format.name.split(",")[0]
        codec = stream.codec_context.codec.canonical_name
        return _row(
            audio.path,
            {key: [value] for key, value in tags.items()},
            duration_s=None if duration is None else duration / 1e6,
            sample_rate=stream.codec_context.sample_rate,
            channels=stream.codec_context.channels,
            bit_rate=stream.bit_rate or container.bit_rate,
            codec="pcm" if codec.startswith("pcm_") else codec,
            container=_AV_CONTAINERS.get(name, name),
        )


def _row(
    path: Path,
    tags: Mapping[str, list[str]],
    *,
    duration_s: float | None,
    sample_rate: int | None,
    channels: int | None,
    bit_rate: int | None,
    codec: str,
    container: str,
) -> Row:
    status = path.stat()
    if not bit_rate and duration_s:
        bit_rate = round(8 * status.st_size / duration_s)
    row: Row = dict.fromkeys(_TEXT_COLUMNS)
    others = {}
    for name, values in tags.items():
        text = "; ".join(clean for value in values if (clean := _clean(value)))
        key = _clean(name).lower()
        column = _TAG_COLUMNS.get(key)
        if not text or key in _PICTURE_TAGS:
            continue
        if column is not None and row[column] is None:
            row[column] = text
        else:
            others[key] = text
    return row | {
        "duration_s": finite(duration_s) if duration_s else None,
        "sample_rate": int(sample_rate) if sample_rate else None,
        "channels": int(channels) if channels else None,
        "bit_rate": int(bit_rate) if bit_rate else None,
        "codec": codec,
        "container": container,
        "file_size": status.st_size,
        "mtime": datetime.fromtimestamp(status.st_mtime, UTC).replace(tzinfo=None),
        "tags": json.dumps(others, ensure_ascii=False, sort_keys=True),
    }


def _clean(text: str) -> str:
    """Return text that any database takes: without NUL bytes and halves of characters."""
    valid = text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ").strip()
    return valid[:_LONGEST_TEXT]


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    return rows[0]


FEATURE_SET = FeatureSet(
    name="metadata",
    description=(
        "Tags (ID3v2, Vorbis comments, APEv2, MP4, ASF) and technical properties as the file "
        "states them. Several values of a tag are joined by '; '; pictures are left out."
    ),
    columns=(
        Column("title", "VARCHAR", "Title"),
        Column("artist", "VARCHAR", "Artist"),
        Column("album", "VARCHAR", "Album"),
        Column("album_artist", "VARCHAR", "Artist of the album"),
        Column("genre", "VARCHAR", "Genre"),
        Column("date", "VARCHAR", "Date or year, as tagged"),
        Column("track", "VARCHAR", "Track number, or number/total"),
        Column("duration_s", "DOUBLE", "Length the file states", "s"),
        Column("sample_rate", "INTEGER", "Sample rate", "Hz"),
        Column("channels", "INTEGER", "Number of channels"),
        Column(
            "bit_rate",
            "BIGINT",
            "Bit rate as stated, or the file's size over its length",
            "bit/s",
        ),
        Column("codec", "VARCHAR", "Codec, for instance mp3, vorbis, pcm"),
        Column("container", "VARCHAR", "Container, for instance mp3, ogg, wav"),
        Column("file_size", "BIGINT", "Size of the file", "byte"),
        Column("mtime", "TIMESTAMP", "When the file was last modified, UTC"),
        Column("tags", "VARCHAR", "All other tags: a JSON object of texts by lower-case name"),
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    headline="title",
    plotted=("duration_s", "bit_rate"),
    extractor="mutagen",
    alternative="av",
    reads_pcm=False,
    kinds=frozenset({"python", "mutagen"}),
)
