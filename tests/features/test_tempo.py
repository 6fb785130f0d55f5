"""The second candidate of a tempo, and how sure the first is."""

import numpy as np
import pytest

from audio_assets.features.tempo import Tempo, judge_tempo

BEATS = np.arange(0, 20, 0.5)  # 120 beats per minute
LAG = 44100 / 512 / 2  # of a beat


def judged(
    beats: np.ndarray = BEATS,
    others: tuple[float, ...] = (),
    peaks: dict[float, float] | None = None,
) -> Tempo | None:
    """Judge beats with four other trackers, and peaks of the periodicity by beats."""
    periodicity = np.zeros(512)
    for lag, height in (peaks or {}).items():
        periodicity[round(lag * LAG)] = height
    by_tracker = [beats] * (5 - len(others))
    return judge_tempo(
        beats, [*by_tracker, *(np.arange(0, 20, 60 / bpm) for bpm in others)], periodicity
    )


def confidence(**how: object) -> float:
    tempo = judged(**how)  # type: ignore[arg-type]
    assert tempo
    return tempo.confidence


def test_second_candidate_is_the_best_supported_other_tempo() -> None:
    for others, peaks, second in (
        ((), {}, 80),  # the nearest to common tempi
        ((90, 90), {}, 90),
        ((90,), {2: 0.9}, 60),
        ((), {0.5: 0.2}, 80),
        ((119, 60), {}, 60),
    ):
        tempo = judged(others=others, peaks=peaks)
        assert tempo
        assert tempo.second == pytest.approx(second, rel=0.01)


def test_confidence_falls_with_each_doubt() -> None:
    sure = {1.0: 0.6, 2.0: 0.8}
    clear = confidence(peaks=sure)
    wandering = np.concatenate([BEATS, 20 + np.cumsum([0.4, 0.6] * 10)])
    for doubt in (
        confidence(peaks=sure, others=(90, 70, 150)),
        confidence(peaks=sure, beats=wandering),
        confidence(peaks={0.5: 0.6, **sure}),
        confidence(peaks={0.75: 0.6, **sure}),
    ):
        assert 0 < doubt < clear - 0.05 < 1


def test_few_beats_have_no_tempo() -> None:
    assert judged(beats=BEATS[:3]) is None
    assert judged(beats=np.arange(0, 20, 0.2)) is None  # 300 beats per minute
    assert judged(beats=BEATS[:4])
