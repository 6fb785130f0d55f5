"""How right the values are, against a truth that is known; beside other programs.

python -m benchmarks.accuracy [--quick] [--annotations DIRECTORY] [--results DIRECTORY]
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mir_eval
import numpy as np
import soundfile

from audio_assets.audio.decode import decode
from audio_assets.audio.pcm import SAMPLE_RATE, Audio
from audio_assets.cli.synthesis import play
from audio_assets.features import FEATURE_SETS
from audio_assets.features.tempo import is_same
from benchmarks.measure import machine, write_results
from benchmarks.pieces import INSTRUMENTS, METRES, beat_count, make_piece
from benchmarks.tempo_calibration import confidence_scores
from tests.features.signals import sine_of_levels

PIECES, QUICK_PIECES = 120, 2
SECONDS = 30.0

OCTAVES = (1 / 3, 1 / 2, 1, 2, 3)
"""Factors between a right tempo and one that counts another metrical level."""


@dataclass(frozen=True)
class Truth:
    """What is known of a file; None or empty where it is not.

    Parameters
    ----------
    bpm : float, optional
        Tempo (beats per minute).
    beats : sequence of float
        Times of the beats (s).
    key : str, optional
        Tonic and scale, for instance ``F# minor``.
    tuning_hz : float, optional
        Frequency of A4 (Hz).
    kind : str, optional
        What kind of music it is.
    """

    bpm: float | None = None
    beats: Sequence[float] = ()
    key: str | None = None
    tuning_hz: float | None = None
    kind: str | None = None


@dataclass
class Found:
    """What a program says of a file; None or empty where it says nothing."""

    bpm: float | None = None
    bpm_second: float | None = None
    bpm_confidence: float | None = None
    beats: Sequence[float] = ()
    key: str | None = None
    tuning_hz: float | None = None
    lufs: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


# What is known by construction


def make_pieces(directory: Path, count: int) -> Iterator[tuple[Path, Truth]]:
    """Play pieces over tempi, metres, keys, tunings, swing, drums, instruments and levels."""
    rng = random.Random(7)
    tempi = np.linspace(52, 196, count)
    rng.shuffle(tempi)
    for number, tempo in enumerate(tempi):
        cents = rng.choice([0, 0, 0, -35, -20, 20, 35])
        # Played at another rate than the file states, a piece is faster and higher.
        rate = round(SAMPLE_RATE / 2 ** (cents / 1200))
        faster = SAMPLE_RATE / rate
        metre = rng.choice(["4/4", "4/4", "3/4", "6/8"])
        drums, instruments = rng.choice(METRES[metre].drums), rng.choice(INSTRUMENTS)
        piece = make_piece(rng, number, tempo / faster, SECONDS, metre, drums, instruments)
        path = directory / f"{number:03}.flac"
        soundfile.write(path, play(piece, rate), SAMPLE_RATE)
        beats = np.arange(beat_count(piece)) * 60 / tempo
        yield (
            path,
            Truth(
                float(tempo),
                beats.tolist(),
                f"{piece.key} {piece.scale}",
                440 * faster,
                f"{metre}, {'drums' if drums else 'no drums'}",
            ),
        )


def _peak(divisor: int, degrees: float, gain: float) -> np.ndarray:
    """Return a sine of a share of the sample rate, faded in and out."""
    time = np.arange(2 * SAMPLE_RATE)
    sine = gain * np.sin(2 * np.pi * time / divisor + np.radians(degrees))
    return np.stack([sine * np.minimum(1, np.minimum(time, time[::-1]) / 4410)] * 2, 1)


LOUDNESS: Mapping[str, tuple[str, Callable[[], np.ndarray], float]] = {
    "EBU Tech 3341, 1": ("integrated_lufs", lambda: sine_of_levels((20, -23)), -23),
    "EBU Tech 3341, 2": ("integrated_lufs", lambda: sine_of_levels((20, -33)), -33),
    "EBU Tech 3341, 3": (
        "integrated_lufs",
        lambda: sine_of_levels((10, -36), (60, -23), (10, -36)),
        -23,
    ),
    "EBU Tech 3341, 4": (
        "integrated_lufs",
        lambda: sine_of_levels((10, -72), (10, -36), (60, -23), (10, -36), (10, -72)),
        -23,
    ),
    "EBU Tech 3341, 5": (
        "integrated_lufs",
        lambda: sine_of_levels((20, -26), (20.1, -20), (20, -26)),
        -23,
    ),
    "EBU Tech 3341, 15": ("true_peak_dbtp", lambda: _peak(4, 0, 0.5), -6),
    "EBU Tech 3341, 16": ("true_peak_dbtp", lambda: _peak(4, 45, 0.5), -6),
    "EBU Tech 3341, 17": ("true_peak_dbtp", lambda: _peak(6, 60, 0.5), -6),
    "EBU Tech 3341, 18": ("true_peak_dbtp", lambda: _peak(8, 67.5, 0.5), -6),
    "EBU Tech 3341, 19": ("true_peak_dbtp", lambda: _peak(4, 45, 1.41), 3),
    "EBU Tech 3342, 1": ("loudness_range_lu", lambda: sine_of_levels((20, -20), (20, -30)), 10),
    "EBU Tech 3342, 2": ("loudness_range_lu", lambda: sine_of_levels((20, -20), (20, -15)), 5),
    "EBU Tech 3342, 3": ("loudness_range_lu", lambda: sine_of_levels((20, -40), (20, -20)), 20),
    "EBU Tech 3342, 4": (
        "loudness_range_lu",
        lambda: sine_of_levels((20, -50), (20, -35), (20, -20), (20, -35), (20, -50)),
        15,
    ),
}
"""The test signals by name: the column, how to make the samples, the value that it must have."""


def annotated(directory: Path) -> Iterator[tuple[Path, Truth]]:
    """Yield the audio files of a collection that have annotations of the same name beside them.

    These are JAMS (``tempo``, ``beat``, ``key_mode``), or mir_eval's text formats: ``.beats``,
    ``.key`` and ``.bpm``.
    """
    for path in sorted(directory.rglob("*")):
        jams, beats, key, bpm = (path.with_suffix(s) for s in (".jams", ".beats", ".key", ".bpm"))
        if path.suffix in (".jams", ".beats", ".key", ".bpm") or not path.is_file():
            continue
        if jams.exists():
            yield path, _of_jams(json.loads(jams.read_text("utf-8")))
        elif beats.exists() or key.exists() or bpm.exists():
            yield (
                path,
                Truth(
                    float(bpm.read_text()) if bpm.exists() else None,
                    mir_eval.io.load_events(str(beats)).tolist() if beats.exists() else (),
                    mir_eval.io.load_key(str(key)) if key.exists() else None,
                ),
            )


def _of_jams(content: Mapping[str, Any]) -> Truth:
    data = {part["namespace"]: part["data"] for part in content["annotations"] if part["data"]}
    key = data.get("key_mode", [{"value": None}])[0]["value"]
    return Truth(
        bpm=data["tempo"][0]["value"] if "tempo" in data else None,
        beats=[beat["time"] for beat in data.get("beat", ())],
        key=key.replace(":", " ") if key else None,
    )


# Programs


def _extracted(extract: str) -> Callable[[Path, Path], Found]:
    def find(path: Path, scratch: Path) -> Found:
        decode(path, scratch / "pcm.npy")
        audio = Audio.open(scratch / "pcm.npy", path)
        rows = {
            name: getattr(FEATURE_SETS[name], extract)(audio)
            for name in ("rhythm", "key", "chroma", "loudness")
        }
        rhythm, key = rows["rhythm"], rows["key"]
        return Found(
            bpm=rhythm["bpm"],
            bpm_second=rhythm["bpm_second"],
            bpm_confidence=rhythm["bpm_confidence"],
            beats=rhythm["beats"],
            key=f"{key['key']} {key['scale']}" if key["key"] else None,
            tuning_hz=rows["chroma"]["tuning_hz"],
            lufs=rows["loudness"]["integrated_lufs"],
            extra=rows["loudness"],
        )

    return find


def _mixxx(path: Path, scratch: Path) -> Found:
    import mixxx_analyzer

    result = mixxx_analyzer.analyze(str(path))
    return Found(result.bpm, beats=result.beatgrid, key=result.key or None, lufs=result.lufs)


def _sonara(path: Path, scratch: Path) -> Found:
    import sonara

    result = sonara.analyze_file(
        str(path), features=["bpm", "beats", "key", "loudness", "beatgrid"]
    )
    return Found(
        result["bpm"],
        beats=sonara.frames_to_time(np.asarray(result["beats"]), sr=22050, hop_length=512),
        key=result["key"],
        lufs=result["loudness_lufs"],
        extra={
            "true_peak_dbtp": result["true_peak_db"],
            "loudness_range_lu": result["loudness_range_lu"],
        },
    )


def _bliss(path: Path, scratch: Path) -> Found:
    import bliss_audio

    tempo = bliss_audio.Song(str(path)).analysis_dict["tempo"]
    return Found(bpm=(tempo + 1) / 2 * 206 or None)  # 0 to 206 bpm, as -1 to 1; -1 if none is found


PROGRAMS: dict[str, Callable[[Path, Path], Found]] = {
    "primary": _extracted("extract"),
    "alternative": _extracted("extract_alternative"),
    "mixxx-analyzer": _mixxx,
    "sonara": _sonara,
}
if find_spec("bliss_audio"):  # not for Python 3.13
    PROGRAMS["bliss-audio"] = _bliss


# Measures


def scores(pairs: Sequence[tuple[Truth, Found]]) -> dict[str, float | None]:
    """Return a program's scores, each over the files whose truth is known.

    tempo, tempo_or_second, tempo_any_octave : share of files within 4 %, with the
    second candidate too, and within it of a multiple or fraction; confidence_brier,
    confidence_auc : Brier score of the probability that the tempo is right, and area under its ROC
    curve; beat_f_measure, beat_cmlt, beat_amlt, key_score : means of mir_eval's measures;
    tuning_error_cents : the median.
    """
    tempi = [(truth.bpm, found) for truth, found in pairs if truth.bpm]
    confident = [
        (_is_near(found.bpm, truth), found.bpm_confidence)
        for truth, found in tempi
        if found.bpm_confidence is not None
    ]
    beats = [
        mir_eval.beat.evaluate(np.asarray(truth.beats), np.asarray(found.beats))
        for truth, found in pairs
        if len(truth.beats) and len(found.beats)
    ]
    keys = [
        mir_eval.key.weighted_score(truth.key, found.key) if found.key else 0.0
        for truth, found in pairs
        if truth.key
    ]
    tunings = [
        abs(1200 * np.log2(found.tuning_hz / truth.tuning_hz))
        for truth, found in pairs
        if truth.tuning_hz and found.tuning_hz
    ]
    return {
        "tempo": _mean(_is_near(found.bpm, truth) for truth, found in tempi),
        "tempo_or_second": _mean(
            _is_near(found.bpm, truth) or _is_near(found.bpm_second, truth)
            for truth, found in tempi
            if found.bpm_confidence is not None
        ),
        "tempo_any_octave": _mean(
            any(_is_near(found.bpm, factor * truth) for factor in OCTAVES) for truth, found in tempi
        ),
        **{f"confidence_{name}": score for name, score in confidence_scores(confident).items()},
        "beat_f_measure": _mean(score["F-measure"] for score in beats),
        "beat_cmlt": _mean(score["Correct Metric Level Total"] for score in beats),
        "beat_amlt": _mean(score["Any Metric Level Total"] for score in beats),
        "key_score": _mean(keys) if any(found.key for _, found in pairs) else None,
        "tuning_error_cents": float(np.median(tunings)) if tunings else None,
    }


def tempo_by_kind(pairs: Mapping[str, Sequence[tuple[Truth, Found]]]) -> dict[str, Any]:
    """Return how many files there are of each kind of music, and each program's right tempi."""
    kinds = {truth.kind for truth, _ in pairs["primary"] if truth.kind and truth.bpm}
    return {
        kind: {
            "files": sum(truth.kind == kind for truth, _ in pairs["primary"]),
            "tempo": {
                name: _mean(
                    _is_near(found.bpm, truth.bpm)
                    for truth, found in of_program
                    if truth.kind == kind
                )
                for name, of_program in pairs.items()
            },
        }
        for kind in sorted(kinds)
    }


def _is_near(found: float | None, truth: float) -> bool:
    return found is not None and is_same(found, truth)


def _mean(values: Any) -> float | None:
    known = list(values)
    return float(np.mean(known)) if known else None


def loudness_errors(find: Callable[[Path, Path], Found], scratch: Path) -> dict[str, float | None]:
    """Return the error of each test signal (LU or dB); None where the program has no value."""
    errors: dict[str, float | None] = {}
    for name, (column, make, expected) in LOUDNESS.items():
        path = scratch / "signal.wav"
        soundfile.write(path, make(), SAMPLE_RATE, subtype="FLOAT")
        found = find(path, scratch)
        value = {"integrated_lufs": found.lufs, **found.extra}.get(column)
        errors[name] = None if value is None else float(value - expected)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two pieces, no other program")
    parser.add_argument("--annotations", type=Path, help="a collection with annotations beside it")
    parser.add_argument("--results", type=Path, help="directory for accuracy.json")
    arguments = parser.parse_args()
    names = ["primary", "alternative"] if arguments.quick else list(PROGRAMS)
    results: dict[str, Any] = {"machine": machine(), "quick": arguments.quick, "collections": {}}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        count = QUICK_PIECES if arguments.quick else PIECES
        collections = {"synthesized": list(make_pieces(scratch, count))}
        if arguments.annotations:
            collections[arguments.annotations.name] = list(annotated(arguments.annotations))
        for collection, files in collections.items():
            pairs = {
                name: [(truth, PROGRAMS[name](path, scratch)) for path, truth in files]
                for name in names
            }
            results["collections"][collection] = {
                "files": len(files),
                "scores": {name: scores(pairs[name]) for name in names},
                "kinds": tempo_by_kind(pairs),
                "tempi": {
                    name: [(truth.bpm, found.bpm) for truth, found in pairs[name]] for name in names
                },
            }
        if not arguments.quick:
            results["loudness_errors"] = {
                name: loudness_errors(PROGRAMS[name], scratch) for name in names
            }
    print(write_results("accuracy", results, arguments.results))


if __name__ == "__main__":
    main()
