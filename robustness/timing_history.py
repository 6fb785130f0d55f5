"""The time that work has taken, and the time that a file is expected to take.

1. The expected time is a line in the file's length, ``overhead + rate * length``, fitted by the
   Theil-Sen estimator [1]_ [2]_: the median of the slopes between all pairs of observations, which
   a few odd files do not move. With the overhead apart, a library of short sounds does not lead to
   hours for a long file. Beyond the longest file observed the time grows with the length.
2. How far times spread above that is a quantile of observed over expected time. Work stopped by
   its timeout would have taken longer: such observations are censored, and leaving them out, or
   taking them as they are, would pull the quantile towards the timeouts themselves. The
   Kaplan-Meier estimator [3]_ accounts for them. Where too many are censored to estimate the
   quantile, the largest ratio of finished work replaces it, so that work which never ends does not
   raise the timeout without end.

References
----------
.. [1] H. Theil (1950). A rank-invariant method of linear and polynomial regression analysis.
   Indagationes Mathematicae 12.
.. [2] P. K. Sen (1968). Estimates of the regression coefficient based on Kendall's tau.
   Journal of the American Statistical Association 63(324).
.. [3] E. L. Kaplan, P. Meier (1958). Nonparametric estimation from incomplete observations.
   Journal of the American Statistical Association 53(282).
"""

import time
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_RECENT = 10
"""Newest observations that the success rate is taken from."""

_FEWEST_RECENT = 3
"""Observations before a success rate says something."""

_REFRESH_SECONDS = 5.0
"""Age at which what other processes have recorded is read again."""

_LEAST_EXPECTED = 0.1
"""Expected seconds below which observed over expected time is mere noise."""


class PerformanceStats(TypedDict):
    """Statistics of a kind of work over its newest observations (at most `SAMPLE_SIZE`)."""

    avg_time: float
    """Mean time of work that succeeded, in seconds; 0 if none has."""
    avg_processing_time: float
    """The same."""
    success_rate: float
    """Share of observations that succeeded, 0 to 1; 1 without any, as nothing has failed."""
    timeout_efficiency: float
    """Mean share of the given timeout that work which succeeded has used, 0 to 1."""
    timeouts: int
    """Observations that were stopped by their timeout."""
    samples: int
    """Observations."""


class TimingHistory:
    """The observations of a kind of work as they were read from the store."""

    def __init__(self, rows: Sequence[sa.RowMapping]) -> None:
        self._read_at = time.monotonic()
        self.missed, self.missed_failures = 0, 0
        """Observations recorded by this process since, and those of them that failed."""
        # A missing length or size (None) becomes NaN.
        self._values: dict[str, Floats] = {
            name: np.array([row[name] for row in rows], dtype=np.float64)
            for name in ("seconds", "audio_seconds", "file_size_mb", "timeout_given")
        }
        self._success: Bools = np.array([row["success"] for row in rows], dtype=bool)
        self._censored: Bools = np.array([row["censored"] for row in rows], dtype=bool)
        self._models: dict[tuple[str, float], _Model | None] = {}

    def is_stale(self) -> bool:
        """Return whether the observations have changed enough to be read again."""
        too_old = time.monotonic() > self._read_at + _REFRESH_SECONDS
        many = len(self._success) / 10
        return too_old or self.missed > many or self.missed_failures > min(many, _RECENT)

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
        """Return the statistics of the observations."""
        seconds = self._values["seconds"][self._success]
        given = self._values["timeout_given"][self._success]
        average = float(seconds.mean()) if len(seconds) else 0.0
        used = seconds[given > 0] / given[given > 0]
        return PerformanceStats(
            avg_time=average,
            avg_processing_time=average,
            success_rate=float(self._success.mean()) if len(self._success) else 1.0,
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
