import json
import os
import random
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audio_assets.features.base import Column
from audio_assets.warehouse import landing as landing_module
from audio_assets.warehouse.landing import CorruptPartError, Landing
from tests.warehouse.rows import (
    AWKWARD_KEYS,
    RHYTHM,
    all_rows,
    common,
    feature_set,
    landing_of,
    mfcc,
    rhythm,
    write_foreign_parts,
)

TABLE = "features/rhythm"


def keys(landing: Landing) -> list[str]:
    return sorted(row["file_key"] for row in all_rows(landing, TABLE))


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    row = mfcc(AWKWARD_KEYS[0])
    landing.append("features/mfcc", [row, {"file_key": "only"}])
    rows = all_rows(landing, "features/mfcc", list(row))
    assert [{name: each[name] for name in row} for each in rows] == [
        row,
        dict.fromkeys(row) | {"file_key": "only"},
    ]
    assert landing.parts(TABLE) == []


def test_parts_sort_by_age_and_rows_have_identifiers_of_version_7(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    names = [landing.append(TABLE, [rhythm("a"), rhythm("b")]) for _ in range(20)]
    assert names == sorted(names) == landing.parts(TABLE)
    ids = [row["row_id"] for row in all_rows(landing, TABLE)]
    assert len(set(ids)) == 40
    assert all(row.version == 7 and row.variant == uuid.RFC_4122 for row in ids)


def test_rows_that_do_not_fit_are_rejected_whole(tmp_path: Path) -> None:
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
        assert [row["bpm"] for row in all_rows(old, TABLE, ["bpm"])] == [120.0] * 20
        swing = [row["swing"] for row in new.latest(TABLE)]
        assert (swing.count(None), len(swing)) == (10, 20)
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
        all_rows(landing, TABLE)


def test_foreign_parts_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    landing = landing_of(tmp_path)
    landing.append(TABLE, [rhythm("a")])
    foreign = write_foreign_parts(landing, tmp_path)
    assert {row["file_key"] for row in landing.latest(TABLE)} == {"a"}
    for name in foreign:
        assert name in caplog.text
        with pytest.raises(CorruptPartError, match=name):
            landing.read_part(TABLE, name)
    assert landing.append(TABLE, [rhythm("b")]).startswith("0")  # not after the far future's
    assert {row["file_key"] for row in landing.latest(TABLE)} == {"a", "b"}


def test_rows_are_those_of_all_parts_however_few_are_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audio_assets.warehouse.landing._MOST_KEPT", 2)
    landing = landing_of(tmp_path)
    for bpm in (1.0, 2.0):
        for key in "abcde":
            landing.append(TABLE, [{"file_key": key, "bpm": bpm}])
        for _ in range(2):
            rows = landing.latest(TABLE, ["file_key", "bpm"])
            assert {row["file_key"]: row["bpm"] for row in rows} == dict.fromkeys("abcde", bpm)


def test_values_that_do_not_fit_their_column_any_more_are_null(tmp_path: Path) -> None:
    older = feature_set(
        "rhythm", [Column("bpm", "BIGINT", "Tempo"), Column("beats", "FLOAT[2]", "Beats")]
    )
    newer = feature_set("rhythm", [RHYTHM.columns[0], Column("beats", "FLOAT[3]", "Beats")])
    landing_of(tmp_path, [older]).append(TABLE, [common("a") | {"bpm": 90, "beats": [0.5, 1.0]}])
    landing = landing_of(tmp_path, [newer])
    landing.append(TABLE, [rhythm("b")])
    assert {row["file_key"]: (row["bpm"], row["beats"]) for row in landing.latest(TABLE)} == {
        "a": (90.0, None),
        "b": (120.0, [0.5, 1.0, 1.5]),
    }


def test_mutated_parts_are_read_or_named(tmp_path: Path) -> None:
    landing, rng = landing_of(tmp_path), random.Random(14)
    landing.append(TABLE, [rhythm("whole")])
    names = [landing.append(TABLE, [rhythm(f"file {i}") for i in range(20)]) for _ in range(8)]
    [merged] = landing.compact(TABLE, only=names)
    path = tmp_path / "landing" / TABLE / merged
    contents = path.read_bytes()
    footer = len(contents) - 8 - int.from_bytes(contents[-8:-4], "little")
    named = 0
    for _ in range(200):
        mutated = bytearray(contents)
        for _ in range(rng.choice([1, 1, 2, 8])):
            mutated[rng.randrange(footer, len(contents))] = rng.randrange(256)
        path.write_bytes(mutated)
        reader = landing_of(tmp_path)
        assert "whole" in {row["file_key"] for row in reader.latest(TABLE)}
        try:
            reader.supersedes(TABLE, merged)
            reader.read_part(TABLE, merged)
        except CorruptPartError as error:
            named += error.part == f"{TABLE}/{merged}"
    assert named > 50


class StoreError(Exception):
    """An error of an object store's package."""


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "I/O"), StoreError()])
def test_errors_of_the_storage_are_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    landing = landing_of(tmp_path)
    landing.append(TABLE, [rhythm("a")])

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(type(error)):
        landing.latest(TABLE)


def test_latest_returns_the_row_that_was_written_last(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    landing.append(TABLE, [rhythm("a", 1, at=1), rhythm("b", 1, at=9)])
    landing.append(TABLE, [rhythm("a", 2, at=2) | {"content_hash": "new"}, rhythm("b", 2, at=8)])
    landing.append(TABLE, [rhythm("c", 1), rhythm("c", 2)])
    rows = landing.latest(TABLE)
    assert {row["file_key"]: row["bpm"] for row in rows} == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert all(set(row) == set(rhythm("a")) for row in rows)
    # A row that has been replaced is not found by its old values.
    hashes = ["hash of a", "hash of b", "it's nothing"]
    assert landing.latest(TABLE, ["bpm"], where=("content_hash", hashes)) == [{"bpm": 2.0}]
    assert landing.latest(TABLE, where=("content_hash", [])) == []
    assert landing.latest("features/mfcc") == []


def test_a_later_row_replaces_an_earlier_one_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    present = time.time_ns()
    for number, days in enumerate((0, -2, 1, -400)):
        # Each process has a clock of its own, and knows of the others by the landing alone.
        monkeypatch.setattr(landing_module, "_row_ids", landing_module._RowIds())
        monkeypatch.setattr(time, "time_ns", lambda days=days: present + days * 86_400 * 10**9)
        landing = landing_of(tmp_path)
        landing.latest(TABLE)
        landing.append(TABLE, [rhythm("a", number, at=days)])
        landing.append(TABLE, [rhythm("b", number, at=days)])
        rows = landing.latest(TABLE)
        assert [row["bpm"] for row in rows] == [number, number]
    behind = [record.args[0] for record in caplog.records if "clock" in record.message]
    assert behind == pytest.approx([2 * 86_400, 401 * 86_400], abs=1)


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


def test_compaction_leaves_damaged_parts_out(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    names = [landing.append(TABLE, [rhythm(f"file {number}")]) for number in range(10)]
    (tmp_path / "landing" / TABLE / names[3]).write_bytes(b"PAR1")
    [merged] = landing.compact(TABLE)
    assert landing.supersedes(TABLE, merged) == {*names} - {names[3]}


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
    # Superseded parts that were not deleted never come back, whatever is merged later.
    for number in range(60):
        landing.append(TABLE, [rhythm(f"more {number:02}")])
        landing.compact(TABLE)
    assert keys(landing) == expected + [f"more {number:02}" for number in range(60)]


def test_a_listing_in_the_middle_of_a_compaction_misses_nothing(tmp_path: Path) -> None:
    """A slow listing shows neither the merged part nor those deleted meanwhile."""
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
    assert sorted(row["file_key"] for row in landing.latest(TABLE)) == [
        f"file {number}" for number in range(8)
    ]


def test_temporary_files_of_killed_writers_are_deleted_once_old(tmp_path: Path) -> None:
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


def test_parts_written_during_compaction_stay(tmp_path: Path) -> None:
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


def test_a_part_saved_twice_exists_once(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    part = landing.prepare(TABLE, [rhythm("a"), rhythm("b")])
    landing.save(part)
    landing.save(part)
    assert landing.parts(TABLE) == [part.name]
    assert keys(landing) == ["a", "b"]


def test_latest_leaves_a_damaged_part_out(tmp_path: Path) -> None:
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
