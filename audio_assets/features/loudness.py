"""Loudness by EBU R128, true peak, and dynamic complexity."""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import soxr
from numpy.typing import NDArray

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.essentia_library import essentia
from audio_assets.features.pictures import bars
from audio_assets.features.statistics import finite, is_silent, largest, weighted_mean

_ABSOLUTE_GATE_LUFS = -70.0
_SILENCE_LUFS = -120.0
_MOMENTARY_SECONDS = 0.4
_SHORT_TERM_SECONDS = 3.0
_COMPLEXITY_FRAME_SECONDS = 0.2
_COMPLEXITY_FLOOR_DB = -100.0

_OVERSAMPLING = 4
_SEGMENT = SAMPLE_RATE // 4
_CONTEXT = 1024
_CANDIDATES = 8
_CHUNK_SEGMENTS = 40


def _extract(audio: Audio) -> Row:
    if is_silent(audio.pcm):
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
        max(_reference_peak(channel) for channel in _channels(audio)),
        complexity,
    )


def _extract_alternative(audio: Audio) -> Row:
    if is_silent(audio.pcm):
        return FEATURE_SET.empty_row
    step = SAMPLE_RATE // 10
    steps = len(audio.pcm) // step
    power = sum(
        (_k_weighted(channel)[: steps * step].reshape(steps, step) ** 2).mean(axis=1)
        for channel in _channels(audio)
    )
    momentary_power, short_term_power = (
        np.convolve(power, np.full(round(10 * seconds), 0.1 / seconds), "valid")
        if steps >= round(10 * seconds)
        else np.empty(0)
        for seconds in (_MOMENTARY_SECONDS, _SHORT_TERM_SECONDS)
    )
    gated = _gated(momentary_power, -10.0)
    counted = _lufs(_gated(short_term_power, -20.0))
    return _row(
        audio.duration_s,
        float(_lufs(gated.mean())) if len(gated) else _ABSOLUTE_GATE_LUFS,
        float(np.subtract(*np.percentile(counted, (95, 10)))) if len(counted) else 0.0,
        _lufs(momentary_power),
        _lufs(short_term_power),
        max(float(_segment_peaks(channel).max()) for channel in _channels(audio)),
        _dynamic_complexity(audio.mono()),
    )


def _channels(audio: Audio) -> Iterator[Samples]:
    for channel in range(audio.channels):
        yield np.ascontiguousarray(audio.pcm[:, channel])


def _reference_peak(channel: Samples) -> float:
    """Return the largest value TruePeakDetector finds (full scale is 1).

    The detector takes 32 ms for each second of audio, so it only measures those segments in which
    another, faster interpolator sees the highest peaks. The two differ near the Nyquist frequency
    alone: the result is that of the whole signal for music and for Gaussian white noise, and was
    0.07 dB too low for the worst signal tried, random samples of ±1.
    """
    detector = essentia().TruePeakDetector()
    candidates = np.argsort(_segment_peaks(channel))[-_CANDIDATES:]
    peak = 0.0
    for start in candidates * _SEGMENT:
        first = max(0, start - _CONTEXT)
        _, output = detector(channel[first : start + _SEGMENT + _CONTEXT])
        # Where the context is cut the interpolator overshoots: leave it out.
        skipped = (start - first) * _OVERSAMPLING
        inside = output[skipped : skipped + _SEGMENT * _OVERSAMPLING]
        peak = max(peak, float(np.abs(inside).max()))
    return peak


def _segment_peaks(channel: Samples) -> Samples:
    """Return the peak of each segment of a quarter of a second, oversampled four times."""
    peaks = []
    for start in range(0, len(channel), _CHUNK_SEGMENTS * _SEGMENT):
        first = max(0, start - _CONTEXT)
        stop = start + _CHUNK_SEGMENTS * _SEGMENT
        oversampled = soxr.resample(channel[first : stop + _CONTEXT], 1, _OVERSAMPLING)
        inside = np.abs(oversampled[(start - first) * _OVERSAMPLING :])
        inside = inside[: (min(stop, len(channel)) - start) * _OVERSAMPLING]
        edges = np.arange(0, len(inside), _SEGMENT * _OVERSAMPLING)
        peaks.append(np.maximum.reduceat(inside, edges))
    return np.concatenate(peaks)


def _k_weighted(channel: Samples) -> NDArray[np.float64]:
    """Apply the two filters of BS.1770 at 44.1 kHz.

    The recommendation tabulates them at 48 kHz; these are the analogue filters behind the table
    (De Man, "Evaluation of implementations of the EBU R128 loudness measurement", AES 145, 2018)
    through the bilinear transform.
    """
    from scipy import signal

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
    sections = np.array(
        [
            [*np.divide(shelf_b, shelf_a[0]), *np.divide(shelf_a, shelf_a[0])],
            [1, -2, 1, *np.divide(pass_a, pass_a[0])],
        ]
    )
    return cast("NDArray[np.float64]", signal.sosfilt(sections, channel.astype(np.float64)))


def _lufs(power: NDArray[np.float64] | np.floating) -> NDArray[np.float64]:
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-30))


def _gated(power: NDArray[np.float64], relative_gate_lu: float) -> NDArray[np.float64]:
    """Return the powers that pass the absolute and then the relative gate."""
    power = power[_lufs(power) > _ABSOLUTE_GATE_LUFS]
    if len(power) == 0:
        return power
    return power[_lufs(power) > _lufs(power.mean()) + relative_gate_lu]


def _dynamic_complexity(samples: Samples) -> float:
    """Return the mean deviation (dB) from the global loudness (Streich, 2007, section 4.1)."""
    from scipy import signal

    decay = np.exp(-1 / (0.035 * SAMPLE_RATE))
    frame = int(_COMPLEXITY_FRAME_SECONDS * SAMPLE_RATE)
    weighted = signal.lfilter([0.98595, -0.98595], [1, -0.9719], samples.astype(np.float64))
    power = signal.lfilter([1 - decay], [1, -decay], weighted**2)[frame - 1 :: frame]
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
    momentary: Samples | NDArray[np.float64],
    short_term: Samples | NDArray[np.float64],
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


def _audible(loudness: Samples | NDArray[np.float64]) -> float | None:
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
    return bars(levels, " dB", low=_ABSOLUTE_GATE_LUFS)


FEATURE_SET = FeatureSet(
    name="loudness",
    description=(
        "Loudness by EBU R 128 (EBU Tech 3341 and 3342, ITU-R BS.1770-4), true peak by ITU-R "
        "BS.1770-4, dynamic complexity by Streich (2007). Stereo where the file is; a mono file "
        "is measured as a single channel, 3 LU below the same signal in both channels; files of "
        "more channels are measured on their stereo downmix. NULL for silence and where the file "
        "is shorter than the measure's window. Analysis in blocks takes maxima exactly, gates "
        "each block by itself, and averages loudness range and dynamic complexity."
    ),
    columns=(
        Column("integrated_lufs", "DOUBLE", "Integrated loudness, gated, -70 to about 0", "LUFS"),
        Column("loudness_range_lu", "DOUBLE", "Loudness range, from 0; needs 3 s", "LU"),
        Column("momentary_max_lufs", "DOUBLE", "Largest loudness of 0.4 s", "LUFS"),
        Column("short_term_max_lufs", "DOUBLE", "Largest loudness of 3 s", "LUFS"),
        Column(
            "true_peak_dbtp",
            "DOUBLE",
            "Largest peak of the channels oversampled four times; above 0 it clips on playback",
            "dBTP",
        ),
        Column(
            "dynamic_complexity_db",
            "DOUBLE",
            "Mean deviation of the level from the global level, 0 to about 45; needs 0.2 s",
            "dB",
        ),
    ),
    licence="AGPL-3.0 (Essentia), BSD-3-Clause (SciPy)",
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
    alternative="scipy",
    position=20,
)
