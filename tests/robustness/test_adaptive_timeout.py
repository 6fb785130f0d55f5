import logging
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from robustness import adaptive_timeout, timing_history
from robustness.adaptive_timeout import (
    BASE_TIMEOUTS,
    SAMPLE_SIZE,
    AdaptiveTimeoutManager,
    OperationTimeoutError,
    TimeoutNotEnforceableError,
    TimeoutStrategy,
    get_timeout_manager,
    timeout_context,
)
from robustness.error_classifier import ErrorClassifier
from robustness.settings import RobustnessSettings
from robustness.state import StateStore
from robustness.timing_history import censored_quantile, fit_line

SETTINGS = RobustnessSettings()


@pytest.fixture(autouse=True)
def calm_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_timeout, "_CONDITIONS_SECONDS", 0.0)
    monkeypatch.setattr(adaptive_timeout, "_load_per_core", lambda: 0.5)
    monkeypatch.setattr(adaptive_timeout, "memory_limit_mib", lambda: 1000.0)
    monkeypatch.setattr(adaptive_timeout, "available_memory_mib", lambda: 900.0)


@pytest.fixture
def manager() -> AdaptiveTimeoutManager:
    return AdaptiveTimeoutManager(StateStore(None), settings=SETTINGS)


class Library:
    """Simulated work: seconds = (overhead + rate * length), spread by a lognormal factor.

    Parameters
    ----------
    lengths : tuple of float
        Median and log-deviation of the lengths in seconds of audio.
    """

    def __init__(
        self,
        seed: int,
        lengths: tuple[float, float] = (200.0, 0.6),
        overhead: float = 0.4,
        rate: float = 0.02,
        scatter: float = 0.3,
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._lengths = lengths
        self._overhead = overhead
        self.rate = rate
        self._scatter = scatter

    def time_of(self, length: float) -> float:
        usual = self._overhead + self.rate * length
        return float(usual * self._random.lognormal(0.0, self._scatter))

    def run(
        self,
        manager: AdaptiveTimeoutManager,
        files: int,
        *,
        hanging: float = 0.0,
        feature_type: str = "rhythm",
    ) -> int:
        """Work through files as a run would; return how many honest ones were stopped."""
        stopped = 0
        median, deviation = self._lengths
        for _ in range(files):
            length = float(self._random.lognormal(math.log(median), deviation))
            hangs = self._random.random() < hanging
            needed = math.inf if hangs else self.time_of(length)
            timeout = manager.calculate_timeout(5.0, feature_type, audio_seconds=length)
            done = needed < timeout
            stopped += not done and not hangs
            manager.record_performance(
                feature_type,
                5.0,
                min(needed, timeout),
                done,
                timeout,
                audio_seconds=length,
                timed_out=not done,
            )
        return stopped


# The table, the strategies, the adjustments


def test_a_small_file_gets_the_timeout_of_the_table(manager: AdaptiveTimeoutManager) -> None:
    for feature_type, seconds in BASE_TIMEOUTS.items():
        assert manager.calculate_timeout(0.0, feature_type) == seconds
    assert manager.calculate_timeout(0.0, "something else") == SETTINGS.timeout_base_delay


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (TimeoutStrategy.LINEAR, [30, 45, 60, 120]),
        (TimeoutStrategy.EXPONENTIAL, [30, 30 * math.sqrt(2), 60, 240]),
        (TimeoutStrategy.ADAPTIVE, [30, 45, 60, 120]),
    ],
)
def test_timeouts_grow_with_the_size_of_the_file(
    manager: AdaptiveTimeoutManager, strategy: TimeoutStrategy, expected: list[float]
) -> None:
    sizes = [0.0, 50.0, 100.0, 300.0]
    timeouts = [manager.calculate_timeout(size, "loudness", strategy) for size in sizes]
    assert timeouts == pytest.approx(expected)


@pytest.mark.parametrize("strategy", TimeoutStrategy)
def test_no_timeout_is_above_the_ceiling(
    manager: AdaptiveTimeoutManager, strategy: TimeoutStrategy
) -> None:
    assert manager.calculate_timeout(1e9, "musicnn", strategy) == SETTINGS.timeout_max_delay


def test_load_lengthens_timeouts(
    manager: AdaptiveTimeoutManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_timeout, "_load_per_core", lambda: 3.0)
    assert manager.calculate_timeout(0.0, "key") == pytest.approx(45 * 1.5)


def test_memory_over_the_threshold_lengthens_timeouts(
    manager: AdaptiveTimeoutManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_timeout, "available_memory_mib", lambda: 210.0)
    assert manager.calculate_timeout(0.0, "key") == pytest.approx(45)
    monkeypatch.setattr(adaptive_timeout, "available_memory_mib", lambda: 190.0)
    assert manager.calculate_timeout(0.0, "key") == pytest.approx(45 * 1.5)
    careless = AdaptiveTimeoutManager(
        StateStore(None), settings=RobustnessSettings(memory_aware=False)
    )
    assert careless.calculate_timeout(0.0, "key") == pytest.approx(45)


def test_a_success_rate_under_half_lengthens_timeouts(manager: AdaptiveTimeoutManager) -> None:
    for success in (False, False, False, True, True):
        manager.record_performance("key", 1.0, 2.0, success, 45.0)
    assert manager.calculate_timeout(0.0, "key") == pytest.approx(45 * 1.5)
    manager.record_performance("key", 1.0, 2.0, True, 45.0)
    assert manager.calculate_timeout(0.0, "key") == pytest.approx(45)


def test_the_load_of_this_machine_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert adaptive_timeout._load_per_core() >= 0


# What is learned


@pytest.mark.parametrize("seed", range(5))
def test_honest_work_is_not_killed_and_hangs_are_found_soon(
    manager: AdaptiveTimeoutManager, seed: int
) -> None:
    library = Library(seed)
    assert library.run(manager, 400) == 0
    for length in (60.0, 200.0, 600.0):
        usual = 0.4 + 0.02 * length
        timeout = manager.calculate_timeout(5.0, "rhythm", audio_seconds=length)
        assert max(SETTINGS.timeout_floor, 3 * usual) <= timeout
        assert timeout <= max(SETTINGS.timeout_floor, 10 * usual)


@pytest.mark.parametrize("seed", range(5))
def test_widely_spread_times_are_not_killed_either(
    manager: AdaptiveTimeoutManager, seed: int
) -> None:
    library = Library(seed, rate=0.2, scatter=0.5)
    assert library.run(manager, 1000) <= 2


def test_the_table_holds_until_enough_was_seen(manager: AdaptiveTimeoutManager) -> None:
    library = Library(0)
    library.run(manager, SETTINGS.timeout_min_samples - 1)
    assert manager.timeout_in_force("rhythm", 60.0).source == "base"
    library.run(manager, 1)
    decision = manager.timeout_in_force("rhythm", 60.0)
    assert decision.source == "learned"
    assert decision.seconds < 20
    assert decision.samples == SETTINGS.timeout_min_samples


def test_a_decision_tells_its_origin(manager: AdaptiveTimeoutManager) -> None:
    Library(1, rate=0.1, scatter=0.1).run(manager, 100)
    decision = manager.timeout_in_force("rhythm", 300.0)
    assert decision.base_seconds == 120
    assert decision.expected_seconds == pytest.approx(30.4, rel=0.1)
    assert decision.quantile_rate is not None
    assert decision.seconds == pytest.approx(300 * decision.quantile_rate * SETTINGS.timeout_margin)


def test_short_sounds_do_not_spoil_the_timeouts_of_long_files(
    manager: AdaptiveTimeoutManager,
) -> None:
    sounds = Library(2, lengths=(0.5, 0.5), overhead=1.0)
    sounds.run(manager, 200)
    tracks = Library(3, overhead=1.0)
    assert tracks.run(manager, 100) == 0
    # By mere rate the sounds take 2 s per second of audio: 400 s for such a track.
    assert manager.calculate_timeout(5.0, "rhythm", audio_seconds=200.0) < 60


def test_longer_files_than_any_seen_are_not_killed(manager: AdaptiveTimeoutManager) -> None:
    Library(4, lengths=(200.0, 0.01)).run(manager, 50)  # no slope to be seen in these
    long = Library(5, lengths=(5000.0, 0.1))
    assert long.run(manager, 50) == 0


def test_timeouts_follow_a_machine_that_becomes_slower(manager: AdaptiveTimeoutManager) -> None:
    library = Library(6)
    library.run(manager, 300)
    library.rate *= 12
    assert library.run(manager, 30) <= 20
    assert library.run(manager, 100) <= 2


@pytest.mark.parametrize("hanging", [0.03, 0.1, 0.3])
def test_hanging_work_does_not_raise_its_own_timeout(
    manager: AdaptiveTimeoutManager, hanging: float
) -> None:
    library = Library(7)
    library.run(manager, 100)
    before = manager.calculate_timeout(5.0, "rhythm", audio_seconds=200.0)
    assert library.run(manager, 400, hanging=hanging) == 0
    after = manager.calculate_timeout(5.0, "rhythm", audio_seconds=200.0)
    assert after < 3 * before


def test_failures_say_nothing_of_the_time_that_work_takes(
    manager: AdaptiveTimeoutManager,
) -> None:
    Library(8, rate=0.1).run(manager, 100)
    before = manager.calculate_timeout(5.0, "rhythm", audio_seconds=200.0)
    for _ in range(100):
        manager.record_performance("rhythm", 5.0, 0.001, False, 60.0, audio_seconds=200.0)
    for _ in range(20):
        manager.record_performance("rhythm", 5.0, 20.0, True, 60.0, audio_seconds=200.0)
    after = manager.calculate_timeout(5.0, "rhythm", audio_seconds=200.0)
    assert after == pytest.approx(before, rel=0.3)


def test_without_lengths_the_size_is_learned_from(manager: AdaptiveTimeoutManager) -> None:
    for size in range(1, 31):
        manager.record_performance("decode", size, 0.1 * size, True, 60.0)
    decision = manager.timeout_in_force("decode", None, file_size_mb=100.0)
    assert decision.source == "learned"
    assert decision.seconds == pytest.approx(10 * SETTINGS.timeout_margin)
    assert decision.quantile_rate == pytest.approx(0.1)
    assert manager.timeout_in_force("decode", 60.0).source == "base"


def test_learned_timeouts_keep_to_floor_and_ceiling(manager: AdaptiveTimeoutManager) -> None:
    for length in range(1, 31):
        manager.record_performance("key", 1.0, 0.001, True, 45.0, audio_seconds=length)
        manager.record_performance("mfcc", 1.0, length, True, 180.0, audio_seconds=length)
    assert manager.calculate_timeout(1.0, "key", audio_seconds=30.0) == SETTINGS.timeout_floor
    assert manager.calculate_timeout(1.0, "mfcc", audio_seconds=1e5) == SETTINGS.timeout_max_delay


def test_empty_files_divide_nothing_by_zero(manager: AdaptiveTimeoutManager) -> None:
    for _ in range(20):
        manager.record_performance("key", 0.0, 0.0, True, 0.0, audio_seconds=0.0)
    decision = manager.timeout_in_force("key", 0.0)
    assert (decision.seconds, decision.quantile_rate) == (SETTINGS.timeout_floor, None)
    assert manager.get_performance_stats("key")["timeout_efficiency"] == 0


def test_what_was_learned_survives_and_is_shared(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    Library(9).run(AdaptiveTimeoutManager(StateStore(url), settings=SETTINGS), 30)
    other = AdaptiveTimeoutManager(StateStore(url), settings=SETTINGS)
    assert other.timeout_in_force("rhythm", 60.0).source == "learned"
    assert other.timeout_in_force("key", 60.0).source == "base"


def test_what_others_record_is_read_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_history, "_REFRESH_SECONDS", 0.0)
    url = f"sqlite:///{tmp_path / 'state.db'}"
    one, other = (AdaptiveTimeoutManager(StateStore(url), settings=SETTINGS) for _ in range(2))
    assert one.timeout_in_force("rhythm", 60.0).source == "base"
    Library(10).run(other, 30)
    assert one.timeout_in_force("rhythm", 60.0).source == "learned"


def test_the_sample_is_bounded(manager: AdaptiveTimeoutManager) -> None:
    for _ in range(SAMPLE_SIZE + 20):
        manager.record_performance("key", 1.0, 1.0, True, 45.0, audio_seconds=10.0)
    assert manager.get_performance_stats("key")["samples"] == SAMPLE_SIZE


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_impossible_times_are_refused(manager: AdaptiveTimeoutManager, seconds: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        manager.record_performance("key", 1.0, seconds, True, 45.0)


# The estimators


def test_a_line_is_found_among_outliers() -> None:
    random = np.random.default_rng(0)
    lengths = random.uniform(10, 600, 200)
    seconds = 2.0 + 0.05 * lengths + random.normal(0, 0.1, 200)
    seconds[:30] *= 20
    overhead, rate = fit_line(lengths, seconds)
    assert overhead == pytest.approx(2.0, abs=0.5)
    assert rate == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ("lengths", "seconds", "line"),
    [
        ([100.0], [5.0], (5.0, 0.0)),
        ([0.0, 0.0], [1.0, 3.0], (2.0, 0.0)),
        ([100.0, 200.0], [4.0, 2.0], (3.0, 0.0)),  # not faster the longer it is
        ([100.0, 200.0], [1.0, 4.0], (0.0, 0.015)),  # no overhead below nothing
    ],
)
def test_a_line_is_never_negative(
    lengths: list[float], seconds: list[float], line: tuple[float, float]
) -> None:
    assert fit_line(np.array(lengths), np.array(seconds)) == pytest.approx(line)


def test_the_quantile_accounts_for_what_was_cut_off() -> None:
    random = np.random.default_rng(1)
    times = random.exponential(1.0, 20_000)
    limits = random.exponential(2.0, 20_000)
    values, observed = np.minimum(times, limits), times <= limits
    for quantile in (0.5, 0.8, 0.9):
        truth = -math.log(1 - quantile)
        assert censored_quantile(values, observed, quantile) == pytest.approx(truth, rel=0.05)
        # What leaving out the cut-off values would give.
        assert np.quantile(values[observed], quantile) < 0.8 * truth


def test_the_quantile_of_a_published_example() -> None:
    """Remission times (weeks) of 21 patients under 6-MP: Freireich et al. (1963)."""
    finished = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    cut_off = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    values = np.array(finished + cut_off, dtype=float)
    observed = np.array([True] * len(finished) + [False] * len(cut_off))
    assert censored_quantile(values, observed, 0.5) == 23  # the published median
    assert censored_quantile(values, observed, 0.25) == 13
    assert censored_quantile(values, observed, 0.95) == 23  # never reached: the largest


# Statistics


def test_stats_have_the_seen_shares(manager: AdaptiveTimeoutManager) -> None:
    for seconds in (30.0, 60.0, 90.0):
        manager.record_performance("rhythm", 5.0, seconds, True, 120.0)
    manager.record_performance("rhythm", 5.0, 120.0, False, 120.0)
    manager.record_performance("key", 5.0, 1.0, False, 45.0)
    stats = manager.get_performance_stats("rhythm")
    assert stats == {
        "avg_time": 60.0,
        "avg_processing_time": 60.0,
        "success_rate": 0.75,
        "timeout_efficiency": 0.5,
        "timeouts": 1,
        "samples": 4,
    }
    assert manager.get_performance_stats()["rhythm"] == stats
    assert list(manager.get_performance_stats()) == ["key", "rhythm"]


def test_stats_of_nothing_say_that_nothing_failed(
    manager: AdaptiveTimeoutManager, store: StateStore
) -> None:
    stats: dict[str, object] = {**manager.get_performance_stats("rhythm")}
    summary = ErrorClassifier(rules=(), store=store).get_error_summary()
    assert stats.pop("success_rate") == summary["success_rate"] == 1
    assert set(stats.values()) == {0}
    assert manager.get_performance_stats() == {}


def test_decisions_are_logged(
    manager: AdaptiveTimeoutManager, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="robustness.adaptive_timeout"):
        manager.calculate_timeout(0.0, "rhythm")
    assert "rhythm" in caplog.text


def test_there_is_one_manager_in_a_process() -> None:
    assert get_timeout_manager() is get_timeout_manager()


# timeout_context


@pytest.fixture
def alarms() -> Iterator[list[float]]:
    """Times at which a handler of its own was called by SIGALRM; put back afterwards."""
    called: list[float] = []
    handler = signal.signal(signal.SIGALRM, lambda *_: called.append(time.monotonic()))
    left = signal.setitimer(signal.ITIMER_REAL, 0)
    yield called
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *left)


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "block", [spin, lambda: time.sleep(60), lambda: threading.Event().wait(60)]
)
def test_a_block_is_interrupted(block: Callable[[], object]) -> None:
    with pytest.raises(OperationTimeoutError, match=r"0\.1 s") as caught, timeout_context(0.1):
        block()
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.seconds == 0.1


def test_a_block_in_time_goes_on(alarms: list[float]) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with timeout_context(0.05):
        pass
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    time.sleep(0.1)
    assert alarms == []


@pytest.mark.parametrize(("outer", "inner", "first"), [(0.1, 60.0, 0.1), (60.0, 0.1, 0.1)])
def test_the_first_of_nested_deadlines_interrupts(
    alarms: list[float], outer: float, inner: float, first: float
) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with (
        pytest.raises(OperationTimeoutError) as caught,
        timeout_context(outer),
        timeout_context(inner),
    ):
        spin()
    assert caught.value.seconds == first
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_outer_deadline_holds_after_the_inner_one() -> None:
    def work() -> None:
        with pytest.raises(OperationTimeoutError), timeout_context(0.05):
            spin()
        spin()

    # Far enough behind the inner one that a busy machine does not let both pass at once.
    with pytest.raises(OperationTimeoutError) as caught, timeout_context(2.0):
        work()
    assert caught.value.seconds == 2.0


def test_three_deep(alarms: list[float]) -> None:
    with (
        pytest.raises(OperationTimeoutError) as caught,
        timeout_context(0.3),
        timeout_context(0.1),
        timeout_context(60),
    ):
        spin()
    assert caught.value.seconds == 0.1
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_timer_that_was_set_before_goes_on(alarms: list[float]) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    with pytest.raises(OperationTimeoutError), timeout_context(0.3):
        spin()
    assert len(alarms) >= 2
    within = len(alarms)
    while len(alarms) == within:
        time.sleep(0.01)


def test_an_alarm_that_is_to_end_the_process_still_does() -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with timeout_context(60):
            spin()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGALRM


def test_other_threads_are_refused_with_the_reason() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with timeout_context(1):
                pass
        except TimeoutNotEnforceableError as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="lane 3")
    thread.start()
    thread.join()
    assert "'lane 3'" in str(errors[0])
    assert "WorkerPool" in str(errors[0])


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan])
def test_a_block_needs_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        timeout_context(seconds)


def test_the_error_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(OperationTimeoutError(3.0)))
    assert (str(copy), copy.seconds) == ("not done after 3 s", 3.0)
