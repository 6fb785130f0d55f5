import asyncio
import gc
import itertools
import logging
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from robustness import state
from robustness.circuit_breaker import (
    BreakerOptions,
    CircuitBreaker,
    CircuitBreakerOpenError,
    CircuitState,
    Permit,
    Transition,
    add_transition_listener,
    all_circuit_breakers,
    circuit_breaker,
    get_circuit_breaker,
)
from robustness.log_context import log_context
from robustness.settings import get_settings
from robustness.state import StateStore, reset_state_store
from robustness.state_schema import breaker_probes, breaker_transitions
from tests.robustness.shared_state import (
    processes,
    rows_of,
    run_in_processes,
    wait_until,
)

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class OutageError(Exception):
    """Counts."""


class BadFileError(Exception):
    """Does not count."""


def is_outage(error: Exception) -> bool:
    return isinstance(error, OutageError)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process-wide store of this test's own."""
    monkeypatch.delenv("ROBUSTNESS_STATE_URL", raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    get_settings.cache_clear()
    reset_state_store()
    yield tmp_path
    get_settings.cache_clear()
    reset_state_store()


def fail(error: Exception | None = None) -> None:
    raise error or OutageError("no answer")


def fail_once(breaker: CircuitBreaker, error: Exception | None = None) -> None:
    error = error or OutageError("no answer")
    with pytest.raises(type(error)):
        breaker.call(fail, error)


def open_up(breaker: CircuitBreaker) -> None:
    for _ in range(breaker.failure_threshold):
        fail_once(breaker)


# One process


def test_opens_after_failures_in_a_row_and_says_when_to_come_back() -> None:
    breaker = CircuitBreaker(failure_threshold=3, recovery_timeout=60, counts=is_outage)
    fail_once(breaker)
    fail_once(breaker)
    assert breaker.call(lambda: 42) == 42
    fail_once(breaker)
    fail_once(breaker)
    assert breaker.get_state() is CLOSED
    fail_once(breaker)
    assert breaker.get_state() is OPEN
    with pytest.raises(CircuitBreakerOpenError) as caught:
        breaker.call(pytest.fail)
    assert 59 < caught.value.retry_after <= 60
    assert "OutageError: no answer" in str(caught.value)
    assert "try again in 60 s" in str(caught.value)


def test_open_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CircuitBreakerOpenError("a", 12.5)))
    assert (error.name, error.retry_after) == ("a", 12.5)
    assert str(error) == "Circuit breaker 'a' is open; try again in 13 s"


def test_successful_probe_closes() -> None:
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=0.02, counts=is_outage)
    open_up(breaker)
    wait_until(lambda: breaker.get_state() is HALF_OPEN)
    assert breaker.call(lambda: 1) == 1
    assert breaker.get_state() is CLOSED


def test_failed_probe_opens_again() -> None:
    breaker = CircuitBreaker(failure_threshold=3, recovery_timeout=1, counts=is_outage)
    open_up(breaker)
    wait_until(lambda: breaker.get_state() is HALF_OPEN)
    fail_once(breaker)
    assert breaker.get_stats()["state"] == "OPEN"


def test_several_probes_may_be_asked_for() -> None:
    breaker = CircuitBreaker(
        failure_threshold=1,
        recovery_timeout=0,
        half_open_permits=2,
        half_open_successes=3,
        counts=is_outage,
    )
    open_up(breaker)
    first, second = breaker.acquire(), breaker.acquire()
    assert first.is_probe
    assert second.is_probe
    with pytest.raises(CircuitBreakerOpenError, match="is being probed"):
        breaker.acquire()
    first.succeeded()
    second.succeeded()
    assert breaker.get_state() is HALF_OPEN
    breaker.call(int)
    assert breaker.get_state() is CLOSED


def test_probe_given_back_or_ignored_decides_nothing() -> None:
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=0, counts=is_outage)
    open_up(breaker)
    breaker.acquire().release()
    breaker.acquire().failed(BadFileError())
    with pytest.raises(KeyboardInterrupt), breaker.call:
        raise KeyboardInterrupt
    permit = breaker.acquire()
    permit.failed(OutageError())
    permit.succeeded()  # an outcome is reported once
    assert breaker.get_stats()["state"] == "HALF_OPEN"  # open again, its 0 s over
    assert breaker.get_stats()["failure_count"] == 2
    assert breaker.get_stats()["success_count"] == 0


def test_errors_that_do_not_count_are_recorded() -> None:
    breaker = CircuitBreaker(failure_threshold=2, recovery_timeout=60, counts=is_outage)
    fail_once(breaker)
    for _ in range(5):
        fail_once(breaker, BadFileError())
    stats = breaker.get_stats()
    assert stats["state"] == "CLOSED"
    assert stats["failure_count"] == 1
    assert stats["ignored_count"] == 5
    assert stats["consecutive_failures"] == 1
    fail_once(breaker)
    assert breaker.get_state() is OPEN


def test_classifier_decides_by_default_what_counts() -> None:
    class DamagedError(Exception):
        error_type = "CORRUPT_FILE"

    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=60)
    fail_once(breaker, DamagedError())
    assert breaker.get_state() is CLOSED
    fail_once(breaker, TimeoutError())
    assert breaker.get_state() is OPEN


def test_stats() -> None:
    breaker = CircuitBreaker(failure_threshold=2, recovery_timeout=60, counts=is_outage)
    for _ in range(3):
        breaker.call(int)
    open_up(breaker)
    for _ in range(4):
        with pytest.raises(CircuitBreakerOpenError):
            breaker.acquire()
    stats = breaker.get_stats()
    assert {
        "state": "OPEN",
        "forced": None,
        "failure_count": 2,
        "success_count": 3,
        "ignored_count": 0,
        "rejected_count": 4,
        "consecutive_failures": 2,
        "failure_rate": None,
        "slow_call_rate": None,
        "last_error": "OutageError: no answer",
        "failure_threshold": 2,
        "recovery_timeout": 60,
    }.items() <= stats.items()
    assert 0 < stats["retry_after"] <= 60
    assert stats["opened_at"] == stats["last_failure_at"]


def test_every_way_of_guarding() -> None:
    breaker = CircuitBreaker(failure_threshold=4, recovery_timeout=60, counts=is_outage)
    with pytest.raises(OutageError), breaker.call:
        fail()
    with pytest.raises(OutageError):
        breaker.call(fail)
    with breaker.call as permit, breaker.call:
        assert isinstance(permit, Permit)
    assert breaker.call(divmod, 7, 2) == (3, 1)
    stats = breaker.get_stats()
    assert (stats["failure_count"], stats["success_count"]) == (2, 3)


def test_decorator_on_functions_and_coroutine_functions() -> None:
    @circuit_breaker(failure_threshold=1, recovery_timeout=60, counts=is_outage)
    def halve(number: int) -> float:
        if number % 2:
            raise OutageError
        return number / 2

    @circuit_breaker(failure_threshold=1, recovery_timeout=60, counts=is_outage)
    async def halve_later(number: int) -> float:
        await asyncio.sleep(0)
        if number % 2:
            raise OutageError
        return number / 2

    assert halve(4) == 2
    assert asyncio.run(halve_later(4)) == 2
    with pytest.raises(OutageError):
        halve(3)
    with pytest.raises(OutageError):
        asyncio.run(halve_later(3))
    with pytest.raises(CircuitBreakerOpenError):
        halve(4)
    with pytest.raises(CircuitBreakerOpenError):
        asyncio.run(halve_later(4))
    assert halve.__name__ == "halve"
    assert halve.breaker.get_state() is OPEN  # type: ignore[attr-defined]


def test_what_runs_nothing_when_called_is_refused() -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    breaker = CircuitBreaker(counts=is_outage)
    for function in (coroutine, generator):
        with pytest.raises(TypeError, match=function.__name__):
            breaker.call(function)
    with pytest.raises(TypeError, match="generator"):
        circuit_breaker()(generator)
    assert breaker.get_stats()["success_count"] == 0


def test_cancelled_task_says_nothing_about_the_work() -> None:
    @circuit_breaker(failure_threshold=1, recovery_timeout=60, counts=lambda error: True)
    async def hang() -> None:
        await asyncio.sleep(3600)

    async def cancel_it() -> None:
        task = asyncio.create_task(hang())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_it())
    stats = hang.breaker.get_stats()  # type: ignore[attr-defined]
    assert (stats["state"], stats["failure_count"]) == ("CLOSED", 0)


def test_late_outcome_of_a_former_state_decides_nothing() -> None:
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=0, counts=is_outage)
    slow_success, slow_failure = breaker.acquire(), breaker.acquire()
    open_up(breaker)
    probe = breaker.acquire()
    slow_success.succeeded()
    assert breaker.get_state() is HALF_OPEN
    probe.succeeded()
    slow_failure.failed(OutageError("began before the outage was over"))
    assert breaker.get_state() is CLOSED
    assert breaker.get_stats()["failure_count"] == 2


# The sliding window


def window_breaker(store: StateStore, **options: float) -> CircuitBreaker:
    settings: BreakerOptions = {
        "failure_threshold": 1000,
        "recovery_timeout": 60,
        "window_size": 10,
        "minimum_calls": 4,
        "counts": is_outage,
        "store": store,
    }
    return CircuitBreaker("window", **(settings | options))  # type: ignore[arg-type]


def test_failure_rate_opens(store: StateStore) -> None:
    breaker = window_breaker(store, failure_rate_threshold=0.5)
    fail_once(breaker)
    breaker.call(int)
    fail_once(breaker)
    assert breaker.get_stats()["failure_rate"] is None  # too few calls
    breaker.call(int)
    assert breaker.get_state() is OPEN


def test_old_calls_leave_the_window(store: StateStore) -> None:
    breaker = window_breaker(store, failure_rate_threshold=0.5)
    for _ in range(6):
        breaker.call(int)
    for _ in range(4):
        fail_once(breaker)
    assert breaker.get_stats()["failure_rate"] == 0.4
    assert breaker.get_state() is CLOSED
    fail_once(breaker)
    assert breaker.get_state() is OPEN
    breaker.reset()
    assert breaker.get_stats()["failure_rate"] is None


def test_window_of_time(store: StateStore) -> None:
    breaker = window_breaker(store, failure_rate_threshold=0.5, window_seconds=0.05)
    for _ in range(3):
        fail_once(breaker)
    time.sleep(0.06)
    fail_once(breaker)
    assert breaker.get_state() is CLOSED


def test_slow_calls_open(store: StateStore) -> None:
    breaker = window_breaker(store, slow_call_seconds=2.0, slow_call_rate_threshold=0.5)
    for seconds in (1.0, 3.0, 1.0):
        breaker.acquire().succeeded(seconds)
    assert breaker.get_state() is CLOSED
    breaker.acquire().succeeded(2.5)
    assert breaker.get_state() is OPEN


def test_slow_probe_opens_again(store: StateStore) -> None:
    breaker = CircuitBreaker(
        failure_threshold=1,
        recovery_timeout=0,
        slow_call_seconds=2.0,
        slow_call_rate_threshold=0.5,
        counts=is_outage,
        store=store,
    )
    open_up(breaker)
    breaker.acquire().succeeded(3.0)
    assert [(row["from_state"], row["to_state"]) for row in rows_of(store, breaker_transitions)][
        -1
    ] == ("HALF_OPEN", "OPEN")


@pytest.mark.parametrize(
    "options",
    [
        {"failure_threshold": 0},
        {"recovery_timeout": -1},
        {"failure_rate_threshold": 1.5},
        {"slow_call_seconds": 3.0},
        {"slow_call_rate_threshold": 0.5},
        {"window_size": 5, "minimum_calls": 6},
        {"half_open_permits": 0},
    ],
)
def test_options_out_of_range(options: BreakerOptions) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CircuitBreaker(**options)


# By hand


def test_forced_open_until_reset(store: StateStore) -> None:
    breaker = CircuitBreaker("b", recovery_timeout=0, counts=is_outage, store=store)
    elsewhere = CircuitBreaker("b", recovery_timeout=0, store=store)
    breaker.force_open()
    assert elsewhere.get_state() is OPEN
    with pytest.raises(CircuitBreakerOpenError, match="is held open by hand"):
        elsewhere.acquire()
    breaker.reset()
    assert breaker.call(int) == 0


def test_disabled_lets_everything_through_and_counts(store: StateStore) -> None:
    breaker = CircuitBreaker(
        "b", failure_threshold=1, recovery_timeout=60, counts=is_outage, store=store
    )
    open_up(breaker)
    breaker.disable()
    for _ in range(3):
        fail_once(breaker)
    assert breaker.get_state() is CLOSED
    assert breaker.get_stats()["failure_count"] == 4
    assert breaker.get_stats()["forced"] == "disabled"
    breaker.reset()
    stats = breaker.get_stats()
    assert (stats["forced"], stats["failure_count"], stats["state"]) == (None, 0, "CLOSED")
    assert [
        (row["from_state"], row["to_state"]) for row in rows_of(store, breaker_transitions)
    ] == [
        ("CLOSED", "OPEN"),
        ("OPEN", "DISABLED"),
        ("DISABLED", "CLOSED"),
    ]


# Events and the registry


def test_transitions_are_events_logged_and_stored(
    store: StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="robustness.circuit_breaker")
    seen: list[Transition] = []

    def broken_listener(_transition: Transition) -> None:
        raise LookupError("a listener's own trouble")

    removers = [add_transition_listener(broken_listener), add_transition_listener(seen.append)]
    try:
        breaker = CircuitBreaker(
            "b", failure_threshold=1, recovery_timeout=0, counts=is_outage, store=store
        )
        with log_context(run_id="run-7"):
            open_up(breaker)
        breaker.call(int)
    finally:
        for remove in removers:
            remove()
    moves = [("CLOSED", "OPEN"), ("OPEN", "HALF_OPEN"), ("HALF_OPEN", "CLOSED")]
    assert [(event.from_state, event.to_state) for event in seen] == moves
    stored = rows_of(store, breaker_transitions)
    assert [(row["from_state"], row["to_state"]) for row in stored] == moves
    assert [row["run_id"] for row in stored] == ["run-7", None, None]
    assert "1 failures in a row, the last OutageError: no answer" in str(stored[0]["reason"])
    assert "Circuit breaker 'b' went from CLOSED to OPEN" in caplog.text
    assert "A listener for circuit breaker transitions failed" in caplog.text
    breaker.force_open()
    assert len(seen) == 3


@pytest.mark.usefixtures("home")
def test_registry() -> None:
    expected = {
        "audio_processing": (3, 30),
        "database_operations": (5, 60),
        "network_operations": (3, 120),
        "feature_extraction": (2, 45),
        "feature:key": (5, 60),
    }
    for name, (threshold, timeout) in expected.items():
        breaker = get_circuit_breaker(name)
        assert breaker is get_circuit_breaker(name)
        assert (breaker.failure_threshold, breaker.recovery_timeout) == (threshold, timeout)
    others = all_circuit_breakers()  # of earlier tests, without a name
    for name in ("network_operations", "feature:key"):
        with pytest.raises(TimeoutError):
            get_circuit_breaker(name).call(fail, TimeoutError())
    stats = {
        name: breaker.get_stats()
        for name, breaker in all_circuit_breakers().items()
        if name not in others
    }
    assert {name: stat["failure_count"] for name, stat in stats.items()} == {
        "feature:key": 1,
        "network_operations": 1,
    }


@pytest.mark.usefixtures("home")
def test_breakers_without_a_name_are_listed_while_they_are_in_use() -> None:
    first, second = CircuitBreaker(counts=is_outage), CircuitBreaker(counts=is_outage)
    assert first.name != second.name
    fail_once(first)
    listed = all_circuit_breakers()
    assert (listed[first.name], listed[second.name]) == (first, second)
    assert listed[first.name].get_stats()["failure_count"] == 1
    name = first.name
    del first, listed
    gc.collect()
    assert name not in all_circuit_breakers()
    assert second.name in all_circuit_breakers()


@pytest.mark.usefixtures("home")
def test_settings_give_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_FAILURE_THRESHOLD", "2")
    monkeypatch.setenv("CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "7")
    get_settings.cache_clear()
    breaker = CircuitBreaker("b", counts=is_outage)
    assert (breaker.failure_threshold, breaker.recovery_timeout) == (2, 7)
    assert CircuitBreaker("c", failure_threshold=9).failure_threshold == 9


# Many processes


def make_breaker(url: str, **options: float | StateStore) -> CircuitBreaker:
    settings: BreakerOptions = {
        "failure_threshold": 3,
        "recovery_timeout": 0.02,
        "counts": is_outage,
        "store": StateStore(url, lock_timeout=20),
    }
    return CircuitBreaker("shared", **(settings | options))  # type: ignore[arg-type]


def test_state_survives_a_restart(url: str) -> None:
    run_in_processes(1, lambda: open_up(make_breaker(url, recovery_timeout=60)))
    breaker = make_breaker(url, recovery_timeout=60)
    assert breaker.get_state() is OPEN
    with pytest.raises(CircuitBreakerOpenError):
        breaker.acquire()


def test_failures_of_several_processes_add_up(url: str) -> None:
    run_in_processes(3, lambda: fail_once(make_breaker(url, recovery_timeout=60)))
    assert make_breaker(url).get_stats()["state"] == "OPEN"


def test_successes_reach_the_store_soon_and_at_exit(url: str) -> None:
    breaker = make_breaker(url)
    for _ in range(5):
        breaker.call(int)
    elsewhere = make_breaker(url)
    wait_until(lambda: elsewhere.get_stats()["success_count"] == 5)

    def succeed_and_exit() -> None:
        make_breaker(url).call(int)
        state._return_all()  # as at the exit of a whole interpreter

    run_in_processes(4, succeed_and_exit)
    assert elsewhere.get_stats()["success_count"] == 9


def test_pending_successes_are_not_stored_again_by_a_forked_process(url: str) -> None:
    breaker = make_breaker(url)
    breaker.call(int)
    run_in_processes(3, breaker.call, int)
    run_in_processes(3, state._return_all)
    wait_until(lambda: breaker.get_stats()["success_count"] > 0)  # a thread may be storing it
    assert breaker.get_stats()["success_count"] == 1


def test_success_stored_late_does_not_hide_failures_after_it(url: str) -> None:
    breaker, elsewhere = make_breaker(url), make_breaker(url)
    breaker.call(int)
    fail_once(elsewhere)
    fail_once(elsewhere)
    assert breaker.get_stats()["success_count"] == 1
    assert elsewhere.get_stats()["consecutive_failures"] == 2


@pytest.mark.parametrize("permits", [1, 3])
def test_ten_processes_hammer_one_breaker(url: str, permits: int) -> None:
    """No more probes at once than permitted, and every transition follows from the last.

    Probes last up to five times the recovery timeout: some go on while the breaker, opened by
    another probe's failure, is half-open again.
    """
    make_breaker(url).get_stats()
    probing = processes.Value("i", 0)
    most = processes.Value("i", 0)
    probes = processes.Value("i", 0)
    has_closed, has_reopened = processes.Event(), processes.Event()
    start = processes.Barrier(10)

    def watch(transition: Transition) -> None:
        if transition.from_state == HALF_OPEN:
            (has_closed if transition.to_state == CLOSED else has_reopened).set()

    def hammer() -> None:
        add_transition_listener(watch)
        randomness = random.Random(os.getpid())
        store = StateStore(url, lock_timeout=20)
        breaker = make_breaker(url, half_open_permits=permits, half_open_successes=2, store=store)
        start.wait(30)
        end = time.monotonic() + 50
        while time.monotonic() < end and not (
            has_closed.is_set()
            and has_reopened.is_set()
            and probes.value >= 20
            and most.value >= permits
        ):
            try:
                permit = breaker.acquire()
            except CircuitBreakerOpenError:
                time.sleep(0.002)
                continue
            if permit.is_probe:
                with probing.get_lock():
                    probing.value += 1
                    probes.value += 1
                    most.value = max(most.value, probing.value)
                time.sleep(randomness.uniform(0, 0.1))
                with probing.get_lock():
                    probing.value -= 1
            match randomness.random():
                case chance if chance < 0.3:
                    permit.failed(OutageError("struck"))
                case chance if chance < 0.4:
                    permit.failed(BadFileError())
                case chance if chance < 0.5:
                    permit.release()
                case _:
                    permit.succeeded()
            time.sleep(0.001)
        assert not store.degraded

    run_in_processes(10, hammer)
    assert probes.value >= 20
    assert most.value == permits

    store = StateStore(url)
    assert rows_of(store, breaker_probes) == []
    moves = [(row["from_state"], row["to_state"]) for row in rows_of(store, breaker_transitions)]
    allowed = {
        ("CLOSED", "OPEN"),
        ("OPEN", "HALF_OPEN"),
        ("HALF_OPEN", "OPEN"),
        ("HALF_OPEN", "CLOSED"),
    }
    assert set(moves) == allowed
    assert moves[0][0] == "CLOSED"
    assert all(before[1] == after[0] for before, after in itertools.pairwise(moves))
    stats = make_breaker(url).get_stats()
    assert stats["rejected_count"] > 0


def test_probe_still_running_takes_a_permit_of_the_next_half_open_state(url: str) -> None:
    breaker = make_breaker(url, recovery_timeout=0, half_open_permits=2)
    open_up(breaker)
    slow, failing = breaker.acquire(), breaker.acquire()
    failing.failed(OutageError())
    second = breaker.acquire()
    with pytest.raises(CircuitBreakerOpenError, match="is being probed"):
        breaker.acquire()
    slow.succeeded()  # began before the breaker opened again: decides nothing
    assert breaker.get_stats()["state"] == "HALF_OPEN"
    third = breaker.acquire()
    second.succeeded()
    assert breaker.get_state() is CLOSED
    third.succeeded()


def test_reset_takes_back_the_permits_of_probes(url: str) -> None:
    breaker = make_breaker(url, failure_threshold=1, recovery_timeout=0)
    open_up(breaker)
    breaker.acquire()  # never comes back
    breaker.reset()
    open_up(breaker)
    breaker.acquire().succeeded()
    assert breaker.get_state() is CLOSED


def test_killed_prober_gives_its_permit_back(url: str) -> None:
    breaker = make_breaker(url, recovery_timeout=0)
    open_up(breaker)
    is_probing = processes.Event()

    def probe_and_hang() -> None:
        make_breaker(url, recovery_timeout=0).acquire(lease_seconds=1.0)
        is_probing.set()
        signal.pause()

    child = processes.Process(target=probe_and_hang)
    child.start()
    assert is_probing.wait(30)
    with pytest.raises(CircuitBreakerOpenError, match="is being probed"):
        breaker.acquire()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()

    def permitted() -> bool:
        try:
            breaker.acquire(lease_seconds=60).succeeded()
        except CircuitBreakerOpenError:
            return False
        return True

    wait_until(permitted)
    assert breaker.get_state() is CLOSED
    assert rows_of(StateStore(url), breaker_probes) == []


def test_probe_that_outlived_its_lease_decides_nothing_once_replaced(url: str) -> None:
    breaker = make_breaker(url, recovery_timeout=0)
    open_up(breaker)
    late = breaker.acquire(lease_seconds=0.01)
    time.sleep(0.02)
    replacement = breaker.acquire()
    late.succeeded()
    assert breaker.get_stats()["state"] == "HALF_OPEN"
    replacement.succeeded()
    assert breaker.get_state() is CLOSED


def test_threads_share_one_object(store: StateStore) -> None:
    breaker = CircuitBreaker("b", failure_threshold=10_000, counts=is_outage, store=store)

    def work() -> None:
        for number in range(40):
            permit = breaker.acquire()
            permit.failed(OutageError()) if number % 10 == 0 else permit.succeeded()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = breaker.get_stats()
    assert (stats["failure_count"], stats["success_count"]) == (32, 288)


# Faults of the store


def lock_database(path: Path) -> Callable[[], None]:
    """Lock a SQLite file from another process; return what ends that."""
    is_locked, release = processes.Event(), processes.Event()

    def hold() -> None:
        with StateStore(f"sqlite:///{path}").begin():
            is_locked.set()
            release.wait(60)

    child = processes.Process(target=hold)
    child.start()
    assert is_locked.wait(30)

    def unlock() -> None:
        release.set()
        child.join()

    return unlock


def test_breaker_works_on_without_its_store(tmp_path: Path) -> None:
    path = tmp_path / "robustness.db"
    store = StateStore(f"sqlite:///{path}", lock_timeout=0.1, retry_interval=0.05)
    breaker = CircuitBreaker(
        "b", failure_threshold=2, recovery_timeout=60, counts=is_outage, store=store
    )
    fail_once(breaker)
    unlock = lock_database(path)
    fail_once(breaker)  # what this process knew still counts
    assert store.degraded
    assert breaker.get_state() is OPEN
    breaker.reset()
    assert breaker.call(int) == 0
    unlock()
    wait_until(lambda: (breaker.get_stats(), not store.degraded)[1])
    fail_once(breaker)
    assert StateStore(f"sqlite:///{path}").query(
        lambda c: c.execute(sa.text("SELECT failure_count FROM circuit_breakers")).all()
    ) == [(2,)]
