"""Loudness by EBU R128, true peak, and dynamic complexity.

Loudness follows ITU-R BS.1770 also where Essentia does not. Essentia multiplies the two filters of
the K-weighting into one and rounds its coefficients to single precision. At 44.1 kHz this moves the
poles of the high-pass from 0.9946 to 0.9930 and 0.9962: it attenuates 40 Hz by 0.7 dB too much, and
a constant by 21 dB only. Music reads 0.1 LU too low, with much bass 0.5.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import soxr
from numpy.typing import NDArray

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.essentia_library import essentia
from audio_assets.features.pictures import bars
from audio_assets.features.statistics import channels_are_silent, finite, largest, weighted_mean

Powers = NDArray[np.float64]

_BLOCK_SECONDS = 10  # what is in memory at once
_ABSOLUTE_GATE_LUFS = -70.0
_SILENCE_LUFS = -120.0
_STEP_SIZE = SAMPLE_RATE // 10
_MOMENTARY_SECONDS = 0.4
_SHORT_TERM_SECONDS = 3.0
_COMPLEXITY_FRAME_SECONDS = 0.2
_COMPLEXITY_FRAME_SIZE = 2 * _STEP_SIZE
_COMPLEXITY_FLOOR_DB = -100.0

_LOUDEST_DB = 200
"""Samples of 32-bit integers that were not scaled reach 187 dB."""

_OVERSAMPLING = 4
_READ = 32  # samples to either side of an interpolated place
_KAISER_BETA = 8.0
_RESAMPLER_CONTEXT = 1024


def _extract(audio: Audio) -> Row:
    if channels_are_silent(audio):
        return FEATURE_SET.empty_row
    power = _step_powers(audio)
    momentary, short_term = (
        np.convolve(power, np.full(round(10 * seconds), 0.1 / seconds), "valid")
        if len(power) >= round(10 * seconds)
        else np.empty(0)
        for seconds in (_MOMENTARY_SECONDS, _SHORT_TERM_SECONDS)
    )
    gated = _gated(momentary, -10.0)
    counted = _lufs(_gated(short_term, -20.0))
    return _row(
        audio.duration_s,
        float(_lufs(gated.mean())) if len(gated) else _ABSOLUTE_GATE_LUFS,
        float(np.subtract(*np.percentile(counted, (95, 10), method="nearest")))
        if len(counted)
        else 0.0,
        _lufs(momentary),
        _lufs(short_term),
        _true_peak(audio.pcm),
        _dynamic_complexity(audio),
    )


def _extract_alternative(audio: Audio) -> Row:
    if channels_are_silent(audio):
        return FEATURE_SET.empty_row
    library = essentia()
    # A single channel is measured as one, as in ITU-R BS.1770 and FFmpeg's ebur128: both channels
    # carrying it would measure 3 LU more.
    stereo = audio.pcm if audio.channels == 2 else np.pad(audio.pcm, ((0, 0), (0, 1)))
    momentary, short_term, integrated, loudness_range = library.LoudnessEBUR128()(
        np.ascontiguousarray(stereo)
    )
    complexity, _ = library.DynamicComplexity()(audio.mono())
    return _row(
        audio.duration_s,
        integrated,
        loudness_range,
        momentary,
        short_term,
        _resampled_peak(audio.pcm),
        complexity,
    )


def _step_powers(audio: Audio) -> Powers:
    """Return the K-weighted power of each whole 0.1 s, the channels added up."""
    from audio_assets.features.kernels import step_energies

    energies = step_energies(np.ascontiguousarray(audio.pcm), _k_weighting(), _STEP_SIZE)
    powers: Powers = energies.sum(axis=1) / _STEP_SIZE
    return powers


@cache
def _k_weighting() -> Powers:
    """Return b0, b1, b2, a1, a2 of the two filters of BS.1770 at 44.1 kHz.

    The recommendation tabulates them at 48 kHz; these are the analogue filters behind the table
    (De Man, "Evaluation of implementations of the EBU R128 loudness measurement", AES 145, 2018)
    through the bilinear transform.
    """
    gain_db, q, cutoff = 3.99984385397, 0.7071752369554193, 1681.9744509555319
    k = np.tan(np.pi * cutoff / SAMPLE_RATE)
    high = 10 ** (gain_db / 20)
    band = high**0.499666774155
    shelf_b = [high + band * k / q + k * k, 2 * (k * k - high), high - band * k / q + k * k]
    shelf_a = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    q, cutoff = 0.5003270373253953, 38.13547087613982
    k = np.tan(np.pi * cutoff / SAMPLE_RATE)
    pass_a = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    # The table gives the high-pass numerator as 1, -2, 1 without normalizing it.
    shelf, high_pass = np.array([*shelf_b, *shelf_a[1:]]), np.array([1, -2, 1, *pass_a[1:]])
    high_pass[3:] /= pass_a[0]
    return np.array([shelf / shelf_a[0], high_pass])


def _lufs(power: Powers | np.floating) -> Powers:
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-30))


def _gated(power: Powers, relative_gate_lu: float) -> Powers:
    """Return the powers that pass the absolute and then the relative gate."""
    power = power[_lufs(power) > _ABSOLUTE_GATE_LUFS]
    if len(power) == 0:
        return power
    return power[_lufs(power) > _lufs(power.mean()) + relative_gate_lu]


def _true_peak(pcm: Samples) -> float:
    """Return the largest value of the channels oversampled four times (full scale is 1)."""
    from audio_assets.features.kernels import interpolated_peak

    return float(interpolated_peak(np.ascontiguousarray(pcm), *_interpolation()))


@cache
def _interpolation() -> tuple[Samples, float]:
    """Return filters for the three places between two samples, and how far they reach beyond both.

    Sinc functions in a Kaiser window, flat within 0.01 dB to 20 kHz, shape (places, samples read).
    Peaks of Gaussian white noise, which goes beyond, come out within 0.2 dB.
    """
    places = np.arange(1, _OVERSAMPLING)[:, None] / _OVERSAMPLING
    samples = np.arange(1 - _READ, _READ + 1)
    window = np.i0(_KAISER_BETA * np.sqrt(1 - ((samples - places) / _READ) ** 2))
    filters = np.sinc(samples - places) * window / np.i0(_KAISER_BETA)
    # Less a straight line from sample 0 to 1, filters are sums of weighted second differences.
    right = filters @ samples
    bends = filters.copy()
    bends[:, _READ - 1] -= filters.sum(axis=1) - right
    bends[:, _READ] -= right
    weights = bends.cumsum(axis=1).cumsum(axis=1)
    return filters.astype(np.float32), float(np.linalg.norm(weights, axis=1).max())


def _resampled_peak(pcm: Samples) -> float:
    """Return the largest value of the channels as soxr resamples them to four times the rate."""
    peak = 0.0
    block = _BLOCK_SECONDS * SAMPLE_RATE
    for start in range(0, len(pcm), block):
        first = max(0, start - _RESAMPLER_CONTEXT)
        part = np.ascontiguousarray(pcm[first : start + block + _RESAMPLER_CONTEXT])
        oversampled = soxr.resample(part, 1, _OVERSAMPLING)
        # Where the context is cut the resampler overshoots: leave it out.
        inside = oversampled[(start - first) * _OVERSAMPLING :][: block * _OVERSAMPLING]
        peak = max(peak, float(np.abs(inside).max()))
    return peak


def _dynamic_complexity(audio: Audio) -> float:
    """Return the mean deviation (dB) from the global loudness (Streich, 2007, section 4.1)."""
    from audio_assets.features.kernels import frame_powers

    decay, state = np.exp(-1 / (0.035 * SAMPLE_RATE)), np.zeros(3)
    power = np.concatenate(
        [
            frame_powers(block.mono(), decay, _COMPLEXITY_FRAME_SIZE, state)
            for block in audio.blocks(_BLOCK_SECONDS)
        ]
    )
    level = np.maximum(10 * np.log10(np.maximum(power, 1e-30)), _COMPLEXITY_FLOOR_DB)
    audible = np.flatnonzero(level > _COMPLEXITY_FLOOR_DB)
    if len(audible) == 0:
        return 0.0
    level = level[audible[0] : audible[-1] + 1]
    # Each dB down takes a tenth of a frame's weight.
    overall = np.average(level, weights=0.9**-level)
    return float(np.abs(level - overall).mean())


def _row(
    duration_s: float,
    integrated: float,
    loudness_range: float,
    momentary: Samples | Powers,
    short_term: Samples | Powers,
    peak: float,
    complexity: float,
) -> Row:
    has_momentary = duration_s >= _MOMENTARY_SECONDS
    has_short_term = duration_s >= _SHORT_TERM_SECONDS
    return {
        "integrated_lufs": (
            finite(integrated) if has_momentary and integrated > _ABSOLUTE_GATE_LUFS else None
        ),
        "loudness_range_lu": finite(loudness_range) if has_short_term else None,
        "momentary_max_lufs": _audible(momentary) if has_momentary else None,
        "short_term_max_lufs": _audible(short_term) if has_short_term else None,
        "true_peak_dbtp": finite(20 * np.log10(peak)) if peak > 0 else None,
        "dynamic_complexity_db": (
            finite(complexity) if duration_s >= _COMPLEXITY_FRAME_SECONDS else None
        ),
    }


def _audible(loudness: Samples | Powers) -> float | None:
    peak = float(loudness.max())
    return finite(peak) if peak > _SILENCE_LUFS else None


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    levels = [row["integrated_lufs"] for row in rows]
    power = weighted_mean(
        [None if level is None else 10 ** (level / 10) for level in levels], durations
    )
    means = ("loudness_range_lu", "dynamic_complexity_db")
    maxima = ("momentary_max_lufs", "short_term_max_lufs", "true_peak_dbtp")
    return {
        "integrated_lufs": None if power is None else float(10 * np.log10(power)),
        **{name: weighted_mean((row[name] for row in rows), durations) for name in means},
        **{name: largest(row[name] for row in rows) for name in maxima},
    }


def _picture(row: Row) -> str | None:
    levels = {
        "integrated": row["integrated_lufs"],
        "short-term max": row["short_term_max_lufs"],
        "momentary max": row["momentary_max_lufs"],
        "true peak": row["true_peak_dbtp"],
    }
    units = {name: " dBTP" if name == "true peak" else " LUFS" for name in levels}
    return bars(levels, units, low=_ABSOLUTE_GATE_LUFS)


FEATURE_SET = FeatureSet(
    name="loudness",
    description=(
        "Loudness by EBU R 128 (EBU Tech 3341 and 3342, ITU-R BS.1770-4), true peak by ITU-R "
        "BS.1770-4, dynamic complexity by Streich (2007). The alternative reads up to 0.5 LU "
        "lower where there is much bass. Stereo where the file is; a mono file "
        "is measured as a single channel, 3 LU below the same signal in both channels; files of "
        "more channels are measured on their stereo downmix. NULL for silence and where the file "
        "is shorter than the measure's window. Analysis in blocks takes maxima exactly, gates "
        "each block by itself, and averages loudness range and dynamic complexity."
    ),
    columns=(
        Column(
            "integrated_lufs",
            "DOUBLE",
            "Integrated loudness, gated; above 0 only where samples exceed full scale",
            "LUFS",
            _ABSOLUTE_GATE_LUFS,
            _LOUDEST_DB,
        ),
        Column("loudness_range_lu", "DOUBLE", "Loudness range; needs 3 s", "LU", 0, _LOUDEST_DB),
        Column(
            "momentary_max_lufs", "DOUBLE", "Largest loudness of 0.4 s", "LUFS", high=_LOUDEST_DB
        ),
        Column(
            "short_term_max_lufs", "DOUBLE", "Largest loudness of 3 s", "LUFS", high=_LOUDEST_DB
        ),
        Column(
            "true_peak_dbtp",
            "DOUBLE",
            "Largest peak of the channels oversampled four times; above 0 it clips on playback",
            "dBTP",
            high=_LOUDEST_DB,
        ),
        Column(
            "dynamic_complexity_db",
            "DOUBLE",
            "Mean deviation of the level from the global level, mostly below 45; needs 0.2 s",
            "dB",
            0,
            _LOUDEST_DB,
        ),
    ),
    licence="BSD-3-Clause (SciPy), AGPL-3.0 (Essentia)",
    citation=(
        "EBU R 128 with EBU Tech 3341 and 3342; ITU-R BS.1770-4; S. Streich, Music "
        "complexity, thesis, UPF Barcelona, 2007"
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    picture=_picture,
    headline="integrated_lufs",
    plotted=("integrated_lufs", "loudness_range_lu", "true_peak_dbtp", "dynamic_complexity_db"),
    extractor="scipy",
    alternative="essentia",
    position=20,
    code_version="2",
)
