"""Tags: how they are read by mutagen and FFmpeg, and in which column each goes."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, BinaryIO, cast

import mutagen
from mutagen.apev2 import APEv2
from mutagen.id3 import (
    ID3,
    RVA2,
    SYLT,
    UFID,
    USLT,
    BitPaddedInt,
    PairedTextFrame,
    TextFrame,
    UrlFrame,
    UrlFrameU,
)
from mutagen.mp4 import MP4FreeForm

from audio_assets.features.base import Column, Row

Tags = Mapping[str, list[str]]
"""Texts by lower-case name."""

_LONGEST_TEXT = 4096
MOST_TAGS = 1000
LONGEST_TAGS = 1 << 18
"""Characters of all other tags together."""

_LARGEST_CUT_TAG = 16 << 20

_MOST_VALUES = 100

COLUMNS = (
    Column("title", "VARCHAR", "Title"),
    Column("artist", "VARCHAR", "First artist"),
    Column("artists", "VARCHAR[]", "All artists"),
    Column("album", "VARCHAR", "Album"),
    Column("album_artist", "VARCHAR", "First artist of the album"),
    Column("album_artists", "VARCHAR[]", "All artists of the album"),
    Column("genre", "VARCHAR", "First genre"),
    Column("genres", "VARCHAR[]", "All genres"),
    Column("date", "VARCHAR", "Date or year, as tagged"),
    Column("track", "VARCHAR", "Track number, or number/total"),
    Column("disc", "VARCHAR", "Disc number, or number/total"),
    Column("composer", "VARCHAR", "First composer"),
    Column("composers", "VARCHAR[]", "All composers"),
    Column("isrc", "VARCHAR", "First International Standard Recording Code"),
    Column("isrcs", "VARCHAR[]", "All International Standard Recording Codes"),
    Column("musicbrainz_recording_id", "VARCHAR", "MusicBrainz identifier of the recording"),
    Column("musicbrainz_release_id", "VARCHAR", "MusicBrainz identifier of the release"),
    Column("musicbrainz_artist_id", "VARCHAR", "MusicBrainz identifier of the first artist"),
    Column("musicbrainz_artist_ids", "VARCHAR[]", "MusicBrainz identifiers of all artists"),
    Column(
        "replaygain_track_gain_db",
        "DOUBLE",
        "ReplayGain of the track as tagged; NULL if the tag is no such number",
        "dB",
        -100,
        100,
    ),
    Column("publisher", "VARCHAR", "First publisher or label"),
    Column("publishers", "VARCHAR[]", "All publishers and labels"),
    Column(
        "tagged_bpm",
        "DOUBLE",
        "Tempo as tagged; NULL if the tag is no such number",
        "BPM",
        1,
        1000,
    ),
    Column("tagged_key", "VARCHAR", "Musical key as tagged"),
    Column("encoder", "VARCHAR", "Program that encoded the file, as tagged"),
    Column(
        "tags",
        "VARCHAR",
        "All other tags, and those with more values than their column holds: a JSON object by "
        "lower-case name; each is a text, or a list of texts where a tag has several values",
    ),
)

_NUMERIC = {column.name: column for column in COLUMNS if column.type == "DOUBLE"}

_LISTS = {
    "artist": "artists",
    "album_artist": "album_artists",
    "genre": "genres",
    "composer": "composers",
    "isrc": "isrcs",
    "musicbrainz_artist_id": "musicbrainz_artist_ids",
    "publisher": "publishers",
}
"""The column that has all values of a tag, by that of the first one."""

# The names of tags in ID3v2, Vorbis comments, APEv2, MP4, ASF and FFmpeg by column, best first.
_NAMES = {
    "title": ("title", "tit2", "©nam"),
    "artist": ("artist", "tpe1", "©art", "author"),
    "album": ("album", "talb", "©alb", "wm/albumtitle"),
    "album_artist": (
        *("album_artist", "albumartist", "album artist", "tpe2", "aart", "wm/albumartist"),
    ),
    "genre": ("genre", "tcon", "©gen", "wm/genre"),
    "date": ("date", "tdrc", "tyer", "year", "©day", "wm/year"),
    "track": ("track", "tracknumber", "trck", "trkn", "wm/tracknumber"),
    "disc": ("disc", "discnumber", "tpos", "disk", "wm/partofset"),
    "composer": ("composer", "tcom", "©wrt", "wm/composer"),
    "isrc": ("isrc", "tsrc", "wm/isrc"),
    "musicbrainz_recording_id": (
        *("ufid:http://musicbrainz.org", "musicbrainz_trackid", "musicbrainz track id"),
        "musicbrainz/track id",
    ),
    "musicbrainz_release_id": (
        *("musicbrainz_albumid", "musicbrainz album id", "musicbrainz/album id"),
    ),
    "musicbrainz_artist_id": (
        *("musicbrainz_artistid", "musicbrainz artist id", "musicbrainz/artist id"),
    ),
    "replaygain_track_gain_db": (
        *("replaygain_track_gain", "replaygain/track_gain", "rva2:track"),
    ),
    "publisher": ("publisher", "label", "organization", "tpub", "wm/publisher"),
    "tagged_bpm": ("bpm", "tbpm", "tmpo", "wm/beatsperminute"),
    "tagged_key": ("initialkey", "initial key", "tkey", "key", "wm/initialkey"),
    "encoder": (
        *("encoder", "tsse", "©too", "encodersettings", "encoder settings"),
        *("wm/encodingsettings", "encoded_by", "encodedby", "tenc", "wm/encodedby"),
    ),
}

# Where a name of one's own is put: as it is, or behind ID3v2's or MP4's mark of such names.
_MARKS = ("", "txxx:", "----:com.apple.itunes:")

# Pictures; what FFmpeg says of a container's structure; bytes that FFmpeg shows as text.
_LEFT_OUT = {
    *("metadata_block_picture", "coverart"),
    *("major_brand", "minor_version", "compatible_brands", "handler_name", "vendor_id"),
    *("language", "duration"),
}
_LEFT_OUT_PREFIX = "id3v2_priv."

_NUMBER = re.compile(r"([-+]?\d+(?:[.,]\d+)?)\s*(?:dB|BPM)?", re.IGNORECASE)


class NamedFile(io.BufferedReader):
    """A file for tag readers.

    `name` is empty, or a hint of the format for mutagen. `error` is an error of the storage,
    which readers hide, or mix up with those that they cause by seeking to impossible places.
    """

    name = ""
    error: OSError | None = None

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(cast("io.RawIOBase", file))

    def read(self, size: int | None = -1) -> bytes:
        """Read, and keep an error."""
        try:
            return super().read(size)
        except OSError as error:
            self.error = error
            raise


class _ID3v2(ID3):
    """An ID3v2 tag. Lyrics that are there several times stay several, as other texts do."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, load_v1=False)  # type: ignore[no-untyped-call]

    def _add(self, frame: Any, strict: bool) -> None:
        if isinstance(frame, USLT) and frame.HashKey in self and not strict:
            before = self[frame.HashKey].text[:LONGEST_TAGS]
            lyrics: Any = frame
            lyrics.text = f"{before}\0{lyrics.text}"
        super()._add(frame, strict)  # type: ignore[no-untyped-call]


def read_with_mutagen(file: NamedFile, name: str) -> tuple[Any, list[Tags]]:
    """Read a file's tags of every kind.

    Parameters
    ----------
    file : NamedFile
        The file.
    name : str
        Its name, for instance ``a.mp3``. Only if it misleads is the format recognized without it.

    Returns
    -------
    (FileType or None, list of Tags)
        The file as mutagen knows it, and its tags, by precedence: those of its own format, ID3v2,
        APEv2, ID3v1. What cannot be read is left out.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    parsed = None
    for hint in (name, ""):
        file.name = hint
        found = _attempt(mutagen.File, file)
        # Some bytes of any file look like an MP3's.
        if found is not None and not getattr(found.info, "sketchy", False):
            parsed = found
            break
    id3 = _attempt(_ID3v2, file)
    if id3 is None:
        id3 = _attempt(_cut_id3, file)
    native = None if parsed is None or type(parsed.tags) is ID3 else parsed.tags
    sources = [native, id3, _attempt(APEv2, file)]
    if id3 is None:
        sources.append(_attempt(ID3, file))
    return parsed, [_texts_by_name(tags) for tags in sources if tags]


def _attempt(read: Callable[[NamedFile], Any], file: NamedFile) -> Any:
    """Return what a reader returns; None if it fails for what it reads."""
    result = None
    try:
        file.seek(0)
        result = read(file)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a reader of headers raises whatever they lead it to
        pass
    if file.error is not None:
        raise file.error
    return result


def _cut_id3(file: NamedFile) -> _ID3v2 | None:
    """Read an ID3v2 tag that the end of the file cuts."""
    header = file.read(10)
    if not header.startswith(b"ID3"):
        return None
    frames = file.read(_LARGEST_CUT_TAG)
    size = BitPaddedInt.to_str(len(frames), width=4)
    return _ID3v2(io.BytesIO(header[:6] + size + frames)) if size < header[6:] else None


def _texts_by_name(tags: Mapping[str, Any]) -> Tags:
    named: dict[str, list[str]] = {}
    for name, value in islice(tags.items(), MOST_TAGS):
        # The names of such frames end with the URL.
        key = value.FrameID if isinstance(value, UrlFrameU) else name
        named.setdefault(_clean(key).lower(), []).extend(_texts(value))
    return named


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a tag of any of mutagen's kinds; pictures and other bytes have none."""
    frame: Any = value  # mutagen's types do not know the attributes of frames
    match value:
        case str():
            yield from value.split("\0")
        case bool() | int() | float():
            yield str(value)
        case tuple():
            # MP4 numbers tracks as (number, total), 0 for unknown.
            yield "/".join(str(part) for part in value if part)
        case list():
            for part in value:
                yield from _texts(part)
        case MP4FreeForm():
            yield from _texts(value.decode("utf-8", "replace"))
        case SYLT():  # lyrics with times
            yield str(value)
        case TextFrame():
            yield from _texts([str(text) for text in frame.text])  # dates are objects
        case UrlFrame():
            yield from _texts(frame.url)
        case PairedTextFrame():
            yield from (": ".join(pair) for pair in frame.people)
        case UFID():
            yield frame.data.decode("utf-8", "replace")
        case RVA2():
            yield f"{frame.gain:+.2f} dB"
        case _:
            plain = getattr(value, "text", None) or getattr(value, "value", None)
            if isinstance(plain, str | int):
                yield from _texts(plain)


def tags_of_ffmpeg(*metadata: Mapping[str, str]) -> Tags:
    """Return the tags of a container and its stream, by precedence.

    Texts that are not UTF-8 are taken for Windows' Latin-1, as programs write RIFF INFO.
    """
    named: dict[str, list[str]] = {}
    for tags in metadata:
        for name, text in islice(tags.items(), MOST_TAGS):
            named.setdefault(_clean(name).lower(), [_decoded(text)])
    return named


def _decoded(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    return text


def tag_columns(sources: Iterable[Tags]) -> Row:
    """Return the values of `COLUMNS`.

    Parameters
    ----------
    sources : iterable of Tags
        By precedence: a later one only adds what no earlier one has, under whatever name.
    """
    row: Row = dict.fromkeys((*_NAMES, *_LISTS.values()))
    others: dict[str, list[str]] = {}
    room, count = LONGEST_TAGS, MOST_TAGS
    seen: set[str] = set()
    for source in sources:
        tags = {
            name: texts
            for name, values in source.items()
            if name not in _LEFT_OUT
            and not name.startswith(_LEFT_OUT_PREFIX)
            and (texts := _distinct(values))
        }
        texts_here = {text for texts in tags.values() for text in texts}
        for column, names in _NAMES.items():
            marked = [mark + name for mark in _MARKS for name in names]
            if row[column] is not None:
                for name in marked:
                    tags.pop(name, None)
                continue
            for name in marked:
                if name in tags and (value := _value(column, tags[name])) is not None:
                    row[column], texts = value, tags[name]
                    if column in _LISTS:
                        row[_LISTS[column]] = texts[:_MOST_VALUES]
                    if len(texts) <= (_MOST_VALUES if column in _LISTS else 1):
                        tags = {n: t for n, t in tags.items() if n not in marked or t != texts}
                    break
        for name, texts in tags.items():
            size = len(name) + sum(map(len, texts))
            if count and size <= room and name not in others and not seen.issuperset(texts):
                others[name] = texts
                room, count = room - size, count - 1
        seen |= texts_here
    plain = {name: texts[0] if len(texts) == 1 else texts for name, texts in others.items()}
    return row | {"tags": json.dumps(plain, ensure_ascii=False, sort_keys=True)}


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for value in values if (text := _clean(value))))


def _value(column: str, texts: list[str]) -> str | float | None:
    """Return the value of a column; None where it must be a number and is none in its range."""
    if column not in _NUMERIC:
        return texts[0]
    numbers = (
        float(match[1].replace(",", ".")) for text in texts if (match := _NUMBER.fullmatch(text))
    )
    return next((number for number in numbers if _NUMERIC[column].has(number)), None)


def _clean(text: str) -> str:
    """Return text that any database takes: without NUL bytes and halves of characters."""
    valid = text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ").strip()
    return valid[:_LONGEST_TEXT]
