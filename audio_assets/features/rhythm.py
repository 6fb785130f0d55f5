"""Tempo, beats and onsets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.essentia_library import essentia
from audio_assets.features.onset_functions import (
    HOP_SIZE,
    BeatFunctions,
    beat_functions,
    onset_functions,
    periodicity,
)
from audio_assets.features.pictures import curve
from audio_assets.features.statistics import is_silent, mono_is_silent, weighted_mean
from audio_assets.features.tempo import TEMPI, is_same, is_tempo, judge_tempo

_FRAME_S = 2048 / SAMPLE_RATE

_SHORTEST_S = 6.0
"""Essentia's TempoTapDegara estimates the beats' period in frames of 5.944 s.

So do M. E. P. Davies and M. D. Plumbley, Context-dependent beat tracking of musical audio, IEEE
TASLP 15(3), 2007.
"""


@dataclass(frozen=True)
class Tracked:
    """What the beat trackers find.

    Parameters
    ----------
    beats : ndarray, shape (beats,)
        Times (s) by the tracker that agrees best with the others.
    agreement : float
        How well the trackers agree.
    by_tracker : sequence of ndarray
        The beats of each tracker.
    """

    beats: Samples
    agreement: float
    by_tracker: Sequence[Samples]


def _extract(audio: Audio) -> Row:
    if mono_is_silent(audio):
        return _row([], 0.0)
    functions = beat_functions(audio)
    tracked = track_beats(functions)
    onsets = essentia().Onsets()(onset_functions(audio), [1, 1])
    beats, onset_rate = tracked.beats.tolist(), len(onsets) / audio.duration_s
    tempo = judge_tempo(tracked.beats, tracked.by_tracker, periodicity(functions))
    if tempo is None:
        return _row(beats, onset_rate)
    return _row(beats, onset_rate, tempo.bpm, tempo.confidence, tempo.second, tracked.agreement)


def track_beats(functions: BeatFunctions) -> Tracked:
    """Track the beats of each function and elect one of the trackers.

    A beat tracker follows each function (Degara et al., 2012); the agreement of their beats is
    that of Zapata et al. (2012). The trackers are Essentia's.
    """
    library = essentia()
    rate = SAMPLE_RATE / HOP_SIZE
    track = library.TempoTapDegara(sampleRateODF=rate, resample="none")
    track_double_hop = library.TempoTapDegara(sampleRateODF=rate / 2, resample="x2")

    class Agreement(library.TempoTapMaxAgreement):  # type: ignore[name-defined, misc]
        def configure(self) -> None:
            """Keep the histogram of beat errors, to which each call adds its bins once more."""

    by_tracker = [
        track_double_hop(functions.complex_difference),
        track_double_hop(functions.energy_flux),
        track_double_hop(functions.mel_flux),
        track(functions.beat_emphasis),
        track(functions.information_gain),
    ]
    beats, agreement = Agreement()(by_tracker)
    # Essentia loses a beat that is the only one.
    return Tracked(beats if len(beats) > 1 else beats[:0], agreement, by_tracker)


def _extract_alternative(audio: Audio) -> Row:
    import librosa

    samples = audio.mono()
    if is_silent(samples):
        return _row([], 0.0)
    envelope = librosa.onset.onset_strength(y=samples, sr=SAMPLE_RATE, hop_length=HOP_SIZE)
    tempo, beats = librosa.beat.beat_track(
        onset_envelope=envelope, sr=SAMPLE_RATE, hop_length=HOP_SIZE, units="time"
    )
    onsets = librosa.onset.onset_detect(
        onset_envelope=envelope, sr=SAMPLE_RATE, hop_length=HOP_SIZE
    )
    bpm = float(np.max(tempo))
    return _row(
        beats.tolist(), len(onsets) / audio.duration_s, bpm if is_tempo(bpm, beats) else None
    )


def _row(
    beats: list[float],
    onset_rate: float,
    bpm: float | None = None,
    bpm_confidence: float | None = None,
    bpm_second: float | None = None,
    beat_confidence: float | None = None,
) -> Row:
    return {
        "bpm": bpm,
        "bpm_confidence": bpm_confidence,
        "bpm_second": bpm_second,
        "beat_confidence": beat_confidence,
        "beats_count": len(beats),
        "beats": beats,
        "onset_rate": float(onset_rate),
    }


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    starts = list(accumulate(durations, initial=0.0))[:-1]
    beats = [start + beat for start, row in zip(starts, rows, strict=True) for beat in row["beats"]]
    bpm = _weighted_median([row["bpm"] for row in rows], durations)
    # A block with another tempo speaks against this one.
    agrees = [bpm is not None and is_same(row["bpm"] or 0.0, bpm) for row in rows]
    confidences = [
        row["bpm_confidence"] if same or row["bpm_confidence"] is None else 0.0
        for same, row in zip(agrees, rows, strict=True)
    ]
    seconds = [row["bpm_second"] if same else None for same, row in zip(agrees, rows, strict=True)]
    return _row(
        beats,
        weighted_mean((row["onset_rate"] for row in rows), durations) or 0.0,
        bpm,
        weighted_mean(confidences, durations),
        _weighted_median(seconds, durations),
        weighted_mean((row["beat_confidence"] for row in rows), durations),
    )


def _weighted_median(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return the value at which half of the weight is reached; None if all are None."""
    known = sorted((v, w) for v, w in zip(values, weights, strict=True) if v is not None)
    if not known:
        return None
    reached = np.cumsum([weight for _, weight in known])
    return known[int(np.searchsorted(reached, reached[-1] / 2))][0]


def _contradiction(row: Mapping[str, Any], duration_s: float | None) -> str | None:
    beats = row["beats"]
    if len(beats) != row["beats_count"]:
        return f"{row['beats_count']} beats are said to be {len(beats)}"
    if any(right < left for left, right in pairwise(beats)):
        return "its beats are not in order"
    if beats and duration_s is not None and beats[-1] > duration_s + _FRAME_S:
        return f"a beat at {beats[-1]:.2f} s is behind the end of the audio, {duration_s:.2f} s"
    return None


def _picture(row: Row) -> str | None:
    """Draw the tempo over time, from beat to beat."""
    steps = [(left, right) for left, right in pairwise(row["beats"]) if right > left]
    tempo = [60 / (right - left) for left, right in steps]
    return curve([left for left, _ in steps], tempo, " s", " bpm")


FEATURE_SET = FeatureSet(
    name="rhythm",
    description=(
        "Tempo and beats by the multi-feature beat tracker (Zapata, Davies and Gómez, IEEE/ACM "
        "TASLP 2014), as Essentia's RhythmExtractor2013 has them, onset rate by high-frequency "
        "content and complex-domain onset detection (Bello et al., 2005). The alternative tracks "
        "beats by dynamic programming (Ellis, 2007) and says neither how sure it is nor what else "
        "the tempo may be. Analysis in blocks "
        "takes the median tempo, weighted by duration; a block with another tempo has a "
        "probability of 0, and beats near a block's edge may be missed."
    ),
    columns=(
        Column(
            "bpm",
            "DOUBLE",
            "Tempo; NULL where fewer than four beats are found, or they have no tempo in the range",
            "1/min",
            *TEMPI,
        ),
        Column(
            "bpm_confidence",
            "DOUBLE",
            "Probability that bpm is within 4 % of the true tempo, calibrated on synthesized music",
            low=0,
            high=1,
        ),
        Column("bpm_second", "DOUBLE", "What the tempo may be if it is not bpm", "1/min", *TEMPI),
        Column(
            "beat_confidence",
            "DOUBLE",
            "Agreement of five beat trackers: under 1 very low, over 3.5 excellent",
            low=-0.33,
            high=5,
        ),
        Column("beats_count", "INTEGER", "Number of beats", low=0),
        Column("beats", "DOUBLE[]", "Times of the beats from the file's start", "s", low=0),
        Column("onset_rate", "DOUBLE", "Onsets per second", "1/s", low=0, high=100),
    ),
    licence="AGPL-3.0 (Essentia), BSD-3-Clause (SciPy), ISC (librosa)",
    citation=(
        "J. R. Zapata, M. E. P. Davies and E. Gómez, Multi-feature beat tracking, IEEE/ACM "
        "TASLP 22(4), 2014; N. Degara et al., Reliability-informed beat tracking of musical "
        "signals, IEEE TASLP 20(1), 2012; J. P. Bello et al., A tutorial on onset detection in "
        "music signals, IEEE TSAP 13(5), 2005; D. P. W. Ellis, Beat tracking by dynamic "
        "programming, Journal of New Music Research 36(1), 2007"
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    picture=_picture,
    contradiction=_contradiction,
    headline="bpm",
    plotted=("bpm", "bpm_confidence", "beat_confidence", "onset_rate"),
    shortest_s=_SHORTEST_S,
    position=80,
    code_version="3",
)
