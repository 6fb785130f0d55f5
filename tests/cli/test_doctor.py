"""`audio-assets doctor`: each failure is provoked for real."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import duckdb
import pytest

from audio_assets.cli import doctor
from audio_assets.cli.doctor import Finding, Verdict
from audio_assets.warehouse.publisher import Publisher
from tests.conftest import PROJECT, Home


def check(home: Home, name: str, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Run one check in its own process, as the doctor does."""
    done = subprocess.run(
        [sys.executable, "-m", "audio_assets.cli.doctor", name],
        env=home.environment(environment),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        Finding(**{**item, "verdict": Verdict(item["verdict"])})
        for item in results
        if not isinstance(item, str)
    ]


def test_complete_installation_passes(home: Home, tmp_path: Path) -> None:
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "song.wav").touch()
    done = subprocess.run(
        [sys.executable, "-m", "audio_assets", "doctor"],
        env=home.environment({"COLUMNS": "250", "AUDIO_LIBRARY": str(tmp_path / "music")}),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    for name in doctor.CHECKS:
        assert name in done.stdout
    assert "has audio files" in done.stdout


def test_without_dagster_home_the_project_s_own_is_checked(home: Home) -> None:
    environment = home.environment({"COLUMNS": "250"})
    del environment["DAGSTER_HOME"]
    done = subprocess.run(
        [sys.executable, "-m", "audio_assets", "doctor"],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(PROJECT / "dagster_home" / "robustness.db") in done.stdout


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AUDIO_ASSETS_WORKERS", "many"),
        ("TIMEOUT_MAX_DELAY", "-1"),
        ("AUDIO_ASSETS_TIMEZONE", "Middle-earth/Shire"),
        ("ROBUSTNESS_STATE_URL", "mysql://host/base"),
    ],
)
def test_invalid_settings_are_named(home: Home, variable: str, value: str) -> None:
    (finding,) = check(home, "settings", {variable: value})
    assert finding.verdict is Verdict.FAILED
    assert variable in finding.found
    assert finding.advice


def test_packages_in_a_wrong_version_are_named(home: Home, tmp_path: Path) -> None:
    # What is found first is what would be imported.
    for name, version in (("av", "19.0.0"), ("numba", "0.1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    path = os.pathsep.join((str(tmp_path), str(PROJECT)))
    (finding,) = check(home, "packages", {"PYTHONPATH": path})
    assert finding.verdict is Verdict.FAILED
    assert "av is 19.0.0, not <19" in finding.found
    assert "numba is 0.1, not" in finding.found  # librosa needs it
    assert finding.advice == "make clean && make run"


def test_missing_weights_have_one_command(home: Home, tmp_path: Path) -> None:
    (tmp_path / "audio_assets-0.0.dist-info").mkdir()
    (tmp_path / "audio_assets-0.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: audio-assets\nVersion: 0.0\n"
    )
    path = os.pathsep.join((str(tmp_path), str(PROJECT)))
    (finding,) = check(home, "models", {"PYTHONPATH": path})
    assert finding.verdict is Verdict.FAILED
    assert "MusiCNN's weights is missing" in finding.found
    assert finding.advice == "make clean && make run"


def test_report_is_complete_despite_invalid_settings(home: Home) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "audio_assets", "doctor"],
        env=home.environment({"COLUMNS": "250", "AUDIO_ASSETS_WORKERS": "many"}),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "AUDIO_ASSETS_WORKERS" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        ("warehouse", "AUDIO_WAREHOUSE", "in-the-way/warehouse.duckdb"),
        ("landing", "AUDIO_LANDING", "in-the-way/landing"),
        ("landing", "AUDIO_LANDING", "nosuchstore://bucket/landing"),
        ("scratch", "AUDIO_SCRATCH", "in-the-way"),
        ("Dagster", "DAGSTER_HOME", "in-the-way"),
        ("state store", "ROBUSTNESS_STATE_URL", "sqlite:////dev/null/in-the-way/state.db"),
        ("state store", "ROBUSTNESS_STATE_URL", "postgresql://127.0.0.1:1/nothing"),
        ("library", "AUDIO_LIBRARY", "in-the-way"),
        ("library", "AUDIO_LIBRARY", "nowhere"),
        ("memory", "ROBUSTNESS_WORKER_MEMORY_MIB", "100"),
    ],
)
def test_unusable_places_fail_with_advice(
    home: Home, tmp_path: Path, name: str, variable: str, value: str
) -> None:
    (tmp_path / "in-the-way").touch()
    if value.startswith(("in-the-way", "nowhere")):
        value = str(tmp_path / value)
    failed = [f for f in check(home, name, {variable: value}) if f.verdict is Verdict.FAILED]
    assert len(failed) == 1
    assert failed[0].advice
    assert "Traceback" not in failed[0].found


def test_damaged_state_store_fails_and_is_not_changed(home: Home) -> None:
    database = home.path / "robustness.db"
    database.write_bytes(b"not a database at all" * 1000)
    (finding,) = check(home, "state store")
    assert finding.verdict is Verdict.FAILED
    assert "not a database" in finding.found
    assert database.read_bytes().startswith(b"not a database")


def test_a_state_store_of_another_version_is_a_warning(home: Home) -> None:
    import sqlite3

    with sqlite3.connect(home.path / "robustness.db") as connection:
        connection.execute("CREATE TABLE robustness_version (version_num TEXT)")
        connection.execute("INSERT INTO robustness_version VALUES ('9999')")
    connection.close()
    (finding,) = check(home, "state store")
    assert finding.verdict is Verdict.WARNING
    assert "9999" in finding.found


def publish(home: Home) -> None:
    from audio_assets.features import FEATURE_SETS
    from audio_assets.warehouse.landing import Landing
    from audio_assets.warehouse.schema import warehouse_tables

    tables = warehouse_tables(FEATURE_SETS.values())
    landing = Landing(str(home.path / "landing"), tables)
    rows = [{"file_key": f"music/{number}", "bpm": float(number)} for number in range(5000)]
    landing.append("features/rhythm", rows)
    Publisher(landing, home.warehouse, FEATURE_SETS.values()).publish()


@pytest.mark.parametrize("damage", ["no database", "a flipped bit", "another row"])
def test_a_damaged_warehouse_fails(home: Home, damage: str) -> None:
    publish(home)
    with duckdb.connect(home.warehouse) as connection:
        match damage:
            case "no database":
                home.warehouse.write_bytes(b"not a database at all" * 1000)
            case "another row":
                connection.execute(
                    "UPDATE features.rhythm SET row_id = uuid() WHERE file_key = 'music/7'"
                )
            case "a flipped bit":
                (block,) = connection.execute(
                    "SELECT max(block_id) FROM pragma_storage_info('features.rhythm') "
                    "WHERE column_name = 'bpm'"
                ).fetchone() or (-1,)
                content = bytearray(home.warehouse.read_bytes())
                content[3 * 4096 + block * 262_144 + 100] ^= 1
                home.warehouse.write_bytes(content)
    (finding,) = check(home, "warehouse")
    assert finding.verdict is Verdict.FAILED, finding
    assert "audio-assets publish --rebuild" in finding.advice


def test_warehouse_passes_during_publishing(home: Home) -> None:
    from filelock import FileLock

    publish(home)
    with FileLock(home.path / f".{home.warehouse.name}.lock"):
        (finding,) = check(home, "warehouse")
    assert finding.verdict is Verdict.OK, finding
    assert "version 1" in finding.found
    assert "published to right now" in finding.found


def test_invalid_dagster_yaml_fails(home: Home) -> None:
    (home.path / "dagster.yaml").write_text("concurrency:\n  pools:\n    default_limit: lots\n")
    (finding,) = check(home, "Dagster")
    assert finding.verdict is Verdict.FAILED
    assert "dagster.yaml" in finding.advice


def test_without_a_dagster_yaml_it_warns(home: Home) -> None:
    (home.path / "dagster.yaml").unlink()
    verdicts = {f.check: f.verdict for f in check(home, "Dagster")}
    assert verdicts["dagster.yaml"] is Verdict.WARNING


def test_an_empty_root_is_a_warning(home: Home, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (finding,) = check(home, "library", {"AUDIO_LIBRARY": str(tmp_path / "empty")})
    assert finding.verdict is Verdict.WARNING
    assert "mounted" in finding.advice


def test_check_that_hangs_fails_and_names_its_step(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading the roots hangs, as no process writes to the pipe.
    os.mkfifo(home.path / "library_roots.json")
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    (finding,) = doctor._run_check("library", 20.0)
    assert time.monotonic() - started >= 20.0
    assert finding.verdict is Verdict.FAILED
    assert re.fullmatch("the library's roots: no answer within 20 s", finding.found)


def test_check_that_crashes_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A module that kills its process on import, as a wheel for another processor does.
    (tmp_path / "librosa.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor._run_check("librosa", 60.0)
    assert finding.verdict is Verdict.FAILED
    assert "-4" in finding.found


def test_breakers_are_opened_disabled_and_reset(home: Home) -> None:
    script = (
        "from robustness.circuit_breaker import get_circuit_breaker\n"
        "with get_circuit_breaker('feature:key').call: pass\n"
    )
    subprocess.run([sys.executable, "-c", script], env=home.environment(), cwd=PROJECT, check=True)
    for command, state in (("force-open", "open"), ("disable", "disabled")):
        assert home.cli("breakers", command, "feature:key").returncode == 0
        assert re.search(rf"feature:key.*\b{state}\b", home.cli("breakers", "list").stdout)
    assert home.cli("breakers", "reset", "feature:key").returncode == 0
    done = home.cli("breakers", "disable", "nothing")
    assert done.returncode == 2
    assert "feature:key" in done.stdout
