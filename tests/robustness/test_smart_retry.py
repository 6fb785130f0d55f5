"""Retrying: what is retried, how long it waits, when it stops, and what it learns."""

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import sqlalchemy as sa

from audio_assets.audio.errors import CorruptFileError
from robustness.circuit_breaker import CircuitBreaker, CircuitBreakerOpenError
from robustness.error_classifier import ErrorClassifier, ErrorType
from robustness.retry_budget import BUDGET_CAPACITY, BUDGET_REFILL_SECONDS, BUDGET_RESERVE
from robustness.retry_history import DEFAULT_PARAMETERS, OUTCOMES_KEPT
from robustness.settings import RobustnessSettings
from robustness.smart_retry import (
    JITTER,
    MAX_DELAY,
    RetryResult,
    RetryStrategy,
    SmartRetryManager,
    get_retry_manager,
    set_testing,
    smart_retry,
)
from robustness.state import StateStore
from robustness.state_schema import errors, retry_budget, retry_outcomes


@pytest.fixture
def manager(store: StateStore) -> SmartRetryManager:
    return manager_on(store)


def manager_on(store: StateStore, ratio: float = 0.2) -> SmartRetryManager:
    settings = RobustnessSettings(retry_budget_ratio=ratio, retry_total_seconds=60)
    return SmartRetryManager(
        store=store, classifier=ErrorClassifier(rules=(), store=store), settings=settings
    )


class Flaky:
    """Fails so many times, then returns "done"."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.failures = failures
        self.error = error or ConnectionResetError("gone")
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "done"


def many_attempts() -> AbstractContextManager[object]:
    """Instant waits, and as many attempts as asked for."""
    return set_testing(True, attempts=1000, cap=True)


class TestDelays:
    @pytest.mark.parametrize(
        ("strategy", "expected"),
        [
            (RetryStrategy.EXPONENTIAL, [1, 2, 4, 8, 16]),
            (RetryStrategy.LINEAR, [1, 2, 3, 4, 5]),
            (RetryStrategy.ADAPTIVE, [1, 2, 4, 8, 16]),
            (RetryStrategy.FIBONACCI, [1, 1, 2, 3, 5]),
            (RetryStrategy.CONSTANT, [1, 1, 1, 1, 1]),
        ],
    )
    def test_formulas(
        self, strategy: RetryStrategy, expected: list[float], manager: SmartRetryManager
    ) -> None:
        for attempt, longest in enumerate(expected):
            delays = [manager.calculate_delay(strategy, attempt) for _ in range(300)]
            assert max(delays) <= longest
            assert min(delays) >= longest * (1 - JITTER)
            assert max(delays) - min(delays) > longest * JITTER * 0.8, "no jitter"

    @pytest.mark.parametrize("strategy", RetryStrategy)
    def test_are_bounded(self, strategy: RetryStrategy, manager: SmartRetryManager) -> None:
        assert manager.calculate_delay(strategy, 10_000) <= MAX_DELAY

    def test_start_from_the_base_asked_for(self, manager: SmartRetryManager) -> None:
        delay = manager.calculate_delay(RetryStrategy.EXPONENTIAL, 2, base_delay=0.1)
        assert 0.4 * (1 - JITTER) <= delay <= 0.4

    def test_whoever_refuses_says_when(self, manager: SmartRetryManager) -> None:
        refused = manager.classifier.classify(CircuitBreakerOpenError("x", 500))
        assert manager.calculate_delay(RetryStrategy.CONSTANT, 0, error_info=refused) == 500


class TestAttempts:
    @pytest.mark.parametrize("strategy", RetryStrategy)
    def test_success_at_last(self, strategy: RetryStrategy, manager: SmartRetryManager) -> None:
        result = manager.retry(Flaky(2), strategy, max_attempts=3, base_delay=0.001)
        assert result.success
        assert result.result == "done"
        assert result.attempts == 3
        assert result.strategy is strategy
        assert result.stopped_by == "success"
        assert len(result.delays) == 2
        assert result.total_time >= sum(result.delays)
        assert result.error is None
        assert result.unwrap() == "done"

    def test_end_with_the_last_error(self, manager: SmartRetryManager) -> None:
        flaky = Flaky(9)
        with many_attempts():
            result = manager.exponential_backoff(flaky, max_attempts=3)
        assert not result.success
        assert result.attempts == flaky.calls == 3
        assert result.stopped_by == "attempts"
        assert result.error is flaky.error
        assert result.error_info
        assert result.error_info.error_type is ErrorType.NETWORK
        with pytest.raises(ConnectionResetError):
            result.unwrap()

    @pytest.mark.parametrize("error", [CorruptFileError("x"), TypeError("x"), KeyError("x")])
    def test_not_retryable_is_not_retried(
        self, error: Exception, manager: SmartRetryManager
    ) -> None:
        flaky = Flaky(9, error)
        result = manager.exponential_backoff(flaky, max_attempts=3)
        assert flaky.calls == 1
        assert result.stopped_by == "not_retryable"
        assert result.delays == ()

    def test_no_wait_that_cannot_be_used(self, manager: SmartRetryManager) -> None:
        flaky = Flaky(9)
        result = manager.exponential_backoff(flaky, timeout=10, base_delay=1000)
        assert flaky.calls == 1
        assert result.stopped_by == "time"

    def test_interruptions_pass_through(self, manager: SmartRetryManager) -> None:
        calls = []

        def interrupted() -> None:
            calls.append(1)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            manager.exponential_backoff(interrupted)
        assert len(calls) == 1

    def test_open_breaker_is_not_hammered(self, manager: SmartRetryManager) -> None:
        breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=3600)
        breaker.force_open()
        flaky = Flaky(0)
        result = manager.exponential_backoff(lambda: breaker.call(flaky), timeout=60)
        assert flaky.calls == 0
        assert result.attempts == 1
        assert result.stopped_by == "time"

    def test_each_retry_is_logged(
        self, manager: SmartRetryManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        with many_attempts(), caplog.at_level(logging.WARNING, "robustness.smart_retry"):
            manager.exponential_backoff(Flaky(2), operation="upload")
        assert [r.getMessage() for r in caplog.records] == [
            "Attempt 1 of 3 at upload failed (gone); next one in 0.0 s",
            "Attempt 2 of 3 at upload failed (gone); next one in 0.0 s",
        ]

    def test_errors_are_recorded_with_how_it_ended(
        self, store: StateStore, manager: SmartRetryManager
    ) -> None:
        with many_attempts():
            manager.exponential_backoff(lambda: None)
            for failures in (1, 9):
                # Each time another error: one that is seen again counts once.
                flaky = Flaky(failures, ConnectionResetError(str(failures)))
                manager.exponential_backoff(flaky, operation="x", context={"file_path": "/a"})
        with store.read() as connection:
            rows = connection.execute(sa.select(errors).order_by(errors.c.id)).all()
        assert [(row.operation, row.file, row.recovered) for row in rows] == [
            ("x", "/a", True),
            ("x", "/a", False),
        ]

    def test_at_least_one_attempt(self, manager: SmartRetryManager) -> None:
        with pytest.raises(ValueError, match="max_attempts"):
            manager.exponential_backoff(Flaky(0), max_attempts=0)


class TestAsync:
    def test_waits_without_blocking(self, manager: SmartRetryManager) -> None:
        flaky = Flaky(1)
        order: list[str] = []

        async def work() -> str:
            order.append("attempt")
            return flaky()

        async def other() -> None:
            order.append("other")

        async def both() -> RetryResult[str]:
            task = asyncio.create_task(manager.retry_async(work, base_delay=0.05))
            await asyncio.sleep(0)
            await other()
            return await task

        result = asyncio.run(both())
        assert result.unwrap() == "done"
        assert order == ["attempt", "other", "attempt"]

    def test_cancellation_passes_through(self, manager: SmartRetryManager) -> None:
        calls = []

        async def cancel() -> None:
            begun = asyncio.Event()

            async def work() -> None:
                calls.append(1)
                begun.set()
                await asyncio.sleep(60)

            task = asyncio.create_task(manager.retry_async(work))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancel())
        assert len(calls) == 1


class TestDecorator:
    def test_returns_or_raises(self) -> None:
        flaky = Flaky(1)

        @smart_retry(strategy=RetryStrategy.EXPONENTIAL, max_attempts=3)
        def work(prefix: str, *, suffix: str) -> str:
            """Work hard."""
            return prefix + flaky() + suffix

        with set_testing(True, attempts=3):
            assert work("<", suffix=">") == "<done>"
            flaky.calls, flaky.failures = 0, 9
            with pytest.raises(ConnectionResetError) as caught:
                work("<", suffix=">")
        assert caught.value is flaky.error
        assert flaky.calls == 3
        assert work.__doc__ == "Work hard."

    def test_coroutine_function(self) -> None:
        flaky = Flaky(1)

        @smart_retry(max_attempts=2)
        async def work() -> str:
            await asyncio.sleep(0)
            return flaky()

        with set_testing(True, attempts=2):
            assert asyncio.run(work()) == "done"

    def test_generator_function_is_refused(self) -> None:
        with pytest.raises(TypeError, match="generator"):

            @smart_retry()
            def work() -> Iterator[int]:
                yield 1


class TestTesting:
    def test_one_attempt_unless_told_otherwise(self, manager: SmartRetryManager) -> None:
        flaky = Flaky(9)
        with set_testing(True):
            assert not manager.exponential_backoff(flaky, max_attempts=5).success
        assert flaky.calls == 1

    def test_switch_without_a_block(self, manager: SmartRetryManager) -> None:
        set_testing(True, attempts=4)
        try:
            assert manager.calculate_delay(RetryStrategy.CONSTANT, 0) == 0
            assert manager.exponential_backoff(Flaky(3), max_attempts=1).success
        finally:
            set_testing(False)
        assert manager.calculate_delay(RetryStrategy.CONSTANT, 0) > 0

    def test_blocks_nest(self, manager: SmartRetryManager) -> None:
        with set_testing(True, attempts=2):
            with set_testing(False):
                assert manager.calculate_delay(RetryStrategy.CONSTANT, 0) > 0
            assert manager.calculate_delay(RetryStrategy.CONSTANT, 0) == 0


class TestBudget:
    def test_storm_is_stopped(self, store: StateStore) -> None:
        manager = manager_on(store)
        calls = 0

        def fail() -> None:
            nonlocal calls
            calls += 1
            raise ConnectionResetError

        operations = 100
        for _ in range(operations):
            result = manager.retry(
                fail, RetryStrategy.CONSTANT, max_attempts=3, base_delay=0, operation="x"
            )
        assert result.stopped_by == "budget"
        retries = calls - operations
        # One more, as the reserve may refill a little meanwhile.
        assert 0.2 * operations <= retries <= BUDGET_RESERVE + 0.2 * operations + 1

    def test_no_ratio_leaves_the_reserve(self, store: StateStore) -> None:
        manager = manager_on(store, ratio=0)
        granted = sum(manager.try_spend("x") for _ in range(50))
        assert granted == BUDGET_RESERVE

    def test_scopes_are_apart(self, manager: SmartRetryManager) -> None:
        while manager.try_spend("x"):
            pass
        assert manager.try_spend("y")

    def test_idle_time_restores_the_reserve_only(
        self, store: StateStore, manager: SmartRetryManager
    ) -> None:
        while manager.try_spend("x"):
            pass
        with store.begin() as connection:
            past = time.time() - 10 * BUDGET_REFILL_SECONDS
            connection.execute(sa.update(retry_budget).values(updated_at=past))
        assert sum(manager.try_spend("x") for _ in range(50)) == BUDGET_RESERVE

    def test_savings_are_bounded(self, store: StateStore) -> None:
        manager = manager_on(store, ratio=30)
        for _ in range(20):
            manager.deposit("x")
        assert sum(manager.try_spend("x") for _ in range(200)) == BUDGET_CAPACITY

    def test_is_shared_by_processes(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/state.db"
        context = multiprocessing.get_context("spawn")
        with context.Pool(2) as pool:
            granted = pool.map(_spend_all, [url] * 2, chunksize=1)
        assert sum(granted) == BUDGET_RESERVE


def _spend_all(url: str) -> int:
    manager = manager_on(StateStore(url, lock_timeout=60), ratio=0)
    granted = 0
    while manager.try_spend("x"):
        granted += 1
    return granted


class TestLearning:
    def test_stats(self, manager: SmartRetryManager) -> None:
        assert manager.get_retry_stats() == {}
        manager.record_outcome(RetryStrategy.EXPONENTIAL, 1, True, 2.0)
        manager.record_outcome(RetryStrategy.EXPONENTIAL, 3, False, 4.0)
        manager.record_outcome(RetryStrategy.ADAPTIVE, 2, True, 1.0, operation="mfcc")
        stats = manager.get_retry_stats()
        assert set(stats) == {"exponential", "adaptive"}
        assert stats["exponential"]["success_rate"] == 0.5
        assert stats["exponential"]["avg_attempts"] == 2.0
        assert stats["exponential"]["avg_total_time"] == 3.0
        assert stats["exponential"]["operations"] == 2

    def test_housekeeping_stays_out_of_the_history(self, manager: SmartRetryManager) -> None:
        with many_attempts():
            manager.exponential_backoff(Flaky(1), record=False)
        assert manager.get_retry_stats() == {}

    def test_stats_are_shared_and_kept(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/state.db"
        first, second = StateStore(url), StateStore(url)
        manager_on(first).retry(Flaky(0), RetryStrategy.CONSTANT)
        first.close()
        assert manager_on(second).get_retry_stats()["constant"]["operations"] == 1
        second.close()

    def test_waits_that_do_not_outlast_the_fault_grow(
        self, store: StateStore, manager: SmartRetryManager
    ) -> None:
        strategy = RetryStrategy.EXPONENTIAL
        default = DEFAULT_PARAMETERS[strategy]
        for _ in range(9):
            manager.record_outcome(strategy, 3, False, 1.0)
        assert manager.parameters(strategy) == default
        manager.record_outcome(strategy, 3, False, 1.0)
        assert manager.parameters(strategy).base_delay == 1.5 * default.base_delay
        assert manager_on(store).parameters(strategy).base_delay == 1.5 * default.base_delay
        assert manager.parameters(RetryStrategy.LINEAR) == DEFAULT_PARAMETERS[RetryStrategy.LINEAR]

    def test_dead_operation_lengthens_its_own_waits_alone(
        self, store: StateStore, manager: SmartRetryManager
    ) -> None:
        strategy = RetryStrategy.EXPONENTIAL
        for _ in range(10):
            manager.record_outcome(strategy, 3, False, 1.0, operation="dead")
        assert manager_on(store).parameters(strategy, "dead").base_delay == 1.5
        for operation in ("healthy", None):
            assert manager.parameters(strategy, operation) == DEFAULT_PARAMETERS[strategy]
        delays = [manager.calculate_delay(strategy, 0, operation="healthy") for _ in range(100)]
        assert max(delays) <= 1.0

    def test_waits_that_always_suffice_shrink(self, manager: SmartRetryManager) -> None:
        strategy = RetryStrategy.CONSTANT
        for _ in range(10):
            manager.record_outcome(strategy, 2, True, 1.0)
        assert manager.parameters(strategy).base_delay == 0.8

    def test_first_successes_teach_nothing(self, manager: SmartRetryManager) -> None:
        for _ in range(30):
            manager.record_outcome(RetryStrategy.CONSTANT, 1, True, 1.0)
        assert manager.parameters(RetryStrategy.CONSTANT).base_delay == 1.0

    def test_adjustment_has_limits(self, manager: SmartRetryManager) -> None:
        for _ in range(120):
            manager.record_outcome(RetryStrategy.CONSTANT, 2, False, 1.0)
        assert manager.parameters(RetryStrategy.CONSTANT).base_delay == 8.0

    def test_adaptive_goes_by_the_operation(self, store: StateStore) -> None:
        manager = manager_on(store)
        for _ in range(9):  # too few to adjust the strategy as a whole
            manager.record_outcome(RetryStrategy.LINEAR, 2, False, 1.0, operation="hopeless")
            manager.record_outcome(RetryStrategy.FIBONACCI, 2, True, 1.0, operation="easy")

        def longest(operation: str, size: float | None = None) -> float:
            return max(
                manager.calculate_delay(
                    RetryStrategy.ADAPTIVE, 0, operation=operation, file_size_mb=size
                )
                for _ in range(300)
            )

        assert longest("easy") < 0.65
        assert 0.9 < longest("never seen") <= 1.0
        assert longest("hopeless") > 1.8
        assert longest("never seen", size=2000) > 1.8

    def test_history_is_bounded(
        self, store: StateStore, manager: SmartRetryManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("robustness.retry_history.OUTCOMES_KEPT", 60)
        assert OUTCOMES_KEPT > 60
        for _ in range(200):
            manager.record_outcome(RetryStrategy.CONSTANT, 1, True, 1.0)
        with store.read() as connection:
            kept = connection.execute(
                sa.select(sa.func.count()).select_from(retry_outcomes)
            ).scalar_one()
        assert kept < 110


def test_one_manager_per_process() -> None:
    assert get_retry_manager() is get_retry_manager()


def test_coroutine_functions_are_refused_where_nothing_awaits_them(
    manager: SmartRetryManager,
) -> None:
    async def later() -> None: ...

    with pytest.raises(TypeError, match="use retry_async"):
        manager.retry(later)
