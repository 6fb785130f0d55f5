"""The way from files to tables, through Dagster, as `audio-assets analyze` goes it."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import dagster as dg
import duckdb
import numpy as np
import psutil
import pytest
import soundfile

from audio_assets.cli.endings import ExitCode
from audio_assets.cli.sample_library import SampleTrack, make_sample_library
from audio_assets.definitions import defs
from audio_assets.defs.library_files import LIBRARY_FILES
from audio_assets.features import FEATURE_SETS
from audio_assets.library.file_keys import encode_key
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import FILES, warehouse_tables
from tests.conftest import PROJECT, Home, make_home, write_tone


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, str]:
    """A home after a first `analyze` of the sample library, and what that printed."""
    home = make_home(tmp_path_factory.mktemp("analysed"))
    done = home.cli("analyze")
    assert done.returncode == ExitCode.SOME_FILES_FAILED, done.stdout + done.stderr
    return home, done.stdout


def key_of(home: Home, track: SampleTrack) -> str:
    relative = track.path.relative_to(home.path / "sample_library")
    return encode_key("sample_library", os.fsencode(relative))


def statuses(home: Home) -> dict[str, dict[str, str]]:
    """Return Dagster's own word on every cell: by feature set and file."""
    with dg.DagsterInstance.from_config(str(home.path)) as instance:
        keys = instance.get_dynamic_partitions("audio_files")
        result = {}
        for name in FEATURE_SETS:
            key = dg.AssetKey(["features", name])
            definition = defs.get_assets_def(key).partitions_def
            assert definition is not None
            by_partition = instance.get_status_by_partition(key, keys, definition) or {}
            result[name] = {k: s.value if s else "MISSING" for k, s in by_partition.items()}
        return result


def test_every_cell_is_materialized_or_failed_and_dagster_agrees(
    analysed: tuple[Home, str],
) -> None:
    home, _ = analysed
    tracks = make_sample_library(home.path / "sample_library")
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        for name, by_file in statuses(home).items():
            rows = {
                key
                for (key,) in connection.execute(f"SELECT file_key FROM features.{name}").fetchall()
            }
            materialized = {key for key, status in by_file.items() if status == "MATERIALIZED"}
            failed = {key for key, status in by_file.items() if status == "FAILED"}
            assert rows == materialized
            assert rows | failed == set(by_file)
            cut, text = (key_of(home, track) for track in tracks if track.fault)
            assert failed == {text}
            degraded = connection.execute(
                f"SELECT file_key FROM features.{name} WHERE degraded IS NOT NULL"
            ).fetchall()
            assert degraded == [(cut,)]


def test_dagster_shows_the_runs_among_those_of_the_code_location(
    analysed: tuple[Home, str],
) -> None:
    home, _ = analysed
    with dg.DagsterInstance.from_config(str(home.path)) as instance:
        origins = {run.job_name: run.remote_job_origin for run in instance.get_runs()}
    assert origins.keys() == {"all_features", "robustness_stats"}
    assert {origin and origin.location_name for origin in origins.values()} == {"audio_assets"}


def test_known_tempo_and_key_are_found(analysed: tuple[Home, str]) -> None:
    home, _ = analysed
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        found = {
            key: (bpm, f"{tonic} {scale}")
            for key, bpm, tonic, scale in connection.execute(
                "SELECT file_key, bpm, key.key, scale "
                "FROM features.rhythm JOIN features.key USING (file_key)"
            ).fetchall()
        }
    for track in make_sample_library(home.path / "sample_library"):
        if track.fault is None:
            bpm, key = found[key_of(home, track)]
            assert bpm == pytest.approx(track.bpm, rel=0.02)
            assert key == f"{track.key} {track.scale}"


def test_tables_hold_no_nan_or_infinity(analysed: tuple[Home, str]) -> None:
    home, _ = analysed
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        for name in FEATURE_SETS:
            table = connection.execute(f"SELECT * FROM features.{name}").fetchall()
            assert not re.search(r"\b(nan|inf)\b", repr(table)), name


def test_the_time_of_the_workers_is_explained(analysed: tuple[Home, str]) -> None:
    home, _ = analysed
    explained = json.loads(home.cli("explain", "--json").stdout)
    uses = {use["use"]: use for use in explained["time"]}
    assert explained["bottleneck"] == explained["time"][0]["use"]
    assert sum(use["share"] for use in uses.values()) == pytest.approx(1)
    for name in ("computing", "decoding", "reading", "events", "publishing"):
        assert uses[name]["seconds"] > 0, name
    sets = {each["feature_set"]: each["cells"] for each in explained["feature_sets"]}
    assert sets.keys() == {*FEATURE_SETS, "decoding"}
    run_id = explained["run_id"]
    assert f"Run {run_id}" in home.cli("explain", run_id[:8]).stdout
    refused = home.cli("explain", "no run")
    assert (refused.returncode, refused.stdout) == (ExitCode.USAGE, "No run begins with no run.\n")


def test_summary_names_tracks_failures_and_what_to_do_next(analysed: tuple[Home, str]) -> None:
    _, printed = analysed
    tracks, failed = printed.split("Failed cells")
    assert "without these values: 1 (silent, too short, or in features.missing)" in tracks
    assert "degraded: 1 (in features.degraded)" in tracks
    assert "lyrics.mp3" not in tracks
    assert "lyrics.mp3" in failed
    assert "make dev" in printed
    assert "warehouse.duckdb" in printed


def test_second_analysis_computes_nothing(analysed: tuple[Home, str]) -> None:
    home, _ = analysed
    before = attempts(home)
    done = home.cli("analyze")
    assert done.returncode == ExitCode.SOME_FILES_FAILED, done.stdout + done.stderr
    assert "Nothing to compute" in done.stdout
    assert attempts(home) == before


def attempts(home: Home) -> int:
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        row = connection.execute("SELECT count(*) FROM robustness.attempts").fetchone()
    assert row is not None
    return int(row[0])


def test_files_come_and_go(home: Home, tmp_path: Path) -> None:
    library = tmp_path / "music"
    library.mkdir()
    for name, seconds in (("stays.wav", 3), ("goes.wav", 2)):
        t = np.arange(seconds * 22050) / 22050
        soundfile.write(library / name, 0.3 * np.sin(2 * np.pi * 440 * t), 22050)
    assert home.cli("analyze", str(library)).returncode == 0
    (library / "goes.wav").rename(library / "moved.wav")
    done = home.cli("analyze")  # what is known: no sample library is made
    assert done.returncode == 0, done.stdout + done.stderr
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        there = connection.execute("SELECT file_key FROM features.tracks ORDER BY 1").fetchall()
        kept = connection.execute("SELECT file_key FROM features.rhythm ORDER BY 1").fetchall()
        outcomes = connection.execute(
            "SELECT outcome, count(*) FROM robustness.attempts WHERE file_key = 'music/moved.wav' "
            "GROUP BY outcome ORDER BY outcome"
        ).fetchall()
    assert there == [("music/moved.wav",), ("music/stays.wav",)]
    assert kept == [("music/goes.wav",), *there]
    # What the audio holds is known by its content; only the file's own metadata is read again.
    assert outcomes == [("reused", 8), ("succeeded", 1)]


def test_bad_input_is_told_in_one_line(home: Home, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in (
        ["analyze", str(tmp_path / "nowhere")],
        ["analyze", str(tmp_path / "empty")],
        ["query", "SELECT 1"],
        ["query"],
        ["forget", "nowhere"],
    ):
        done = home.cli(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stdout + done.stderr
        assert done.stdout.strip()
    assert not (home.path / "library_roots.json").exists()


@pytest.mark.parametrize("waits", [False, True], ids=["computing", "waiting"])
def test_ctrl_c_ends_the_whole_command(home: Home, tmp_path: Path, *, waits: bool) -> None:
    library = tmp_path / "music"
    library.mkdir()
    for number in range(6):
        write_tone(library / f"{number}.wav", 200.0 + 50 * number, seconds=120.0)  # not over soon
    home = replace(home, variables={"AUDIO_ASSETS_BATCH_SIZE": "5"})
    if waits:
        force_open = "get_circuit_breaker('feature:metadata').force_open()"
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from robustness.circuit_breaker import get_circuit_breaker; {force_open}",
            ],
            env=home.environment(),
            cwd=PROJECT,
            check=True,
        )
    run = home.start("analyze", str(library))
    # A batch that only computes lands its rows when it is nearly over.
    begun = "landing/features/musicnn/*.parquet" if waits else "scratch/**/*.npy"
    while not list(home.path.glob(begun)):
        assert run.poll() is None
        time.sleep(0.1)
    children = psutil.Process(run.pid).children(recursive=True)
    for pid in (*(child.pid for child in children), run.pid):
        os.kill(pid, signal.SIGINT)  # as a terminal does
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 130, output + errors
    assert "Interrupted" in output
    assert "audio-assets publish" in output
    assert "Traceback" not in output + errors
    with dg.DagsterInstance.from_config(str(home.path)) as instance:
        assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.CANCELED]


def test_queries_from_a_file_and_as_csv(analysed: tuple[Home, str], tmp_path: Path) -> None:
    home, _ = analysed
    sql = tmp_path / "question.sql"
    sql.write_text("-- What is asked.\nSELECT file_key, beats FROM features.rhythm")
    done = home.cli("query", "--csv", "--file", str(sql))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 13
    assert all(isinstance(json.loads(row["beats"])[0], float) for row in rows)
    done = home.cli("query", "")
    assert (done.returncode, done.stdout.strip()) == (2, "There is no SQL to run.")


def test_a_directory_can_be_forgotten(home: Home, tmp_path: Path) -> None:
    library = tmp_path / "music"
    library.mkdir()
    write_tone(library / "a.wav", 440.0)
    assert "1 files, 1 added" in home.cli("scan", str(library)).stdout
    with dg.DagsterInstance.from_config(str(home.path)) as instance:
        assert instance.get_dynamic_partitions("audio_files") == ["music/a.wav"]
        [observed] = instance.fetch_observations(LIBRARY_FILES, limit=2).records
        assert observed.asset_observation
        assert observed.asset_observation.description == "1 files, 1 added"
        landing = Landing(str(home.path / "landing"), warehouse_tables(FEATURE_SETS.values()))
        landing.append(FILES.landing_name, [{"file_key": "music/a.wav", "size": 1, "gone": False}])
        named = replace(home, variables={"AUDIO_LIBRARY": str(library)})
        assert "take it out" in named.cli("forget", "music").stdout
        assert home.cli("forget", "music").returncode == 0
        assert instance.get_dynamic_partitions("audio_files") == []
        assert [row["gone"] for row in landing.latest(FILES.landing_name)] == [True]
    done = home.cli("scan")
    assert done.returncode == 2
    assert "No library is known" in done.stdout
