"""Calibrates the confidence of tempi, and tells how well it holds.

python -m benchmarks.tempo_calibration [--quick] [--results DIRECTORY]

Prints the constants of `audio_assets/features/tempo.py`, fitted by logistic regression on
synthesized sounds whose tempo is known. Scored are the probabilities of each of two parts of the
sounds, with drum patterns and instruments of its own, by constants fitted to the other part.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.cli.synthesis import play
from audio_assets.features.onset_functions import beat_functions, periodicity
from audio_assets.features.rhythm import track_beats
from audio_assets.features.tempo import Evidence, Tempo, is_same, judge_tempo
from benchmarks.measure import machine, write_results
from benchmarks.pieces import INSTRUMENTS, METRES, Drums, make_piece

SOUNDS, QUICK_SOUNDS = (500, 350), (6, 6)
"""Of each part."""

_TEMPI = (45.0, 210.0)
_MIDDLE_TEMPO, _SPREAD_OCTAVES = 112.0, 0.45
"""True tempi are normally distributed on a logarithmic scale, within a range."""

KINDS = {
    "drums": 8,
    "no drums": 4,
    "half or double time": 3,
    "even pulses": 2,
    "rubato": 2,
    "no beat": 4,
}
"""Shares of the kinds of sounds."""


@dataclass(frozen=True)
class Sound:
    """Mono samples, and their mean tempo; None where there is no beat."""

    kind: str
    samples: Samples
    bpm: float | None


def make_sounds(seed: int, count: int, part: int) -> Iterator[Sound]:
    """Make sounds of every kind; the two parts share neither drum patterns nor instruments."""
    rng = random.Random(seed)
    for number in range(count):
        [kind] = rng.choices(list(KINDS), list(KINDS.values()))
        match kind:
            case "no beat":
                sound = Sound(kind, _without_beat(rng), None)
            case "even pulses":
                sound = _pulses(rng)
            case _:
                sound = _piece(rng, number, kind, part)
        yield _roughened(rng, sound)


def _piece(rng: random.Random, number: int, kind: str, part: int) -> Sound:
    bpm = _tempo(rng)
    metre = "4/4" if kind == "half or double time" else rng.choice(["4/4", "4/4", "3/4", "6/8"])
    drums: Drums = {}
    if kind != "no drums":
        drums = rng.choice([kit for kit in METRES[metre].drums[part::2] if kit])
    if kind == "half or double time":
        twice = rng.random() < 0.5
        drums = {
            drum: steps[::2] * 2 if twice else ".".join(steps[:8]) + "."
            for drum, steps in drums.items()
        }
    instruments = rng.choice(INSTRUMENTS[part::2])
    piece = make_piece(rng, number, bpm, _seconds(rng), metre, drums, instruments)
    return Sound(kind, play(piece, SAMPLE_RATE).mean(axis=1), bpm)


def _pulses(rng: random.Random) -> Sound:
    """Repeat a stroke in equal intervals, one to four of which are a beat."""
    bpm = _tempo(rng)
    interval = 60 / bpm / rng.choice([1, 2, 3, 4])
    times = np.arange(0, _seconds(rng), interval)
    return Sound("even pulses", _strokes(rng, times, same=True), bpm)


def _without_beat(rng: random.Random) -> Samples:
    """Make noise, a drone, or strokes in irregular intervals."""
    seconds = _seconds(rng)
    generator = np.random.default_rng(rng.getrandbits(32))
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    match rng.choice(["noise", "drone", "strokes", "strokes"]):
        case "noise":
            noise = generator.standard_normal(len(time))
            swell = 1 + 0.8 * np.sin(2 * np.pi * rng.uniform(0.02, 0.2) * time)
            return (0.2 * noise * swell).astype(np.float32)
        case "drone":
            pitches = 110 * 2 ** (generator.integers(0, 24, 4) / 12)
            waves = [
                np.sin(2 * np.pi * pitch * time) * (1 + 0.5 * np.sin(2 * np.pi * slow * time))
                for pitch, slow in zip(pitches, generator.uniform(0.03, 0.3, 4), strict=True)
            ]
            return (0.1 * np.sum(waves, axis=0)).astype(np.float32)
        case _:
            # The larger the shape, the more regular the intervals.
            shape, mean = rng.choice([1, 2, 4, 8]), rng.uniform(0.15, 1.0)
            intervals = generator.gamma(shape, mean / shape, int(seconds / mean))
            return _strokes(rng, np.cumsum(intervals), same=False)


def _strokes(rng: random.Random, times: Samples, same: bool) -> Samples:
    """Play tones or bursts of noise."""
    generator = np.random.default_rng(rng.getrandbits(32))
    decay, tonal = rng.uniform(0.01, 0.2), rng.random() < 0.5
    since = np.arange(int(5 * decay * SAMPLE_RATE)) / SAMPLE_RATE
    samples = np.zeros(int((times[-1] + 1) * SAMPLE_RATE), np.float32)
    envelope, noise = np.exp(-since / decay), generator.standard_normal(len(since))
    pitch = 220.0
    for time in times:
        if not same:
            pitch = 220 * 2 ** (generator.integers(0, 24) / 12)
        stroke = np.sin(2 * np.pi * pitch * since) if tonal else noise
        gain = 0.5 if same else generator.uniform(0.2, 0.6)
        part = samples[int(time * SAMPLE_RATE) :][: len(since)]
        part += (gain * stroke * envelope)[: len(part)]
    return samples


def _roughened(rng: random.Random, sound: Sound) -> Sound:
    """Let the tempo drift, the strokes come early or late, and add noise."""
    samples, bpm = sound.samples, sound.bpm
    time = np.arange(len(samples)) / SAMPLE_RATE
    is_rubato = sound.kind == "rubato"
    if is_rubato or rng.random() < 0.5:
        change = rng.uniform(0.06, 0.25) if is_rubato else rng.choice([0, 0.005, 0.02])
        waves = [(change, rng.uniform(0.03, 0.15))]
        late = rng.choice([0, 0.005, 0.015])
        waves += [(2 * np.pi * f * late / 2, f) for f in (rng.uniform(0.7, 3) for _ in range(3))]
        place = time.copy()
        for speed, hz in waves:
            place += speed / (2 * np.pi * hz) * np.sin(2 * np.pi * hz * time + rng.uniform(0, 6.28))
        if bpm:
            bpm *= float((place[-1] - place[0]) / (time[-1] - time[0]))
        samples = np.interp(place, time, samples).astype(np.float32)
    if rng.random() < 0.3:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(samples))
        level = samples.std() * 10 ** (-rng.uniform(5, 30) / 20)
        samples = samples + (level * noise).astype(np.float32)
    return Sound(sound.kind, samples, bpm)


def _tempo(rng: random.Random) -> float:
    while True:
        tempo = _MIDDLE_TEMPO * 2 ** rng.gauss(0, _SPREAD_OCTAVES)
        if _TEMPI[0] <= tempo <= _TEMPI[1]:
            return tempo


def _seconds(rng: random.Random) -> float:
    return rng.choice([12, 25, 40])


@dataclass(frozen=True)
class Case:
    """A sound's kind and mean tempo, and the tempo that is found."""

    kind: str
    bpm: float | None
    found: Tempo

    @property
    def is_right(self) -> bool:
        return self.bpm is not None and is_same(self.found.bpm, self.bpm)

    @property
    def is_second_right(self) -> bool:
        return self.bpm is not None and is_same(self.found.second, self.bpm)


def find_tempi(sounds: Iterator[Sound]) -> list[Case]:
    """Return a case for each sound in which a tempo is found."""
    cases = []
    for sound in sounds:
        functions = beat_functions(Audio(Path(sound.kind), None, sound.samples[:, np.newaxis]))
        tracked = track_beats(functions)
        found = judge_tempo(tracked.beats, tracked.by_tracker, periodicity(functions))
        if found is not None:
            cases.append(Case(sound.kind, sound.bpm, found))
    return cases


def confidence_scores(pairs: Sequence[tuple[bool, float]]) -> dict[str, float | None]:
    """Score probabilities, each with whether what it is of came true.

    Returns
    -------
    dict
        brier : mean squared error. calibration_error : mean distance of the probability from the
        share that came true, over ten bins by probability, weighted by size. auc : area under the
        ROC curve. None where it is not defined.
    """
    if not pairs:
        return dict.fromkeys(("brier", "calibration_error", "auc"))
    right, probability = (np.array(column, float) for column in zip(*pairs, strict=True))
    bins = reliability(pairs)
    return {
        "brier": float(np.mean(np.square(probability - right))),
        "calibration_error": sum(size * abs(mean - share) for mean, share, size in bins)
        / len(pairs),
        "auc": float(roc_auc_score(right, probability)) if 0 < right.mean() < 1 else None,
    }


def reliability(pairs: Sequence[tuple[bool, float]]) -> list[tuple[float, float, int]]:
    """Return mean probability, share that came true and size of each of ten bins."""
    right, probability = (np.array(column, float) for column in zip(*pairs, strict=True))
    of_bin = np.minimum((10 * probability).astype(int), 9)
    return [
        (float(probability[there].mean()), float(right[there].mean()), int(there.sum()))
        for there in (of_bin == number for number in range(10))
        if there.any()
    ]


def fit(cases: Sequence[Case]) -> LogisticRegression:
    """Return a regression of what is right on the evidence."""
    return LogisticRegression().fit(_evidence(cases), [case.is_right for case in cases])


def _evidence(cases: Sequence[Case]) -> list[tuple[float, ...]]:
    return [astuple(case.found.evidence) for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sounds")
    parser.add_argument("--results", type=Path, help="directory for tempo-calibration.json")
    arguments = parser.parse_args()
    quick = arguments.quick
    about = {"machine": machine(), "quick": quick}
    counts = QUICK_SOUNDS if quick else SOUNDS
    parts = [find_tempi(make_sounds(21 + part, count, part)) for part, count in enumerate(counts)]
    model = fit(parts[0] + parts[1])
    print(f"_INTERCEPT = {model.intercept_[0]:.2f}")
    print(f"_WEIGHTS = {Evidence(*map(float, model.coef_[0].round(2)))}")
    scored: list[tuple[Case, float]] = []
    for cases, others in (parts, parts[::-1]):
        confidences = fit(others).predict_proba(_evidence(cases))[:, 1]
        scored += zip(cases, map(float, confidences), strict=True)
    pairs = [(case.is_right, confidence) for case, confidence in scored]
    results = about | {
        "sounds": len(scored),
        "scores": confidence_scores(pairs),
        "reliability": reliability(pairs),
        "kinds": [
            {
                "kind": kind,
                "sounds": len(of_kind),
                "right": sum(case.is_right for case, _ in of_kind),
                "second_right": sum(case.is_second_right for case, _ in of_kind),
                "confidence": sum(confidence for _, confidence in of_kind) / len(of_kind),
            }
            for kind in KINDS
            if (of_kind := [(case, value) for case, value in scored if case.kind == kind])
        ],
    }
    print(write_results("tempo-calibration", results, arguments.results))


if __name__ == "__main__":
    main()
