"""Danceability by detrended fluctuation analysis."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.essentia_library import essentia
from audio_assets.features.pictures import curve
from audio_assets.features.statistics import mono_is_silent, weighted_mean

_FRAME = SAMPLE_RATE // 100
_BLOCK_SECONDS = 10
_SEGMENTS = [int(310 * 1.1**i / 10) for i in range(36)]
"""Segment lengths (frames of 10 ms), from 310 ms to 8.8 s."""

_SHORTEST_S = 3.0
"""Excerpts of 2 s differ from the whole piece by a factor of up to 1.8, of 3 s by 1.4 (p90)."""

_HIGHEST = 10.0
"""A metronome has 9, a tone 400: it has next to no fluctuation to analyse."""


def _extract(audio: Audio) -> Row:
    if audio.duration_s < _SHORTEST_S or mono_is_silent(audio):
        return _row([])
    envelope = _envelope(audio)
    # Essentia takes the deviation of each 10 ms: two samples have it as well as 441.
    signal = np.column_stack([envelope, -envelope]).ravel()
    _, dfa = essentia().Danceability(sampleRate=200)(signal)
    usable = sum(length <= len(envelope) for length in _SEGMENTS) - 1
    return _row(dfa[:usable].tolist())


def _extract_alternative(audio: Audio) -> Row:
    if audio.duration_s < _SHORTEST_S or mono_is_silent(audio):
        return _row([])
    envelope = _envelope(audio)
    profile = np.cumsum(envelope - envelope.mean(dtype=np.float64), dtype=np.float64)
    usable = [length for length in _SEGMENTS if length < len(envelope)]
    fluctuation = np.array([_fluctuation(profile, length) for length in usable])
    if len(usable) < 2 or not fluctuation.all():
        return _row([])
    lengths = np.array(usable)
    # Short segments are biased; adding 3 to their length corrects it (Streich and Herrera).
    return _row((np.diff(np.log(fluctuation)) / np.diff(np.log(lengths + 3.0))).tolist())


def _envelope(audio: Audio) -> Samples:
    """Return the standard deviation of each whole 10 ms of the mono signal."""
    deviations = []
    for block in audio.blocks(_BLOCK_SECONDS):
        count = len(block.pcm) // _FRAME
        deviations.append(block.mono()[: count * _FRAME].reshape(count, _FRAME).std(axis=1))
    return np.concatenate(deviations)


def _fluctuation(profile: NDArray[np.float64], length: int) -> float:
    """Return the root mean square of what linear trends leave of segments of a length."""
    segments = sliding_window_view(profile, length)[: len(profile) - length : max(length // 50, 1)]
    time = np.arange(length) - (length - 1) / 2
    residual = (segments**2).sum(axis=1) - length * segments.mean(axis=1) ** 2
    residual -= (segments @ time) ** 2 / (time @ time)
    return float(np.sqrt(np.maximum(residual, 0).mean() / length))


def _row(dfa: list[float]) -> Row:
    mean = float(np.mean(dfa)) if dfa else 0.0
    if not np.isfinite(mean) or mean <= 0 or not np.isfinite(dfa).all():
        return {"danceability": None, "dfa_exponents": None}
    return {"danceability": 1 / mean if mean >= 1 / _HIGHEST else None, "dfa_exponents": dfa}


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    # Shorter blocks have fewer exponents.
    by_length = zip_longest(*(row["dfa_exponents"] or [] for row in rows))
    dfa = [weighted_mean(exponents, durations) for exponents in by_length]
    return _row([exponent for exponent in dfa if exponent is not None])


def _picture(row: Row) -> str | None:
    """Draw the scaling exponent over the length of the segments."""
    exponents = row["dfa_exponents"] or []
    return curve([length / 100 for length in _SEGMENTS[: len(exponents)]], exponents, " s")


FEATURE_SET = FeatureSet(
    name="danceability",
    description=(
        "Danceability by detrended fluctuation analysis of the amplitude envelope (Streich and "
        "Herrera, AES 118th Convention, 2005). NULL for silence and for files under 3 s. "
        "Analysis in blocks averages the blocks' exponents."
    ),
    columns=(
        Column(
            "danceability",
            "DOUBLE",
            "The higher, the more danceable; music mostly stays below 3. NULL where the level "
            "hardly fluctuates, as in tones",
            low=0,
            high=_HIGHEST,
        ),
        Column(
            "dfa_exponents",
            "FLOAT[]",
            "Scaling exponent of the fluctuation between neighbouring segment lengths of 0.31 s "
            "to 8.8 s, each 1.1 times the one before; shorter files have fewer; about 0 to 2, "
            "low where a regular beat dominates; danceability is the inverse of their mean",
        ),
    ),
    licence="AGPL-3.0 (Essentia), BSD-3-Clause (NumPy)",
    citation=(
        "S. Streich and P. Herrera, Detrended fluctuation analysis of music signals: "
        "danceability estimation and further semantic characterization, AES 118th Convention, "
        "2005"
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    picture=_picture,
    headline="danceability",
    plotted=("danceability",),
    alternative="numpy",
    shortest_s=_SHORTEST_S,
    position=30,
    code_version="2",
)
