import json
import os
import random
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audio_assets.features.base import Column
from audio_assets.warehouse.landing import CorruptPartError, Landing
from tests.warehouse.rows import AWKWARD_KEYS, RHYTHM, feature_set, landing_of, mfcc, rhythm

TABLE = "features/rhythm"


def keys(landing: Landing) -> list[str]:
    found: list[str] = sorted(landing.read(TABLE, ["file_key"])["file_key"].to_pylist())
    return found


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    row = mfcc(AWKWARD_KEYS[0])
    landing.append("features/mfcc", [row, {"file_key": "only"}])
    rows = landing.read("features/mfcc").drop("row_id").to_pylist(maps_as_pydicts="strict")
    assert rows == [row, dict.fromkeys(row) | {"file_key": "only"}]
    assert landing.read(TABLE).num_rows == 0


def test_parts_sort_by_age_and_rows_have_identifiers_of_version_7(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    names = [landing.append(TABLE, [rhythm("a"), rhythm("b")]) for _ in range(20)]
    assert names == sorted(names) == landing.parts(TABLE)
    ids = landing.read(TABLE)["row_id"].to_pylist()
    assert len(set(ids)) == 40
    assert all(row.version == 7 and row.variant == uuid.RFC_4122 for row in ids)


def test_what_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    with pytest.raises(ValueError, match="no columns"):
        landing.append(TABLE, [rhythm("a"), {"bmp": 1.0}])
    with pytest.raises(pa.ArrowInvalid):
        landing.append("features/mfcc", [mfcc("a") | {"mean": [1.0]}])
    with pytest.raises(ValueError, match="no rows"):
        landing.append(TABLE, [])
    assert landing.parts(TABLE) == landing.parts("features/mfcc") == []


def test_parts_of_other_schemas_are_read_and_compacted(tmp_path: Path) -> None:
    wider = feature_set("rhythm", [*RHYTHM.columns, Column("swing", "DOUBLE", "Swing")])
    old, new = landing_of(tmp_path), landing_of(tmp_path, [wider])
    for number in range(10):
        old.append(TABLE, [rhythm(f"old {number}")])
        new.append(TABLE, [rhythm(f"new {number}") | {"swing": 0.5}])
    for _ in range(2):
        assert sorted(old.read(TABLE, ["file_key", "bpm"])["bpm"].to_pylist()) == [120.0] * 20
        swing = new.read(TABLE, ["swing"])["swing"]
        assert (swing.null_count, len(swing)) == (10, 20)
        new.compact(TABLE)
    assert len(new.parts(TABLE)) == 2


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landing = landing_of(tmp_path)
    landing.append(TABLE, [rhythm("a")])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            landing.append(TABLE, [rhythm("b")])
    assert keys(landing) == ["a"]
    assert len(list((tmp_path / "landing/features/rhythm").iterdir())) == 1


@pytest.mark.parametrize("damage", ["empty", "half", "flipped"])
def test_damaged_parts_are_named(tmp_path: Path, damage: str) -> None:
    landing = landing_of(tmp_path)
    name = landing.append(
        TABLE, [rhythm(f"file {i}", random.Random(i).random()) for i in range(50)]
    )
    path = tmp_path / "landing/features/rhythm" / name
    contents = bytearray(path.read_bytes())
    match damage:
        case "empty":
            contents.clear()
        case "half":
            del contents[len(contents) // 2 :]
        case "flipped":
            column = pq.ParquetFile(path).metadata.row_group(0).column(1)
            contents[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(contents)
    with pytest.raises(CorruptPartError, match=name):
        landing.read(TABLE)


def test_latest_is_what_is_in_force(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    landing.append(TABLE, [rhythm("a", 1, at=1), rhythm("b", 1, at=9)])
    landing.append(TABLE, [rhythm("a", 2, at=2) | {"content_hash": "new"}, rhythm("b", 2, at=8)])
    landing.append(TABLE, [rhythm("c", 1), rhythm("c", 2)])
    rows = landing.latest(TABLE)
    assert {row["file_key"]: row["bpm"] for row in rows} == {"a": 2.0, "b": 1.0, "c": 2.0}
    assert all(set(row) == set(rhythm("a")) for row in rows)
    # A row that has been replaced is not in force for what it once was.
    hashes = ["hash of a", "hash of b", "it's nothing"]
    assert landing.latest(TABLE, ["bpm"], where=("content_hash", hashes)) == [{"bpm": 1.0}]
    assert landing.latest(TABLE, where=("content_hash", [])) == []
    assert landing.latest("features/mfcc") == []


# Compaction


def test_compaction_bounds_the_number_of_parts(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    for number in range(200):
        landing.append(TABLE, [rhythm(f"file {number:03}")])
        if number % 10 == 9:
            landing.compact(TABLE)
    assert len(landing.parts(TABLE)) <= 24
    assert keys(landing) == [f"file {number:03}" for number in range(200)]
    names = {path.name for path in (tmp_path / "landing/features/rhythm").glob("*.parquet")}
    assert names == set(landing.parts(TABLE))


def test_only_the_parts_allowed_are_merged(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    names = [landing.append(TABLE, [rhythm(f"file {number}")]) for number in range(20)]
    [merged] = landing.compact(TABLE, only=names[:10])
    assert landing.supersedes(TABLE, merged) == set(names[:10])
    assert landing.parts(TABLE) == sorted([*names[10:], merged])


class Crash(BaseException):
    pass


@pytest.mark.parametrize("deletions", range(9))
def test_a_crash_between_writing_and_deleting_shows_no_row_twice_or_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    landing = landing_of(tmp_path)
    expected = [f"file {number}" for number in range(8)]
    for key in expected:
        landing.append(TABLE, [rhythm(key)])
    left = iter(range(deletions))

    def rm_file(path: str) -> None:
        if next(left, None) is None:
            raise Crash
        Path(path).unlink()

    with monkeypatch.context() as patched:
        patched.setattr(landing._fs, "rm_file", rm_file)
        if deletions < 8:
            with pytest.raises(Crash):
                landing.compact(TABLE)
        else:
            landing.compact(TABLE)
    assert len(landing.parts(TABLE)) == 1
    assert keys(landing) == expected
    # What was left behind never comes back, whatever is merged on top.
    for number in range(60):
        landing.append(TABLE, [rhythm(f"more {number:02}")])
        landing.compact(TABLE)
    assert keys(landing) == expected + [f"more {number:02}" for number in range(60)]


def test_a_listing_in_the_middle_of_a_compaction_misses_nothing(tmp_path: Path) -> None:
    """A folder read slowly shows neither the merged part nor those deleted meanwhile."""
    landing, other = landing_of(tmp_path), landing_of(tmp_path)
    names = [landing.append(TABLE, [rhythm(f"file {number}")]) for number in range(8)]
    original = landing._list
    calls = iter([True])

    def torn(table: str) -> set[str]:
        listed = original(table)
        if next(calls, False):
            other.compact(TABLE)
            return listed & set(names[:4])
        return listed

    landing._list = torn  # type: ignore[method-assign]
    assert keys(landing) == [f"file {number}" for number in range(8)]


def test_a_part_deleted_after_the_listing_is_found_in_its_successor(tmp_path: Path) -> None:
    landing, other = landing_of(tmp_path), landing_of(tmp_path)
    for number in range(8):
        landing.append(TABLE, [rhythm(f"file {number}")])
    original = landing.read_part
    calls = iter([True])

    def read_part(*arguments: Any) -> pa.Table:
        if next(calls, False):
            other.compact(TABLE)
        return original(*arguments)

    landing.read_part = read_part  # type: ignore[assignment,method-assign]
    assert keys(landing) == [f"file {number}" for number in range(8)]


def test_what_killed_writers_left_is_cleared_once_it_is_old(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    landing.append(TABLE, [rhythm("a")])
    folder = tmp_path / "landing/features/rhythm"
    old, young = folder / ".old.parquet.tmp", folder / ".young.parquet.tmp"
    old.write_bytes(b"PAR1")
    young.write_bytes(b"PAR1")
    os.utime(old, (0, 0))
    landing.compact(TABLE)
    assert (old.exists(), young.exists()) == (False, True)
    assert keys(landing) == ["a"]


def test_what_lands_while_parts_are_compacted_stays(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    for number in range(8):
        landing.append(TABLE, [rhythm(f"file {number}")])
    original = landing.parts

    def parts(table: str) -> list[str]:
        found = original(table)
        landing.append(TABLE, [rhythm("late")])
        return found

    landing.parts = parts  # type: ignore[method-assign]
    assert landing.compact(TABLE)
    landing.parts = original  # type: ignore[method-assign]
    assert keys(landing) == [*(f"file {number}" for number in range(8)), "late"]


def test_a_part_saved_twice_is_there_once(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    part = landing.prepare(TABLE, [rhythm("a"), rhythm("b")])
    landing.save(part)
    landing.save(part)
    assert landing.parts(TABLE) == [part.name]
    assert keys(landing) == ["a", "b"]


def test_rows_in_force_do_without_a_damaged_part(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    names = [landing.append(TABLE, [rhythm(key)]) for key in ("a", "b")]
    (tmp_path / "landing" / TABLE / names[0]).write_bytes(b"PAR1 and no more")
    assert [row["file_key"] for row in landing.latest(TABLE)] == ["b"]


def test_the_footer_of_a_merged_part_names_its_sources(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    names = [landing.append(TABLE, [rhythm(f"file {number}")]) for number in range(8)]
    [merged] = landing.compact(TABLE)
    metadata = pq.read_metadata(tmp_path / "landing/features/rhythm" / merged).metadata
    assert json.loads(metadata[b"supersedes"]) == names
