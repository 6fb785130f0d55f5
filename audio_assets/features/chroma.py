"""Harmonic pitch class profile and tuning."""

from collections.abc import Iterator, Sequence

import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Audio
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.pictures import columns
from audio_assets.features.spectra import (
    A_HZ,
    Peaks,
    Values,
    find_peaks,
    frame_blocks,
    hann,
    magnitude_spectra,
    pitch_classes,
    semitones,
)
from audio_assets.features.statistics import (
    finite_list,
    is_silent,
    mean_and_std,
    mono_is_silent,
    pool_moments,
    weighted_mean,
)

FRAME_SIZE = 4096
HOP_SIZE = 2048
LOWEST_HZ = 40.0
HIGHEST_HZ = 5000.0
MAGNITUDE_THRESHOLD = 1e-5

_MOST_PEAKS = 100
_CENTS = 100
_LOWEST_CENTS = -35
"""Deviations further down are taken for ones upwards, from the semitone below."""
_SPLIT_HZ = 500.0
"""Essentia scales the profiles below and above this before it adds them."""


def _extract(audio: Audio) -> Row:
    if mono_is_silent(audio):
        return FEATURE_SET.empty_row
    cents = np.zeros(_CENTS)
    mean, std = mean_and_std(_describe(audio, cents))
    most_frequent = int(cents.argmax()) - _CENTS // 2 if cents.any() else 0
    if most_frequent < _LOWEST_CENTS:
        most_frequent += _CENTS
    return {
        "mean": finite_list(mean),
        "std": finite_list(std),
        "tuning_hz": A_HZ * 2 ** (most_frequent / 1200),
    }


def _describe(audio: Audio, cents: Values) -> Iterator[Values]:
    """Yield the profiles of blocks of frames, and count the frames' tunings, weighted by energy.

    Cents are counted from half a semitone under equal temperament.
    """
    for frames in frame_blocks(audio, FRAME_SIZE, HOP_SIZE):
        magnitudes = magnitude_spectra(frames, "blackmanharris62")
        peaks = find_peaks(magnitudes, LOWEST_HZ, HIGHEST_HZ, MAGNITUDE_THRESHOLD, _MOST_PEAKS)
        yield _profiles(peaks, len(frames))
        _, deviations = pitch_classes(semitones(peaks.frequencies))
        bins = np.floor(_CENTS * (deviations + 0.5) + 0.5).astype(np.intp) % _CENTS
        histograms = np.bincount(
            _CENTS * peaks.frames + bins, peaks.magnitudes, _CENTS * len(frames)
        ).reshape(-1, _CENTS)
        energies = np.bincount(peaks.frames, peaks.magnitudes**2, len(frames))
        np.add.at(cents, histograms.argmax(axis=1), energies)


def _extract_alternative(audio: Audio) -> Row:
    import librosa

    samples = audio.mono()
    if is_silent(samples):
        return FEATURE_SET.empty_row
    spectrum = np.abs(
        librosa.stft(samples, n_fft=FRAME_SIZE, hop_length=HOP_SIZE, window=hann(FRAME_SIZE))
    )
    pitches, magnitudes = librosa.piptrack(
        S=spectrum, sr=SAMPLE_RATE, fmin=LOWEST_HZ, fmax=HIGHEST_HZ, threshold=0
    )
    magnitudes[magnitudes <= MAGNITUDE_THRESHOLD] = 0
    loud = magnitudes[magnitudes > 0.1 * magnitudes.max(axis=0)]
    strong = magnitudes > np.median(loud) if len(loud) else magnitudes > 0
    tuning = librosa.pitch_tuning(pitches[strong]) if strong.any() else 0.0
    frames, bins = np.nonzero(magnitudes.T)
    peaks = Peaks(frames, pitches[bins, frames], magnitudes[bins, frames])
    mean, std = mean_and_std([_profiles(peaks, magnitudes.shape[1])])
    return {
        "mean": finite_list(mean),
        "std": finite_list(std),
        "tuning_hz": A_HZ * 2 ** (float(tuning) / 12),
    }


def _profiles(peaks: Peaks, frames: int) -> Values:
    """Return the pitch class profile of each frame (Gómez, 2006), from A, shape (frames, 12)."""
    classes, deviations = pitch_classes(semitones(peaks.frequencies))
    energies = (peaks.magnitudes * np.cos(np.pi * deviations)) ** 2
    bands = 2 * peaks.frames + (peaks.frequencies >= _SPLIT_HZ)
    sums = np.bincount(12 * bands + classes, energies, 24 * frames).astype(np.float64)
    return _scaled(_scaled(sums.reshape(frames, 2, 12)).sum(axis=1))


def _scaled(profiles: Values) -> Values:
    """Scale each profile's largest value to 1."""
    largest = profiles.max(axis=-1, keepdims=True)
    scaled: Values = np.divide(profiles, largest, out=np.zeros_like(profiles), where=largest > 0)
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
    licence="AGPL-3.0 (Essentia), BSD-3-Clause (SciPy), ISC (librosa)",
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
