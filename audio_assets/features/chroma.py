"""Harmonic pitch class profile and tuning."""

from collections.abc import Sequence

import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.essentia_library import Frames, essentia, per_frame
from audio_assets.features.pictures import columns
from audio_assets.features.statistics import is_silent, mean_and_std, pool_moments, weighted_mean

FRAME_SIZE = 4096
HOP_SIZE = 2048
LOWEST_HZ = 40.0
HIGHEST_HZ = 5000.0
MAGNITUDE_THRESHOLD = 1e-5

_A_HZ = 440.0
_SPLIT_HZ = 500.0
"""Essentia scales the profiles below and above this before it adds them."""


def _extract(audio: Audio) -> Row:
    samples = audio.mono()
    if is_silent(samples):
        return FEATURE_SET.empty_row
    library = essentia()
    window, spectrum = library.Windowing(type="blackmanharris62"), library.Spectrum()
    peaks = library.SpectralPeaks(
        orderBy="magnitude",
        magnitudeThreshold=MAGNITUDE_THRESHOLD,
        minFrequency=LOWEST_HZ,
        maxFrequency=HIGHEST_HZ,
    )
    hpcp, tuning = library.HPCP(), library.TuningFrequency()

    def describe(frame: Samples) -> Samples:
        frequencies, magnitudes = peaks(spectrum(window(frame)))
        tuning_hz, _ = tuning(frequencies, magnitudes)
        return np.append(hpcp(frequencies, magnitudes), tuning_hz)

    frames = per_frame(samples, FRAME_SIZE, HOP_SIZE, describe)
    mean, std = mean_and_std(frames[:, :-1])
    # The estimate of each frame rests on all frames up to it.
    return {"mean": mean, "std": std, "tuning_hz": float(frames[-1, -1])}


def _extract_alternative(audio: Audio) -> Row:
    import librosa

    samples = audio.mono()
    if is_silent(samples):
        return FEATURE_SET.empty_row
    window = np.hanning(FRAME_SIZE)
    # Essentia scales its windows to a sum of 2.
    window *= 2 / window.sum()
    spectrum = np.abs(librosa.stft(samples, n_fft=FRAME_SIZE, hop_length=HOP_SIZE, window=window))
    pitches, magnitudes = librosa.piptrack(
        S=spectrum, sr=SAMPLE_RATE, fmin=LOWEST_HZ, fmax=HIGHEST_HZ, threshold=0
    )
    magnitudes[magnitudes <= MAGNITUDE_THRESHOLD] = 0
    loud = magnitudes[magnitudes > 0.1 * magnitudes.max(axis=0)]
    strong = magnitudes > np.median(loud) if len(loud) else magnitudes > 0
    tuning = librosa.pitch_tuning(pitches[strong]) if strong.any() else 0.0
    low = pitches < _SPLIT_HZ
    profiles = _profiles(pitches, magnitudes * low) + _profiles(pitches, magnitudes * ~low)
    mean, std = mean_and_std(_scaled(profiles))
    return {"mean": mean, "std": std, "tuning_hz": _A_HZ * 2 ** (float(tuning) / 12)}


def _profiles(pitches: Samples, magnitudes: Samples) -> Frames:
    """Return the pitch class profile of each frame's peaks (Gómez, 2006), from A, scaled.

    Pitches (Hz) and magnitudes have the shape (bins, frames), the profiles (frames, 12).
    """
    bins, frames = np.nonzero(magnitudes)
    semitones = 12 * np.log2(pitches[bins, frames] / _A_HZ)
    nearest = np.rint(semitones)
    energies = (magnitudes[bins, frames] * np.cos(np.pi * (semitones - nearest))) ** 2
    classes = 12 * frames + (nearest % 12).astype(int)
    sums = np.bincount(classes, energies, 12 * pitches.shape[1]).astype(np.float64)
    return _scaled(sums.reshape(-1, 12))


def _scaled(profiles: Frames) -> Frames:
    """Scale each profile's largest value to 1."""
    largest = profiles.max(axis=1, keepdims=True)
    scaled: Frames = np.divide(profiles, largest, out=np.zeros_like(profiles), where=largest > 0)
    return scaled


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    return pool_moments(rows, durations, "mean", "std") | {
        "tuning_hz": weighted_mean((row["tuning_hz"] for row in rows), durations)
    }


def _picture(row: Row) -> str | None:
    return columns(row["mean"], "A BC D EF G ")


FEATURE_SET = FeatureSet(
    name="chroma",
    description=(
        "Harmonic pitch class profile (Gómez, 2006) of frames of 4096 samples every 2048 samples "
        "at 44.1 kHz, each frame's largest bin scaled to 1: mean and standard deviation over the "
        "track, from A upwards. Tuning by the histogram of the peaks' deviations from equal "
        "temperament (Gómez, 2005). NULL for silence. Analysis in blocks averages the tuning."
    ),
    columns=(
        Column(
            "mean",
            "FLOAT[12]",
            "Mean of each pitch class, A first (A, A#, ... G#)",
            low=0,
            high=1,
        ),
        Column(
            "std",
            "FLOAT[12]",
            "Standard deviation of each pitch class, A first",
            low=0,
            high=0.5,
        ),
        Column("tuning_hz", "DOUBLE", "Frequency of the tuning tone A", "Hz", 427, 457),
    ),
    licence="AGPL-3.0 (Essentia), ISC (librosa)",
    citation=(
        "E. Gómez, Tonal description of polyphonic audio for music content processing, "
        "INFORMS Journal on Computing 18(3), 2006; E. Gómez, Key estimation from polyphonic "
        "audio, MIREX 2005"
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    picture=_picture,
    headline="tuning_hz",
    plotted=("tuning_hz",),
    position=50,
    code_version="2",
)
