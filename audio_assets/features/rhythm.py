"""Tempo, beats and onsets."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Audio
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.essentia_library import essentia
from audio_assets.features.pictures import curve
from audio_assets.features.statistics import is_silent, weighted_mean

_HOP_SIZE = 512


def _extract(audio: Audio) -> Row:
    samples = audio.mono()
    if is_silent(samples):
        return _row(0.0, None, [], 0.0)
    library = essentia()
    bpm, beats, confidence, _, _ = library.RhythmExtractor2013(method="multifeature")(samples)
    _, onset_rate = library.OnsetRate()(samples)
    return _row(bpm, confidence, beats.tolist(), onset_rate)


def _extract_alternative(audio: Audio) -> Row:
    import librosa

    samples = audio.mono()
    if is_silent(samples):
        return _row(0.0, None, [], 0.0)
    envelope = librosa.onset.onset_strength(y=samples, sr=SAMPLE_RATE, hop_length=_HOP_SIZE)
    tempo, beats = librosa.beat.beat_track(
        onset_envelope=envelope, sr=SAMPLE_RATE, hop_length=_HOP_SIZE, units="time"
    )
    onsets = librosa.onset.onset_detect(
        onset_envelope=envelope, sr=SAMPLE_RATE, hop_length=_HOP_SIZE
    )
    return _row(float(np.max(tempo)), None, beats.tolist(), len(onsets) / audio.duration_s)


def _row(bpm: float, confidence: float | None, beats: list[float], onset_rate: float) -> Row:
    found = bpm > 0 and len(beats) > 0
    return {
        "bpm": float(bpm) if found else None,
        "beat_confidence": float(confidence) if found and confidence is not None else None,
        "beats_count": len(beats),
        "beats": beats,
        "onset_rate": float(onset_rate),
    }


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    starts = list(accumulate(durations, initial=0.0))[:-1]
    beats = [start + beat for start, row in zip(starts, rows, strict=True) for beat in row["beats"]]
    return _row(
        _weighted_median([row["bpm"] for row in rows], durations),
        weighted_mean((row["beat_confidence"] for row in rows), durations),
        beats,
        weighted_mean((row["onset_rate"] for row in rows), durations) or 0.0,
    )


def _weighted_median(values: Sequence[float | None], weights: Sequence[float]) -> float:
    """Return the value at which half of the weight is reached; 0 if all are None."""
    known = sorted((v, w) for v, w in zip(values, weights, strict=True) if v is not None)
    if not known:
        return 0.0
    reached = np.cumsum([weight for _, weight in known])
    return known[int(np.searchsorted(reached, reached[-1] / 2))][0]


def _picture(row: Row) -> str | None:
    """Draw the tempo over time, from beat to beat."""
    steps = [(left, right) for left, right in pairwise(row["beats"]) if right > left]
    tempo = [60 / (right - left) for left, right in steps]
    return curve([left for left, _ in steps], tempo, " s", " bpm")


FEATURE_SET = FeatureSet(
    name="rhythm",
    description=(
        "Tempo and beats by the multi-feature beat tracker (Zapata, Davies and Gómez, IEEE/ACM "
        "TASLP 2014; RhythmExtractor2013), onset rate by high-frequency content and complex-domain "
        "onset detection (Bello et al., 2005). The alternative tracks beats by dynamic programming "
        "(Ellis, 2007) and knows no confidence. Analysis in blocks takes the median tempo, "
        "weighted by duration; beats near a block's edge may be missed."
    ),
    columns=(
        Column("bpm", "DOUBLE", "Tempo, 40 to 208; NULL where there is no beat", "1/min"),
        Column(
            "beat_confidence",
            "DOUBLE",
            "Agreement of five beat trackers, 0 to 5.32: under 1 very low, over 3.5 excellent",
        ),
        Column("beats_count", "INTEGER", "Number of beats, ≥ 0"),
        Column("beats", "DOUBLE[]", "Times of the beats from the file's start", "s"),
        Column("onset_rate", "DOUBLE", "Onsets per second, ≥ 0", "1/s"),
    ),
    licence="AGPL-3.0 (Essentia), ISC (librosa)",
    citation=(
        "J. R. Zapata, M. E. P. Davies and E. Gómez, Multi-feature beat tracking, IEEE/ACM "
        "TASLP 22(4), 2014; J. P. Bello et al., A tutorial on onset detection in music "
        "signals, IEEE TSAP 13(5), 2005; D. P. W. Ellis, Beat tracking by dynamic "
        "programming, Journal of New Music Research 36(1), 2007"
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    picture=_picture,
    headline="bpm",
    plotted=("bpm", "beat_confidence", "onset_rate"),
    position=80,
)
