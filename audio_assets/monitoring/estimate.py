"""When the library will be done, as an interval.

The work that is left is the audio of the cells that are left. What a second of audio costs, by
feature set, and how many workers are busy on average, is taken from what was computed of late, in
`BLOCKS` blocks of time. Blocks are drawn with replacement (the bootstrap of Efron, 1979), so that
attempts that happened together stay together, as a slow disk or an album of long tracks makes them
alike. The deviations are then widened by what as much work ahead varies by itself.

It is assumed that work goes on without a pause, on the same machines, in the order in which it
does; that what is left costs per second of audio what the latest did; and that files that were not
opened yet are as long as the others. Cells that failed are not counted as left.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCKS = 20
DRAWS = 1000
MIN_ATTEMPTS = 20
"""With fewer attempts nothing is estimated."""

COVERAGE = 0.9
"""Probability that the true value is in an interval, if the assumptions hold."""


@dataclass(frozen=True)
class Interval:
    """An estimate.

    Parameters
    ----------
    low, middle, high : float
        Median, and the bounds that hold it with a probability of `COVERAGE`.
    """

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Attempts:
    """Attempts that ended, one per element.

    Parameters
    ----------
    feature_set : sequence of str
        What was computed.
    began, ended : array of float64
        When (s since the epoch).
    audio_s : array of float64
        Audio that it analysed (s); 0 if it failed.
    """

    feature_set: Sequence[str]
    began: NDArray[np.float64]
    ended: NDArray[np.float64]
    audio_s: NDArray[np.float64]


@dataclass(frozen=True)
class Left:
    """What is left to compute.

    Parameters
    ----------
    audio_s : dict of str to float
        Audio of the cells that are left in files that were opened, by feature set (s); less than
        nothing if cells of other files have ended meanwhile.
    unseen : int
        Files that were not opened yet; all their cells are left.
    mean_s, deviation_s : float
        Duration of the files that were, and its standard deviation (s).
    seen : int
        Their number.
    """

    audio_s: Mapping[str, float]
    unseen: int = 0
    mean_s: float = 0.0
    deviation_s: float = 0.0
    seen: int = 0


@dataclass(frozen=True)
class Estimate:
    """What is estimated.

    Parameters
    ----------
    seconds : Interval
        Time until the end (s).
    speeds : dict of str to Interval
        Audio per time of one worker, by feature set (s/s).
    """

    seconds: Interval
    speeds: dict[str, Interval]


def estimate(
    left: Left, done: Attempts, since: float, until: float, before: Mapping[str, float]
) -> Estimate | None:
    """Estimate how long the rest takes.

    Parameters
    ----------
    left : Left
        What is left.
    done : Attempts
        What was computed of late.
    since, until : float
        The time in which all attempts are known (s since the epoch).
    before : dict of str to float
        Time of a worker per audio, by feature set, for those of which there is nothing of late
        (s/s).

    Returns
    -------
    Estimate or None
        None if too little was computed for an estimate.
    """
    if len(done.began) < MIN_ATTEMPTS or until <= since:
        return None
    names = sorted({*left.audio_s, *done.feature_set})
    of_set = np.array([[name == other for other in names] for name in done.feature_set], float)
    edges = np.linspace(since, until, BLOCKS + 1)[:, None]
    overlaps = np.minimum(done.ended, edges[1:]) - np.maximum(done.began, edges[:-1])
    overlaps = overlaps.clip(0)
    speed = done.audio_s / np.maximum(done.ended - done.began, 1e-6)
    spent, audio = overlaps @ of_set, (overlaps * speed) @ of_set
    if not audio.any():
        return None
    whole = np.array([before.get(name, spent.sum() / audio.sum()) for name in names])
    np.divide(spent.sum(axis=0), audio.sum(axis=0), out=whole, where=audio.any(axis=0))

    rng = np.random.default_rng(0)  # so that an estimate changes only with what it is made of
    draws = rng.multinomial(BLOCKS, [1 / BLOCKS] * BLOCKS, size=DRAWS)
    spent, audio = draws @ spent, draws @ audio
    costs = np.tile(whole, (DRAWS, 1))
    np.divide(spent, audio, out=costs, where=audio > 0)
    busy = spent.sum(axis=1) / (until - since)
    known = np.array([left.audio_s.get(name, 0.0) for name in names])
    unseen = np.array([name in left.audio_s for name in names], float)
    unseen_s = left.unseen * left.mean_s
    seconds = ((known + unseen * unseen_s).clip(0) * costs).sum(axis=1) / np.maximum(busy, 1e-6)
    middle = float(np.median(seconds))
    if middle:
        seconds = middle + (seconds - middle) * math.sqrt(1 + (until - since) / middle)
    # The mean of the durations that are known is not that of all, nor that of the rest.
    spread = left.deviation_s * math.sqrt(left.unseen * (1 + left.unseen / max(left.seen, 1)))
    seconds += rng.normal(0, spread, DRAWS) * (unseen @ whole) / np.maximum(busy.mean(), 1e-6)
    return Estimate(
        _interval(seconds.clip(0)),
        {name: _interval(1 / costs[:, i]) for i, name in enumerate(names) if audio[:, i].any()},
    )


def _interval(values: NDArray[np.float64]) -> Interval:
    tail = (1 - COVERAGE) / 2
    return Interval(*map(float, np.quantile(values, (tail, 0.5, 1 - tail))))
