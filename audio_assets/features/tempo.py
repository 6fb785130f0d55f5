"""The tempo of beats, what else it may be, and the probability that it is right."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from audio_assets.audio.pcm import SAMPLE_RATE, Samples
from audio_assets.features.onset_functions import HOP_SIZE

TEMPI = (35.0, 213.0)
"""Essentia tracks 40 to 208 beats per minute; the mean of the tempi may lie beside that."""

_LEAST_BEATS = 4

_SAME = 0.04
_NEAR_MOST_FREQUENT = 5.0
_RATIOS = (1 / 2, 2, 1 / 3, 3, 2 / 3, 3 / 2)
_COMMON_TEMPO = 112.0
_WEIGHT_OF_RARITY = 0.3
"""Of values up to 1, the one with which most second candidates of wrong tempi were right."""


@dataclass(frozen=True)
class Evidence:
    """What distinguishes a sure tempo from a doubtful one.

    Parameters
    ----------
    agreement : float
        Share of the beat trackers that have the tempo, 0 to 1.
    regularity : float
        Share of the intervals between beats that fit the tempo, 0 to 1.
    pulse : float
        Periodicity over a beat or over two, the lesser, less that over half a beat.
    between : float
        Periodicity over three quarters of a beat, where music with that beat has little.
    rarity : float
        By how much the second candidate is farther from common tempi (octaves²).
    """

    agreement: float
    regularity: float
    pulse: float
    between: float
    rarity: float


_INTERCEPT = -3.97
_WEIGHTS = Evidence(agreement=1.62, regularity=3.14, pulse=0.87, between=-1.44, rarity=0.9)
"""Of a logistic regression on synthesized sounds: see `benchmarks/tempo_calibration.py`."""


@dataclass(frozen=True)
class Tempo:
    """A tempo, and how sure it is.

    Parameters
    ----------
    bpm : float
        Tempo (beats per minute).
    second : float
        What it may be if it is not that.
    evidence : Evidence
        What is known of it.
    """

    bpm: float
    second: float
    evidence: Evidence

    @property
    def confidence(self) -> float:
        """Probability that the tempo is right, 0 to 1."""
        logit = _INTERCEPT + float(np.dot(astuple(_WEIGHTS), astuple(self.evidence)))
        return 1 / (1 + math.exp(-logit))


def is_same(tempo: float, other: float) -> bool:
    """Return whether a tempo is within 4 % of the other (Gouyon et al., IEEE TASLP 14(5), 2006)."""
    return abs(tempo - other) <= _SAME * other


def tempo_of(beats: Samples) -> float:
    """Return the mean of the tempi from beat to beat within 5 of the most frequent one.

    Tempi are counted in bins of 2 beats per minute. It is 0 if there are fewer than two beats.

    Parameters
    ----------
    beats : ndarray, shape (beats,)
        Times (s).
    """
    if len(beats) < 2:
        return 0.0
    tempi = np.float32(60) / np.diff(beats)
    most_frequent = 2 * np.argmax(np.bincount((tempi / 2 + 0.5).astype(int)))
    near = tempi[np.abs(tempi - most_frequent) < _NEAR_MOST_FREQUENT]
    return float(near.mean() if len(near) else most_frequent)


def is_tempo(bpm: float, beats: Samples) -> bool:
    """Return whether beats are enough for a tempo, and it is one that can be."""
    lowest, highest = TEMPI
    return lowest <= bpm <= highest and len(beats) >= _LEAST_BEATS


def judge_tempo(
    beats: Samples, by_tracker: Sequence[Samples], periodicity: NDArray[np.float64]
) -> Tempo | None:
    """Return the tempo of beats, and what it may be instead; None if they have none.

    Parameters
    ----------
    beats : ndarray, shape (beats,)
        Times (s).
    by_tracker : sequence of ndarray, shape (beats,)
        Times (s) by each of the trackers, of which one has found the beats.
    periodicity : ndarray of float64, shape (lags,)
        As from `onset_functions.periodicity`.
    """
    bpm = tempo_of(beats)
    if not is_tempo(bpm, beats):
        return None
    tempi = [tempo_of(each) for each in by_tracker]
    second = _second(bpm, tempi, periodicity)
    evidence = Evidence(
        agreement=_share(tempi, bpm),
        regularity=float(np.mean(np.abs(np.diff(beats) * bpm / 60 - 1) <= _SAME)),
        pulse=min(_strength(periodicity, bpm), _strength(periodicity, bpm / 2))
        - _strength(periodicity, 2 * bpm),
        between=_strength(periodicity, 4 / 3 * bpm),
        rarity=_rarity(second) - _rarity(bpm),
    )
    return Tempo(bpm, second, evidence)


def _second(bpm: float, tempi: Sequence[float], periodicity: NDArray[np.float64]) -> float:
    """Return the likeliest of the tempi that the trackers have and of other levels of the metre.

    The share of the trackers that have it and the periodicity there speak for a tempo, its rarity
    against it.
    """

    def score(tempo: float) -> float:
        support = _share(tempi, tempo) + _strength(periodicity, tempo)
        return support - _WEIGHT_OF_RARITY * _rarity(tempo)

    lowest, highest = TEMPI
    others = [bpm * ratio for ratio in _RATIOS] + [t for t in tempi if not is_same(t, bpm)]
    return max((t for t in others if lowest <= t <= highest), key=score)


def _rarity(tempo: float) -> float:
    """Return the squared distance from the most common tempo (octaves²)."""
    return math.log2(tempo / _COMMON_TEMPO) ** 2


def _strength(periodicity: NDArray[np.float64], tempo: float) -> float:
    """Return the largest autocorrelation near a beat of a tempo; 0 beyond the lags."""
    lag = 60 / tempo * SAMPLE_RATE / HOP_SIZE
    near = periodicity[math.floor((1 - _SAME) * lag) : math.ceil((1 + _SAME) * lag) + 1]
    return float(near.max(initial=0))


def _share(tempi: Sequence[float], tempo: float) -> float:
    """Return the share of the tempi that are the same as one."""
    return sum(is_same(each, tempo) for each in tempi) / len(tempi)
