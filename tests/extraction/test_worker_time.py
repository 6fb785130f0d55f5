"""What the time of the workers is counted as."""

from types import SimpleNamespace
from typing import Any

import pytest

from audio_assets.extraction import worker_time
from audio_assets.extraction.worker_time import WorkerTime


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(worker_time, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def spent(time: WorkerTime) -> dict[str, float]:
    return {what: seconds for what, seconds in time.so_far().items() if seconds}


def test_each_second_of_each_worker_counts_once(clock: SimpleNamespace) -> None:
    pool: Any = SimpleNamespace(size=3, given_up=0)
    time = WorkerTime(pool)
    clock.now = 1.0
    with time.waiting_for("planning_s"):
        clock.now = 2.0
        time.task_begins(alone=False)
        with time.waiting_for("idle_s"):
            clock.now = 4.0
            time.task_ends("computing_s", 2.0, 0.5)
        pool.given_up = 2
        time.task_begins(alone=False)
        time.task_begins(alone=False)
        clock.now = 7.0
        time.task_ends("decoding_s", 3.0, 0.0)
        time.task_ends("decoding_s", 3.0, 0.0)
    assert spent(time) == {
        "events_s": 3.0,
        "planning_s": 3.0,
        "idle_s": 4.0,
        "computing_s": 1.5,
        "core_wait_s": 0.5,
        "memory_wait_s": 3.0,
        "decoding_s": 6.0,
    }
    assert sum(spent(time).values()) == 3 * clock.now


def test_workers_wait_for_the_memory_of_a_task_that_runs_alone(clock: SimpleNamespace) -> None:
    pool: Any = SimpleNamespace(size=2, given_up=0)
    time = WorkerTime(pool)
    time.task_begins(alone=True)
    clock.now = 2.0
    time.task_ends("computing_s", 2.0, 0.0)
    clock.now = 3.0
    assert spent(time) == {"computing_s": 2.0, "memory_wait_s": 2.0, "events_s": 2.0}
