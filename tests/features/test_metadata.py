import base64
import errno
import io
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import mutagen
import numpy as np
import pytest
from mutagen.apev2 import APEv2
from mutagen.flac import FLAC, Picture
from mutagen.id3 import (
    APIC,
    COMM,
    ID3,
    RVA2,
    SYLT,
    TALB,
    TBPM,
    TCOM,
    TCON,
    TDRC,
    TIPL,
    TIT2,
    TKEY,
    TMCL,
    TPE1,
    TPE2,
    TPOS,
    TPUB,
    TRCK,
    TSRC,
    TSSE,
    TXXX,
    UFID,
    USLT,
    WOAR,
    WXXX,
)
from mutagen.mp4 import MP4, MP4Cover, MP4FreeForm

from audio_assets.audio.decode import DecoderName, decode
from audio_assets.audio.errors import AudioFileError, CorruptFileError, UnsupportedFormatError
from audio_assets.audio.pcm import Audio, SourceInfo
from audio_assets.features.base import Row, check_row
from audio_assets.features.metadata import FEATURE_SET
from robustness.error_classifier import ErrorInfo, get_error_classifier
from tests.audio.damage import encode
from tests.audio.test_decode import FORMATS, SECONDS, encode_format, picture, tone

TAGGED = {
    "title": "Blåbærsyltetøy 🍇",
    "artist": "One",
    "artists": ["One", "Two"],
    "album": "The Album",
    "album_artist": "Various",
    "genre": "Jazz",
    "date": "1999-12-31",
    "track": "3/12",
    "disc": "1/2",
    "composer": "Three",
    "composers": ["Three", "Four"],
    "isrc": "USRC17607839",
    "musicbrainz_recording_id": "8b882575-08a5-4452-a7a7-cbb8a1531f9e",
    "musicbrainz_release_id": "9e873859-8aa4-4790-b985-5a953e8ef628",
    "musicbrainz_artist_id": "7cf0ea9d-86b9-4dad-ba9e-2355a64899ea",
    "replaygain_track_gain_db": -7.25,
    "publisher": "Label",
    "tagged_bpm": 128.0,
    "tagged_key": "F#m",
    "encoder": "LAME 3.100",
}
GAIN = "-7.25 dB"
TAGS = [column.name for column in FEATURE_SET.columns if column.name in TAGGED]


def decoding(path: Path, decoder: DecoderName = "av") -> SourceInfo | ErrorInfo:
    try:
        return decode(path, path.with_name(f"{path.name}.npy"), decoder=decoder)
    except AudioFileError as error:
        return get_error_classifier().classify(error)


def extract(path: Path, decoder: DecoderName = "av") -> Row:
    row = FEATURE_SET.extract(Audio.without_pcm(path, None, decoding(path, decoder)))
    check_row(FEATURE_SET, row, None)
    return row


def extract_alternative(path: Path) -> Row:
    row = FEATURE_SET.extract_alternative(Audio.without_pcm(path, None, decoding(path)))
    check_row(FEATURE_SET, row, None)
    return row


def others(row: Row) -> dict[str, str | list[str]]:
    return json.loads(row["tags"])  # type: ignore[no-any-return]


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
        TPOS(text=TAGGED["disc"]),
        TCOM(text=["Three", "Four"]),
        TSRC(text=TAGGED["isrc"]),
        UFID(owner="http://musicbrainz.org", data=str(TAGGED["musicbrainz_recording_id"]).encode()),
        TXXX(desc="MusicBrainz Album Id", text=TAGGED["musicbrainz_release_id"]),
        TXXX(desc="MusicBrainz Artist Id", text=TAGGED["musicbrainz_artist_id"]),
        TXXX(desc="REPLAYGAIN_TRACK_GAIN", text=GAIN),
        TPUB(text=TAGGED["publisher"]),
        TBPM(text="128"),
        TKEY(text=TAGGED["tagged_key"]),
        TSSE(text=TAGGED["encoder"]),
        TXXX(desc="MOOD", text=["calm", "mild"]),
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
            "discnumber": TAGGED["disc"],
            "composer": ["Three", "Four"],
            "isrc": TAGGED["isrc"],
            "musicbrainz_trackid": TAGGED["musicbrainz_recording_id"],
            "musicbrainz_albumid": TAGGED["musicbrainz_release_id"],
            "musicbrainz_artistid": TAGGED["musicbrainz_artist_id"],
            "replaygain_track_gain": GAIN,
            "label": TAGGED["publisher"],
            "bpm": "128",
            "key": TAGGED["tagged_key"],
            "encoder": TAGGED["encoder"],
            "mood": ["calm", "mild"],
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
    tags["disk"] = [(1, 2)]
    tags["©wrt"] = ["Three", "Four"]
    tags["©too"] = TAGGED["encoder"]
    for name, texts in {
        "ISRC": [TAGGED["isrc"]],
        "MusicBrainz Track Id": [TAGGED["musicbrainz_recording_id"]],
        "MusicBrainz Album Id": [TAGGED["musicbrainz_release_id"]],
        "MusicBrainz Artist Id": [TAGGED["musicbrainz_artist_id"]],
        "replaygain_track_gain": [GAIN],
        "LABEL": [TAGGED["publisher"]],
        "initialkey": [TAGGED["tagged_key"]],
        "MOOD": ["calm", "mild"],
    }.items():
        tags[f"----:com.apple.iTunes:{name}"] = [MP4FreeForm(str(t).encode()) for t in texts]
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
    tags["WM/PartOfSet"] = TAGGED["disc"]
    tags["WM/Composer"] = ["Three", "Four"]
    tags["WM/ISRC"] = TAGGED["isrc"]
    tags["MusicBrainz/Track Id"] = TAGGED["musicbrainz_recording_id"]
    tags["MusicBrainz/Album Id"] = TAGGED["musicbrainz_release_id"]
    tags["MusicBrainz/Artist Id"] = TAGGED["musicbrainz_artist_id"]
    tags["replaygain_track_gain"] = GAIN
    tags["WM/Publisher"] = TAGGED["publisher"]
    tags["WM/BeatsPerMinute"] = "128"
    tags["WM/InitialKey"] = TAGGED["tagged_key"]
    tags["WM/EncodingSettings"] = TAGGED["encoder"]
    tags["Mood"] = ["calm", "mild"]
    tags["WM/Picture"] = bytes(1000)
    tags.save()


def tag_ape(path: Path) -> None:
    names = {
        "artist": "Artist",
        "date": "Year",
        "disc": "Disc",
        "album_artist": "Album Artist",
        "musicbrainz_recording_id": "MUSICBRAINZ_TRACKID",
        "musicbrainz_release_id": "MUSICBRAINZ_ALBUMID",
        "musicbrainz_artist_id": "MUSICBRAINZ_ARTISTID",
        "replaygain_track_gain_db": "REPLAYGAIN_TRACK_GAIN",
        "publisher": "Label",
        "tagged_bpm": "BPM",
        "tagged_key": "KEY",
    }
    tags = APEv2()
    for column, value in TAGGED.items():
        if not column.endswith("s"):
            all_values = TAGGED.get(f"{column}s", [str(value)])
            tags[names.get(column, column.title())] = all_values
    tags["REPLAYGAIN_TRACK_GAIN"] = GAIN
    tags["Mood"] = ["calm", "mild"]
    tags["Cover Art (Front)"] = bytes(1000)
    ID3().delete(path)  # the encoder's
    tags.save(path)


@pytest.mark.parametrize(
    ("name", "tag", "container", "codec"),
    [
        ("wav16.wav", tag_id3, "wav", "pcm_s16le"),
        ("a.aiff", tag_id3, "aiff", "pcm_s16be"),
        ("a.mp3", tag_id3, "mp3", "mp3"),
        ("a.mp3", tag_ape, "mp3", "mp3"),
        ("a.flac", tag_vorbis, "flac", "flac"),
        ("a.ogg", tag_vorbis, "ogg", "vorbis"),
        ("a.opus", tag_vorbis, "ogg", "opus"),
        ("a.m4a", tag_mp4, "mp4", "aac"),
        ("alac.m4a", tag_mp4, "mp4", "alac"),
        ("a.wma", tag_asf, "asf", "wmav2"),
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
    assert row["bit_rate"] > 20_000
    assert row["file_size"] == path.stat().st_size
    assert ["calm", "mild"] in others(row).values()
    assert len(row["tags"]) < 1000


@pytest.mark.parametrize("name", ["wav16.wav", "a.mp3", "a.flac", "a.m4a", "a.aiff"])
def test_both_libraries_read_the_same(tmp_path: Path, name: str) -> None:
    path = encode_format(tmp_path, name)
    if name != "a.aiff":
        {"a.flac": tag_vorbis, "a.m4a": tag_mp4}.get(name, tag_id3)(path)
    primary, alternative = extract(path), extract_alternative(path)

    # FFmpeg joins several values in ways of its own, or keeps one of them.
    same = ["title", "album", "album_artist", "date", "duration_s", "sample_rate", "channels"]
    same += ["bit_rate", "codec", "container", "file_size", "mtime"]
    if name != "wav16.wav":
        same += ["genre", "track"]
    assert {key: alternative[key] for key in same} == {key: primary[key] for key in same}


def test_a_file_without_tags(tmp_path: Path) -> None:
    row = extract(encode_format(tmp_path, "wav32.wav"))

    assert all(row[name] is None for name in TAGGED if name != "encoder")
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


CANONICAL = {
    "libmp3lame": "mp3",
    "libopus": "opus",
}
"""Codecs whose encoder has another name."""


@pytest.mark.parametrize("name", FORMATS)
def test_properties_are_those_of_the_decoded_stream(tmp_path: Path, name: str) -> None:
    path = encode_format(tmp_path, name)
    codec, _ = FORMATS[name]
    expected = (CANONICAL.get(codec, codec), 48000 if codec == "libopus" else 44100, 2)
    row = extract(path)

    assert (row["codec"], row["sample_rate"], row["channels"]) == expected
    assert row["duration_s"] == pytest.approx(SECONDS, abs=0.06)
    if codec.startswith("pcm"):
        assert row["bit_rate"] == 2 * 44100 * int("".join(filter(str.isdigit, codec)))
    assert 20_000 < row["bit_rate"] < 8 * path.stat().st_size / row["duration_s"]


@pytest.mark.parametrize("name", ["wav8.wav", "wav16.wav", "float.wav", "a.aiff", "a.flac"])
def test_libsndfile_names_codecs_as_ffmpeg_does(tmp_path: Path, name: str) -> None:
    path = encode_format(tmp_path, name)
    by_av, by_soundfile = extract(path), extract(path, "soundfile")

    same = ("codec", "container", "sample_rate", "channels", "duration_s")
    assert [by_soundfile[key] for key in same] == [by_av[key] for key in same]


def test_headers_that_state_another_length_do_not_win(tmp_path: Path) -> None:
    piped = encode_format(tmp_path, "wav16.wav")
    content = bytearray(piped.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = b"\xff" * 4
    piped.write_bytes(content)
    mp3_in_wav = encode(tmp_path / "mp3.wav", "libmp3lame", tone())

    row = extract(piped)
    assert row["duration_s"] == pytest.approx(SECONDS)
    assert row["bit_rate"] == 2 * 16 * 44100
    row = extract(mp3_in_wav)
    assert (row["codec"], row["container"]) == ("mp3", "wav")
    assert row["duration_s"] == pytest.approx(SECONDS, abs=0.1)
    assert row["bit_rate"] == pytest.approx(128_000, rel=0.05)


def test_pictures_do_not_count_as_audio(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.mp3")
    before = extract(path)["bit_rate"]
    tag_id3(path)

    assert extract(path)["bit_rate"] == before


@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.m4a", "wav16.wav"])
def test_a_file_that_cannot_be_decoded_has_its_tags_and_what_its_header_states(
    tmp_path: Path, name: str
) -> None:
    path = encode_format(tmp_path, name)
    {"a.flac": tag_vorbis, "a.m4a": tag_mp4}.get(name, tag_ape)(path)
    failed = get_error_classifier().classify(CorruptFileError("breaks off"))
    row = FEATURE_SET.extract(Audio.without_pcm(path, None, failed))

    whole = extract(path)
    same = [*TAGS, "codec", "container", "sample_rate", "channels", "tags"]
    assert [row[key] for key in same] == [whole[key] for key in same]
    assert row["duration_s"] == pytest.approx(SECONDS, abs=0.1)
    if name != "a.flac":  # whose picture FFmpeg counts in
        assert row["bit_rate"] == pytest.approx(whole["bit_rate"], rel=0.1)


def test_tags_alone_make_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    tags = ID3()
    tags.add(TIT2(text="Title"))
    tags.add(TXXX(desc="huge", text="x" * 10_000))
    tags.save(path)
    row = extract(path)

    assert (row["title"], row["duration_s"], row["codec"]) == ("Title", None, None)
    os.truncate(path, 5000)  # within the tag
    assert extract(path)["title"] == "Title"


def test_frames_that_are_no_plain_text(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.mp3")
    tags = ID3(path)
    tags.delall("TSSE")
    for frame in (
        TIPL(people=[["producer", "Ann"], ["mix", "Bob"]]),
        TMCL(people=[["guitar", "Cid"]]),
        WOAR(url="http://one.org"),
        WOAR(url="http://two.org"),
        WXXX(desc="shop", url="http://three.org"),
        USLT(lang="eng", desc="", text="words"),
        USLT(lang="deu", desc="", text="Worte"),
        SYLT(lang="eng", desc="", format=2, type=1, text=[("sung", 1000)]),
        COMM(lang="eng", desc="", text=["one comment", "another"]),
        RVA2(desc="track", channel=1, gain=-3.5, peak=0.9),
    ):
        tags.add(frame)
    tags.save(path)
    row = extract(path)

    assert row["replaygain_track_gain_db"] == -3.5
    found = others(row)
    assert found["tipl"] == ["producer: Ann", "mix: Bob"]
    assert found["tmcl"] == "guitar: Cid"
    assert found["woar"] == ["http://one.org", "http://two.org"]
    assert found["wxxx:shop"] == "http://three.org"
    assert (found["uslt::eng"], found["uslt::deu"]) == ("words", "Worte")
    assert "sung" in found["sylt::eng"]
    assert found["comm::eng"] == ["one comment", "another"]
    assert len(found) == 8  # FFmpeg's names of the same are left out


def test_lyrics_of_one_language_are_all_kept(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.mp3")
    tags = ID3(path)
    tags.add(USLT(encoding=0, lang="eng", desc="", text="first"))
    tags.add(USLT(encoding=0, lang="eng", desc="x", text="other"))
    tags.save(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"engx\0other", b"eng\0other\0"))

    assert others(extract(path))["uslt::eng"] == ["first", "other"]


def test_of_several_kinds_of_tags_the_first_wins_and_the_others_add(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.mp3")
    tags = ID3(path)
    tags.add(TIT2(text="By ID3"))
    tags.save(path, v1=2)
    ape = APEv2()
    ape.update({"Title": "By APEv2", "Artist": ["One", "Two"], "Mood": "calm"})
    ape.save(path)
    row = extract(path)

    assert (row["title"], row["artist"]) == ("By ID3", "One")
    assert others(row) == {"mood": "calm"}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_riff_info(tmp_path: Path, encoding: str) -> None:
    path = encode_format(tmp_path, "wav16.wav")
    chunks = b""
    for name, text in {"IART": "Café Ülm", "INAM": "Title", "ITRK": "3", "ISFT": "Tool"}.items():
        value = text.encode(encoding) + b"\0"
        value += b"\0" * (len(value) % 2)
        chunks += name.encode() + len(value).to_bytes(4, "little") + value
    info = b"LIST" + (len(chunks) + 4).to_bytes(4, "little") + b"INFO" + chunks
    content = path.read_bytes() + info
    path.write_bytes(content[:4] + (len(content) - 8).to_bytes(4, "little") + content[8:])
    row = extract(path)

    assert (row["artist"], row["title"]) == ("Café Ülm", "Title")


def test_a_second_reader_does_not_replace_what_the_first_read_well(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.mp3")
    tags = ID3(path)
    tags.add(TIT2(encoding=0, text="Größe"))
    tags.add(COMM(encoding=1, lang="eng", desc="", text="日本語"))
    tags.save(path, v2_version=3)
    row = extract(path)

    assert row["title"] == "Größe"
    assert others(row) == {"comm::eng": "日本語"}


@pytest.mark.parametrize(
    ("bpm", "gain", "expected"),
    [
        ("127,5", "+1.5 dB", (127.5, 1.5)),
        ("0", "nan dB", (None, None)),
        ("fast", "-7", (None, -7.0)),
        ("1e2", "12345 dB", (None, None)),
    ],
)
def test_numbers_as_tagged(
    tmp_path: Path, bpm: str, gain: str, expected: tuple[float | None, float | None]
) -> None:
    path = encode_format(tmp_path, "a.flac")
    tags = FLAC(path)
    tags["bpm"], tags["replaygain_track_gain"] = bpm, gain
    tags.save()
    row = extract(path)

    assert (row["tagged_bpm"], row["replaygain_track_gain_db"]) == expected
    for value, name, text in zip(
        expected, ("bpm", "replaygain_track_gain"), (bpm, gain), strict=True
    ):
        assert value is not None or others(row)[name] == text


def test_the_name_is_a_hint_and_no_more(tmp_path: Path) -> None:
    aac = encode(tmp_path / "a.aac", "aac", tone(), container="adts")
    tags = ID3()
    tags.add(TIT2(text="Title"))
    tags.save(tmp_path / "tag")
    aac.write_bytes((tmp_path / "tag").read_bytes() + aac.read_bytes())
    assert [extract(aac)[key] for key in ("title", "codec")] == ["Title", "aac"]

    path = encode_format(tmp_path, "a.mp3")
    tag_id3(path)
    for name in ("a.flac", "a.wav", "a.m4a", "a.ape", "\udcff.ogg"):
        path = path.rename(tmp_path / name)
        row = extract(path)
        assert {name: row[name] for name in TAGGED} == TAGGED
        assert row["container"] == "mp3"


def test_what_mutagen_does_not_know_is_read_by_ffmpeg(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.mka")

    row = extract(path)
    assert (row["container"], row["codec"]) == ("matroska", "aac")
    assert row["duration_s"] == pytest.approx(SECONDS, abs=0.1)


def test_an_error_of_the_storage_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

    path = encode_format(tmp_path, "a.mp3")
    monkeypatch.setattr(Audio, "open_file", lambda audio: io.BufferedReader(Failing(audio.path)))
    for read in (FEATURE_SET.extract, FEATURE_SET.extract_alternative):
        with pytest.raises(OSError, match="Input/output error") as raised:
            read(Audio.without_pcm(path))
        assert raised.value.errno == errno.EIO


def test_what_is_no_audio(tmp_path: Path) -> None:
    text, cover, noise = (tmp_path / name for name in ("a.mp3", "b.jpg", "c.mp3"))
    text.write_text("nothing to hear " * 100)
    picture(cover)
    noise.write_bytes(np.random.default_rng(3).bytes(10_000))

    for path in (text, cover, noise):
        for read in (extract, extract_alternative):
            with pytest.raises(UnsupportedFormatError, match=r"holds no audio|in no audio format"):
                read(path)
        with pytest.raises(UnsupportedFormatError):
            FEATURE_SET.extract(Audio.without_pcm(path))
    with pytest.raises(FileNotFoundError):
        FEATURE_SET.extract(Audio.without_pcm(tmp_path / "missing.mp3"))


def test_where_nothing_can_be_read_the_error_is_that_of_decoding(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(b"")
    failed = get_error_classifier().classify(CorruptFileError("the first cause"))

    with pytest.raises(CorruptFileError, match=r"^the first cause$"):
        FEATURE_SET.extract(Audio.without_pcm(path, None, failed))
