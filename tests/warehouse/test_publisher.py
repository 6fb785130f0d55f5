import os
import random
import resource
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest
import sqlalchemy as sa

from audio_assets.defs.run_records import record_ended_runs
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Column, FeatureSet
from audio_assets.warehouse import database
from audio_assets.warehouse.database import DatabaseFile, reading
from audio_assets.warehouse.publisher import Publisher
from audio_assets.warehouse.schema import ATTEMPTS, FILES, feature_table
from robustness import state_schema
from robustness.state import StateStore
from tests.warehouse.rows import (
    AWKWARD_KEYS,
    MFCC,
    RHYTHM,
    SETS,
    START,
    all_rows,
    attempt,
    feature_set,
    file,
    landing_of,
    made_up,
    mfcc,
    publisher_of,
    rhythm,
    write_foreign_parts,
)


def ask(root: Path, sql: str) -> list[Any]:
    with reading(root / "warehouse.duckdb") as connection:
        return connection.execute(sql).fetchall()


def test_rows_are_published_with_their_types_and_comments(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    landing.append("features/rhythm", [rhythm("a")])
    landing.append("features/mfcc", [mfcc("a"), mfcc("b")])
    result = publisher_of(tmp_path).publish()
    assert (result.version, result.published) == (1, True)
    assert result.rows == {"features/rhythm": 1, "features/mfcc": 2}
    assert ask(tmp_path, "SELECT file_key, bpm, beats, computed_at FROM features.rhythm") == [
        ("a", 120.0, [0.5, 1.0, 1.5], START)
    ]
    assert (
        ask(
            tmp_path,
            "SELECT typeof(mean), tags['rock'], array_cosine_distance(mean, mean) "
            "FROM features.mfcc",
        )
        == [("FLOAT[3]", 0.5, 0.0)] * 2
    )
    assert ask(
        tmp_path,
        "SELECT comment FROM duckdb_columns() WHERE (table_name, column_name) = ('rhythm', 'bpm')",
    ) == [("Tempo (1/min)",)]
    assert ask(tmp_path, "SELECT comment FROM duckdb_tables() WHERE table_name = 'rhythm'") == [
        ("One row per file. What rhythm is.",)
    ]


def test_the_last_row_of_a_file_is_published_whenever_its_part_appears(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    landing.append("features/rhythm", [rhythm("a", 1, at=1), rhythm("b", 1, at=5)])
    delayed = landing.prepare("features/rhythm", [rhythm("a", 2, at=9), rhythm("b", 2, at=4)])
    landing.append("features/rhythm", [rhythm("a", 3, at=3), rhythm("c", 1), rhythm("c", 2)])
    publisher.publish()
    landing.save(delayed)
    publisher.publish()
    expected = [("a", 3.0), ("b", 2.0), ("c", 2.0)]
    assert ask(tmp_path, "SELECT file_key, bpm FROM features.rhythm ORDER BY ALL") == expected
    (tmp_path / "warehouse.duckdb").unlink()
    publisher.publish()
    assert ask(tmp_path, "SELECT file_key, bpm FROM features.rhythm ORDER BY ALL") == expected


def test_nothing_new_publishes_nothing(tmp_path: Path) -> None:
    publisher = publisher_of(tmp_path)
    landing_of(tmp_path).append("features/rhythm", [rhythm("a")])
    first = publisher.publish()
    inode = (tmp_path / "warehouse.duckdb").stat().st_ino
    again = publisher.publish()
    assert (again.version, again.published) == (first.version, False)
    assert (tmp_path / "warehouse.duckdb").stat().st_ino == inode


def test_versions_take_turns_and_a_version_in_use_is_left_alone(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    starts = []
    for number in range(4):
        landing.append("features/rhythm", [rhythm(f"file {number}")])
        starts.append(publisher.publish().start)
    assert starts == ["landing", "copy", "previous", "previous"]
    with duckdb.connect(str(tmp_path / "warehouse.duckdb"), read_only=True) as reader:
        for number in range(4, 7):
            landing.append("features/rhythm", [rhythm(f"file {number}")])
            starts.append(publisher.publish().start)
            assert reader.execute("SELECT count(*), max(bpm) FROM features.rhythm").fetchall() == [
                (4, 120.0)
            ]
    assert starts[4:] == ["previous", "copy", "previous"]
    assert ask(tmp_path, "SELECT count(*), count(DISTINCT file_key) FROM features.rhythm") == [
        (7, 7)
    ]


def test_file_keys_are_data_and_nothing_else(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    landing.append("library/files", [file(key) for key in AWKWARD_KEYS])
    landing.append("features/rhythm", [rhythm(key) for key in AWKWARD_KEYS])
    landing.append("robustness/attempts", [attempt(key, "mfcc", "failed") for key in AWKWARD_KEYS])
    publisher = publisher_of(tmp_path)
    publisher.publish()
    landing.append("features/rhythm", [rhythm(key, 90, at=1) for key in AWKWARD_KEYS])
    publisher.publish()
    expected = sorted((key,) for key in AWKWARD_KEYS)
    assert sorted(ask(tmp_path, "SELECT file_key FROM features.rhythm WHERE bpm = 90")) == expected
    assert sorted(ask(tmp_path, "SELECT file_key FROM features.tracks")) == expected
    assert sorted(ask(tmp_path, "SELECT file_key FROM features.missing")) == expected
    assert {row["file_key"] for row in landing.latest("features/rhythm")} == set(AWKWARD_KEYS)


def test_degraded_cells_are_named_with_their_reason(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    landing.append("library/files", [file("a"), file("b"), file("left", gone=True)])
    since = datetime(2026, 1, 1, tzinfo=UTC)
    bad = {"degraded": "the audio breaks off", "degraded_since": since}
    landing.append(
        "features/rhythm", [rhythm("a") | bad, rhythm("b") | bad | {"retry_after": since}]
    )
    landing.append("features/rhythm", [rhythm("left") | bad])
    landing.append("features/mfcc", [mfcc("a")])
    publisher_of(tmp_path).publish()
    assert ask(tmp_path, "FROM features.degraded ORDER BY ALL") == [
        ("a", "rhythm", "the audio breaks off", since, True),
        ("b", "rhythm", "the audio breaks off", since, False),
    ]
    assert ask(tmp_path, "SELECT file_key, degraded FROM features.tracks ORDER BY ALL") == [
        ("a", ["rhythm"]),
        ("b", ["rhythm"]),
    ]


def test_missing_cells_are_named_with_their_reason(tmp_path: Path) -> None:
    landing = landing_of(tmp_path)
    landing.append(
        "library/files",
        [file("a"), file("b"), file("c", content_hash="another"), file("left")],
    )
    landing.append("library/files", [file("left", at=1, gone=True)])
    landing.append("features/rhythm", [rhythm("a"), rhythm("c"), rhythm("left")])
    landing.append("features/mfcc", [mfcc("a"), mfcc("c")])
    landing.append(
        "robustness/attempts",
        [
            attempt("b", outcome="failed", at=0),
            attempt("b", outcome="skipped", at=1, message="quarantined: damaged"),
            attempt("c", outcome="failed", at=2, message="cannot be read"),
        ],
    )
    publisher_of(tmp_path).publish()
    assert ask(
        tmp_path,
        "SELECT file_key, feature_set, reason, error_type FROM features.missing ORDER BY ALL",
    ) == [
        ("b", "mfcc", "never attempted", None),
        ("b", "rhythm", "quarantined: damaged", None),
        ("c", "mfcc", "the file has changed since", None),
        ("c", "rhythm", "cannot be read", "timeout"),
    ]
    assert ask(tmp_path, "SELECT file_key, bpm FROM features.tracks ORDER BY ALL") == [
        ("a", 120.0),
        ("b", None),
        ("c", 120.0),
    ]


def changed(original: FeatureSet, *columns: Column) -> FeatureSet:
    return feature_set(original.name, columns, columns[0].name)


def test_schema_changes_migrate_in_place(tmp_path: Path) -> None:
    landing_of(tmp_path).append("library/files", [file("a"), file("b")])
    landing_of(tmp_path).append("features/rhythm", [rhythm("a")])
    landing_of(tmp_path).append("features/mfcc", [mfcc("a")])
    publisher_of(tmp_path).publish()
    new_rhythm = changed(
        RHYTHM, Column("bpm", "FLOAT", "Tempo"), Column("swing", "DOUBLE", "Swing")
    )
    new_mfcc = changed(MFCC, Column("mean", "FLOAT[4]", "Mean"), MFCC.columns[1])
    third = feature_set("key", [Column("key", "VARCHAR", "Tonic")])
    feature_sets = (new_rhythm, new_mfcc, third)
    row = rhythm("b", at=1) | {"swing": 0.25}
    del row["beats"]
    landing_of(tmp_path, feature_sets).append("features/rhythm", [row])

    # The older program still publishes what it knows of the newer rows.
    publisher_of(tmp_path).publish()
    assert ask(tmp_path, "SELECT file_key, beats FROM features.rhythm ORDER BY ALL") == [
        ("a", [0.5, 1.0, 1.5]),
        ("b", None),
    ]
    publisher_of(tmp_path, feature_sets).publish()
    assert ask(
        tmp_path, "SELECT file_key, bpm, typeof(bpm), swing FROM features.rhythm ORDER BY ALL"
    ) == [("a", 120.0, "FLOAT", None), ("b", 120.0, "FLOAT", 0.25)]
    assert ask(tmp_path, "SELECT file_key, typeof(mean), mean FROM features.mfcc") == [
        ("a", "FLOAT[4]", None)
    ]
    columns = [row[0] for row in ask(tmp_path, "DESCRIBE features.rhythm")]
    assert "beats" not in columns
    assert ask(tmp_path, "SELECT file_key, key FROM features.tracks ORDER BY ALL") == [
        ("a", None),
        ("b", None),
    ]


@pytest.mark.parametrize("damage", ["lost", "empty", "garbage", "torn", "blocks"])
def test_a_lost_or_damaged_database_is_rebuilt_whole(tmp_path: Path, damage: str) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    path = tmp_path / "warehouse.duckdb"
    for number in range(3):
        landing.append("features/rhythm", [rhythm(f"{number} {i}") for i in range(100)])
        landing.append("robustness/attempts", [attempt(f"{number} {i}") for i in range(100)])
        publisher.publish()
    contents = path.read_bytes()
    for file_path in (path, tmp_path / ".warehouse.duckdb.previous"):
        match damage:
            case "lost":
                file_path.unlink()
            case "empty":
                file_path.write_bytes(b"")
            case "garbage":
                file_path.write_bytes(random.Random(1).randbytes(50_000))
            case "torn":
                file_path.write_bytes(contents[: len(contents) // 2])
            case "blocks":
                file_path.write_bytes(contents[:12288] + bytes(len(contents) - 12288))
    landing.append("features/rhythm", [rhythm("new")])
    result = publisher.publish()
    assert result.published
    assert ask(tmp_path, "SELECT count(*), count(DISTINCT file_key) FROM features.rhythm") == [
        (301, 301)
    ]
    assert ask(tmp_path, "SELECT cells_done FROM robustness.runs") == [(300,)]


@pytest.mark.parametrize("damage", ["deleted", "updated", "logged", "overwritten", "none"])
def test_a_database_that_was_written_to_is_made_anew(tmp_path: Path, damage: str) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    path = tmp_path / "warehouse.duckdb"
    for number in range(3):
        landing.append("features/rhythm", [rhythm(f"{number} {i}", i) for i in range(5000)])
        publisher.publish()
    sql = "SELECT count(*), sum(bpm) FROM features.rhythm"
    expected = ask(tmp_path, sql)
    match damage:
        case "deleted":
            with duckdb.connect(path) as connection:
                connection.execute("DELETE FROM features.rhythm WHERE bpm < 1000")
        case "updated":
            with duckdb.connect(path) as connection:
                connection.execute("UPDATE features.rhythm SET bpm = 1")
        case "logged":
            with duckdb.connect(path) as connection:
                connection.execute("PRAGMA disable_checkpoint_on_shutdown")
                connection.execute("DELETE FROM features.rhythm WHERE bpm < 1000")
        case "overwritten":
            with reading(path) as connection:
                (block,) = connection.execute(
                    "SELECT max(block_id) FROM pragma_storage_info('features.rhythm')"
                ).fetchall()[0]
            with path.open("r+b") as file:
                file.seek(3 * 4096 + block * 2**18)  # after three headers
                file.write(bytes(4096))
    result = publisher.publish()
    assert (result.start, result.version) == (("", 3) if damage == "none" else ("landing", 4))
    assert ask(tmp_path, sql) == expected
    assert not publisher.publish().published


def test_lost_rows_are_noticed_whatever_the_time_of_the_file(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    for number in range(3):
        landing.append("features/rhythm", [rhythm("a"), rhythm(f"file {number}")])
        publisher.publish()
    for path in (tmp_path / "warehouse.duckdb", tmp_path / ".warehouse.duckdb.previous"):
        before = path.stat()
        with duckdb.connect(path) as connection:
            connection.execute("DELETE FROM features.rhythm WHERE file_key = 'a'")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert publisher.publish().start == "landing"
    assert ask(tmp_path, "SELECT count(*) FROM features.rhythm") == [(4,)]
    assert not publisher.publish().published


def test_a_previous_version_that_was_written_to_is_not_started_from(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    for number in range(3):
        landing.append("features/rhythm", [rhythm(f"file {number}")])
        publisher.publish()
    with duckdb.connect(tmp_path / ".warehouse.duckdb.previous") as connection:
        connection.execute("DELETE FROM features.rhythm")
    landing.append("features/rhythm", [rhythm("new")])
    assert publisher.publish().start == "copy"
    assert ask(tmp_path, "SELECT count(*) FROM features.rhythm") == [(4,)]


def test_a_rebuild_starts_from_the_landing(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    landing.append("features/rhythm", [rhythm("a")])
    publisher.publish()
    result = publisher.publish(rebuild=True)
    assert (result.published, result.start, result.version) == (True, "landing", 2)
    assert ask(tmp_path, "SELECT file_key FROM features.rhythm") == [("a",)]
    (tmp_path / "warehouse.duckdb").write_bytes(b"damaged")
    assert publisher.publish(rebuild=True).version == 1


def test_foreign_parts_are_named_and_the_others_published(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    landing.append("features/rhythm", [rhythm("a")])
    foreign = [f"features/rhythm/{name}" for name in write_foreign_parts(landing, tmp_path)]
    landing.append("features/rhythm", [rhythm("b")])
    result = publisher.publish()
    assert sorted(result.damaged_parts) == sorted(foreign)
    assert ask(tmp_path, "SELECT file_key FROM features.rhythm ORDER BY ALL") == [("a",), ("b",)]
    assert not publisher.publish().published
    for number in range(10):
        landing.append("features/rhythm", [rhythm(f"file {number}")])
        publisher.publish()
    assert len(landing.parts("features/rhythm")) < len(foreign) + 12  # merged all the same
    assert ask(tmp_path, "SELECT count(*) FROM features.rhythm") == [(12,)]


def test_damaged_parts_are_named_and_the_others_published(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    landing.append("features/rhythm", [rhythm("a")])
    part = landing.append("features/rhythm", [rhythm("b")])
    path = tmp_path / "landing" / "features" / "rhythm" / part
    path.write_bytes(path.read_bytes()[:-20])
    result = publisher.publish()
    assert result.damaged_parts == [f"features/rhythm/{part}"]
    assert ask(tmp_path, "SELECT file_key FROM features.rhythm") == [("a",)]
    assert not publisher.publish().published


class Crash(BaseException):
    pass


CRASH_POINTS = ["_build", "_advance_version", "swap_in", "hardlink", "replaced", "compact"]


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_crash_anywhere_leaves_a_whole_version(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    for number in range(12):
        landing.append("features/rhythm", [rhythm(f"old {number}")])
        if number % 6 == 5:
            publisher.publish()
    landing.append("features/rhythm", [rhythm("new")])

    def crash(*_: object, **__: object) -> Any:
        raise Crash

    with monkeypatch.context() as patched:
        match point:
            case "swap_in":
                patched.setattr(DatabaseFile, "swap_in", crash)
            case "hardlink":
                patched.setattr(Path, "replace", crash)
            case "replaced":
                patched.setattr(database, "fsync_folder", crash)
            case "compact":
                patched.setattr(publisher._landing, "compact", crash)
            case _:
                patched.setattr(publisher, point, crash)
        with pytest.raises(Crash):
            publisher.publish()
    assert ask(tmp_path, "SELECT count(*) FROM features.rhythm")[0][0] in (12, 13)
    landing.append("features/rhythm", [rhythm("last")])
    publisher.publish()
    assert ask(tmp_path, "SELECT count(*), count(DISTINCT file_key) FROM features.rhythm") == [
        (14, 14)
    ]


def test_a_version_without_room_leaves_the_old_one(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    landing.append("features/rhythm", [rhythm("a")])
    publisher.publish()
    landing.append("features/rhythm", [rhythm("b")])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises((OSError, duckdb.Error)):
            publisher.publish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ask(tmp_path, "SELECT file_key FROM features.rhythm") == [("a",)]
    publisher.publish()
    assert ask(tmp_path, "SELECT count(*) FROM features.rhythm") == [(2,)]


# The robustness tables


def epoch(seconds: float) -> float:
    return START.timestamp() + seconds


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    store = StateStore(f"sqlite:///{tmp_path / 'state.db'}")
    with store.begin() as connection:
        connection.execute(
            sa.insert(state_schema.circuit_breakers).values(
                name="feature:rhythm",
                state="OPEN",
                generation=1,
                failure_count=5,
                success_count=7,
                ignored_count=1,
                rejected_count=0,
                consecutive_failures=5,
                probe_successes=0,
                opened_at=epoch(5),
                recovery_timeout=60.0,
                updated_at=epoch(5),
            )
        )
        connection.execute(
            sa.insert(state_schema.breaker_transitions).values(
                name="feature:rhythm",
                from_state="CLOSED",
                to_state="OPEN",
                at=epoch(5.5),
                reason="5 failures",
                run_id="run 1",
            )
        )
        connection.execute(
            sa.insert(state_schema.quarantine).values(
                content_hash="h",
                feature_set="rhythm",
                file_key="it's broken",
                error_type="corrupt_file",
                reason="breaks off",
                first_failed_at=epoch(0),
                last_failed_at=epoch(1.25),
                attempts=2,
            )
        )
        connection.execute(
            sa.insert(state_schema.retry_parameters).values(
                strategy="exponential", base_delay=2.0, multiplier=1.5, updated_at=epoch(0)
            )
        )
    return store


def test_the_state_is_published_and_survives_a_rebuild(tmp_path: Path, store: StateStore) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path, state_store=store)
    landing.append("robustness/attempts", [attempt("a")])
    publisher.publish()
    landing.append("robustness/attempts", [attempt("a", run_id="run 2")])
    publisher.publish()
    assert not publisher.publish().published

    def contents() -> list[list[Any]]:
        return [
            ask(tmp_path, f"SELECT * EXCLUDE (seen_at, row_id) FROM robustness.{name} ORDER BY ALL")
            for name in ("circuit_breakers", "breaker_transitions", "retry_parameters")
        ] + [ask(tmp_path, "FROM robustness.quarantine")]

    breakers, transitions, parameters, quarantine = contents()
    assert [(row[0], row[1], row[2]) for row in breakers] == [
        ("run 1", "feature:rhythm", "OPEN"),
        ("run 2", "feature:rhythm", "OPEN"),
    ]
    assert [(row[2], row[3]) for row in transitions] == [("OPEN", START + timedelta(seconds=5.5))]
    assert len(parameters) == 2
    assert [(row[2], row[6], row[7]) for row in quarantine] == [
        ("it's broken", START + timedelta(seconds=1.25), 2)
    ]
    before = contents()
    (tmp_path / "warehouse.duckdb").unlink()
    publisher.publish()
    assert contents() == before

    with store.begin() as connection:
        connection.execute(sa.delete(state_schema.quarantine))
    assert publisher.publish().published
    assert ask(tmp_path, "FROM robustness.quarantine") == []


def test_the_end_of_a_run_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    @dg.op
    def nothing() -> None: ...

    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        job = dg.JobDefinition(graph_def=dg.GraphDefinition("empty", node_defs=[nothing]))
        run_id = job.execute_in_process(instance=instance).run_id
        attempts = [attempt("a", run_id=run_id), attempt("a", run_id="of another instance")]
        landing.append(ATTEMPTS.landing_name, attempts)
        publisher.publish()
        for _ in range(2):
            record_ended_runs(instance, tmp_path / "warehouse.duckdb", landing)
            publisher.publish()
    assert set(ask(tmp_path, "SELECT run_id, status FROM robustness.runs")) == {
        (run_id, "success"),
        ("of another instance", "unknown"),
    }
    assert len(landing.parts("robustness/runs")) == 1


def test_breakers_of_a_run_stay_what_they_were_at_its_end(
    tmp_path: Path, store: StateStore
) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path, state_store=store)
    landing.append(ATTEMPTS.landing_name, [attempt("a")])
    landing.append("robustness/runs", [{"run_id": "run 1", "recorded_at": datetime.now(UTC)}])
    publisher.publish()
    with store.begin() as connection:
        connection.execute(sa.update(state_schema.circuit_breakers).values(state="CLOSED"))
    (tmp_path / "warehouse.duckdb").unlink()
    publisher.publish()
    assert ask(tmp_path, "SELECT state FROM robustness.circuit_breakers") == [("OPEN",)]


def test_statistics_agree_with_the_attempts_count_by_count(
    tmp_path: Path, store: StateStore
) -> None:
    landing = landing_of(tmp_path)
    retry: dict[str, Any] = {"attempt": 2, "retry_strategy": "exponential", "retry_delay_s": 3.0}
    landing.append(
        ATTEMPTS.landing_name,
        [
            attempt("clean", at=0, duration_s=4.0),
            attempt("clean", "mfcc", at=0, duration_s=1.0),
            attempt("saved", outcome="failed", at=1, recovery_strategy="increase_timeout"),
            attempt("saved", at=2, recovered=True, duration_s=6.0, **retry),
            attempt(
                "lost", outcome="failed", at=3, error_type="corrupt_file", severity="medium",
                message="breaks off", duration_s=2.0, recovery_strategy="format_conversion",
            ),
            attempt(
                "lost", outcome="failed", at=4, error_type="corrupt_file", severity="medium",
                duration_s=2.0, recovery_strategy="skip_file", attempt=2,
            ),
            attempt("deferred", outcome="deferred", at=5, duration_s=None, timeout_s=None),
            attempt("given up", outcome="deferred", at=5, duration_s=None, timeout_s=None),
            attempt("given up", outcome="given_up", at=6, duration_s=None, timeout_s=None),
            attempt("unreadable", outcome="skipped", at=5, duration_s=None, timeout_s=None),
            attempt("lost", outcome="quarantined", at=5, duration_s=None, timeout_s=None),
            attempt("known", outcome="reused", at=5, duration_s=None, timeout_s=None),
        ],
    )  # fmt: skip
    landing.append("robustness/attempts", [attempt("other", run_id="run 2")])
    landing.append(
        "robustness/runs",
        [
            {
                "run_id": "run 1",
                "job_name": "job",
                "started_at": START,
                "ended_at": START + timedelta(seconds=40),
                "status": "failure",
                "recorded_at": datetime.now(UTC),
            }
        ],
    )
    publisher_of(tmp_path, state_store=store).publish()
    assert ask(
        tmp_path,
        """
        SELECT status, files, cells_done, cells_failed, cells_quarantined, cells_skipped,
            cells_reused, success_rate, retries, recovered_cells, fault_seconds, audio_seconds,
            audio_seconds_per_second
        FROM robustness.runs ORDER BY run_id
        """,
    ) == [
        ("failure", 7, 3, 1, 1, 2, 1, 0.75, 2, 1, 17.0, 400.0, 10.0),
        ("unknown", 1, 1, 0, 0, 0, 0, 1.0, 0, 0, 0.0, 200.0, 20.0),
    ]
    assert ask(
        tmp_path,
        """
        SELECT feature_set, attempts, success_rate, mean_s, p50_s, max_s, mean_timeout_s,
            timeout_efficiency, retries
        FROM robustness.feature_stats WHERE run_id = 'run 1' ORDER BY ALL
        """,
    ) == [
        ("mfcc", 1, 1.0, 1.0, 1.0, 1.0, 20.0, 0.05, 0),
        ("rhythm", 5, 0.4, 5.0, 5.0, 6.0, 20.0, 0.25, 2),
    ]
    assert ask(
        tmp_path, "SELECT * EXCLUDE (run_id) FROM robustness.errors ORDER BY error_type"
    ) == [
        ("corrupt_file", "medium", 2, "lost", "breaks off",
         ["format_conversion", "skip_file"], 0),
        ("timeout", "medium", 1, "saved", "took too long", ["increase_timeout"], 1),
    ]  # fmt: skip
    assert ask(tmp_path, "SELECT * EXCLUDE (run_id) FROM robustness.retries ORDER BY ALL") == [
        ("exponential", 1, 1, 1.0, 9.0, 2.0, 1.5),
        ("immediate", 1, 1, 0.0, 2.0, None, None),
    ]
    assert ask(
        tmp_path,
        "SELECT feature_set, source, timeout_s, timed_out FROM robustness.timeouts "
        "WHERE run_id = 'run 1' ORDER BY ALL",
    ) == [("mfcc", "base", 20.0, 0), ("rhythm", "base", 20.0, 1)]


def test_attempts_and_statistics_do_not_double_when_parts_come_again(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    for number in range(30):
        landing.append("robustness/attempts", [attempt(f"file {number}")])
        if number % 3 == 0:
            publisher.publish()
        if number % 7 == 0:
            landing.compact("robustness/attempts")
    publisher.publish()
    expected = [(30, 30)]
    sql = "SELECT count(*), count(DISTINCT file_key) FROM robustness.attempts"
    assert ask(tmp_path, sql) == expected
    assert ask(tmp_path, "SELECT cells_done, retries FROM robustness.runs") == [(30, 0)]
    (tmp_path / "warehouse.duckdb").unlink()
    publisher.publish()
    assert ask(tmp_path, sql) == expected


def test_the_publisher_keeps_the_number_of_parts_bounded(tmp_path: Path) -> None:
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    for number in range(60):
        landing.append("features/rhythm", [rhythm(f"file {number}")])
        if number % 4 == 3:
            publisher.publish()
    assert len(landing.parts("features/rhythm")) <= 24
    assert len(all_rows(landing, "features/rhythm")) == 60
    ledger = ask(
        tmp_path,
        "SELECT count(*) FROM publishing.parts WHERE landing_table = 'features/rhythm'",
    )
    assert ledger[0][0] <= 24


def test_a_publisher_of_no_feature_sets_in_common_keeps_their_tables(tmp_path: Path) -> None:
    landing_of(tmp_path).append("features/rhythm", [rhythm("a")])
    publisher_of(tmp_path).publish()
    Publisher(landing_of(tmp_path), tmp_path / "warehouse.duckdb", SETS[1:]).publish()
    assert ask(tmp_path, "SELECT count(*) FROM features.rhythm") == [(1,)]


def test_tracks_can_be_read_where_cells_are_missing(tmp_path: Path) -> None:
    """DuckDB 2.0.0 fails at this: arrays behind many outer joins."""
    sets, rng = tuple(FEATURE_SETS.values()), random.Random(1)
    landing = landing_of(tmp_path, sets)
    keys = [f"music/{number:02}.flac" for number in range(27)]
    landing.append(FILES.landing_name, [file(key) for key in keys])
    for each in sets:
        there = keys if each.name == "metadata" else [k for k in keys if "5" not in k]
        rows = [made_up(each, key, rng) for key in there]
        landing.append(feature_table(each).landing_name, rows)
    publisher_of(tmp_path, sets).publish()
    with duckdb.connect(str(tmp_path / "warehouse.duckdb"), read_only=True) as connection:
        rows = connection.execute("FROM features.tracks").fetchall()
    assert len(rows) == 27
