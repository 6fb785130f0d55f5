import math
import random
from datetime import timedelta
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from audio_assets.features import FEATURE_SETS
from audio_assets.warehouse.queries import QueryError, query, status
from tests.warehouse.rows import (
    START,
    attempt,
    file,
    landing_of,
    made_up,
    publisher_of,
    queried,
    rhythm,
)

QUERIES = Path(__file__).parents[2] / "examples" / "queries"
SETS = tuple(FEATURE_SETS.values())
TRACKS = 20
CAMELOT = ["8A", "9A", "8B", "12A", "1A", "3B"]


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty tracks in pairs that mix, one damaged, one of another loudness; two runs."""
    root = tmp_path_factory.mktemp("warehouse")
    rng = random.Random(1)
    landing = landing_of(root, SETS)
    keys = [f"music/track {number:02}.flac" for number in range(TRACKS)]
    landing.append("library/files", [file(key) for key in [*keys, "music/damaged.mp3"]])
    for feature_set in SETS:
        rows = [made_up(feature_set, key, rng) for key in keys]
        for number, row in enumerate(rows):
            match feature_set.name:
                case "rhythm":
                    row["bpm"] = 90.0 + 10 * (number // 2) + 0.5 * (number % 2)
                case "key":
                    row["camelot"] = CAMELOT[number % len(CAMELOT)]
                case "loudness":
                    row["integrated_lufs"] = -30.0 if number == 7 else -14.0 + 0.1 * number
                    row["true_peak_dbtp"] = 0.5 if number == 8 else -1.0
                case "musicnn":
                    row["embedding"] = [
                        math.cos(number // 2 + 0.01 * (number % 2) + i) for i in range(200)
                    ]
        landing.append(f"features/{feature_set.name}", rows)
    for run, failures in (("night 1", 3), ("night 2", 1)):
        start = START + timedelta(days=failures == 1)
        landing.append(
            "robustness/runs",
            [
                {
                    "run_id": run,
                    "job_name": "all_features",
                    "started_at": start,
                    "ended_at": start + timedelta(hours=1),
                    "status": "failure",
                    "recorded_at": start + timedelta(hours=1),
                }
            ],
        )
        landing.append(
            "robustness/attempts",
            [
                attempt(key, name, run_id=run, duration_s=9.0 if name == "rhythm" else 1.0)
                for key in keys
                for name in FEATURE_SETS
            ]
            + [
                attempt(
                    "music/damaged.mp3", name, "failed", run_id=run,
                    error_type="corrupt_file", message="breaks off after 3 of 200 s",
                )
                for name in list(FEATURE_SETS)[:failures]
            ],
        )  # fmt: skip
    publisher_of(root, SETS).publish()
    return root / "warehouse.duckdb"


def example(warehouse: Path, name: str) -> pd.DataFrame:
    return queried(warehouse, (QUERIES / f"{name}.sql").read_text())


def test_tracks_to_mix(warehouse: Path) -> None:
    pairs = example(warehouse, "tracks_to_mix")
    # Neighbours in tempo only: 8A-9A, 8B-12A, 1A-3B, 8A-9A, ... of which 8A-9A mix.
    assert len(pairs) == 4
    assert set(zip(pairs["camelot"], pairs["other_camelot"], strict=True)) == {("8A", "9A")}
    assert (pairs["tempo_change_percent"].abs() <= 3).all()


def test_nearest_neighbours(warehouse: Path) -> None:
    neighbours = example(warehouse, "nearest_neighbours")
    assert len(neighbours) == 5 * TRACKS
    nearest = neighbours.groupby("file_key").first()["neighbour"]
    assert nearest["music/track 04.flac"] == "music/track 05.flac"
    assert nearest["music/track 05.flac"] == "music/track 04.flac"


def test_loudness_outliers(warehouse: Path) -> None:
    outliers = example(warehouse, "loudness_outliers")
    assert list(outliers["file_key"]) == ["music/track 07.flac", "music/track 08.flac"]


def test_failing_files(warehouse: Path) -> None:
    failing = example(warehouse, "failing_files")
    assert set(failing["file_key"]) == {"music/damaged.mp3"}
    assert dict(zip(failing["reason"], map(len, failing["feature_sets"]), strict=True)) == {
        "breaks off after 3 of 200 s": 3,
        "never attempted": 6,
    }


def test_slow_feature_sets(warehouse: Path) -> None:
    slow = example(warehouse, "slow_feature_sets")
    assert slow["feature_set"][0] == "rhythm"
    assert slow["seconds_per_minute_of_audio"][0] == pytest.approx(2.7)
    assert slow["share_percent"].sum() == pytest.approx(100, abs=0.5)


def test_healthier_than_before(warehouse: Path) -> None:
    runs = example(warehouse, "healthier_than_before")
    assert list(runs["run_id"]) == ["night 2", "night 1"]
    assert list(runs["cells_failed"]) == [1, 3]
    assert runs["healthier"][0]


def test_every_example_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in QUERIES.glob("*.sql")} <= tested


def test_tracks_show_the_headline_of_each_feature_set(warehouse: Path) -> None:
    tracks = queried(warehouse, "FROM features.tracks")
    assert len(tracks) == TRACKS + 1
    shown = {"title", "artist", "duration_s", "bpm", "integrated_lufs", "top_tag", "mfcc_mean"}
    assert shown <= set(tracks)


def test_status(warehouse: Path) -> None:
    now = status(warehouse)
    assert (now.version, now.files, now.gone) == (1, TRACKS + 1, 0)
    assert [row[0] for row in now.runs.rows] == [START + timedelta(days=1), START]
    assert now.missing.columns == ["reason", "files", "feature_sets"]
    assert [files for _, files, _ in now.missing.rows] == [1, 1]
    assert sum(len(names.split(", ")) for *_, names in now.missing.rows) == len(SETS)


def test_errors_are_plain(warehouse: Path, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="There is no database"):
        query(tmp_path / "none.duckdb", "SELECT 1")
    with pytest.raises(QueryError, match="nonsense"):
        query(warehouse, "SELECT * FROM nonsense")
    with pytest.raises(QueryError, match="read-only"):
        query(warehouse, "DELETE FROM features.rhythm")


def test_the_present_version_is_asked_even_where_an_older_one_is_open(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    path = tmp_path / "warehouse.duckdb"
    landing.append("features/rhythm", [rhythm("a")])
    publisher.publish()
    with duckdb.connect(str(path), read_only=True):
        landing.append("features/rhythm", [rhythm("b")])
        publisher.publish()
        assert len(query(path, "FROM features.rhythm").rows) == 2


DENIED = [
    "DELETE FROM features.rhythm",
    "USE memory; DETACH warehouse; ATTACH '{path}' AS w; DELETE FROM w.features.rhythm",
    "ATTACH '{path}' AS w (READ_WRITE)",
    "ATTACH '{path}.new' AS w",
    "COPY (SELECT 1) TO '{path}'",
    "COPY (SELECT 1) TO '{path}' (USE_TMP_FILE false)",
    "COPY (SELECT 1) TO '{path}.wal'",
    "COPY (SELECT 1) TO '{path}.csv'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{path}.csv'",
    "PREPARE p AS COPY (SELECT 1) TO '{path}.csv'; EXECUTE p",
    "EXPORT DATABASE '{path}.export'",
    "CALL enable_logging(storage = 'file', storage_config = {{'path': '{path}.logs'}})",
    "PRAGMA enable_profiling = 'json'; SET profiling_output = '{path}.json'; SELECT 1",
    "FROM read_text('/etc/passwd')",
    "FROM read_blob('{path}')",
    "FROM read_csv('/etc/passwd', sep = ':')",
    "FROM '/etc/passwd'",
    "FROM glob('/etc/*')",
    "SELECT getenv('HOME')",
    "FROM frame_of_python",
    "INSTALL httpfs",
    "LOAD httpfs",
    "FROM read_parquet('http://127.0.0.1:9/a.parquet')",
    "SET lock_configuration = false",
    "SET enable_external_access = true",
    "RESET enable_external_access; FROM read_text('/etc/passwd')",
    "RESET disabled_filesystems; FROM read_text('/etc/passwd')",
    "SET allowed_directories = ['/']",
    "SET temp_directory = '/'",
]


@pytest.mark.parametrize("sql", DENIED)
def test_a_query_reaches_nothing_but_the_database_and_cannot_write_to_it(
    warehouse: Path, sql: str
) -> None:
    frame_of_python = pd.DataFrame({"secret": [1]})
    before, contents = sorted(warehouse.parent.iterdir()), warehouse.read_bytes()
    with pytest.raises(QueryError):
        query(warehouse, sql.format(path=warehouse))
    assert sorted(warehouse.parent.iterdir()) == before
    assert warehouse.read_bytes() == contents
    assert len(frame_of_python) == 1


def test_a_query_may_use_memory(warehouse: Path) -> None:
    sql = "CREATE TABLE memory.t AS FROM features.rhythm; SELECT count(*) AS n FROM memory.t"
    assert query(warehouse, sql).rows == [(TRACKS,)]


def test_a_damaged_database_is_named_with_its_remedy(warehouse: Path, tmp_path: Path) -> None:
    contents = bytearray(warehouse.read_bytes())
    contents[12288:] = bytes(len(contents) - 12288)
    path = tmp_path / "warehouse.duckdb"
    for damaged in (contents, contents[:20_000], b"", b"no database" * 10_000):
        path.write_bytes(damaged)
        for ask in (status, lambda path: query(path, "SELECT sum(bpm) FROM features.rhythm")):
            with pytest.raises(QueryError, match="audio-assets publish --rebuild"):
                ask(path)
    path.unlink()
    duckdb.connect(str(path)).close()
    with pytest.raises(QueryError, match="audio-assets publish --rebuild"):
        status(path)
    with pytest.raises(QueryError) as wrong_sql:
        query(warehouse, "FROM nothing")
    assert "rebuild" not in str(wrong_sql.value)
