"""What the robustness layer itself costs, in microseconds, beside pybreaker and tenacity."""

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybreaker
import tenacity

from audio_assets.audio.errors import CorruptFileError
from robustness.adaptive_timeout import AdaptiveTimeoutManager
from robustness.circuit_breaker import CircuitBreaker
from robustness.error_classifier import ErrorClassifier
from robustness.smart_retry import SmartRetryManager
from robustness.state import StateStore

ROUNDS = 5
_BUDGET_S = 0.5
"""Time that one round of one operation may take (s)."""


def microseconds(operation: Callable[[], object], *, quick: bool) -> float:
    """Return the median time of an operation over some rounds (µs)."""
    operation()
    began = time.perf_counter()
    operation()
    once = max(time.perf_counter() - began, 1e-7)
    count = max(int((0.01 if quick else _BUDGET_S) / once), 1)
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(count):
            operation()
        rounds.append((time.perf_counter() - began) / count)
    return statistics.median(rounds) * 1e6


def nothing() -> None:
    """Be the work that is guarded."""


def measure(directory: Path, *, quick: bool) -> dict[str, Any]:
    """Measure each operation with private state and with the store that processes share."""
    directory.mkdir(parents=True)
    stores = {
        "in-process": StateStore(None),
        "shared (SQLite)": StateStore(f"sqlite:///{directory / 'state.db'}"),
    }
    costs: dict[str, dict[str, float]] = {}
    for where, store in stores.items():
        for name, operation in _operations(store).items():
            costs.setdefault(name, {})[where] = microseconds(operation, quick=quick)
    peers = {
        "call through a closed breaker": {"pybreaker": _pybreaker_call()},
        "recorded failure": {"pybreaker": _pybreaker_failure()},
        "retried call that succeeds at once": {"tenacity": _tenacity_call()},
    }
    for name, others in peers.items():
        for library, operation in others.items():
            costs[name][library] = microseconds(operation, quick=quick)
    for name, by_place in costs.items():
        print(f"{name:40} " + ", ".join(f"{k} {v:.1f} µs" for k, v in by_place.items()))
    return {"microseconds": costs}


def _operations(store: StateStore) -> dict[str, Callable[[], object]]:
    breaker = CircuitBreaker("layer", store=store)
    failing = CircuitBreaker(
        "failing", failure_threshold=1_000_000_000, counts=lambda _: True, store=store
    )
    timeouts = AdaptiveTimeoutManager(store)
    for number in range(50):
        timeouts.record_performance("rhythm", 5.0, 4.0, True, 20.0, audio_seconds=200.0 + number)
    classifier = ErrorClassifier(store=store)
    retries = SmartRetryManager(store=store, classifier=classifier)

    def failed() -> None:
        failing.acquire().failed(ConnectionError("gone"))

    def classified() -> object:
        # Another exception each time, as one that is classified again is one error.
        return classifier.classify_error(CorruptFileError("its stream breaks off"), {})

    def judged() -> object:
        return classifier.classify(CorruptFileError("its stream breaks off"), {})

    return {
        "breaker check": lambda: breaker.acquire().release(),
        "call through a closed breaker": lambda: breaker.call(nothing),
        "recorded failure": failed,
        "timeout calculation": lambda: timeouts.timeout_in_force("rhythm", 200.0),
        "recorded attempt": lambda: timeouts.record_performance(
            "rhythm", 5.0, 4.0, True, 20.0, audio_seconds=200.0
        ),
        "classification": judged,
        "classification, recorded": classified,
        "retry budget: deposit": lambda: retries.deposit("rhythm"),
        "retried call that succeeds at once": lambda: retries.retry(nothing, operation="layer"),
    }


def _pybreaker_call() -> Callable[[], object]:
    breaker = pybreaker.CircuitBreaker(fail_max=5)
    return lambda: breaker.call(nothing)


def _pybreaker_failure() -> Callable[[], object]:
    breaker = pybreaker.CircuitBreaker(fail_max=1_000_000_000)

    def fail() -> None:
        raise ConnectionError("gone")

    def failed() -> None:
        with contextlib.suppress(ConnectionError):
            breaker.call(fail)

    return failed


def _tenacity_call() -> Callable[[], object]:
    retrying = tenacity.Retrying(stop=tenacity.stop_after_attempt(3))
    return lambda: retrying(nothing)
