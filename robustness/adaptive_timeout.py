"""Timeouts that follow the time which work takes.

Until a kind of work has been observed often enough, its timeout comes from a table. After that it
is the usual time of such a file (see `robustness.timing_history`) times a margin, longer on a busy
machine, between a floor and a ceiling. When most work runs into its learned timeout, what was
learned is out of date (a slower machine, another version): the table's timeout is the least then.
"""

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, overload

import sqlalchemy as sa

from robustness.instrumentation import emit
from robustness.log_context import get_logger
from robustness.memory import available_memory_mib, memory_limit_mib
from robustness.settings import RobustnessSettings, get_settings
from robustness.state import StateStore, get_state_store
from robustness.state_schema import prune, timings
from robustness.timed_block import (
    OperationTimeoutError,
    TimeoutNotEnforceableError,
    timeout_context,
)
from robustness.timing_history import PerformanceStats, TimingHistory

__all__ = [
    "BASE_TIMEOUTS",
    "AdaptiveTimeoutManager",
    "OperationTimeoutError",
    "PerformanceStats",
    "TimeoutDecision",
    "TimeoutNotEnforceableError",
    "TimeoutStrategy",
    "get_timeout_manager",
    "timeout_context",
]

logger = get_logger("adaptive_timeout")

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

_CONDITIONS_SECONDS = 1.0
"""Age at which the machine's load and memory are measured again."""


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
    """A timeout and where it comes from.

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


class AdaptiveTimeoutManager:
    """Gives timeouts and learns from the times that work takes.

    Parameters
    ----------
    store : StateStore, optional
        Where observations are kept; the process's store by default.
    settings : RobustnessSettings, optional
        Bounds, quantile and margin; the process's settings by default.

    Notes
    -----
    A kind of work that `BASE_TIMEOUTS` does not name starts with TIMEOUT_BASE_DELAY. A variant of
    a kind, as ``rhythm/alternative``, has its own history and starts with the kind's timeout.
    """

    def __init__(
        self,
        store: StateStore | None = None,
        *,
        settings: RobustnessSettings | None = None,
    ) -> None:
        self._store = store
        self._settings = settings or get_settings()
        self._lock = threading.Lock()
        self._histories: dict[str, TimingHistory] = {}
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
        """Record how long a piece of work took; a success is stored within a second.

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
            Whether its timeout stopped it; assumed of failed work that took at least its timeout.

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

        if success:
            self._state.transact_soon(_insert, row)
        else:
            self._state.transact(lambda connection: _insert(connection, [row]))
        outcome = "succeeded" if success else "timed_out" if row["censored"] else "failed"
        emit("duration_seconds", processing_time, operation=feature_type, outcome=outcome)
        emit("timeout_seconds", timeout_used, operation=feature_type)
        with self._lock:
            if history := self._histories.get(feature_type):
                history.missed += 1
                history.missed_failures += not success

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
            return TimingHistory(self._load(feature_type)).stats()
        query = sa.select(timings.c.feature_type).distinct().order_by(timings.c.feature_type)
        names = self._state.query(lambda connection: connection.execute(query).scalars().all())
        return {name: TimingHistory(self._load(name)).stats() for name in names}

    def has_succeeded(self, feature_type: str, since: datetime) -> bool:
        """Return whether a kind of work has succeeded since a time, as far as is remembered."""
        return any(
            row["success"] and row["at"] > since.timestamp() for row in self._load(feature_type)
        )

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
        base = BASE_TIMEOUTS.get(kind, settings.timeout_base_delay)
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

    def _history(self, feature_type: str) -> TimingHistory:
        with self._lock:
            history = self._histories.get(feature_type)
            if history is None or history.is_stale():
                history = self._histories[feature_type] = TimingHistory(self._load(feature_type))
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


def _insert(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    connection.execute(sa.insert(timings), rows)
    for feature_type in sorted({row["feature_type"] for row in rows}):  # one order for locks
        prune(connection, timings, SAMPLE_SIZE, feature_type=feature_type)


def _growth(file_size_mb: float, strategy: TimeoutStrategy) -> float:
    """Return the factor by which a file's size lengthens the table's timeout."""
    size = file_size_mb / _SIZE_SCALE_MB
    if strategy is TimeoutStrategy.EXPONENTIAL:
        return math.exp2(min(size, 100.0))  # far above every ceiling, and still a number
    return 1.0 + size


def _load_per_core() -> float:
    """Return the average number of runnable processes of the last minute per usable core."""
    return os.getloadavg()[0] / len(os.sched_getaffinity(0))
