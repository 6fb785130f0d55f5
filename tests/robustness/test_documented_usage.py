"""The documented usage examples, word for word, inside an analyser that really reads audio."""

# The examples stay as they are documented, style and all.
# ruff: noqa: F841

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from robustness.adaptive_timeout import OperationTimeoutError, get_timeout_manager, timeout_context
from robustness.circuit_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenError,
    CircuitState,
    circuit_breaker,
)
from robustness.error_classifier import get_error_classifier
from robustness.settings import RobustnessSettings, get_settings
from robustness.smart_retry import RetryStrategy, get_retry_manager, set_testing, smart_retry
from robustness.state import reset_state_store

logger = logging.getLogger("documented_usage")

# fmt: off

# The examples leave these to the reader.
audio = None
processing_time = 45.2
file_info = {'file_path': 'track.wav'}


class AudioAnalyzer:
    """Its methods are the documented examples; what they call is below them."""

    def _init_robustness_features(self):
        """Initialize robustness features for enhanced error handling and recovery."""

        # Circuit breakers for different operations
        self.circuit_breakers = {
            'audio_processing': CircuitBreaker(failure_threshold=3, recovery_timeout=30),
            'database_operations': CircuitBreaker(failure_threshold=5, recovery_timeout=60),
            'network_operations': CircuitBreaker(failure_threshold=3, recovery_timeout=120),
            'feature_extraction': CircuitBreaker(failure_threshold=2, recovery_timeout=45)
        }

        # Initialize managers
        self.timeout_manager = get_timeout_manager()
        self.error_classifier = get_error_classifier()
        self.retry_manager = get_retry_manager()

    def extract_features(self, audio_path: str, force_reextract: bool = False):
        """Extract features with robust error handling."""

        # Get adaptive timeout
        file_size_mb = os.path.getsize(audio_path) / (1024 * 1024)
        timeout = self.timeout_manager.calculate_timeout(file_size_mb, 'feature_extraction')

        # Use circuit breaker for feature extraction
        with self.circuit_breakers['feature_extraction'].call:
            try:
                # Extract features with timeout
                features = self._extract_all_features(audio_path, audio)

                # Record performance for adaptive optimization
                self.timeout_manager.record_performance(
                    'feature_extraction', file_size_mb, processing_time, True, timeout
                )

                return features

            except Exception as e:
                # Classify error and apply recovery strategy
                error_info = self.error_classifier.classify_error(e, {
                    'file_path': audio_path,
                    'file_size_mb': file_size_mb,
                    'operation': 'feature_extraction'
                })

                # Apply recovery strategy
                if error_info.retryable:
                    return self._retry_with_strategy(error_info, audio_path)
                else:
                    self._mark_failed(file_info)
                    return None

    def check_before_operation(self):
        # Check circuit breaker state before operation
        if self.circuit_breakers['audio_processing'].get_state() == CircuitState.OPEN:
            logger.warning("Audio processing circuit is open, skipping operation")
            return None
        return 'operated'

    def save(self, features):
        # Use circuit breaker for critical operations
        try:
            result = self.circuit_breakers['database_operations'].call(
                lambda: self._save_features_to_db(file_info, features)
            )
        except CircuitBreakerOpenError:
            logger.error("Database circuit breaker is open")
            # Handle gracefully
            return None
        return result

    def extract_rhythm(self, audio_path):
        # Calculate timeout based on file characteristics
        file_size_mb = os.path.getsize(audio_path) / (1024 * 1024)
        timeout = self.timeout_manager.calculate_timeout(file_size_mb, 'rhythm')

        # Use timeout in feature extraction
        with timeout_context(timeout):
            rhythm_features = self._extract_rhythm_features(audio, audio_path)
        return rhythm_features

    def classify(self, audio_path):
        try:
            features = self._extract_all_features(audio_path, audio)
        except Exception as e:
            # Classify error and get recovery strategy
            error_info = self.error_classifier.classify_error(e, {
                'file_path': audio_path,
                'operation': 'feature_extraction'
            })

            logger.warning(f"Error classified as {error_info.error_type.value} "
                          f"(severity: {error_info.severity.value})")

            # Apply recovery strategy
            if error_info.retryable:
                recommendation = self.error_classifier.get_recovery_recommendation(error_info)
                logger.info(f"Recovery strategy: {recommendation['action']}")

    def extract_mfcc(self):
        # Retry with exponential backoff
        result = self.retry_manager.exponential_backoff(
            lambda: self._extract_mfcc(audio),
            max_attempts=3,
            timeout=180
        )

        if not result.success:
            logger.error(f"MFCC extraction failed after {result.attempts} attempts")
            # Handle failure
        return result

    def report(self):
        # Get circuit breaker statistics
        for name, breaker in self.circuit_breakers.items():
            stats = breaker.get_stats()
            logger.info(f"{name}: {stats['state']} (failures: {stats['failure_count']})")

        # Get timeout performance statistics
        stats = self.timeout_manager.get_performance_stats('rhythm')
        logger.info(f"Rhythm extraction: {stats['success_rate']:.1%} success rate, "
                   f"avg time: {stats['avg_processing_time']:.1f}s")

        # Get error summary
        summary = self.error_classifier.get_error_summary()
        logger.info(f"Total errors: {summary['total_errors']}, "
                   f"Success rate: {summary['success_rate']:.1%}")

    def __init__(self) -> None:
        self._init_robustness_features()
        self.saved: list[object] = []
        self.failed: list[object] = []
        self.mfcc_failures = 0

    def _extract_all_features(self, audio_path, audio):
        if not Path(audio_path).exists():
            raise ConnectionResetError("the share went away")
        samples, _ = soundfile.read(audio_path)
        return {"rms": math.sqrt(float(np.mean(samples**2)))}

    def _extract_rhythm_features(self, audio, audio_path):
        return self._extract_all_features(audio_path, audio)

    def _extract_mfcc(self, audio):
        if self.mfcc_failures:
            self.mfcc_failures -= 1
            raise ConnectionResetError("gone")
        return [0.0] * 13

    def _save_features_to_db(self, file_info, features):
        self.saved.append(features)
        return len(self.saved)

    def _retry_with_strategy(self, error_info, audio_path):
        return f"retry with {error_info.recovery_strategy.value}"

    def _mark_failed(self, file_info):
        self.failed.append(file_info)


# fmt: on


@pytest.fixture
def analyzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AudioAnalyzer]:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    caches = (get_settings, get_timeout_manager, get_error_classifier, get_retry_manager)
    for cached in caches:
        cached.cache_clear()
    reset_state_store()
    yield AudioAnalyzer()
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()
    reset_state_store()


@pytest.fixture
def track(tmp_path: Path) -> str:
    path = tmp_path / "track.wav"
    soundfile.write(path, 0.5 * np.sin(np.arange(44100) / 10), 44100)
    return str(path)


def test_features_of_a_good_file(analyzer: AudioAnalyzer, track: str) -> None:
    features = analyzer.extract_features(track)
    assert features["rms"] == pytest.approx(0.5 / math.sqrt(2), rel=0.01)
    stats = analyzer.timeout_manager.get_performance_stats("feature_extraction")
    assert stats["success_rate"] == 1
    assert stats["avg_time"] == pytest.approx(45.2)
    assert analyzer.circuit_breakers["feature_extraction"].get_stats()["success_count"] == 1


def test_bad_file_is_marked_failed(analyzer: AudioAnalyzer, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(bytes(1000))
    assert analyzer.extract_features(str(tmp_path / "bad.wav")) is None
    assert analyzer.failed == [file_info]
    assert analyzer.circuit_breakers["feature_extraction"].get_state() is CircuitState.CLOSED


def test_open_circuits_are_respected(analyzer: AudioAnalyzer, track: str) -> None:
    assert analyzer.check_before_operation() == "operated"
    assert analyzer.save({}) == 1
    for breaker in analyzer.circuit_breakers.values():
        breaker.force_open()
    assert analyzer.check_before_operation() is None
    assert analyzer.save({}) is None
    assert len(analyzer.saved) == 1
    with pytest.raises(CircuitBreakerOpenError):
        analyzer.extract_features(track)


def test_timeout_around_extraction(
    analyzer: AudioAnalyzer, track: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert analyzer.extract_rhythm(track)["rms"] > 0
    monkeypatch.setattr(analyzer.timeout_manager, "calculate_timeout", lambda *_: 0.05)
    monkeypatch.setattr(analyzer, "_extract_rhythm_features", lambda *_: time.sleep(60))
    with pytest.raises(OperationTimeoutError):
        analyzer.extract_rhythm(track)


def test_classification_is_logged(
    analyzer: AudioAnalyzer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "documented_usage"):
        analyzer.classify(str(tmp_path / "unmounted" / "track.wav"))
    assert caplog.messages == [
        "Error classified as network (severity: medium)",
        "Recovery strategy: network_retry",
    ]


def test_mfcc_is_retried(analyzer: AudioAnalyzer) -> None:
    analyzer.mfcc_failures = 2
    with set_testing(True, attempts=3):
        result = analyzer.extract_mfcc()
        assert result.success
        assert result.attempts == 3
        assert result.result == [0.0] * 13
        analyzer.mfcc_failures = 9
        assert analyzer.extract_mfcc().attempts == 3
    stats = analyzer.retry_manager.get_retry_stats()
    assert {"success_rate", "avg_attempts", "avg_total_time"} <= stats["exponential"].keys()
    assert stats["exponential"]["success_rate"] == 0.5


def test_metrics_are_logged(
    analyzer: AudioAnalyzer, track: str, caplog: pytest.LogCaptureFixture
) -> None:
    analyzer.timeout_manager.record_performance("rhythm", 4.0, 45.2, True, 120.0)
    with caplog.at_level(logging.INFO, "documented_usage"):
        analyzer.report()
    assert caplog.messages == [
        "audio_processing: CLOSED (failures: 0)",
        "database_operations: CLOSED (failures: 0)",
        "network_operations: CLOSED (failures: 0)",
        "feature_extraction: CLOSED (failures: 0)",
        "Rhythm extraction: 100.0% success rate, avg time: 45.2s",
        "Total errors: 0, Success rate: 100.0%",
    ]
    stats = analyzer.timeout_manager.get_performance_stats()
    assert {"avg_time", "success_rate", "timeout_efficiency"} <= stats["rhythm"].keys()


def test_manual_and_decorator_usage(analyzer: AudioAnalyzer) -> None:
    def my_function() -> str:
        return "done"

    # fmt: off
    # Manual usage
    breaker = CircuitBreaker(failure_threshold=5, recovery_timeout=60)
    result = breaker.call(my_function)
    # fmt: on
    assert result == "done"

    # fmt: off
    # Manual retry
    retry_manager = get_retry_manager()
    result = retry_manager.exponential_backoff(my_function, max_attempts=3)
    # fmt: on
    assert result.result == "done"


def test_decorated_with_a_breaker() -> None:
    # fmt: off
    # Decorator usage
    @circuit_breaker(failure_threshold=3, recovery_timeout=30)
    def my_function():
        # Your code here
        raise ConnectionResetError
    # fmt: on

    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            my_function()
    with pytest.raises(CircuitBreakerOpenError):
        my_function()


def test_decorated_with_retries() -> None:
    calls = []

    # fmt: off
    # Decorator usage
    @smart_retry(strategy=RetryStrategy.EXPONENTIAL, max_attempts=3)
    def my_function():
        # Your code here
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError
    # fmt: on

    with set_testing(True, attempts=3):
        my_function()
    assert len(calls) == 3


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    documented_lines = """
        MEMORY_AWARE=true
        CIRCUIT_BREAKER_FAILURE_THRESHOLD=5
        CIRCUIT_BREAKER_RECOVERY_TIMEOUT=60
        TIMEOUT_BASE_DELAY=60
        TIMEOUT_MAX_DELAY=600
        TIMEOUT_MEMORY_THRESHOLD=0.8
    """
    for line in documented_lines.split():
        monkeypatch.setenv(*line.split("="))
    documented = RobustnessSettings()
    for name in documented.model_fields_set:
        assert getattr(documented, name) == RobustnessSettings.model_fields[name].default
    assert len(documented.model_fields_set) >= 6


DETAILED = (
    "robustness.circuit_breaker",
    "robustness.adaptive_timeout",
    "robustness.error_classifier",
    "robustness.smart_retry",
)


def test_detailed_logging(caplog: pytest.LogCaptureFixture) -> None:
    # fmt: off
    # Enable detailed robustness logging
    logging.getLogger('robustness.circuit_breaker').setLevel(logging.DEBUG)
    logging.getLogger('robustness.adaptive_timeout').setLevel(logging.DEBUG)
    logging.getLogger('robustness.error_classifier').setLevel(logging.DEBUG)
    logging.getLogger('robustness.smart_retry').setLevel(logging.DEBUG)
    # fmt: on
    try:
        breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=60)

        def fail() -> None:
            raise ConnectionResetError

        with set_testing(True, attempts=2):
            get_retry_manager().exponential_backoff(lambda: breaker.call(fail))
        get_timeout_manager().calculate_timeout(5.0, "rhythm")
    finally:
        for name in DETAILED:
            logging.getLogger(name).setLevel(logging.NOTSET)
    assert {record.name for record in caplog.records} >= set(DETAILED)
    assert all(hasattr(r, "run_id") for r in caplog.records if r.name in DETAILED)
