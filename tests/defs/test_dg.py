"""Dagster's command line `dg`: it loads the project and lists its definitions."""

import json
import subprocess
import sys
from pathlib import Path

from audio_assets.defs.jobs import jobs
from audio_assets.features import FEATURE_SETS
from tests.conftest import PROJECT, Home


def dg(home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("dg"), *arguments],
        env=home.environment(),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_dg_loads_the_project(home: Home) -> None:
    done = dg(home, "check", "defs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "venv_mismatch" not in done.stdout + done.stderr


def test_dg_lists_the_definitions(home: Home) -> None:
    done = dg(home, "list", "defs", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assets = {asset["asset_key"] for asset in found["assets"]}
    assert {key for key in assets if key.startswith("features/")} == {
        f"features/{name}" for name in (*FEATURE_SETS, "tracks", "missing")
    }
    assert "library/files" in assets

    def names(kind: str) -> set[str]:
        return {definition["name"] for definition in found[kind]}

    assert names("jobs") >= {job.name for job in jobs}
    assert names("schedules") == {"nightly", "prune_history_daily"}
    assert names("sensors") == {
        "discover_files",
        "publish_after_success",
        "publish_after_failure",
        "publish_after_canceled",
        "publish_while_running",
        "reconcile_history",
        "resume_deferred",
    }
