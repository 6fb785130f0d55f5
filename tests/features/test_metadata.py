import base64
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import mutagen
import numpy as np
import pytest
from mutagen.flac import FLAC, Picture
from mutagen.id3 import APIC, COMM, ID3, TALB, TCON, TDRC, TIT2, TPE1, TPE2, TRCK, TXXX
from mutagen.mp4 import MP4, MP4Cover, MP4FreeForm

from audio_assets.audio import Audio
from audio_assets.errors import (
    AudioFileError,
    UnsupportedFormatError,
)
from audio_assets.features.base import Row, check_row
from audio_assets.features.metadata import FEATURE_SET
from tests.features.test_audio import SECONDS, encode_format, picture

TAGGED = {
    "title": "Blåbærsyltetøy 🍇",
    "artist": "One; Two",
    "album": "The Album",
    "album_artist": "Various",
    "genre": "Jazz",
    "date": "1999-12-31",
    "track": "3/12",
}


def extract(path: Path) -> Row:
    row = FEATURE_SET.extract(Audio.without_pcm(path))
    check_row(FEATURE_SET, row)
    return row


def extract_alternative(path: Path) -> Row:
    row = FEATURE_SET.extract_alternative(Audio.without_pcm(path))
    check_row(FEATURE_SET, row)
    return row


def tag_id3(path: Path) -> None:
    tags = mutagen.File(path)
    if tags.tags is None:
        tags.add_tags()
    for frame in (
        TIT2(text=TAGGED["title"]),
        TPE1(text=["One", "Two"]),
        TALB(text=TAGGED["album"]),
        TPE2(text=TAGGED["album_artist"]),
        TCON(text="(8)"),
        TDRC(text=TAGGED["date"]),
        TRCK(text=TAGGED["track"]),
        TXXX(desc="MOOD", text="calm"),
        COMM(lang="eng", desc="", text="a comment"),
        APIC(mime="image/jpeg", data=bytes(3_000_000)),
    ):
        tags.tags.add(frame)
    tags.save()


def tag_vorbis(path: Path) -> None:
    tags = mutagen.File(path)
    tags.update(
        {
            "TITLE": TAGGED["title"],
            "Artist": ["One", "Two"],
            "album": TAGGED["album"],
            "albumartist": TAGGED["album_artist"],
            "genre": TAGGED["genre"],
            "date": TAGGED["date"],
            "tracknumber": TAGGED["track"],
            "mood": "calm",
        }
    )
    cover = Picture()
    cover.data = bytes(100_000)
    if isinstance(tags, FLAC):
        tags.add_picture(cover)
    else:
        tags["metadata_block_picture"] = base64.b64encode(cover.write()).decode("ascii")
    tags.save()


def tag_mp4(path: Path) -> None:
    tags = MP4(path)
    tags["©nam"] = TAGGED["title"]
    tags["©ART"] = ["One", "Two"]
    tags["©alb"] = TAGGED["album"]
    tags["aART"] = TAGGED["album_artist"]
    tags["©gen"] = TAGGED["genre"]
    tags["©day"] = TAGGED["date"]
    tags["trkn"] = [(3, 12)]
    tags["cpil"] = True
    tags["tmpo"] = [128]
    tags["----:com.apple.iTunes:MOOD"] = MP4FreeForm(b"calm")
    tags["covr"] = [MP4Cover(bytes(100_000))]
    tags.save()


def tag_asf(path: Path) -> None:
    tags = mutagen.File(path)
    tags["Title"] = TAGGED["title"]
    tags["Author"] = ["One", "Two"]
    tags["WM/AlbumTitle"] = TAGGED["album"]
    tags["WM/AlbumArtist"] = TAGGED["album_artist"]
    tags["WM/Genre"] = TAGGED["genre"]
    tags["WM/Year"] = TAGGED["date"]
    tags["WM/TrackNumber"] = TAGGED["track"]
    tags["Mood"] = "calm"
    tags["WM/Picture"] = bytes(1000)
    tags.save()


@pytest.mark.parametrize(
    ("name", "tag", "container", "codec"),
    [
        ("wav16.wav", tag_id3, "wav", "pcm"),
        ("a.aiff", tag_id3, "aiff", "pcm"),
        ("a.mp3", tag_id3, "mp3", "mp3"),
        ("a.flac", tag_vorbis, "flac", "flac"),
        ("a.ogg", tag_vorbis, "ogg", "vorbis"),
        ("a.opus", tag_vorbis, "ogg", "opus"),
        ("a.m4a", tag_mp4, "mp4", "aac"),
        ("alac.m4a", tag_mp4, "mp4", "alac"),
        ("a.wma", tag_asf, "asf", "wma"),
    ],
)
def test_tags_of_every_kind(
    tmp_path: Path, name: str, tag: Callable[[Path], None], container: str, codec: str
) -> None:
    path = encode_format(tmp_path, name)
    tag(path)
    row = extract(path)

    assert {name: row[name] for name in TAGGED} == TAGGED
    assert (row["container"], row["codec"]) == (container, codec)
    assert row["duration_s"] == pytest.approx(SECONDS, abs=0.1)
    assert row["sample_rate"] == (48000 if codec == "opus" else 44100)
    assert row["channels"] == 2
    assert row["bit_rate"] > 50_000
    assert row["file_size"] == path.stat().st_size
    others = json.loads(row["tags"])
    assert "calm" in others.values()
    assert len(row["tags"]) < 1000


@pytest.mark.parametrize("name", ["wav16.wav", "a.mp3", "a.flac", "a.m4a", "a.aiff"])
def test_both_libraries_read_the_same(tmp_path: Path, name: str) -> None:
    path = encode_format(tmp_path, name)
    if name != "a.aiff":
        {"a.flac": tag_vorbis, "a.m4a": tag_mp4}.get(name, tag_id3)(path)
    primary, alternative = extract(path), extract_alternative(path)

    # FFmpeg joins several values in ways of its own, or keeps one of them.
    same = ["title", "album", "album_artist", "date", "sample_rate", "channels"]
    same += ["codec", "container", "file_size", "mtime"]
    if name != "wav16.wav":
        same += ["genre", "track"]
    assert {key: alternative[key] for key in same} == {key: primary[key] for key in same}
    assert alternative["duration_s"] == pytest.approx(primary["duration_s"], abs=0.1)
    if name != "a.flac":  # whose picture FFmpeg counts in
        assert alternative["bit_rate"] == pytest.approx(primary["bit_rate"], rel=0.2)


def test_a_file_without_tags(tmp_path: Path) -> None:
    row = extract(encode_format(tmp_path, "wav32.wav"))

    assert all(row[name] is None for name in TAGGED)
    assert row["tags"] == "{}"
    assert row["bit_rate"] == 2 * 32 * 44100


def test_tags_that_lie_are_harmless(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.mp3")
    tags = ID3(path)
    tags.add(TIT2(encoding=0, text="nul\0 and \x80\x9f"))
    tags.add(TXXX(desc="huge\0name", text="x" * 1_000_000))
    tags.add(TPE1(encoding=3, text="\ud800 half a character".encode("utf-8", "replace").decode()))
    tags.add(TRCK(text=""))
    tags.save(path)
    content = path.read_bytes().replace(b"half a", b"\xff\xfe\xfd a \xc3")
    path.write_bytes(content)

    for read in (extract, extract_alternative):
        row = read(path)
        texts = [text for text in row.values() if isinstance(text, str)]
        assert all("\0" not in text for text in texts)
        assert all(text.encode("utf-8") for text in texts)
        assert row["track"] is None
        assert len(row["tags"]) < 10_000
        assert isinstance(json.loads(row["tags"]), dict)


def test_modification_time_is_utc(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.flac")
    moment = datetime(2020, 6, 1, 12, 30, tzinfo=UTC)
    os.utime(path, (0, moment.timestamp()))

    assert extract(path)["mtime"] == datetime(2020, 6, 1, 12, 30)


def test_the_content_tells_the_format(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.flac").rename(tmp_path / "a.mp3")

    assert extract(path)["container"] == "flac"


def test_what_mutagen_does_not_know_is_left_to_the_alternative(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.mka")

    with pytest.raises(UnsupportedFormatError, match="mutagen does not know"):
        extract(path)
    row = extract_alternative(path)
    assert (row["container"], row["codec"]) == ("matroska", "aac")
    assert row["duration_s"] == pytest.approx(SECONDS, abs=0.1)


def test_what_is_no_audio(tmp_path: Path) -> None:
    text, cover, noise = (tmp_path / name for name in ("a.mp3", "b.jpg", "c.mp3"))
    text.write_text("nothing to hear " * 100)
    picture(cover)
    noise.write_bytes(np.random.default_rng(3).bytes(10_000))

    for path in (text, cover, noise):
        with pytest.raises(AudioFileError):
            extract(path)
        with pytest.raises(UnsupportedFormatError):
            extract_alternative(path)
    with pytest.raises(FileNotFoundError):
        extract(tmp_path / "missing.mp3")
