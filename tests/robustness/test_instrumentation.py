"""What the package tells hooks of."""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

import pytest

from robustness import instrumentation
from robustness.adaptive_timeout import AdaptiveTimeoutManager
from robustness.circuit_breaker import CircuitBreaker, CircuitBreakerOpenError
from robustness.error_classifier import ErrorClassifier
from robustness.instrumentation import EVENTS, Event, emit, set_hooks
from robustness.quarantine import Quarantine
from robustness.smart_retry import RetryStrategy, SmartRetryManager
from robustness.state import StateStore
from robustness.worker_pool import WorkerPool
from tests.conftest import PROJECT

pytestmark = pytest.mark.usefixtures("told")


@pytest.fixture
def told() -> Iterator[list[tuple[str, float, Mapping[str, str]]]]:
    """What a hook is told."""
    events: list[tuple[str, float, Mapping[str, str]]] = []
    set_hooks([lambda event, value, labels: events.append((event.name, value, labels))])
    yield events
    set_hooks(None)


def test_each_event_is_told_with_its_labels(
    store: StateStore, told: list[tuple[str, float, Mapping[str, str]]], tmp_path: object
) -> None:
    breaker = CircuitBreaker("b", failure_threshold=1, store=store)
    with pytest.raises(OSError, match="away"), breaker.call:
        raise OSError(5, "away")
    with pytest.raises(CircuitBreakerOpenError), breaker.call:
        pass
    ErrorClassifier(store=store).classify(MemoryError())
    retries = SmartRetryManager(store=store)
    tries = iter([False, True])

    def once() -> None:
        if not next(tries):
            raise ConnectionError

    retries.retry(once, RetryStrategy.LINEAR, 2, operation="fetch", base_delay=0.0)
    AdaptiveTimeoutManager(store=store).record_performance("key", 1.0, 2.0, False, 2.0)
    Quarantine(store).add("h", "key", file_key="a", error_type="timeout", reason="slow")
    with WorkerPool(1) as pool:
        assert pool.submit(time.sleep, 60, timeout=0.5).exception()
    StateStore(f"sqlite:///{tmp_path}").query(lambda c: None)  # a directory

    assert {name for name, _, _ in told} == EVENTS.keys()
    assert all(labels.keys() == set(EVENTS[name].labels) for name, _, labels in told)
    last = {name: (value, labels) for name, value, labels in told}
    assert last["breaker_transitions"] == (1.0, {"breaker": "b", "to_state": "open"})
    assert last["retried"][1] == {
        "operation": "fetch",
        "strategy": "linear",
        "outcome": "succeeded",
    }
    assert last["duration_seconds"] == (2.0, {"operation": "key", "outcome": "timed_out"})
    assert last["worker_failures"][1] == {"error": "WorkerTimeoutError"}


def test_a_hook_that_fails_stops_nobody(
    told: list[tuple[str, float, Mapping[str, str]]], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Event, value: float, labels: Mapping[str, str]) -> None:
        raise RuntimeError

    set_hooks([fail, lambda event, value, labels: told.append((event.name, value, labels))])
    emit("state_failures")
    assert told == [("state_failures", 1.0, {})]
    assert "A hook for state_failures failed" in caplog.text


def test_prometheus_counts_by_itself(tmp_path: object) -> None:
    pytest.importorskip("prometheus_client")
    script = (
        "from robustness.instrumentation import emit, set_hooks\n"
        "emit('errors', error_type='memory', severity='high')\n"
        "emit('timeout_seconds', 3.0, operation='key')\n"
        "set_hooks([]); emit('state_failures')\n"
        "from prometheus_client import generate_latest\n"
        "print(generate_latest().decode())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    assert 'robustness_errors_total{error_type="memory",severity="high"} 1.0' in printed
    assert 'robustness_timeout_seconds_sum{operation="key"} 3.0' in printed
    assert "robustness_state_failures_total 0.0" in printed
    assert instrumentation._hooks  # those of this process are its own


def test_threads_may_begin_at_once() -> None:
    script = (
        "import sys, threading, prometheus_client\n"
        "from robustness.instrumentation import emit\n"
        "sys.setswitchinterval(1e-6)\n"
        "failed = []\n"
        "threading.excepthook = failed.append\n"
        "at_once = threading.Barrier(8)\n"
        "def count():\n"
        "    at_once.wait()\n"
        "    emit('breaker_refusals', breaker='b')\n"
        "threads = [threading.Thread(target=count) for _ in range(8)]\n"
        "for each in threads: each.start()\n"
        "for each in threads: each.join()\n"
        "sys.exit(len(failed))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
