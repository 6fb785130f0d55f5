"""Faults here are real: the processes hang, crash, are killed, eat memory."""

import contextlib
import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from robustness import worker_handle, worker_pool
from robustness.error_classifier import ErrorClassifier, ErrorInfo, ErrorType
from robustness.state import StateStore
from robustness.worker_pool import (
    RemoteError,
    WorkerCrashedError,
    WorkerMemoryError,
    WorkerPool,
    WorkerStartError,
    WorkerTask,
    WorkerTimeoutError,
    report_stage,
)
from tests.robustness import worker_tasks as tasks

AMPLE = 60.0


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition holds; fail if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    # Each new worker imports the main script, here pytest's.
    with WorkerPool(2, memory_limit_mib=400, preload=["pytest"]) as shared:
        yield shared


def assert_unharmed(pool: WorkerPool) -> None:
    """Both workers take tasks again."""
    futures = [pool.submit(tasks.sleep, 0.05, timeout=AMPLE) for _ in range(4)]
    assert all(is_gone(future.result()) is False for future in futures)


def test_no_file_handles_left_fails_the_task_and_not_the_pool(pool: WorkerPool) -> None:
    assert_unharmed(pool)  # one that is just being started would give handles back
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        failed = pool.submit(tasks.double, 1, timeout=AMPLE, fresh_worker=True).exception(AMPLE)
    finally:
        for handle in taken:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(failed, WorkerStartError)
    # The fork server may have died of it, too; the next worker starts another one.
    wait_for(lambda: pool.submit(tasks.double, 1, timeout=AMPLE).exception() is None)
    assert_unharmed(pool)


def test_idle_workers_draw_tasks_from_a_source(pool: WorkerPool) -> None:
    waiting = [WorkerTask(tasks.double, value, timeout=AMPLE) for value in range(20)]
    drawn = list(waiting)
    asked: set[int] = set()

    def source(pid: int) -> WorkerTask | None:
        asked.add(pid)
        return waiting.pop() if waiting else None

    pool.draw_from(source)
    assert [task.future.result(AMPLE) for task in drawn] == [2 * value for value in range(20)]
    assert asked <= {*pool.worker_pids, 0}
    more = WorkerTask(tasks.double, 7, timeout=AMPLE)
    waiting.append(more)
    pool.wake()
    assert more.future.result(AMPLE) == 14
    assert pool.submit(tasks.double, 1, timeout=AMPLE).result() == 2


def test_a_source_that_fails_harms_nobody(
    pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.draw_from(lambda _: [][0])
    assert pool.submit(tasks.double, 1, timeout=AMPLE).result() == 2
    wait_for(lambda: "source of tasks failed" in caplog.text)


def test_returns_results_in_the_order_of_the_futures(pool: WorkerPool) -> None:
    futures = [pool.submit(tasks.double, value, timeout=AMPLE) for value in range(100)]
    assert [future.result() for future in futures] == [2 * value for value in range(100)]


@pytest.mark.parametrize("fault", [tasks.hang, tasks.hang_in_c, tasks.stop_itself])
def test_a_hung_worker_is_killed_and_costs_its_own_task_alone(
    pool: WorkerPool, fault: Callable[[], None]
) -> None:
    hung = pool.submit(fault, timeout=0.3)
    others = [pool.submit(tasks.sleep, 0.01, timeout=AMPLE) for _ in range(20)]
    with pytest.raises(WorkerTimeoutError) as caught:
        hung.result()
    assert (caught.value.seconds, caught.value.stage, caught.value.errno) == (0.3, None, None)
    assert hung.measurement is not None
    assert hung.measurement.seconds >= 0.3
    # The kernel ends it at once, unless the machine is busy.
    wait_for(lambda: is_gone(hung.measurement.worker_pid))
    assert all(other.exception() is None for other in others)
    assert_unharmed(pool)


@pytest.mark.parametrize("fault", [tasks.hang, tasks.hang_in_c, tasks.stop_itself])
def test_what_hangs_keeps_nobody_from_its_core(fault: Callable[[], None]) -> None:
    with WorkerPool(2) as pool:
        hung = [pool.submit(fault, timeout=AMPLE) for _ in range(2)]
        for _ in range(3):
            pool.submit(tasks.pid, timeout=AMPLE).result()
        assert not any(future.done() for future in hung)
        assert len(pool.worker_pids) <= 4
        pool.kill()
    assert all(isinstance(future.exception(), CancelledError) for future in hung)


def test_what_computes_keeps_its_core_to_itself(pool: WorkerPool) -> None:
    busy = [pool.submit(tasks.compute, 3.0, timeout=AMPLE) for _ in range(2)]
    queued = pool.submit(tasks.pid, timeout=AMPLE)
    assert queued.result() in {future.result() for future in busy}


def test_waiting_for_a_core_is_measured(pool: WorkerPool) -> None:
    rivals = [pool.submit(tasks.compute_on_one_core, 0.5, timeout=AMPLE) for _ in range(2)]
    assert [rival.result() for rival in rivals] == [None, None]
    taken = [rival.measurement for rival in rivals if rival.measurement]
    assert sum(each.core_wait_seconds for each in taken) > 0.2 * max(e.seconds for e in taken)


@pytest.mark.parametrize(
    ("fault", "arguments", "exitcode", "signal_name"),
    [
        (tasks.segfault, (), -signal.SIGSEGV, "SIGSEGV"),
        (tasks.kill_itself, (), -signal.SIGKILL, "SIGKILL"),
        (tasks.exit_at_once, (3,), 3, None),
        (tasks.exit_at_once, (0,), 0, None),
    ],
)
def test_a_crashed_worker_costs_its_own_task_alone(
    pool: WorkerPool,
    fault: Callable[..., None],
    arguments: tuple[int, ...],
    exitcode: int,
    signal_name: str | None,
) -> None:
    crashed = pool.submit(fault, *arguments, timeout=AMPLE)
    others = [pool.submit(tasks.sleep, 0.01, timeout=AMPLE) for _ in range(20)]
    with pytest.raises(WorkerCrashedError) as caught:
        crashed.result()
    assert (caught.value.exitcode, caught.value.signal_name) == (exitcode, signal_name)
    assert crashed.measurement is not None
    assert all(other.exception() is None for other in others)
    assert_unharmed(pool)


def test_every_task_crashing_loses_no_future(pool: WorkerPool) -> None:
    futures = [pool.submit(tasks.kill_itself, timeout=AMPLE) for _ in range(30)]
    assert all(isinstance(future.exception(), WorkerCrashedError) for future in futures)
    assert_unharmed(pool)


def test_a_worker_over_its_memory_budget_is_killed(pool: WorkerPool) -> None:
    greedy = pool.submit(tasks.eat_memory, 20, timeout=AMPLE)
    other = pool.submit(tasks.sleep, 0.2, timeout=AMPLE)
    with pytest.raises(WorkerMemoryError) as caught:
        greedy.result()
    assert caught.value.limit_mib == 400
    assert caught.value.rss_mib > 400
    assert greedy.measurement is not None
    assert greedy.measurement.peak_memory_mib == caught.value.rss_mib
    assert is_gone(greedy.measurement.worker_pid)
    assert other.exception() is None
    assert_unharmed(pool)


def test_pages_of_mapped_files_are_not_in_the_budget(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        for _ in range(500):
            file.write(bytes(tasks.MIB))
    future = pool.submit(tasks.map_file, path, 500, timeout=AMPLE)
    assert future.result() == 0
    assert future.measurement is not None
    assert future.measurement.peak_memory_mib < 400


def test_what_a_task_leaves_in_memory_is_not_charged_to_the_next() -> None:
    with WorkerPool(1, memory_limit_mib=400) as pool:
        leaks = [pool.submit(tasks.leak, 250, timeout=AMPLE) for _ in range(3)]
        assert len({future.result() for future in leaks}) == 3


def test_each_stage_has_its_own_deadline(pool: WorkerPool) -> None:
    deadlines = {"decode": 20.0, "extract": 0.3, "idle": 20.0}
    future = pool.submit(
        tasks.staged, ("decode", 0.5), ("idle", 0.01), ("extract", 60.0), timeout=deadlines
    )
    with pytest.raises(WorkerTimeoutError) as caught:
        future.result()
    assert (caught.value.seconds, caught.value.stage) == (0.3, "extract")
    assert future.measurement is not None
    spent = future.measurement.stage_seconds
    assert spent.keys() == deadlines.keys()
    assert spent["decode"] > 0.4
    assert spent["extract"] >= 0.3
    assert future.measurement.seconds == pytest.approx(sum(spent.values()))


def test_the_first_stage_needs_no_report(pool: WorkerPool) -> None:
    future = pool.submit(tasks.hang, timeout={"decode": 0.2, "extract": AMPLE})
    with pytest.raises(WorkerTimeoutError, match=r"0\.2 s in stage decode"):
        future.result()


def test_stages_do_not_lengthen_a_single_deadline(pool: WorkerPool) -> None:
    steps = [("first", 0.2), ("second", 0.2), ("third", 60.0)]
    future = pool.submit(tasks.staged, *steps, timeout=0.6)
    with pytest.raises(WorkerTimeoutError) as caught:
        future.result()
    assert (caught.value.seconds, caught.value.stage) == (0.6, "third")


def test_a_flood_of_stage_reports_does_not_hold_off_the_deadline(pool: WorkerPool) -> None:
    future = pool.submit(tasks.report_for_ever, timeout=0.3)
    with pytest.raises(WorkerTimeoutError):
        future.result()


def test_a_stage_that_was_not_announced_is_refused(pool: WorkerPool) -> None:
    future = pool.submit(tasks.staged, ("extract", 0.0), timeout={"decode": AMPLE})
    with pytest.raises(ValueError, match="extract"):
        future.result()


def test_report_stage_does_nothing_outside_a_worker() -> None:
    report_stage("decode")


def test_an_exception_arrives_with_its_chain_and_its_traceback(pool: WorkerPool) -> None:
    future = pool.submit(tasks.fail, "chained", timeout=AMPLE)
    with pytest.raises(ValueError, match="cannot use it") as caught:
        future.result()
    cause = caught.value.__cause__
    assert isinstance(cause, FileNotFoundError)
    assert (cause.errno, cause.filename) == (2, "/nowhere")
    assert "worker_tasks.py" in caught.value.__notes__[0]
    assert future.measurement is not None


def test_an_exception_that_cannot_be_sent_is_stood_for(pool: WorkerPool) -> None:
    with pytest.raises(RemoteError) as caught:
        pool.submit(tasks.fail, "odd", timeout=AMPLE).result()
    assert caught.value.type_names == (
        "tests.robustness.worker_tasks.OddError",
        "builtins.Exception",
        "builtins.BaseException",
    )
    assert caught.value.message == "a file, line 3"
    assert "worker_tasks.py" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", tasks.UNSENDABLE)
def test_what_cannot_be_sent_is_classified_as_if_it_had_been(pool: WorkerPool, kind: str) -> None:
    classifier = ErrorClassifier((), store=StateStore())
    arrived = pool.submit(tasks.fail, kind, timeout=AMPLE).exception()
    assert isinstance(arrived, RemoteError)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        tasks.fail(kind)
    here, there = classifier.classify(caught.value), classifier.classify(arrived)
    assert replace(there, at=here.at) == here
    assert_unharmed(pool)


def test_a_stand_in_has_what_the_classifier_goes_by(pool: WorkerPool) -> None:
    def arrived(kind: str) -> ErrorInfo:
        error = pool.submit(tasks.fail, kind, timeout=AMPLE).exception()
        assert isinstance(error, RemoteError)
        return ErrorClassifier((), store=StateStore()).classify(error)

    full = arrived("disk full")
    assert (full.rule, full.error_type) == ("no space left", ErrorType.SYSTEM_RESOURCE)
    declared = arrived("declared by the class")
    assert (declared.error_type, declared.retry_after) == (ErrorType.NETWORK, 7.5)
    assert not declared.systemic
    assert arrived("declared by the instance").error_type is ErrorType.CORRUPT_FILE
    assert arrived("local, network").error_type is ErrorType.NETWORK
    assert arrived("local, memory").error_type is ErrorType.MEMORY


def test_a_task_cannot_end_its_worker_by_raising(pool: WorkerPool) -> None:
    with pytest.raises(RemoteError, match="SystemExit: 3"):
        pool.submit(tasks.leave, timeout=AMPLE).result()


def test_what_cannot_be_pickled_fails_its_task_alone(pool: WorkerPool) -> None:
    with pytest.raises(TypeError, match="pickle"):
        pool.submit(tasks.unpicklable, timeout=AMPLE).result()
    with pytest.raises(TypeError, match="pickle"):
        pool.submit(tasks.length, threading.Lock(), timeout=AMPLE).result()  # type: ignore[arg-type]
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pool.submit(lambda: None, timeout=AMPLE).result()
    assert_unharmed(pool)


def test_large_arguments_and_results(pool: WorkerPool) -> None:
    size = 30 * tasks.MIB
    assert pool.submit(tasks.length, tasks.data(size), timeout=AMPLE).result() == size
    results = [pool.submit(tasks.data, tasks.MIB, timeout=AMPLE) for _ in range(30)]
    assert {len(future.result()) for future in results} == {tasks.MIB}


def test_a_worker_stopped_amid_a_message_is_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_handle, "STALL_SECONDS", 1)
    with WorkerPool(1) as pool:
        future = pool.submit(tasks.stop_amid_message, timeout=AMPLE)
        with pytest.raises(WorkerTimeoutError):
            future.result()
        assert pool.submit(tasks.double, 1, timeout=AMPLE).result() == 2


def test_a_worker_killed_while_idle_costs_nothing(pool: WorkerPool) -> None:
    assert_unharmed(pool)
    pids = pool.worker_pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(is_gone(pid) for pid in pids))
    assert_unharmed(pool)


def test_ten_thousand_tiny_tasks_leave_nothing_behind(pool: WorkerPool) -> None:
    def held() -> tuple[int, int]:
        return tasks.open_descriptors(), threading.active_count()

    def held_by_worker() -> tuple[int, int]:
        return (
            pool.submit(tasks.open_descriptors, timeout=AMPLE).result(),
            pool.submit(tasks.threads, timeout=AMPLE).result(),
        )

    assert_unharmed(pool)
    gc.collect()  # of what earlier tests held
    before = held(), held_by_worker()
    futures = [pool.submit(tasks.double, value, timeout=AMPLE) for value in range(10_000)]
    assert sum(future.result() for future in futures) == 9_999 * 10_000
    for _ in range(20):
        pool.submit(tasks.kill_itself, timeout=AMPLE).exception()
    assert_unharmed(pool)
    wait_for(lambda: all(now <= then for now, then in zip(held(), before[0], strict=True)))
    assert held_by_worker() == before[1]


def test_workers_are_given_up_under_memory_pressure_and_taken_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_pool, "_PRESSURE_SECONDS", 0.05)
    available = 1000.0
    monkeypatch.setattr(worker_pool, "memory_limit_mib", lambda: 1000.0)
    monkeypatch.setattr(worker_pool, "available_memory_mib", lambda: available)
    with WorkerPool(3, memory_high=0.9) as pool:
        wait_for(lambda: len(pool.worker_pids) == 3)
        available = 50.0
        wait_for(lambda: len(pool.worker_pids) == 1)
        survivor = pool.worker_pids
        futures = [pool.submit(tasks.pid, timeout=AMPLE) for _ in range(5)]
        assert {future.result() for future in futures} == set(survivor)
        available = 150.0  # neither scarce nor ample: nothing changes
        assert pool.submit(tasks.sleep, 0.2, timeout=AMPLE).result() == survivor[0]
        assert pool.worker_pids == survivor
        available = 500.0
        wait_for(lambda: len(pool.worker_pids) == 3)
    assert "memory is running out: 1 of 3 workers from now on" in caplog.text
    assert "memory is free again: 3 of 3 workers from now on" in caplog.text


def test_close_finishes_what_was_submitted_and_stops_the_workers() -> None:
    pool = WorkerPool(2)
    futures = [pool.submit(tasks.sleep, 0.02, timeout=AMPLE) for _ in range(10)]
    pool.close()
    assert all(is_gone(future.result(timeout=0)) for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(tasks.pid, timeout=AMPLE)


def test_leaving_by_an_exception_kills_at_once() -> None:
    pool = WorkerPool(2)

    def interrupted() -> None:
        with pool:
            raise KeyboardInterrupt

    futures = [pool.submit(tasks.hang, timeout=AMPLE) for _ in range(4)]
    wait_for(lambda: sum(future.running() for future in futures) == 2)
    pids = pool.worker_pids
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(is_gone(pid) for pid in pids)
    assert len(wait(futures, timeout=20).done) == 4
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)


def test_a_waiting_task_can_be_cancelled(pool: WorkerPool) -> None:
    busy = [pool.submit(tasks.sleep, 0.3, timeout=AMPLE) for _ in range(2)]
    waiting = pool.submit(tasks.pid, timeout=AMPLE)
    assert waiting.cancel()
    assert all(future.exception() is None for future in busy)


@pytest.mark.parametrize("timeout", [0, -1.0, {}, {"decode": 1.0, "extract": 0.0}])
def test_a_task_without_time_is_refused(
    pool: WorkerPool, timeout: float | dict[str, float]
) -> None:
    with pytest.raises(ValueError, match="timeout"):
        pool.submit(tasks.pid, timeout=timeout)


def test_a_pool_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="at least one"):
        WorkerPool(0)


@pytest.mark.parametrize(
    "error",
    [
        WorkerTimeoutError(3.0, "decode"),
        WorkerCrashedError(-9, "SIGKILL", None),
        WorkerMemoryError(700.0, 600.0, "extract"),
    ],
)
def test_worker_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


PARENT = """
import sys, time
import psutil
from robustness.worker_pool import WorkerPool
from tests.robustness import worker_tasks as tasks

if __name__ == "__main__":
    pool = WorkerPool(3)
    futures = [pool.submit(task, timeout=600) for task in (tasks.hang, tasks.hang_in_c)]
    idle = pool.submit(tasks.pid, timeout=60).result()
    while not all(future.running() for future in futures):
        time.sleep(0.01)
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    {last}
"""


@pytest.mark.parametrize(
    ("last", "end"),
    [
        ("time.sleep(600)", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGTERM),
        ("with pool: time.sleep(600)", signal.SIGINT),
        ("pool.close()", signal.SIGINT),
        ("sys.exit(0)", None),
    ],
)
def test_nothing_survives_the_parent(last: str, end: signal.Signals | None, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(last=last))
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    try:
        family = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(family) >= 5  # three workers, the fork server, the resource tracker
        if end is not None:
            parent.send_signal(end)
        parent.wait(30)
        wait_for(lambda: all(is_gone(pid) for pid in family))
    finally:
        parent.kill()
        parent.stdout.close()


def test_the_pool_survives_its_fork_server(pool: WorkerPool) -> None:
    running = pool.submit(tasks.sleep, 0.5, timeout=AMPLE)
    wait_for(running.running)
    before = pool.worker_pids
    server = psutil.Process(before[0]).parent()
    assert server is not None
    assert server.pid != os.getpid()
    server.kill()
    wait_for(lambda: is_gone(server.pid))
    assert running.exception() is None
    for _ in range(4):
        pool.submit(tasks.kill_itself, timeout=AMPLE).exception()
    assert_unharmed(pool)
    wait_for(lambda: not set(before) & set(pool.worker_pids))
    assert all(is_gone(pid) for pid in before)
