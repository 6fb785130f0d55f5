"""What the library page knows, from a generated database."""

import csv
from pathlib import Path

import duckdb
import numpy as np
import pytest
from pyarrow import parquet

from audio_assets import settings
from audio_assets.features import FEATURE_SETS
from audio_assets.pages import charts, similar
from audio_assets.pages.details import details
from audio_assets.pages.saving import saved
from audio_assets.pages.tracks import PLACE, TEXT_LENGTH, Tracks, present_tracks
from audio_assets.warehouse.queries import QueryError
from tests.pages.generated import HOSTILE, generate
from tests.warehouse.rows import attempt, file, landing_of, publisher_of

COUNT = charts.MOST_SYMBOLS + 500


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("warehouse"), COUNT)


@pytest.fixture(scope="module")
def tracks(warehouse: Path) -> Tracks:
    return present_tracks(warehouse)


def key(number: int) -> str:
    return f"music/artist {number // 100}/{number // 10 % 10} album/{number % 10:02}.mp3"


def test_texts_are_short_and_printable(tracks: Tracks, warehouse: Path) -> None:
    title = tracks.frame["title"].iloc[tracks.row_of[key(0)]]
    assert len(title) == TEXT_LENGTH
    assert title.startswith(r"<img src=x onerror=alert(1)>\x1b[31m\u202elong")
    assert HOSTILE.startswith(title[:20])
    known = details(warehouse, key(0))
    assert known
    assert title in known.values["value"].tolist()
    assert dict(known.tags.to_numpy()) == {"mood": "calm"}


def test_each_version_is_read_once(tracks: Tracks, warehouse: Path, tmp_path: Path) -> None:
    assert present_tracks(warehouse) is tracks
    root = tmp_path / "another"
    path = root / "warehouse.duckdb"
    publisher_of(root).publish()
    first = present_tracks(path)
    landing_of(root).append("library/files", [file("a")])
    publisher_of(root).publish()
    assert (len(first.frame), len(present_tracks(path).frame)) == (0, 1)


def test_what_is_not_known_is_said_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="There is no database"):
        present_tracks(tmp_path / "absent.duckdb")
    (tmp_path / "damaged.duckdb").write_bytes(b"no database" * 1000)
    with pytest.raises(QueryError, match="cannot be read"):
        present_tracks(tmp_path / "damaged.duckdb")

    # Published without MusiCNN, and by a version with another view.
    sets = [s for name, s in FEATURE_SETS.items() if name not in ("musicnn", "mfcc")]
    landing_of(tmp_path, sets).append("library/files", [file("music/a"), file("music/b")])
    publisher_of(tmp_path, sets).publish()
    path = tmp_path / "warehouse.duckdb"
    tracks = present_tracks(path)
    assert (len(tracks.heard), "top_tag" in tracks.frame) == (0, False)
    assert tracks.frame[list(PLACE)].isna().all(axis=None)
    assert tracks.frame["missing"].tolist() == ["never attempted"] * 2
    with pytest.raises(KeyError):
        similar.neighbours(tracks, "music/a")
    assert similar.duplicates(tracks).empty
    known = details(path, "music/a")
    assert known
    assert (known.beats, set(known.missing["reason"])) == ([], {"never attempted"})
    assert details(path, "music/c") is None
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP VIEW features.tracks")
        connection.execute("UPDATE publishing.version SET version = version + 1")
    with pytest.raises(QueryError, match="another version"):
        present_tracks(path)


def test_attempts_are_shown_latest_first(tmp_path: Path) -> None:
    sets = list(FEATURE_SETS.values())
    landing = landing_of(tmp_path, sets)
    landing.append("library/files", [file("a")])
    landing.append("robustness/attempts", [attempt("a", outcome="failed"), attempt("b")])
    landing.append("robustness/attempts", [attempt("a", at=9, attempt=2, message="<b>" * 1000)])
    publisher_of(tmp_path, sets).publish()
    known = details(tmp_path / "warehouse.duckdb", "a")
    assert known
    assert known.attempts["attempt"].tolist() == [2, 1]
    assert known.attempts["message"].map(len).tolist() == [TEXT_LENGTH, len("took too long")]


def test_filters(tracks: Tracks) -> None:
    one = tracks.matching("TRACK 77", {"title": ["track 77"]})
    assert one["file_key"].tolist() == [key(77)]
    assert tracks.matching("%").empty
    found = tracks.matching("artist 1/", {"bpm": (100, 110), "top_tag": ["jazz", "rock"]})
    assert len(found)
    assert found["bpm"].between(100, 110).all()
    assert set(found["top_tag"]) == {"jazz", "rock"}
    assert set(found["folder"]) == {"music/artist 1"}
    assert len(tracks.matching("", {"genre": []})) == COUNT


def test_neighbours_are_the_nearest_of_other_contents(tracks: Tracks) -> None:
    near = similar.neighbours(tracks, key(1), 50)
    assert near["file_key"].iloc[0] == key(3)
    assert key(2) not in near["file_key"].tolist()
    one = tracks.embeddings[np.searchsorted(tracks.heard, tracks.row_of[key(1)])]
    distances = np.sort(1 - tracks.embeddings @ one)[2:52]
    assert np.allclose(near["distance"], distances, atol=1e-6)


def test_a_path_has_small_steps(tracks: Tracks) -> None:
    by_tag = tracks.frame.dropna(subset=["top_tag"]).groupby("top_tag")["file_key"].first()
    way = similar.path(tracks, by_tag["jazz"], by_tag["metal"])
    assert way["file_key"].iloc[[0, -1]].tolist() == [by_tag["jazz"], by_tag["metal"]]
    assert way["file_key"].is_unique
    ends = tracks.embeddings[
        np.searchsorted(tracks.heard, [tracks.row_of[k] for k in by_tag[["jazz", "metal"]]])
    ]
    assert len(way) > 2
    assert way["step"].max() < 1 - ends[0] @ ends[1]
    back = similar.path(tracks, by_tag["metal"], by_tag["jazz"])
    assert np.isclose(back["step"].sum(), way["step"].sum())
    assert similar.path(tracks, key(1), key(1))["step"].tolist() == [0.0]
    assert similar.path(tracks, key(1), key(2))["file_key"].tolist() == [key(1), key(2)]


def test_a_path_joins_what_is_far_apart(tmp_path: Path) -> None:
    path = generate(tmp_path, 100)
    with duckdb.connect(str(path)) as connection:
        for number, (low, high) in enumerate([(0, 50), (50, 100)]):
            ends = [0.0] * 100
            parts = (ends, "embedding[:100]") if number else ("embedding[:100]", ends)
            connection.execute(
                f"UPDATE features.musicnn SET embedding = "
                f"list_concat({parts[0]}, {parts[1]})::FLOAT[200] "
                f"WHERE file_key BETWEEN '{key(low)}' AND '{key(high - 1)}'"
            )
    way = similar.path(present_tracks(path), key(10), key(80))
    assert way["file_key"].iloc[[0, -1]].tolist() == [key(10), key(80)]
    assert (way["step"] > 0.9).sum() == 1


def test_duplicates_are_grouped(tracks: Tracks) -> None:
    found = similar.duplicates(tracks)[["file_key", "group", "why"]]
    assert [tuple(row) for row in found.to_numpy()] == [
        (key(1), 1, "same content"),
        (key(2), 1, "same content"),
        (key(3), 1, "sounds the same"),
    ]


@pytest.mark.parametrize("colour", ["top_tag", "bpm", "title", "year"])
def test_many_tracks_are_drawn_as_a_grid(tracks: Tracks, colour: str) -> None:
    grid = charts.scatter(tracks.frame, *PLACE, colour)
    assert grid.to_dict()["mark"]["type"] == "rect"
    assert len(grid.data) < charts.MOST_SYMBOLS
    assert grid.data["tracks"].sum() == len(tracks.heard)
    few = charts.scatter(tracks.frame.head(100), "bpm", "year", colour)
    assert few.to_dict()["mark"]["type"] == "circle"
    assert len(few.data) == 100


def test_a_cell_of_the_grid_has_the_most_frequent_text(tracks: Tracks) -> None:
    frame = tracks.frame.assign(map_x=0.0, map_y=0.0)
    [(count, tag)] = charts.scatter(frame, *PLACE, "top_tag").data[["tracks", "top_tag"]].to_numpy()
    assert (count, tag) == (COUNT, frame["top_tag"].value_counts().index[0])


def test_what_is_marked(tracks: Tracks) -> None:
    area = {"marked": {"x": [110, 100], "y": [1980, 1990]}}
    found = charts.marked(tracks.frame, "bpm", "year", area)
    assert len(found)
    assert found["bpm"].between(100, 110).all()
    assert found["year"].between(1980, 1990).all()
    assert charts.marked(tracks.frame, "bpm", "year", {"marked": {}}) is tracks.frame


def test_charts_of_little() -> None:
    assert charts.tempo([1.0, 1.5, 1.5, 2.0]).data["tempo"].tolist()[::2] == [120, 120]
    assert len(charts.tempo(np.arange(100_000.0).tolist()).data) <= charts.MOST_SYMBOLS


def test_histograms_count_all(tracks: Tracks) -> None:
    for column in ("bpm", "top_tag", "year"):
        counted = charts.histogram(tracks.frame, column).data["tracks"].sum()
        assert counted == tracks.frame[column].notna().sum()
    assert charts.histogram(tracks.frame, "genre").data.empty
    charts.histogram(tracks.frame.head(0), "bpm").to_dict()
    charts.scatter(tracks.frame.head(0), *PLACE, "top_tag").to_dict()


def test_a_selection_is_saved_in_its_order(
    warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIO_LIBRARY", f"music={tmp_path}")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    settings.get_settings.cache_clear()
    chosen = [key(5), key(2), "music/gone.mp3", key(3)]
    try:
        lines = saved(warehouse, chosen, "m3u8").decode().splitlines()
        rows = list(csv.reader(saved(warehouse, chosen, "csv").decode().splitlines()))
        (tmp_path / "tracks.parquet").write_bytes(saved(warehouse, chosen, "parquet"))
    finally:
        monkeypatch.undo()
        settings.get_settings.cache_clear()
    expected = [key(5), key(2), key(3)]
    assert [row[0] for row in rows] == ["file_key", *expected]
    assert parquet.read_table(tmp_path / "tracks.parquet")["file_key"].to_pylist() == expected
    assert lines[2::2] == [str(tmp_path / k.removeprefix("music/")) for k in expected]
