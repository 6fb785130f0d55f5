"""The Dagster adapter in real runs, with both executors."""

import copy
import errno
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from dagster import (
    DagsterEventType,
    DagsterInstance,
    DagsterLogManager,
    JobExecutionResult,
    RetryPolicy,
    execute_job,
    reconstructable,
)
from dagster._core.execution.plan.objects import ErrorSource

from robustness.dagster import SmartRetryPolicy, log_to
from robustness.settings import get_settings
from robustness.smart_retry import (
    JITTER,
    DeferredError,
    RetryStrategy,
    get_retry_manager,
    set_testing,
)
from robustness.state import reset_state_store
from tests.robustness import dagster_jobs


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DagsterInstance]:
    """An instance in a home of its own, whose state store starts empty, with short waits."""
    (tmp_path / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    get_settings.cache_clear()
    reset_state_store()
    get_retry_manager.cache_clear()
    with DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance
    monkeypatch.undo()
    get_settings.cache_clear()
    reset_state_store()
    get_retry_manager.cache_clear()


def run(job: str, fault: str, instance: DagsterInstance, tmp_path: Path) -> JobExecutionResult:
    config = {"path": str(tmp_path / "trace"), "fault": fault}
    return execute_job(
        reconstructable(getattr(dagster_jobs, job)),
        instance=instance,
        run_config={"ops": {"work": {"config": config}}},
    )


def attempts(tmp_path: Path) -> int:
    return len((tmp_path / "trace").read_text().splitlines())


def waits(result: JobExecutionResult) -> list[float]:
    return [
        event.step_retry_data.seconds_to_wait or 0.0
        for event in result.all_events
        if event.event_type is DagsterEventType.STEP_UP_FOR_RETRY
    ]


def messages(result: JobExecutionResult, instance: DagsterInstance) -> str:
    return "\n".join(entry.user_message for entry in instance.all_logs(result.run_id))


def test_the_manager_sets_the_delays(instance: DagsterInstance, tmp_path: Path) -> None:
    result = run("in_process", "flaky", instance, tmp_path)
    assert result.success
    assert attempts(tmp_path) == 3
    assert len(waits(result)) == 2
    assert all(1 - JITTER <= wait <= 1 for wait in waits(result))


def test_policy_reaches_step_processes(instance: DagsterInstance, tmp_path: Path) -> None:
    # The first attempt raises, which the step's process handles; the second one takes that
    # process down, which the run's process handles.
    result = run("multiprocess", "flaky, then crashes", instance, tmp_path)
    assert result.success
    assert attempts(tmp_path) == 3
    assert len(waits(result)) == 2
    assert all(1 - JITTER <= wait <= 1 for wait in waits(result))


def test_a_failure_that_forbids_retries_is_final(instance: DagsterInstance, tmp_path: Path) -> None:
    assert not run("in_process", "forbidden", instance, tmp_path).success
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize("job", ["in_process", "multiprocess"])
def test_what_is_not_retryable_is_not_retried(
    job: str, instance: DagsterInstance, tmp_path: Path
) -> None:
    result = run(job, "defect", instance, tmp_path)
    assert not result.success
    assert attempts(tmp_path) == 1
    (failure,) = result.get_step_failure_events()
    error = failure.step_failure_data.error
    assert error is not None
    assert "the same every time" in error.to_string()
    data = failure.step_failure_data.user_failure_data
    assert data is not None
    assert "the same every time" in (data.description or "")


def test_an_open_breaker_is_waited_for(instance: DagsterInstance, tmp_path: Path) -> None:
    result = run("in_process", "open breaker", instance, tmp_path)
    assert result.success
    assert attempts(tmp_path) == 2
    # Longer than the strategy's own delay of at most 1 s.
    assert 1 < waits(result)[0] <= 1.3


def test_a_wait_beyond_all_bounds_is_not_begun(instance: DagsterInstance, tmp_path: Path) -> None:
    result = run("in_process", "asks for a day", instance, tmp_path)
    assert attempts(tmp_path) == 1
    (failure,) = result.get_step_failure_events()
    data = failure.step_failure_data.user_failure_data
    assert data is not None
    assert "it should wait 86400 s, and ROBUSTNESS_RETRY_TOTAL_SECONDS is 1800" in str(
        data.description
    )


def test_interrupted_step_is_not_retried(instance: DagsterInstance, tmp_path: Path) -> None:
    result = run("in_process", "interrupted", instance, tmp_path)
    assert not result.success
    assert attempts(tmp_path) == 1
    (failure,) = result.get_step_failure_events()
    assert failure.step_failure_data.error_source is ErrorSource.INTERRUPT


def test_log_that_cannot_be_written_fails_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    class FullLog:
        def log(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with log_to(cast("DagsterLogManager", FullLog()), "run"):
        logging.getLogger("robustness.worker_pool").warning("worker gone")
    assert "No space left" in capsys.readouterr().err


def test_logs_and_transitions_reach_the_run(instance: DagsterInstance, tmp_path: Path) -> None:
    result = run("in_process", "logs", instance, tmp_path)
    log = messages(result, instance)
    assert "seen in the run [file=a.flac, attempt=1]" in log
    assert "logging test" in log
    assert "not seen in the run" not in log


def test_copied_policy_is_the_same() -> None:
    policy = SmartRetryPolicy(5, strategy="fibonacci", operation="mfcc", longest_sleep=2.0)
    for other in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert isinstance(other, SmartRetryPolicy)
        assert isinstance(other, RetryPolicy)
        assert other.max_retries == 5
        assert other.strategy is RetryStrategy.FIBONACCI
        assert other.operation == "mfcc"
        assert other.longest_sleep == 2.0


def test_what_is_deferred_says_itself_when_to_come_back() -> None:
    policy = SmartRetryPolicy(strategy="constant")
    try:
        raise DeferredError("three files wait", 90.0)
    except DeferredError:
        assert policy.calculate_delay(1) == 90.0


def test_a_step_that_can_wait_by_itself_is_retried_soon() -> None:
    policy = SmartRetryPolicy(strategy="constant", longest_sleep=2.0)
    assert policy.time_left == 0.0
    try:
        raise DeferredError("three files wait", 90.0)
    except DeferredError:
        assert policy.calculate_delay(1) == 2.0
    assert 2.0 < policy.time_left <= 90.0


def test_waits_can_be_made_instant() -> None:
    with set_testing(True):
        assert SmartRetryPolicy(strategy="constant").calculate_delay(1) == 0
