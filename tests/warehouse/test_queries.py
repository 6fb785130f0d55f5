import math
import random
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Column
from audio_assets.warehouse.queries import QueryError, query, status
from audio_assets.warehouse.views import views
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
RENAMED, COPY, GONE = "music/old name.flac", "music/z copy.flac", "music/gone.flac"
CAMELOT = ["8A", "9A", "8B", "12A", "1A", "3B"]


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty tracks in pairs that mix, one damaged, one of another loudness; two runs.

    The first was renamed, the last is there twice, and a silent one is gone.
    """
    root = tmp_path_factory.mktemp("warehouse")
    rng = random.Random(1)
    landing = landing_of(root, SETS)
    keys = [f"music/track {number:02}.flac" for number in range(TRACKS)]
    landing.append("library/files", [file(key) for key in [*keys, "music/damaged.mp3"]])
    others = {RENAMED: keys[0], COPY: keys[-1], GONE: None}
    landing.append(
        "library/files",
        [
            file(key, content_hash=f"hash of {of or key}", gone=key != COPY)
            for key, of in others.items()
        ],
    )
    for feature_set in SETS:
        rows = [made_up(feature_set, key, rng) for key in keys]
        for number, row in enumerate(rows):
            match feature_set.name:
                case "rhythm":
                    row["bpm"] = 90.0 + 10 * (number // 2) + 0.5 * (number % 2)
                    row["bpm_confidence"] = 0.25 if number in (3, 9) else 0.85
                case "key":
                    row["camelot"] = CAMELOT[number % len(CAMELOT)]
                case "loudness":
                    row["integrated_lufs"] = -30.0 if number == 7 else -14.0 + 0.1 * number
                    row["true_peak_dbtp"] = 0.5 if number == 8 else -1.0
                case "musicnn":
                    row["embedding"] = [
                        math.cos(number // 2 + 0.01 * (number % 2) + i) for i in range(200)
                    ]
        for key, of in others.items():
            row = next((row for row in rows if row["file_key"] == of), rows[-1])
            own = {"integrated_lufs": -70.0} if of is None and "integrated_lufs" in row else {}
            content_hash = f"hash of {of or key}"
            rows.append({**row, "file_key": key, "content_hash": content_hash, **own})
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
                attempt(
                    key, name, run_id=run, duration_s=9.0 if name == "rhythm" else 1.0,
                    started_at=start,
                )
                for key in keys
                for name in FEATURE_SETS
            ]
            + [
                attempt(
                    "music/damaged.mp3", name, outcome, run_id=run, started_at=start,
                    error_type=error_type, message=message,
                )
                for name in list(FEATURE_SETS)[:failures]
                for outcome, error_type, message in (
                    ("failed", "corrupt_file", "breaks off after 3 of 200 s"),
                    ("failed", "unsupported_format", "no audio format"),
                    ("given_up", "corrupt_file", "breaks off after 3 of 200 s"),
                )
            ],
        )  # fmt: skip
    publisher_of(root, SETS).publish()
    return root / "warehouse.duckdb"


def example(warehouse: Path, name: str) -> pd.DataFrame:
    return queried(warehouse, (QUERIES / f"{name}.sql").read_text())


def test_tracks_to_mix(warehouse: Path) -> None:
    pairs = example(warehouse, "tracks_to_mix")
    # Neighbours in tempo only: 8A-9A, 8B-12A, 1A-3B, 8A-9A, ... of which 8A-9A mix; the last is
    # there twice.
    assert len(pairs) == 4
    assert set(zip(pairs["camelot"], pairs["other_camelot"], strict=True)) == {("8A", "9A")}
    assert (pairs["tempo_change_percent"].abs() <= 3).all()


def test_nearest_neighbours(warehouse: Path) -> None:
    neighbours = example(warehouse, "nearest_neighbours")
    assert len(neighbours) == 5 * (TRACKS + 1)
    assert not {RENAMED, GONE} & {*neighbours["file_key"], *neighbours["neighbour"]}
    assert COPY not in set(neighbours["neighbour"])
    nearest = neighbours.groupby("file_key").first()["neighbour"]
    assert nearest["music/track 04.flac"] == "music/track 05.flac"
    assert nearest["music/track 05.flac"] == "music/track 04.flac"


def test_doubtful_tempi(warehouse: Path) -> None:
    doubtful = example(warehouse, "doubtful_tempi")
    assert list(doubtful["file_key"]) == ["music/track 03.flac", "music/track 09.flac"]
    assert set(doubtful["right_percent"]) == {25}


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


def test_last_nights_failures(warehouse: Path) -> None:
    [failure] = example(warehouse, "last_nights_failures").to_dict("records")
    assert failure["file_key"] == "music/damaged.mp3"
    assert failure["error_type"] == "corrupt_file"
    assert failure["message"] == "breaks off after 3 of 200 s"
    assert failure["failed_attempts"] == 2
    assert failure["still_missing"] == sorted(FEATURE_SETS)


def test_duplicates(warehouse: Path) -> None:
    found = example(warehouse, "duplicates")
    same = found[found["why"] == "same content"]
    assert same[["file_key", "other"]].values.tolist() == [["music/track 19.flac", COPY]]
    alike = set(zip(found["file_key"], found["other"], strict=True))
    assert ("music/track 04.flac", "music/track 05.flac") in alike
    assert not {RENAMED, GONE} & {*found["file_key"], *found["other"]}


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
    assert len(tracks) == TRACKS + 2
    shown = {"title", "artist", "album", "year", "genre", "duration_s", "container", "codec"}
    shown |= {"bpm", "bpm_confidence", "beat_confidence", "key", "scale", "camelot"}
    shown |= {
        "danceability",
        "top_tags",
        "integrated_lufs",
        "loudness_range_lu",
        "true_peak_dbtp",
        "mfcc_mean",
    }
    assert shown <= set(tracks)


def test_files_that_are_too_short_for_feature_sets_are_marked(tmp_path: Path) -> None:
    lengths = {"a": 2.9, "b": 3.0, "c": 6.0, "d": 8.0, "of unknown length": None}
    landing = landing_of(tmp_path, SETS)
    landing.append("library/files", [file(key) for key in [*lengths, "without a row"]])
    row = made_up(FEATURE_SETS["metadata"], "", random.Random(1))
    landing.append(
        "features/metadata",
        [row | {"file_key": key, "duration_s": length} for key, length in lengths.items()],
    )
    publisher_of(tmp_path, SETS).publish()
    sql = "SELECT file_key, too_short FROM features.tracks ORDER BY ALL"
    assert query(tmp_path / "warehouse.duckdb", sql).rows == [
        ("a", ["danceability", "key", "rhythm"]),
        ("b", ["key", "rhythm"]),
        ("c", ["key"]),
        ("d", []),
        ("of unknown length", []),
        ("without a row", []),
    ]


def test_columns_of_tracks_have_names_of_their_own_and_the_types_they_state(
    warehouse: Path,
) -> None:
    found = query(warehouse, "SELECT column_name, column_type FROM (DESCRIBE features.tracks)")
    assert [(column.name, column.type) for column in views(SETS)[0].columns] == found.rows
    added = [
        replace(SETS[0], name=f"added_{name}", headline=name, plotted=(), columns=[column])
        for name in ("path", "bpm", "too_short")
        for column in [Column(name, "DOUBLE", "What it is")]
    ]
    names = [column.name for column in views([*SETS, *added])[0].columns]
    assert len(set(names)) == len(names)


def test_every_column_of_every_table_and_view_says_what_it_is(warehouse: Path) -> None:
    sql = "FROM duckdb_columns() WHERE NOT internal AND comment IS NULL"
    assert query(warehouse, sql).rows == []
    sql = (
        "SELECT table_name FROM duckdb_tables() WHERE NOT internal AND comment IS NULL "
        "UNION ALL SELECT view_name FROM duckdb_views() WHERE NOT internal AND comment IS NULL"
    )
    assert query(warehouse, sql).rows == []
    sql = (
        "FROM duckdb_columns() WHERE table_name IN ('acousticbrainz', 'spotify') "
        "AND column_name NOT IN ('file_key', 'path', 'content_hash') "
        "AND NOT regexp_matches(comment, '^(measured|estimated): ')"
    )
    assert query(warehouse, sql).rows == []


def test_values_under_names_of_other_services(tmp_path: Path) -> None:
    landing = landing_of(tmp_path, SETS)
    keys = [("a", "C", "major"), ("b", "Eb", "minor"), ("c", None, None)]
    landing.append("library/files", [file(key) for key, *_ in keys])
    row = made_up(FEATURE_SETS["key"], "a", random.Random(1))
    landing.append(
        "features/key",
        [{**row, "file_key": key, "key": tonic, "scale": scale} for key, tonic, scale in keys],
    )
    row = made_up(FEATURE_SETS["danceability"], "a", random.Random(1)) | {"danceability": 1.5}
    landing.append("features/danceability", [row])
    row = made_up(FEATURE_SETS["spectral"], "a", random.Random(1)) | {"centroid_std": 3.0}
    landing.append("features/spectral", [row])
    publisher_of(tmp_path, SETS).publish()
    path = tmp_path / "warehouse.duckdb"
    assert query(path, "SELECT key, mode FROM features.spotify ORDER BY file_key").rows == [
        (0, 1),
        (3, 0),
        (-1, None),
    ]
    assert query(path, "SELECT max(danceability) FROM features.spotify").rows == [(0.5,)]
    sql = "SELECT max(lowlevel_spectral_centroid_var) FROM features.acousticbrainz"
    assert query(path, sql).rows == [(9.0,)]


def test_one_reason_is_one_text_whenever_it_failed(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    messages = [
        "holds no audio",
        "in quarantine since 2026-03-01 12:00:00 UTC: holds no audio",
        "in quarantine: holds no audio",
    ]
    landing.append("library/files", [file(str(n)) for n in range(len(messages))])
    landing.append(
        "robustness/attempts",
        [attempt(str(n), outcome="succeeded", at=0) for n in range(len(messages))]
        + [
            attempt(str(n), outcome="quarantined", message=message, at=at)
            for at in (10, 20)
            for n, message in enumerate(messages)
        ],
    )
    publisher_of(tmp_path).publish()
    sql = "SELECT DISTINCT reason, since FROM features.missing WHERE feature_set = 'rhythm'"
    assert query(tmp_path / "warehouse.duckdb", sql).rows == [
        ("holds no audio", START + timedelta(seconds=10))
    ]


def test_status(warehouse: Path) -> None:
    now = status(warehouse)
    assert (now.version, now.files, now.gone) == (1, TRACKS + 2, 2)
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
    assert query(warehouse, sql).rows == [(TRACKS + 3,)]


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
