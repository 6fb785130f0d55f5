"""The feature sets by Essentia's own algorithms, called frame by frame as its tutorials do.

They compute what the project's extractors do, at their parameters, but for the true peak:
`TruePeakDetector` takes more than twice as long as all of this. MusiCNN's networks and the tags are
read by the project's extractors: Essentia has no other way here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import essentia
import essentia.standard as es
import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Row

essentia.log.infoActive = essentia.log.warningActive = False

OWN = ("musicnn", "metadata")
"""Feature sets extracted by the project."""


def load(path: Path) -> Samples:
    """Decode a file to stereo at 44.1 kHz, shape (samples, 2)."""
    stereo, sample_rate, *_ = es.AudioLoader(filename=str(path))()
    if sample_rate == SAMPLE_RATE:
        return stereo
    resample = es.Resample(inputSampleRate=sample_rate, outputSampleRate=SAMPLE_RATE)
    return np.column_stack([resample(np.ascontiguousarray(channel)) for channel in stereo.T])


def extract(feature_set: str, path: Path, stereo: Samples) -> Row:
    """Extract a feature set of a file's samples."""
    if feature_set in OWN:
        return FEATURE_SETS[feature_set].extract(Audio(path, None, stereo))
    return _ALGORITHMS[feature_set](stereo)


def _mono(stereo: Samples) -> Samples:
    mono: Samples = es.MonoMixer()(stereo, 2)
    return mono


def _spectra(stereo: Samples, frame: int, hop: int, window: str = "hann") -> Iterator[Samples]:
    windowing, spectrum = es.Windowing(type=window), es.Spectrum()
    for samples in es.FrameGenerator(_mono(stereo), frameSize=frame, hopSize=hop):
        yield spectrum(windowing(samples))


def _summary(values: dict[str, list[Samples | float]]) -> Row:
    return {
        f"{name}_{which}": np.asarray(summarize(np.array(of_frames), axis=0)).tolist()
        for name, of_frames in values.items()
        for which, summarize in (("mean", np.mean), ("std", np.std))
    }


def _rhythm(stereo: Samples) -> Row:
    mono = _mono(stereo)
    bpm, beats, confidence, *_ = es.RhythmExtractor2013(method="multifeature")(mono)
    _, onset_rate = es.OnsetRate()(mono)
    return {"bpm": bpm, "beats": beats.tolist(), "confidence": confidence, "onsets": onset_rate}


def _loudness(stereo: Samples) -> Row:
    momentary, short_term, integrated, loudness_range = es.LoudnessEBUR128()(stereo)
    return {
        "integrated_lufs": integrated,
        "loudness_range_lu": loudness_range,
        "momentary_max_lufs": float(momentary.max()),
        "short_term_max_lufs": float(short_term.max()),
        "dynamic_complexity_db": es.DynamicComplexity()(_mono(stereo))[0],
    }


def _danceability(stereo: Samples) -> Row:
    danceability, exponents = es.Danceability()(_mono(stereo))
    return {"danceability": danceability, "dfa_exponents": exponents.tolist()}


def _key(stereo: Samples) -> Row:
    mono = _mono(stereo)
    return {
        profile: es.KeyExtractor(profileType=profile)(mono) for profile in ("bgate", "temperley")
    }


def _mfcc(stereo: Samples) -> Row:
    mfcc = es.MFCC()
    return _summary({"mfcc": [mfcc(spectrum)[1] for spectrum in _spectra(stereo, 2048, 1024)]})


def _chroma(stereo: Samples) -> Row:
    peaks = es.SpectralPeaks(
        orderBy="magnitude", magnitudeThreshold=1e-5, minFrequency=40, maxFrequency=5000
    )
    hpcp, tuning = es.HPCP(), es.TuningFrequency()
    frames, tuning_hz = [], 440.0
    for spectrum in _spectra(stereo, 4096, 2048, "blackmanharris62"):
        frequencies, magnitudes = peaks(spectrum)
        frames.append(hpcp(frequencies, magnitudes))
        tuning_hz, _ = tuning(frequencies, magnitudes)
    return _summary({"hpcp": frames}) | {"tuning_hz": tuning_hz}


def _spectral(stereo: Samples) -> Row:
    moments, shape = es.CentralMoments(range=SAMPLE_RATE / 2), es.DistributionShape()
    bark, flatness = es.BarkBands(), es.FlatnessDB()
    algorithms: dict[str, Callable[[Samples], Samples | float]] = {
        "centroid": es.Centroid(range=SAMPLE_RATE / 2),
        "rolloff": es.RollOff(),
        "spread": lambda spectrum: shape(moments(spectrum))[0] ** 0.5,
        "flux": es.Flux(),
        "flatness": lambda spectrum: flatness(bark(spectrum)),
    }
    contrast = es.SpectralContrast(sampleRate=SAMPLE_RATE)
    algorithms["contrast"] = lambda spectrum: contrast(spectrum)[0]
    values: dict[str, list[Samples | float]] = {name: [] for name in algorithms}
    for spectrum in _spectra(stereo, 2048, 1024):
        for name, algorithm in algorithms.items():
            values[name].append(algorithm(spectrum))
    crossings = es.ZeroCrossingRate()
    values["zero_crossing_rate"] = [
        crossings(frame) for frame in es.FrameGenerator(_mono(stereo), frameSize=2048, hopSize=1024)
    ]
    return _summary(values)


_ALGORITHMS: dict[str, Callable[[Samples], Row]] = {
    "rhythm": _rhythm,
    "loudness": _loudness,
    "danceability": _danceability,
    "key": _key,
    "mfcc": _mfcc,
    "chroma": _chroma,
    "spectral": _spectral,
}
