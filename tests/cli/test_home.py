"""Every command makes Dagster's home safe, and names what is wrong with it in one sentence."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import PROJECT, Home


def one_line(home: Home, *arguments: str, **variables: str) -> str:
    """Return what a command that fails prints, which is one paragraph."""
    done = replace(home, variables=variables).cli(*arguments)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert "\n\n" not in done.stdout
    return " ".join(done.stdout.split())


@pytest.mark.parametrize(("umask", "mode"), [("", 0o700), ("027", 0o750)])
def test_a_new_home_is_made_safe(tmp_path: Path, umask: str, mode: int) -> None:
    home = Home(tmp_path / "new" / "home", {"AUDIO_ASSETS_UMASK": umask})
    for command in (("prepare",), ("quarantine", "list")):
        done = home.cli(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "telemetry" in (home.path / "dagster.yaml").read_text()
    assert home.path.stat().st_mode & 0o777 == mode
    for name in ("dagster.yaml", "robustness.db"):
        assert (home.path / name).stat().st_mode & 0o777 == mode & 0o666


def test_a_dagster_yaml_of_one_s_own_is_kept(home: Home) -> None:
    (home.path / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    assert home.cli("prepare").returncode == 0
    assert (home.path / "dagster.yaml").read_text() == "telemetry:\n  enabled: false\n"


def test_init_makes_a_home_that_commands_started_in_it_use(home: Home, tmp_path: Path) -> None:
    place = tmp_path / "it's a home"
    assert home.cli("init", str(place)).returncode == 0
    assert {path.name for path in place.iterdir()} == {"dagster.yaml", "workspace.yaml", ".env"}
    with (place / ".env").open("a") as file:
        file.write("AUDIO_LIBRARY=/of/this/home\n")
    done = subprocess.run(
        [sys.executable, "-m", "audio_assets", "scan"],
        env=home.environment({"PYTHONPATH": str(PROJECT), "COLUMNS": "200"}),
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "/of/this/home" in done.stdout, done.stderr
    assert (place / "landing").exists()
    assert home.cli("init", str(place)).returncode == 0
    assert "/of/this/home" in (place / ".env").read_text()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AUDIO_ASSETS_UMASK", "private"),
        ("AUDIO_ASSETS_UMASK", "777"),
        ("AUDIO_ASSETS_WORKERS", "many"),
        ("ROBUSTNESS_STATE_URL", "mysql://user:secret@host/base"),
        ("DAGSTER_HOME", "/proc/nowhere"),
        ("DAGSTER_HOME", "/proc"),
        ("DAGSTER_HOME", "~nosuchuser"),
        ("AUDIO_ASSETS_WORKERS", "1000000000"),
        ("AUDIO_WAREHOUSE", "/dev/full"),
        ("AUDIO_WAREHOUSE", "features.duckdb"),
        ("AUDIO_WAREHOUSE", "notes.db"),
        ("AUDIO_WAREHOUSE", "s3://bucket/music.duckdb"),
        ("AUDIO_SCRATCH", "~nosuchuser/scratch"),
    ],
)
def test_wrong_settings_are_one_sentence(home: Home, variable: str, value: str) -> None:
    said = one_line(home, "analyze", **{variable: value})
    assert (value if variable == "DAGSTER_HOME" else variable) in said


def test_what_only_reads_makes_no_home(home: Home, tmp_path: Path) -> None:
    typo = tmp_path / "typo"
    assert f"{typo} does not exist" in one_line(home, "status", DAGSTER_HOME=str(typo))
    assert not typo.exists()
    assert "no such user" in one_line(home, "status", DAGSTER_HOME="~nosuchuser")


@pytest.mark.parametrize("content", ["{", "[1]", '{"music": 1}', "\udcff"])
def test_damaged_roots_are_one_sentence(home: Home, content: str) -> None:
    path = home.path / "library_roots.json"
    path.write_text(content, errors="surrogateescape")
    assert f"{path} does not hold directories" in one_line(home, "analyze")


def test_a_damaged_database_of_dagster_is_one_sentence(home: Home, tmp_path: Path) -> None:
    (tmp_path / "song.wav").touch()
    (home.path / "history").mkdir()
    (home.path / "history" / "runs.db").write_bytes(b"no database" * 1000)
    said = one_line(home, "scan", str(tmp_path))
    assert "A database failed: file is not a database" in said


@pytest.mark.parametrize("command", [("quarantine", "list"), ("breakers", "list")])
def test_a_state_that_cannot_be_read_is_not_called_empty(
    home: Home, command: tuple[str, ...]
) -> None:
    said = one_line(home, *command, ROBUSTNESS_STATE_URL="postgresql://user:secret@127.0.0.1:1/no")
    assert "cannot be read" in said
    assert "user:***@127.0.0.1" in said


@pytest.mark.parametrize(
    ("command", "landing"),
    [
        ("analyze", "/proc/landing"),
        ("analyze", "ftp://user:secret@127.0.0.1:1/landing"),
        ("scan", "nosuchstore://bucket"),
    ],
)
def test_a_landing_that_cannot_be_is_one_sentence(
    home: Home, tmp_path: Path, command: str, landing: str
) -> None:
    (tmp_path / "song.wav").touch()
    said = one_line(home, command, str(tmp_path), AUDIO_LANDING=landing)
    assert "set AUDIO_LANDING to a writable place" in said
