"""The signs of life of runs, and the machine's slots, with real processes that are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from audio_assets.defs import run_liveness
from audio_assets.defs.machine_slot import runs_ahead
from audio_assets.defs.run_launcher import RunLauncher
from audio_assets.defs.run_liveness import end_dead_runs, liveness, remove_old_locks
from audio_assets.monitoring import run_locks
from audio_assets.monitoring.kernel_locks import is_locked
from audio_assets.monitoring.run_locks import LOCK_TAG, Liveness, RunLock, is_found_free
from audio_assets.settings import get_settings
from robustness.settings import get_settings as get_robustness_settings
from tests.conftest import PROJECT
from tests.robustness.conftest import postgres, postgres_url  # noqa: F401 - fixtures

# What a run's process does for as long as it lives.
HOLDER = """
import sys, time
from audio_assets.monitoring.run_locks import RunLock
lock = RunLock(sys.argv[1])
print(lock.tag["audio_assets/lock"], flush=True)
time.sleep(600)
"""

SLOT_HOLDER = """
import logging, sys, time
import dagster as dg
from audio_assets.defs.machine_slot import machine_slot
with dg.DagsterInstance.get() as instance:
    run = instance.get_run_by_id(sys.argv[1])
    with machine_slot(instance, run, logging.getLogger()):
        print("begins", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    get_settings.cache_clear()
    get_robustness_settings.cache_clear()
    with dg.DagsterInstance.from_config(str(tmp_path)) as made:
        yield made
    get_settings.cache_clear()
    get_robustness_settings.cache_clear()


def begin(instance: dg.DagsterInstance, **tags: str) -> dg.DagsterRun:
    """Make a run that has started."""
    job = dg.GraphDefinition(name="nothing").to_job()
    run = instance.create_run_for_job(job, tags=tags)
    event = dg.DagsterEvent(dg.DagsterEventType.PIPELINE_START.value, run.job_name)
    instance.report_dagster_event(event, run.run_id)
    return read(instance, run)


def read(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRun:
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found


@contextmanager
def process(program: str, run: dg.DagsterRun) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", program, run.run_id], stdout=subprocess.PIPE, text=True, cwd=PROJECT
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def said(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lock_lives_and_dies_with_its_process(instance: dg.DagsterInstance) -> None:
    run = begin(instance, **{LOCK_TAG: "file"})
    with process(HOLDER, run) as holder:
        assert said(holder) == "file"
        assert liveness(run) is Liveness.ALIVE
        holder.send_signal(signal.SIGSTOP)
        assert liveness(run) is Liveness.ALIVE
        assert end_dead_runs(instance) == []
        holder.kill()
        holder.wait()
        assert liveness(run) is Liveness.DEAD
    assert end_dead_runs(instance) == [run.run_id]
    assert read(instance, run).status is dg.DagsterRunStatus.FAILURE


def test_a_run_that_was_being_cancelled_is_cancelled(instance: dg.DagsterInstance) -> None:
    run = begin(instance, **{LOCK_TAG: "file"})
    instance.report_run_canceling(run)
    RunLock(run.run_id).release()
    with process(HOLDER, run) as holder:
        said(holder)
    assert end_dead_runs(instance) == [run.run_id]
    assert read(instance, run).status is dg.DagsterRunStatus.CANCELED


def test_one_of_two_observers_ends_a_run(instance: dg.DagsterInstance) -> None:
    run = begin(instance, **{LOCK_TAG: "file"})
    with process(HOLDER, run) as holder:
        said(holder)
    launcher = RunLauncher()
    launcher.register_instance(instance)
    assert launcher.check_run_worker_health(run).status.value == "FAILED"
    assert end_dead_runs(instance) == []
    assert launcher.check_run_worker_health(run).status.value == "RUNNING"


@pytest.mark.parametrize("tag", [None, "none", "file"])
def test_no_run_is_ended_for_want_of_an_answer(
    instance: dg.DagsterInstance, tag: str | None
) -> None:
    # It has not taken its lock yet, could take none, or the lock's place is unreachable.
    run = begin(instance, **({LOCK_TAG: tag} if tag else {}))
    assert end_dead_runs(instance) == []
    assert read(instance, run).status is dg.DagsterRunStatus.STARTED


def test_a_run_that_never_took_its_lock_is_ended(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(instance)
    monkeypatch.setattr(run_liveness, "START_TIMEOUT_S", 0.0)
    assert end_dead_runs(instance) == [run.run_id]


def test_a_run_goes_on_where_no_lock_can_be_taken(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    (tmp_path / "run_locks").write_text("not a directory")
    run = begin(instance)
    lock = RunLock(run.run_id)
    assert lock.tag == {LOCK_TAG: "none"}
    assert lock.problem
    lock.release()


def test_old_locks_are_removed(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    run = begin(instance, **{LOCK_TAG: "file"})
    with process(HOLDER, run) as holder:
        said(holder)
        path = tmp_path / "run_locks" / f"{run.run_id}.lock"
        instance.report_run_failed(run)
        remove_old_locks(instance)
        assert is_locked(path)
    remove_old_locks(instance)
    assert not path.exists()


def test_a_lock_in_postgresql_lives_and_dies_with_its_process(
    instance: dg.DagsterInstance,
    postgres_url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROBUSTNESS_STATE_URL", postgres_url)
    monkeypatch.setattr(run_locks, "FREE_FOR_S", 0.2)
    get_robustness_settings.cache_clear()
    run = begin(instance, **{LOCK_TAG: "postgresql"})
    with process(HOLDER, run) as holder:
        assert said(holder) == "postgresql"
        assert liveness(run) is Liveness.ALIVE
        holder.kill()
        holder.wait()
        wait_until(lambda: liveness(run) is Liveness.ALIVE and is_found_free(run.run_id))
        assert end_dead_runs(instance) == [run.run_id]  # after a second check


def test_a_postgresql_that_is_away_ends_no_run(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql+psycopg://postgres@/state?host={tmp_path}"
    monkeypatch.setenv("ROBUSTNESS_STATE_URL", url)
    get_robustness_settings.cache_clear()
    run = begin(instance, **{LOCK_TAG: "postgresql"})
    assert liveness(run) is Liveness.UNKNOWN


def test_runs_take_turns_and_a_killed_one_leaves_its_place(instance: dg.DagsterInstance) -> None:
    first, second = begin(instance), begin(instance)
    with process(SLOT_HOLDER, first) as one:
        assert said(one) == "begins"
        with process(SLOT_HOLDER, second) as two:
            wait_until(lambda: runs_ahead(second.run_id) == [first.run_id])
            assert not runs_ahead(first.run_id)
            os.kill(one.pid, signal.SIGKILL)
            assert said(two) == "begins"
