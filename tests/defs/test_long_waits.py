"""A run that has nothing to compute for long gives its slot back, and is continued."""

import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._daemon.types import DaemonHeartbeat

from audio_assets.defs import long_waits
from audio_assets.defs.long_waits import (
    DEGRADED_TAG,
    RETRY_AT_TAG,
    WAITING_SETS_TAG,
    WAITING_SINCE_TAG,
)
from audio_assets.defs.partitions import RESULT_TAG
from audio_assets.defs.sensors import resume_deferred
from robustness.circuit_breaker import get_circuit_breaker
from tests.defs.test_history import run_all
from tests.defs.test_sensors import execute, fresh_home, instance, put, root, statuses

__all__ = ["fresh_home", "instance", "root"]

FILE = "music/a.wav"


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_waits, "LONGEST_WAIT_S", 3.0)


def requests(instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    with dg.build_sensor_context(instance=instance) as context:
        return list(resume_deferred(context))


def test_a_run_that_would_wait_for_long_is_continued_when_its_cells_are_due(
    root: Path, instance: dg.DagsterInstance
) -> None:
    put(root / "a.wav")
    get_circuit_breaker("feature:metadata").force_open()
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), "SENSOR", "daemon", []))
    run_id = run_all(root, instance)
    ended = instance.get_run_by_id(run_id)
    assert ended is not None
    assert ended.status is dg.DagsterRunStatus.FAILURE
    assert ended.tags[RESULT_TAG] == "deferred"
    assert "metadata" in ended.tags["audio_assets/waiting_for"]
    assert statuses(instance)[FILE] == {"MATERIALIZED", "FAILED"}
    assert requests(instance) == []

    now = datetime.now(UTC)
    began = (now - timedelta(hours=1)).isoformat()
    instance.add_run_tags(run_id, {RETRY_AT_TAG: now.isoformat(), WAITING_SINCE_TAG: began})
    get_circuit_breaker("feature:metadata").reset()
    [request] = requests(instance)
    assert request.run_key == run_id
    assert request.tags[WAITING_SINCE_TAG] == began
    assert request.asset_selection == [dg.AssetKey(["features", "metadata"])]
    run = dg.DagsterRun(
        job_name="all_features",
        run_id=str(uuid.uuid4()),
        tags=request.tags,
        asset_selection=frozenset(request.asset_selection),
    )
    execute(instance, instance.add_run(run))
    assert statuses(instance)[FILE] == {"MATERIALIZED"}


def test_without_a_daemon_a_run_waits_in_place_and_fails_in_the_end(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTNESS_RETRY_TOTAL_SECONDS", "5")
    put(root / "a.wav")
    get_circuit_breaker("feature:metadata").force_open()
    run = instance.get_run_by_id(run_all(root, instance))
    assert run is not None
    assert run.tags[RESULT_TAG] == "incomplete"


def test_degraded_rows_are_requested_again_when_they_are_due(
    root: Path, instance: dg.DagsterInstance
) -> None:
    put(root / "a.wav")
    run_id = run_all(root, instance)
    assert requests(instance) == []
    due = {
        DEGRADED_TAG: "true",
        RETRY_AT_TAG: (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
        WAITING_SETS_TAG: "metadata",
    }
    instance.add_run_tags(run_id, due)
    assert requests(instance) == []
    instance.add_run_tags(run_id, {RETRY_AT_TAG: datetime.now(UTC).isoformat()})
    [request] = requests(instance)
    assert request.asset_selection == [dg.AssetKey(["features", "metadata"])]
    assert WAITING_SINCE_TAG not in request.tags
