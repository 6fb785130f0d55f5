"""Everything is killed in the middle of a run, as by a power cut, and started again."""

import time
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import requests

from audio_assets.features import FEATURE_SETS
from tests.conftest import Home, make_home
from tests.dagster_dev import Deployment, running, wait_until
from tests.test_kills import add_files, differences

FILES = 4

LAUNCH_BACKFILL = """
mutation Launch($parameters: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $parameters) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""

ASSETS = "{ assetNodes { id } }"
RUNS = "{ runsOrError { ... on Runs { results { runId status } } } }"


def graphql(deployment: Deployment, query: str, **variables: Any) -> dict[str, Any]:
    answer = requests.post(
        f"{deployment.url}/graphql", json={"query": query, "variables": variables}, timeout=60
    ).json()
    assert "errors" not in answer, answer
    data: dict[str, Any] = answer["data"]
    return data


def launch_backfill(deployment: Deployment, partitions: list[str]) -> None:
    launched = graphql(
        deployment,
        LAUNCH_BACKFILL,
        parameters={
            "assetSelection": [{"path": ["features", name]} for name in FEATURE_SETS],
            "partitionNames": partitions,
        },
    )["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched


def statuses(deployment: Deployment) -> dict[str, str]:
    runs = graphql(deployment, RUNS)["runsOrError"]["results"]
    return {run["runId"]: run["status"] for run in runs}


def kill_all(home: Home) -> None:
    """Kill every process that works on a home, all at once."""
    environment = f"DAGSTER_HOME={home.path}"
    family = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DAGSTER_HOME") == str(home.path):
                family.append(process)
        except (psutil.Error, OSError):
            continue
    assert family, environment
    for process in family:
        process.suspend()
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    import random

    add_files(tmp_path / "library", random.Random(3), FILES)
    return tmp_path / "library"


@pytest.fixture
def two_runs(tmp_path: Path) -> Home:
    made = make_home(tmp_path)
    return Home(made.path, {"AUDIO_ASSETS_BATCH_SIZE": str(FILES // 2)})


@pytest.mark.timeout(900)
def test_what_a_power_cut_left_is_computed_without_a_person(
    two_runs: Home, library: Path, tmp_path: Path
) -> None:
    home = two_runs
    done = home.cli("scan", str(library))
    assert done.returncode == 0, done.stdout + done.stderr
    keys = sorted(f"{library.name}/{path.name}" for path in library.iterdir())
    with running(home, library, tmp_path / "before.log") as deployment:
        wait_until(lambda: graphql(deployment, ASSETS)["assetNodes"], "the code location")
        launch_backfill(deployment, keys)
        wait_until(lambda: "STARTED" in statuses(deployment).values(), "a run")
        running_at_once = 0
        with dg.DagsterInstance.from_config(str(home.path)) as instance:

            def some_are_done() -> bool:
                nonlocal running_at_once
                started = [s for s in statuses(deployment).values() if s == "STARTED"]
                running_at_once = max(running_at_once, len(started))
                return bool(instance.get_materialized_partitions(dg.AssetKey(["features", "mfcc"])))

            wait_until(some_are_done, "a cell")
        kill_all(home)
    assert running_at_once == 1

    again = time.monotonic()
    with running(home, library, tmp_path / "after.log") as deployment:

        def is_over() -> bool:
            found = statuses(deployment).values()
            return not {"STARTED", "QUEUED", "STARTING", "NOT_STARTED"}.intersection(found) and (
                "SUCCESS" in found
            )

        wait_until(lambda: is_over() and not differences(home, library), "all cells", timeout=400)
        print(f"all is there {time.monotonic() - again:.0f} s after the start")
        print(statuses(deployment))
