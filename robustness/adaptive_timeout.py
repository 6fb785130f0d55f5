"""Timeouts that follow what the work really takes.

Until a kind of work has been seen often enough its timeout comes from a table. After that it
comes from a bounded sample of what was recorded, shared by all processes:

1. The time expected for a file is a line in its length, ``overhead + rate * length``, fitted by
   the Theil-Sen estimator [1]_ [2]_: the median of the slopes between all pairs of observations,
   which a few odd files do not move. So a library of short sounds, whose times are all overhead,
   does not lead to hours for a long file. Beyond the longest file seen the expected time grows in
   proportion to the length.
2. How far times spread above that is a quantile of observed over expected time. Work stopped by
   its timeout took longer than was seen: such observations are censored, and leaving them out, or
   taking them as they are, would pull the quantile towards the timeouts themselves. The
   Kaplan-Meier estimator [3]_ accounts for them. A quantile it cannot reach, since too many
   observations are censored, is replaced by the largest ratio of work that was done, so that work
   which never ends does not raise the timeout without end.
3. The timeout is the expected time by that quantile by a margin, longer on a busy machine, between
   a floor and a ceiling. When most work runs into its learned timeout, what was learned no longer
   holds (a slower machine, another version): then the table's timeout is the least.

References
----------
.. [1] H. Theil (1950). A rank-invariant method of linear and polynomial regression analysis.
   Indagationes Mathematicae 12.
.. [2] P. K. Sen (1968). Estimates of the regression coefficient based on Kendall's tau.
   Journal of the American Statistical Association 63(324).
.. [3] E. L. Kaplan, P. Meier (1958). Nonparametric estimation from incomplete observations.
   Journal of the American Statistical Association 53(282).
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import FrameType, MappingProxyType, TracebackType
from typing import Literal, Self, TypedDict, overload

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from robustness.memory import available_memory_mib, memory_limit_mib
from robustness.settings import RobustnessSettings, get_settings
from robustness.state import StateStore, get_state_store, prune, timings

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BASE_TIMEOUTS: Mapping[str, float] = MappingProxyType(
    {
        "hash": 30.0,
        "duration": 5.0,
        "decode": 60.0,
        "rhythm": 120.0,
        "spectral": 90.0,
        "loudness": 30.0,
        "danceability": 60.0,
        "key": 45.0,
        "mfcc": 180.0,
        "chroma": 120.0,
        "musicnn": 300.0,
        "metadata": 30.0,
    }
)
"""Timeout in seconds of each kind of work before anything is known of it, for a small file."""

SAMPLE_SIZE = 500
"""Observations kept of each kind of work, the newest."""

_SIZE_SCALE_MB = 100.0
"""File size at which the table's timeout has doubled."""

_STRESS_FACTOR = 1.5
"""What each adverse condition multiplies a timeout by."""

_BUSY_LOAD = 1.5
"""Runnable processes per core above which the machine is busy; workers alone make it 1."""

_RECENT = 10
"""Newest observations that the success rate is taken from."""

_FEWEST_RECENT = 3
"""Observations before a success rate says something."""

_REFRESH_SECONDS = 5.0
"""Age at which what other processes have recorded is read again."""

_CONDITIONS_SECONDS = 1.0
"""Age at which the machine's load and memory are looked at again."""

_LEAST_EXPECTED = 0.1
"""Expected seconds below which observed over expected time is mere noise."""


class TimeoutStrategy(Enum):
    """How a timeout is found.

    ``LINEAR`` and ``EXPONENTIAL`` let the table's timeout grow with the size of the file, to the
    double at 100 MB, from there on by as much again or by doubling; ``ADAPTIVE`` learns it, and
    is ``LINEAR`` until it has.
    """

    LINEAR = "linear"
    EXPONENTIAL = "exponential"
    ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class TimeoutDecision:
    """A timeout and how it came about.

    Parameters
    ----------
    feature_type : str
        The kind of work.
    seconds : float
        The timeout.
    source : {"base", "learned"}
        Whether it comes from the table or from observations.
    base_seconds : float
        The table's timeout, for this file's size.
    expected_seconds : float or None
        What such a file is expected to take; None if not learned.
    quantile_rate : float or None
        The learned quantile for this file in seconds per second of audio, or per MB for a file
        whose length is not known; None if not learned.
    multiplier : float
        1, or more under adverse conditions.
    samples : int
        Observations of finished work it was learned from.
    """

    feature_type: str
    seconds: float
    source: Literal["base", "learned"]
    base_seconds: float
    expected_seconds: float | None
    quantile_rate: float | None
    multiplier: float
    samples: int


class PerformanceStats(TypedDict):
    """Statistics of a kind of work over its newest observations (at most `SAMPLE_SIZE`)."""

    avg_time: float
    """Mean time of work that succeeded, in seconds; 0 if none has."""
    avg_processing_time: float
    """The same."""
    success_rate: float
    """Share of observations that succeeded, 0 to 1."""
    timeout_efficiency: float
    """Mean share of the given timeout that work which succeeded has used, 0 to 1."""
    timeouts: int
    """Observations that were stopped by their timeout."""
    samples: int
    """Observations."""


class AdaptiveTimeoutManager:
    """Gives timeouts and learns from what became of them.

    Parameters
    ----------
    store : StateStore, optional
        Where observations are kept; the process's store by default.
    settings : RobustnessSettings, optional
        Bounds, quantile and margin; the process's settings by default.
    base_timeouts : mapping of str to float
        Timeouts in seconds before anything is learned; kinds of work it does not name get
        TIMEOUT_BASE_DELAY. A variant of a kind, as ``rhythm/alternative``, has a history of its
        own and starts with the kind's timeout.
    """

    def __init__(
        self,
        store: StateStore | None = None,
        *,
        settings: RobustnessSettings | None = None,
        base_timeouts: Mapping[str, float] = BASE_TIMEOUTS,
    ) -> None:
        self._store = store
        self._settings = settings or get_settings()
        self._base_timeouts = base_timeouts
        self._lock = threading.Lock()
        self._histories: dict[str, _History] = {}
        self._stress = 1.0
        self._stress_until = 0.0

    def calculate_timeout(
        self,
        file_size_mb: float,
        feature_type: str,
        strategy: TimeoutStrategy = TimeoutStrategy.ADAPTIVE,
        *,
        audio_seconds: float | None = None,
    ) -> float:
        """Return the timeout for a file.

        Parameters
        ----------
        file_size_mb : float
            Size of the file in MB (2**20 bytes).
        feature_type : str
            Kind of work.
        strategy : TimeoutStrategy
            How to find it.
        audio_seconds : float, optional
            Length of the audio, which says more than the size.

        Returns
        -------
        float
            Seconds, at most TIMEOUT_MAX_DELAY.
        """
        return self._decide(feature_type, file_size_mb, audio_seconds, strategy).seconds

    def timeout_in_force(
        self, feature_type: str, audio_seconds: float | None, *, file_size_mb: float = 0.0
    ) -> TimeoutDecision:
        """Return the adaptive timeout for a file together with its origin.

        Parameters
        ----------
        feature_type : str
            Kind of work.
        audio_seconds : float or None
            Length of the audio; None if not known.
        file_size_mb : float
            Size of the file in MB.
        """
        return self._decide(feature_type, file_size_mb, audio_seconds, TimeoutStrategy.ADAPTIVE)

    def record_performance(
        self,
        feature_type: str,
        file_size_mb: float,
        processing_time: float,
        success: bool,
        timeout_used: float,
        *,
        audio_seconds: float | None = None,
        timed_out: bool = False,
    ) -> None:
        """Record what became of a piece of work.

        Parameters
        ----------
        feature_type : str
            Kind of work.
        file_size_mb : float
            Size of the file in MB.
        processing_time : float
            Seconds it took, or ran until it was stopped.
        success : bool
            Whether it succeeded.
        timeout_used : float
            The timeout it was given, in seconds.
        audio_seconds : float, optional
            Length of the audio.
        timed_out : bool
            Whether its timeout stopped it; taken for granted of work that failed and took no
            less than its timeout.

        Raises
        ------
        ValueError
            If a time, a size or a length is negative or not finite.
        """
        for quantity in (file_size_mb, processing_time, timeout_used, audio_seconds or 0.0):
            if not (math.isfinite(quantity) and quantity >= 0):
                raise ValueError(f"times, sizes and lengths are finite and >= 0, not {quantity}")
        row = {
            "feature_type": feature_type,
            "at": time.time(),
            "seconds": processing_time,
            "audio_seconds": audio_seconds,
            "file_size_mb": file_size_mb,
            "success": success,
            "censored": not success and (timed_out or processing_time >= timeout_used),
            "timeout_given": timeout_used,
        }

        def insert(connection: sa.Connection) -> None:
            connection.execute(sa.insert(timings), row)
            prune(connection, timings, SAMPLE_SIZE, feature_type=feature_type)

        self._state.transact(insert)
        with self._lock:
            if history := self._histories.get(feature_type):
                history.missed += 1

    @overload
    def get_performance_stats(self, feature_type: str) -> PerformanceStats: ...

    @overload
    def get_performance_stats(self, feature_type: None = None) -> dict[str, PerformanceStats]: ...

    def get_performance_stats(
        self, feature_type: str | None = None
    ) -> PerformanceStats | dict[str, PerformanceStats]:
        """Return statistics of a kind of work, or of every kind by its name.

        Parameters
        ----------
        feature_type : str, optional
            Kind of work.
        """
        if feature_type is not None:
            return _History(self._load(feature_type)).stats()
        query = sa.select(timings.c.feature_type).distinct().order_by(timings.c.feature_type)
        names = self._state.query(lambda connection: connection.execute(query).scalars().all())
        return {name: _History(self._load(name)).stats() for name in names}

    @property
    def _state(self) -> StateStore:
        return self._store or get_state_store()

    def _decide(
        self,
        feature_type: str,
        file_size_mb: float,
        audio_seconds: float | None,
        strategy: TimeoutStrategy,
    ) -> TimeoutDecision:
        settings = self._settings
        history = self._history(feature_type)
        kind = feature_type.partition("/")[0]
        base = self._base_timeouts.get(kind, settings.timeout_base_delay)
        base *= _growth(file_size_mb, strategy)
        multiplier = self._machine_stress()
        if history.recent_success_rate < 0.5:
            multiplier *= _STRESS_FACTOR
        covariate, length = (
            ("file_size_mb", file_size_mb)
            if audio_seconds is None
            else ("audio_seconds", audio_seconds)
        )
        model = history.model(covariate, settings.timeout_quantile)
        samples = 0 if model is None else model.samples
        expected = rate = None
        seconds = base * multiplier
        learns = strategy is TimeoutStrategy.ADAPTIVE and samples >= settings.timeout_min_samples
        if model is not None and learns:
            expected = model.expected(length)
            usual_most = expected * model.spread
            rate = usual_most / length if length else None
            seconds = max(usual_most * settings.timeout_margin, settings.timeout_floor) * multiplier
            if history.recent_timeout_share > 0.5:
                seconds = max(seconds, base)
        decision = TimeoutDecision(
            feature_type=feature_type,
            seconds=min(seconds, settings.timeout_max_delay),
            source="base" if expected is None else "learned",
            base_seconds=base,
            expected_seconds=expected,
            quantile_rate=rate,
            multiplier=multiplier,
            samples=samples,
        )
        logger.debug("%s", decision)
        return decision

    def _history(self, feature_type: str) -> "_History":
        with self._lock:
            history = self._histories.get(feature_type)
            if history is None or history.is_stale():
                history = self._histories[feature_type] = _History(self._load(feature_type))
            return history

    def _load(self, feature_type: str) -> Sequence[sa.RowMapping]:
        """Return the observations of a kind of work, oldest first."""
        query = (
            sa.select(timings)
            .where(timings.c.feature_type == feature_type)
            .order_by(timings.c.id.desc())
            .limit(SAMPLE_SIZE)
        )
        rows = self._state.query(lambda connection: connection.execute(query).mappings().all())
        return rows[::-1]

    def _machine_stress(self) -> float:
        """Return what the machine's condition multiplies timeouts by."""
        now = time.monotonic()
        if now >= self._stress_until:
            self._stress = 1.0
            if _load_per_core() > _BUSY_LOAD:
                self._stress *= _STRESS_FACTOR
            if self._settings.memory_aware:
                used = 1 - available_memory_mib() / memory_limit_mib()
                if used > self._settings.timeout_memory_threshold:
                    self._stress *= _STRESS_FACTOR
            self._stress_until = now + _CONDITIONS_SECONDS
        return self._stress


@cache
def get_timeout_manager() -> AdaptiveTimeoutManager:
    """Return the process's timeout manager."""
    return AdaptiveTimeoutManager()


def _growth(file_size_mb: float, strategy: TimeoutStrategy) -> float:
    """Return the factor by which a file's size lengthens the table's timeout."""
    size = file_size_mb / _SIZE_SCALE_MB
    if strategy is TimeoutStrategy.EXPONENTIAL:
        return math.exp2(min(size, 100.0))  # far above every ceiling, and still a number
    return 1.0 + size


def _load_per_core() -> float:
    """Return the average number of runnable processes of the last minute per usable core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return os.getloadavg()[0] / (cores or 1)


class _History:
    """The observations of a kind of work as they were read from the store."""

    def __init__(self, rows: Sequence[sa.RowMapping]) -> None:
        self._read_at = time.monotonic()
        self.missed = 0
        """Observations recorded by this process since."""
        # A missing length or size (None) becomes NaN.
        self._values: dict[str, Floats] = {
            name: np.array([row[name] for row in rows], dtype=np.float64)
            for name in ("seconds", "audio_seconds", "file_size_mb", "timeout_given")
        }
        self._success: Bools = np.array([row["success"] for row in rows], dtype=bool)
        self._censored: Bools = np.array([row["censored"] for row in rows], dtype=bool)
        self._models: dict[tuple[str, float], _Model | None] = {}

    def is_stale(self) -> bool:
        """Tell whether the observations have changed enough to be read again."""
        too_old = time.monotonic() > self._read_at + _REFRESH_SECONDS
        return too_old or self.missed > min(len(self._success) / 10, _RECENT)

    @property
    def recent_success_rate(self) -> float:
        """Share of the newest observations that succeeded; 1 while there are too few."""
        recent = self._success[-_RECENT:]
        return float(recent.mean()) if len(recent) >= _FEWEST_RECENT else 1.0

    @property
    def recent_timeout_share(self) -> float:
        """Share of the newest observations stopped by their timeout; 0 while there are too few."""
        recent = self._censored[-_RECENT:]
        return float(recent.mean()) if len(recent) >= _FEWEST_RECENT else 0.0

    def model(self, covariate: str, quantile: float) -> "_Model | None":
        """Return what is learned of time by length or size; None if nothing succeeded."""
        key = (covariate, quantile)
        if key not in self._models:
            lengths = self._values[covariate]
            # Work that failed by itself says nothing of how long the whole takes.
            usable = np.isfinite(lengths) & (self._success | self._censored)
            self._models[key] = (
                _Model(
                    lengths[usable],
                    self._values["seconds"][usable],
                    self._success[usable],
                    quantile,
                )
                if (usable & self._success).any()
                else None
            )
        return self._models[key]

    def stats(self) -> PerformanceStats:
        seconds = self._values["seconds"][self._success]
        given = self._values["timeout_given"][self._success]
        average = float(seconds.mean()) if len(seconds) else 0.0
        used = seconds[given > 0] / given[given > 0]
        return PerformanceStats(
            avg_time=average,
            avg_processing_time=average,
            success_rate=float(self._success.mean()) if len(self._success) else 0.0,
            timeout_efficiency=float(used.mean()) if len(used) else 0.0,
            timeouts=int(self._censored.sum()),
            samples=len(self._success),
        )


class _Model:
    """Time as a function of length, and how far it spreads above that.

    Parameters
    ----------
    lengths, seconds : arrays, shape (n,)
        Lengths (any unit) and times.
    finished : array of bool, shape (n,)
        Whether the work ended by itself; at least one has.
    quantile : float
        Quantile of observed over expected time, between 0 and 1.
    """

    def __init__(self, lengths: Floats, seconds: Floats, finished: Bools, quantile: float) -> None:
        self.samples = int(finished.sum())
        self._longest = float(lengths[finished].max())
        self._overhead, self._rate = fit_line(lengths[finished], seconds[finished])
        expected = np.array([self.expected(length) for length in lengths.tolist()])
        self.spread = censored_quantile(seconds / expected, finished, quantile)

    def expected(self, length: float) -> float:
        """Return the time expected for a length."""
        seen = min(length, self._longest)
        seconds = self._overhead + self._rate * seen
        if length > seen > 0:
            seconds *= length / seen
        return max(seconds, _LEAST_EXPECTED)


def fit_line(lengths: Floats, seconds: Floats) -> tuple[float, float]:
    """Fit a line of non-negative intercept and slope by the Theil-Sen estimator.

    Parameters
    ----------
    lengths, seconds : arrays, shape (n,), n >= 1
        Observations, 0 or more.

    Returns
    -------
    overhead : float
        Intercept, in the unit of `seconds`.
    rate : float
        Slope.
    """
    first, second = np.triu_indices(len(lengths), k=1)
    run = lengths[second] - lengths[first]
    rise = seconds[second] - seconds[first]
    slopes = rise[run != 0] / run[run != 0]
    rate = max(float(np.median(slopes)), 0.0) if len(slopes) else 0.0
    overhead = float(np.median(seconds - rate * lengths))
    positive = lengths > 0
    if overhead >= 0 or not positive.any():
        return max(overhead, 0.0), rate
    return 0.0, float(np.median(seconds[positive] / lengths[positive]))


def censored_quantile(values: Floats, observed: Bools, quantile: float) -> float:
    """Estimate a quantile from values of which some are only lower bounds (Kaplan-Meier).

    Parameters
    ----------
    values : array, shape (n,)
        Observed values, and lower bounds of those that were cut off.
    observed : array of bool, shape (n,)
        False where a value is a lower bound; at least one is True.
    quantile : float
        Between 0 and 1.

    Returns
    -------
    float
        The smallest observed value that the estimated distribution function puts at or above
        `quantile`; the largest observed value if there is none, since too many were cut off.
    """
    order = np.lexsort((~observed, values))  # of equal values, the observed come first
    values, observed = values[order], observed[order]
    at_risk = np.arange(len(values), 0, -1)
    surviving = np.cumprod(1 - observed / at_risk)
    reached = values[observed & (surviving <= 1 - quantile + 1e-9)]
    return float(reached[0] if len(reached) else values[observed][-1])


class OperationTimeoutError(TimeoutError):
    """What `timeout_context` guards was not done in time.

    Parameters
    ----------
    seconds : float
        The time it had been given.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not done after {seconds:g} s")
        self.seconds = seconds

    def __reduce__(self) -> tuple[type[Self], tuple[float]]:
        return type(self), (self.seconds,)


class TimeoutNotEnforceableError(RuntimeError):
    """Nothing can interrupt the code here when its time is over."""


class timeout_context:  # noqa: N801 - used like a function
    """Interrupt the block when its time is over.

    The block is interrupted by a signal, so it is in Python code, a system call or a wait that
    `OperationTimeoutError` is raised. Native code that never comes back to the interpreter
    cannot be interrupted this way, only by killing its process: run it in a
    `robustness.worker_pool.WorkerPool`.

    Contexts nest: the one that is over first interrupts, whichever it is; a timer and a handler
    of ``SIGALRM`` that were set before go on after the block.

    Parameters
    ----------
    seconds : float
        Time for the block.

    Raises
    ------
    TimeoutNotEnforceableError
        On entry, outside the main thread (the only one that signals interrupt) and on systems
        without ``setitimer``.
    OperationTimeoutError
        From the block, when its time is over.
    ValueError
        If `seconds` is not positive.
    """

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"a timeout must be positive, not {seconds}")
        self._seconds = seconds

    def __enter__(self) -> None:
        if not hasattr(signal, "setitimer"):
            raise TimeoutNotEnforceableError(
                "this system has no interval timer to interrupt the block with; "
                "run it in a robustness.worker_pool.WorkerPool"
            )
        if threading.current_thread() is not threading.main_thread():
            raise TimeoutNotEnforceableError(
                "only the main thread of a process can be interrupted, and this is "
                f"{threading.current_thread().name!r}; "
                "run the block in a robustness.worker_pool.WorkerPool"
            )
        self._deadline = time.monotonic() + self._seconds
        self._take_over()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._give_back()

    def _take_over(self) -> None:
        """Put this deadline in front of the timer and the handler there are."""
        left, self._outer_interval = signal.getitimer(signal.ITIMER_REAL)
        self._outer_deadline = time.monotonic() + left if left else math.inf
        self._active = True
        self._outer_handler = signal.signal(signal.SIGALRM, self._on_alarm)
        self._arm()

    def _arm(self) -> None:
        """Set the timer to this deadline or the outer one, whichever comes first."""
        _set_timer(min(self._deadline, self._outer_deadline), 0.0)

    def _give_back(self) -> None:
        """Leave the timer and the handler as they were before; once."""
        if self._active:
            self._active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._outer_handler)
            _set_timer(self._outer_deadline, self._outer_interval)

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now >= self._deadline:
            # Not left to __exit__, which an exception raised on the way into it would skip.
            self._give_back()
            raise OperationTimeoutError(self._seconds)
        if now < self._outer_deadline:
            self._arm()
            return
        # The outer timer is over: its handler runs as if this context were not there.
        self._outer_deadline = now + self._outer_interval if self._outer_interval else math.inf
        self._give_back()
        if callable(self._outer_handler):
            self._outer_handler(signum, frame)
        elif self._outer_handler is signal.SIG_DFL:
            signal.raise_signal(signum)
        self._take_over()


def _set_timer(deadline: float, interval: float) -> None:
    """Set the interval timer to a point of the monotonic clock; not at all if that is infinite."""
    if math.isfinite(deadline):
        left = max(deadline - time.monotonic(), 1e-6)  # 0 would switch the timer off
        signal.setitimer(signal.ITIMER_REAL, left, interval)
