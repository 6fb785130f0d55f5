"""What is not well is found, named, and gone when it is repaired."""

import os
import resource
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._daemon.types import DaemonHeartbeat
from dagster_shared.error import SerializableErrorInfo

from audio_assets.monitoring import disks, results
from audio_assets.monitoring.daemon import HEARTBEAT_S, TICK_S, check_daemon
from audio_assets.monitoring.findings import Finding, Health, Severity, health_of
from audio_assets.monitoring.health import CHECKS, examine, open_store
from audio_assets.monitoring.run_locks import LOCK_TAG, RunLock
from audio_assets.monitoring.watchdog import watch
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish
from robustness.activity import report_activity
from robustness.circuit_breaker import get_circuit_breaker
from tests.conftest import forget_state
from tests.robustness.conftest import postgres, postgres_url  # noqa: F401 - fixtures
from tests.warehouse.rows import START, attempt

REPOSITORY = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("audio_assets"), "__repository__")

STORAGE = """
storage:
  postgres:
    postgres_url:
      env: DAGSTER_PG_URL
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with a library."""
    (tmp_path / "music" / "album").mkdir(parents=True)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AUDIO_LIBRARY", str(tmp_path / "music"))
    forget_state()
    (tmp_path / "home").mkdir()
    yield tmp_path / "home"
    monkeypatch.undo()
    forget_state()


@pytest.fixture(params=["sqlite", "postgresql"])
def instance(
    request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """Dagster's instance in the home, with either storage."""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url").partition("://")[2]
        monkeypatch.setenv("DAGSTER_PG_URL", f"postgresql+psycopg2://{url}")
        (home / "dagster.yaml").write_text(STORAGE)
    with dg.DagsterInstance.from_config(str(home)) as made:
        made.get_runs(limit=1)
        yield made


def found() -> list[Finding]:
    return examine(open_store(), deadline_s=30)


def checks() -> set[str]:
    findings = found()
    assert {finding.check for finding in findings} <= set(CHECKS)
    return {finding.check for finding in findings}


def beat(instance: dg.DagsterInstance, seconds: float) -> None:
    instance.add_daemon_heartbeat(DaemonHeartbeat(seconds, "SENSOR", "daemon"))


def started(instance: dg.DagsterInstance, kind: str) -> str:
    """Make a run that has started."""
    job = dg.GraphDefinition(name="nothing").to_job()
    run = instance.create_run_for_job(job, tags={LOCK_TAG: kind})
    event = dg.DagsterEvent(dg.DagsterEventType.PIPELINE_START.value, run.job_name)
    instance.report_dagster_event(event, run.run_id)
    return run.run_id


def tick(
    instance: dg.DagsterInstance,
    seconds: float,
    status: TickStatus,
    name: str = "publish",
    message: str = "no disk\nat line 1",
) -> None:
    """Have a sensor tick."""
    origin = RemoteInstigatorOrigin(REPOSITORY, name)
    data = SensorInstigatorData(seconds, min_interval=60, last_tick_start_timestamp=seconds)
    state = InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.DECLARED_IN_CODE, data)
    if instance.get_instigator_state(origin.get_id(), state.selector_id):
        instance.update_instigator_state(state)
    else:
        instance.add_instigator_state(state)
    error = SerializableErrorInfo(message, [], "OSError")
    instance.create_tick(
        TickData(
            instigator_origin_id=origin.get_id(),
            instigator_name=name,
            instigator_type=InstigatorType.SENSOR,
            status=status,
            timestamp=seconds,
            selector_id=state.selector_id,
            error=error if status is TickStatus.FAILURE else None,
        )
    )


def test_a_new_home_is_well(home: Path) -> None:
    assert found() == []


def test_the_daemon_is_missed_after_its_last_heartbeat(instance: dg.DagsterInstance) -> None:
    now = time.time()
    assert list(check_daemon(now)) == []
    beat(instance, now)
    assert list(check_daemon(now + HEARTBEAT_S - 5)) == []
    [finding] = check_daemon(now + HEARTBEAT_S + 5)
    assert (finding.check, finding.severity) == ("daemon", Severity.DEGRADED)
    assert finding.since == datetime.fromtimestamp(now, UTC)
    [finding] = check_daemon(now - 3600)
    assert (finding.check, finding.severity) == ("clock", Severity.UNKNOWN)
    instance.create_run_for_job(
        dg.GraphDefinition(name="nothing").to_job(),
        status=dg.DagsterRunStatus.QUEUED,
        remote_job_origin=RemoteJobOrigin(REPOSITORY, "nothing"),
    )
    [finding] = check_daemon(now + HEARTBEAT_S + 5)
    assert (finding.check, finding.severity) == ("daemon", Severity.BROKEN)
    beat(instance, now + 60)
    [finding] = check_daemon(now + 62)
    assert (finding.check, finding.severity) == ("queue", Severity.BROKEN)
    started(instance, "none")
    assert list(check_daemon(now + 62)) == []


def test_systemd_is_told_while_the_daemon_lives(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "1000")
        monkeypatch.setattr(os, "getppid", iter([1, 1, 2]).__next__)
        beat(instance, time.time() - 3600)
        watch(1)
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
        monkeypatch.setattr(os, "getppid", iter([1, 2]).__next__)
        beat(instance, time.time())
        watch(1)
        assert systemd.recv(100) == b"WATCHDOG=1"


def test_a_code_location_that_is_not_loaded_is_one_finding(instance: dg.DagsterInstance) -> None:
    now = time.time()
    beat(instance, now)
    for name in ("publish", "reconcile"):
        message = (
            f"{DagsterUserCodeUnreachableError.__name__}: Unable to reach the server for {name}"
        )
        tick(instance, now - 60, TickStatus.FAILURE, name, message)
    [finding] = check_daemon(now)
    assert (finding.check, finding.subject) == ("ticks", "code location")
    assert finding.since == datetime.fromtimestamp(now - 60, UTC)


def test_ticks_that_fail_or_do_not_come_are_named(instance: dg.DagsterInstance) -> None:
    now = time.time()
    beat(instance, now)
    tick(instance, now - 90, TickStatus.SKIPPED)
    assert list(check_daemon(now)) == []
    for seconds in (60, 30):
        tick(instance, now - seconds, TickStatus.FAILURE)
    [finding] = check_daemon(now)
    assert (finding.check, finding.subject, finding.evidence) == ("ticks", "publish", "no disk")
    assert finding.since is not None
    assert abs(finding.since.timestamp() - (now - 60)) < 1
    tick(instance, now, TickStatus.SKIPPED)
    assert list(check_daemon(now)) == []
    late = now + 60 + TICK_S + 5
    beat(instance, late)
    [finding] = check_daemon(late)
    assert "does not tick" in finding.what


def test_runs_that_died_stopped_wait_or_cannot_write_are_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dg.DagsterInstance.from_config(str(home)) as instance:
        run_id = started(instance, "file")
        lock = RunLock(run_id)
        assert checks() == set()
        body = {
            "cells": 10,
            "cells_finished": 4,
            "cell_at": time.time(),
            "waits_for": None,
            "outbox_rows": 5,
            "outbox_failing_s": None,
            "outbox_error": None,
            "workers": [],
        }
        worker = {"pid": 7, "operation": "rhythm", "file_key": "a", "seconds": 3, "timeout_s": 60}
        report_activity(run_id, body)
        assert checks() == set()
        for change, check, severity in (
            ({"waits_for": "not mounted"}, "runs", Severity.DEGRADED),
            ({"cell_at": time.time() - 3600}, "runs", Severity.DEGRADED),
            ({"outbox_failing_s": 60.0, "outbox_error": "full"}, "outbox", Severity.BROKEN),
            ({"workers": [worker | {"idle_s": 60.0}]}, "workers", Severity.DEGRADED),
        ):
            report_activity(run_id, body | change)
            [finding] = found()
            assert (finding.check, finding.severity) == (check, severity)
        report_activity(run_id, body | {"workers": [worker | {"idle_s": 1.0}]})
        assert checks() == set()
        with monkeypatch.context() as patch:
            patch.setattr("audio_assets.monitoring.runs.SILENCE_S", -1.0)
            [finding] = found()
            assert (finding.check, finding.severity) == ("runs", Severity.BROKEN)
            assert "has said nothing" in finding.what
        assert lock._file is not None
        path = lock._file.path
        lock.release()
        path.touch()
        [finding] = found()
        assert (finding.check, finding.severity) == ("runs", Severity.DEGRADED)
        assert "is gone" in finding.what


def test_a_locked_state_store_and_an_open_breaker_are_named(home: Path) -> None:
    get_circuit_breaker("feature:key").force_open()
    [finding] = found()
    assert (finding.check, finding.subject) == ("breakers", "feature:key")
    assert finding.what == "The breaker feature:key is held open by hand"
    assert "breakers reset feature:key" in finding.advice
    get_circuit_breaker("feature:key").disable()
    [finding] = found()
    assert "is disabled by hand" in finding.what
    get_circuit_breaker("feature:key").reset()
    assert checks() == set()
    with sqlite3.connect(home / "robustness.db", isolation_level=None) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert checks() == {"state"}
        connection.execute("ROLLBACK")
    assert checks() == set()


def test_a_disk_that_is_full_or_fills_up_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = get_settings().dagster_home
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as a quota that is used up
        [finding] = disks.check_place("home", path, time.time())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (finding.check, finding.severity) == ("disks", Severity.BROKEN)

    now = time.time()
    [disk, *_] = disks.disks(now)
    disks.take_sample(now)
    assert disk.full_in_s is None
    monkeypatch.setattr(
        disks, "samples", lambda: {str(path.stat().st_dev): [(now, 3 * disk.free_mib)]}
    )
    [finding] = disks.check_place("home", path, now + 3600)
    assert finding.severity is Severity.DEGRADED
    assert "full in 30 min" in finding.evidence
    monkeypatch.setattr(disks, "MIN_FREE_MIB", float("inf"))
    [finding] = disks.check_place("home", path, now)
    assert finding.severity is Severity.BROKEN


def test_samples_of_disks_are_few_and_may_be_damaged(home: Path) -> None:
    now = time.time()
    for seconds in (0, 1, disks.SAMPLE_S):
        disks.take_sample(now + seconds)
    assert {len(rows) for rows in disks.samples().values()} == {2}
    disks.take_sample(now + 2 * disks.WINDOW_S)
    assert {len(rows) for rows in disks.samples().values()} == {1}
    for text in ("", "[]", '{"1": 2}'):
        (home / ".disks.json").write_text(text)
        assert disks.samples() == {}


def test_a_root_that_is_not_mounted_is_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "music" / "album").rmdir()
    [finding] = found()
    assert (finding.check, finding.subject) == ("roots", "music")
    (tmp_path / "music").rmdir()
    assert checks() == {"roots"}
    (tmp_path / "music" / "album").mkdir(parents=True)
    assert checks() == set()


def test_what_is_not_published_is_named_until_it_is(home: Path) -> None:
    now, late = time.time(), time.time() + results.MAX_LAG.total_seconds() + 60
    open_landing().append("robustness/attempts", [attempt("a")])
    assert list(results.check_results(now)) == []
    [finding] = results.check_results(late)
    assert (finding.check, finding.severity) == ("publish", Severity.DEGRADED)
    publish()
    assert list(results.check_results(late)) == []
    open_landing().append("robustness/attempts", [attempt("b")])
    [finding] = results.check_results(late)
    assert finding.check == "publish"
    get_settings().warehouse.parent.joinpath("landing").rename(home / "elsewhere")
    assert checks() == {"landing"}


def test_a_database_that_cannot_be_read_is_not_known(home: Path) -> None:
    get_settings().warehouse.write_bytes(b"of another program")
    [finding] = found()
    assert (finding.check, finding.severity) == ("results", Severity.UNKNOWN)
    assert health_of([finding]) is Health.DEGRADED


def test_failures_of_the_last_hour_and_day_are_weighed(home: Path) -> None:
    good = [attempt(f"good {n}", run_id="recent") for n in range(90)]
    landing = open_landing()
    landing.append("robustness/attempts", good)
    publish()
    assert checks() == set()
    failed = [attempt(f"failed {n}", outcome="failed", run_id="recent") for n in range(10)]
    landing.append("robustness/attempts", failed)
    publish()
    assert [(f.check, f.subject) for f in found()] == [("errors", "day"), ("errors", "hour")]
    recovered = [attempt(f"failed {n}", run_id="recent", degraded="cut") for n in range(10)]
    landing.append("robustness/attempts", recovered)
    publish()
    [note] = found()
    assert (note.check, note.subject, note.severity) == ("quality", "degraded", Severity.NOTE)


@pytest.mark.parametrize(
    ("outcome", "values"), [("quarantined", {}), ("succeeded", {"degraded": "cut"})]
)
def test_bad_files_are_a_note_until_they_are_more_than_usual(
    home: Path, outcome: str, values: dict[str, str]
) -> None:
    def land(run_id: str, bad: int, good: int) -> None:
        rows = [
            attempt(f"{run_id} {n}", outcome=outcome, run_id=run_id, **values) for n in range(bad)
        ]
        rows += [attempt(f"good {run_id} {n}", run_id=run_id) for n in range(good)]
        open_landing().append("robustness/attempts", rows)
        publish()

    land("first", 9, 91)
    [first] = found()
    assert (first.severity, first.since) == (Severity.NOTE, START)
    assert health_of([first]) is Health.WELL
    early = datetime.now(UTC) - timedelta(days=3)
    open_landing().append(
        "robustness/runs", [{"run_id": "first", "started_at": early, "ended_at": early}]
    )
    publish()
    [usual] = found()
    assert usual.severity is Severity.NOTE
    assert usual.evidence == "9 in the last day, 9% of those that ended; 9% before"
    land("second", 60, 40)
    [more] = found()
    assert (more.severity, more.since) == (Severity.DEGRADED, START)
    assert more.evidence == "69 in the last day, 34% of those that ended; 9% before"


def test_what_was_in_quarantine_before_is_not_more_of_it(home: Path) -> None:
    rows = [attempt(f"{n}", outcome="quarantined", attempt=0) for n in range(50)]
    rows += [attempt(f"{n}", outcome="reused", attempt=0) for n in range(50, 500)]
    open_landing().append("robustness/attempts", rows)
    publish()
    assert found() == []
    failed = [attempt("new", "key", "failed"), attempt("new", "key", "quarantined", attempt=0)]
    open_landing().append("robustness/attempts", failed)
    publish()
    [note] = found()
    assert note.evidence == "1 in the last day"


def test_a_check_that_hangs_or_fails_costs_itself_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, begun = threading.Event(), []

    def hang(now: float) -> list[Finding]:
        begun.append(now)
        released.wait(60)
        return []

    def fail(now: float, store: object) -> list[Finding]:
        raise RuntimeError("of its own\nin two lines")

    monkeypatch.setattr("audio_assets.monitoring.health.check_daemon", hang)
    monkeypatch.setattr("audio_assets.monitoring.health.check_runs", fail)
    get_circuit_breaker("feature:key").force_open()
    for _ in range(2):
        findings = {f.check: f for f in examine(open_store(), deadline_s=3)}
        assert findings.keys() == {"breakers", "daemon", "runs"}
    released.set()
    assert len(begun) == 1
    assert findings["daemon"].severity is findings["runs"].severity is Severity.UNKNOWN
    assert findings["runs"].evidence == "of its own"
