"""What other programs get: playlists, JAMS and Parquet, of hostile names and incomplete tracks."""

import random
from pathlib import Path
from urllib.parse import unquote_to_bytes

import jams
import pytest
from pyarrow import parquet

from audio_assets.features import FEATURE_SETS
from audio_assets.library.file_keys import encode_key
from audio_assets.library.scan import Library
from audio_assets.warehouse.exports import write_jams, write_parquet, write_playlist
from audio_assets.warehouse.queries import QueryError
from tests.warehouse.rows import file, landing_of, made_up, publisher_of

NAMES = [
    b"plain #1 100%.mp3",
    b"#EXTM3U.mp3",
    "caf\u00e9\u3000\u97f3.flac".encode(),
    b"two\r\nlines.mp3",
    b"next\xe2\x80\xa8line.mp3",
    b"latin-1 \xe9.mp3",
    b"ends in a space ",
    "\u200b".encode() * 80 + b".mp3",
]
"""The last is too long for a file's name, once its invisible characters are escaped."""

KEYS = [encode_key("music", name) for name in NAMES]
GONE, UNREADABLE, UNTITLED = "music/gone.mp3", "music/unreadable.mp3", "music/untitled.mp3"
TRACKS = "FROM features.tracks ORDER BY file_key DESC"


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warehouse")
    landing = landing_of(root, list(FEATURE_SETS.values()))
    landing.append(
        "library/files",
        [file(key, gone=key == GONE) for key in (*KEYS, GONE, UNREADABLE, UNTITLED)],
    )
    untitled = {"title": None, "artist": None}
    for name in ("metadata", "rhythm", "key", "musicnn"):
        rows = [made_up(FEATURE_SETS[name], key, random.Random(1)) for key in (*KEYS, GONE)]
        own = {
            "metadata": {"duration_s": 200.0, "title": "Line 1\n#Line 2", "artist": "Ann"},
            "rhythm": {"bpm": 120.0, "beats": [0.5, 1.0], "beat_confidence": 4.0},
            "key": {"key": "Eb", "scale": "minor", "strength": 0.5},
            "musicnn": {"msd_tags": {"rock": 0.5}, "mtt_tags": {"no vocals": 0.25}},
        }[name]
        rows = [row | own for row in rows]
        if name == "metadata":
            rows += [
                rows[0] | {"file_key": key, "content_hash": f"hash of {key}"} | untitled
                for key in (UNREADABLE, UNTITLED)
            ]
        landing.append(f"features/{name}", rows)
    landing.append("features/mfcc", [made_up(FEATURE_SETS["mfcc"], UNTITLED, random.Random(1))])
    publisher_of(root, list(FEATURE_SETS.values())).publish()
    return root / "warehouse.duckdb"


def test_a_playlist_leads_to_each_file_whatever_its_name(warehouse: Path, tmp_path: Path) -> None:
    playlist = tmp_path / "all.m3u8"
    path_of = Library({"music": Path("/music")}).path_of
    assert write_playlist(warehouse, TRACKS, playlist, path_of) == (len(KEYS) + 1, 1)
    first, *lines = playlist.read_text("utf-8").splitlines()
    assert first == "#EXTM3U"
    assert set(lines[::2]) == {"#EXTINF:200,Ann - Line 1 #Line 2", "#EXTINF:200,untitled.mp3"}
    read = [
        unquote_to_bytes(line.removeprefix("file://")) if "://" in line else line.encode()
        for line in lines[1::2]
    ]
    named = dict(zip(KEYS, NAMES, strict=True)) | {UNTITLED: b"untitled.mp3"}
    assert read == [b"/music/" + named[key] for key in sorted(named, reverse=True)]
    assert sum("://" in line for line in lines) == 4
    assert write_playlist(warehouse, f"SELECT '{GONE}' AS file_key", playlist, path_of) == (0, 1)


def test_jams_are_valid(warehouse: Path, tmp_path: Path) -> None:
    assert write_jams(warehouse, TRACKS, tmp_path / "jams") == (len(KEYS) + 1, 1)
    found = {path: jams.load(str(path)) for path in (tmp_path / "jams").rglob("*.jams")}
    by_key = {track.file_metadata.identifiers["file_key"]: track for track in found.values()}
    assert set(by_key) == {*KEYS, UNTITLED}
    assert tmp_path / "jams" / f"{KEYS[0]}.jams" in found
    track = by_key[KEYS[0]]
    assert (track.file_metadata.artist, track.file_metadata.duration) == ("Ann", 200.0)
    assert [
        (annotation.namespace, [(o.time, o.duration, o.value, o.confidence) for o in annotation])
        for annotation in track.annotations
    ] == [
        ("tempo", [(0.0, 200.0, 120.0, 1.0)]),
        ("beat", [(0.5, 0.0, None, None), (1.0, 0.0, None, None)]),
        ("key_mode", [(0.0, 200.0, "Eb:minor", 0.5)]),
        ("tag_open", [(0.0, 200.0, "rock", 0.5)]),
        ("tag_open", [(0.0, 200.0, "no vocals", 0.25)]),
    ]
    assert not by_key[UNTITLED].annotations


def test_parquet_has_the_columns_types(warehouse: Path, tmp_path: Path) -> None:
    output = tmp_path / "tracks.parquet"
    sql = "SELECT file_key, beats, msd_tags, row_id, rhythm.computed_at FROM features.rhythm "
    sql += "JOIN features.musicnn USING (file_key) ORDER BY file_key"
    assert write_parquet(warehouse, sql.replace("row_id", "rhythm.row_id"), output) == len(KEYS) + 1
    [row, *_] = parquet.read_table(output).to_pylist(maps_as_pydicts="strict")
    assert row["beats"] == [0.5, 1.0]
    assert row["msd_tags"] == {"rock": 0.5}
    assert row["computed_at"].tzinfo


def test_an_export_that_fails_leaves_what_was_there(warehouse: Path, tmp_path: Path) -> None:
    output = tmp_path / "there.parquet"
    output.write_text("before")
    late = "SELECT if(n = 900000, error('late'), n) AS n FROM range(1000000) AS t(n)"
    for sql in (late, "-- nothing", "SELECT INTERVAL 1 DAY AS x", f"COPY (SELECT 1) TO '{output}'"):
        with pytest.raises(QueryError):
            write_parquet(warehouse, sql, output)
    with pytest.raises(QueryError, match="column file_key"):
        write_jams(warehouse, "SELECT 1 AS n", tmp_path / "jams")
    assert output.read_text() == "before"
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(OSError, match="not a file"):
        write_parquet(warehouse, TRACKS, tmp_path)
