"""Shape of the spectrum."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.pictures import bars
from audio_assets.features.spectra import Values, frame_blocks, hann, magnitude_spectra
from audio_assets.features.statistics import (
    is_silent,
    mean_and_std,
    mono_is_silent,
    pool_moments,
)

FRAME_SIZE = 2048
HOP_SIZE = 1024

_SCALARS = ("centroid", "rolloff", "spread", "flux", "flatness", "zero_crossing_rate")
_NYQUIST = SAMPLE_RATE / 2
_BIN_HZ = SAMPLE_RATE / FRAME_SIZE
_ROLLOFF_SHARE = 0.85
_FLATNESS_FLOOR_DB = -60.0

# Zwicker's critical bands, in Hz.
_BARK_EDGES = (
    *(0, 50, 100, 150, 200, 300, 400, 510, 630, 770, 920, 1080, 1270, 1480, 1720, 2000, 2320),
    *(2700, 3150, 3700, 4400, 5300, 6400, 7700, 9500, 12000, 15500, 20500),
)
_BARK_BINS = np.rint(np.array(_BARK_EDGES) / _BIN_HZ).astype(int)

# Bins at which Essentia divides 20 Hz to 11 kHz in six bands, part evenly and part by octaves.
_CONTRAST_EDGES = (1, 16, 33, 59, 108, 221, 512)
_CONTRAST_NEIGHBOURS = 0.4
_SMALLEST = 1e-30


def _extract(audio: Audio) -> Row:
    return FEATURE_SET.empty_row if mono_is_silent(audio) else _row(_descriptions(audio))


def _descriptions(audio: Audio) -> Iterator[Values]:
    """Yield the values of each frame, in blocks of shape (frames, values)."""
    from audio_assets.features import kernels

    last = np.zeros(FRAME_SIZE // 2 + 1, np.float32)
    for frames in frame_blocks(audio, FRAME_SIZE, HOP_SIZE):
        magnitudes = magnitude_spectra(frames)
        crossings = np.count_nonzero(np.diff(frames > 0, axis=1), axis=1)
        shape = kernels.spectral_shape(magnitudes, last, _ROLLOFF_SHARE)
        last = magnitudes[-1]
        centroid, spread, rolloff, flux = shape.T
        yield np.column_stack(
            [
                centroid * _BIN_HZ,
                rolloff * _BIN_HZ,
                spread * _BIN_HZ,
                flux,
                _flatness(kernels.band_energies(magnitudes, _BARK_BINS)),
                crossings / FRAME_SIZE,
                _contrast(magnitudes),
            ]
        )


def _flatness(bands: Samples) -> Values:
    """Return the geometric over the arithmetic mean (dB) of each frame's bands."""
    with np.errstate(divide="ignore", invalid="ignore"):
        level = 10 * (np.log10(bands).mean(axis=1) - np.log10(bands.mean(axis=1)))
    # Of silence the level is no number.
    flatness: Values = np.fmax(level, _FLATNESS_FLOOR_DB)
    return flatness


def _extract_alternative(audio: Audio) -> Row:
    import librosa

    samples = audio.mono()
    if is_silent(samples):
        return FEATURE_SET.empty_row
    magnitudes = np.abs(
        librosa.stft(samples, n_fft=FRAME_SIZE, hop_length=HOP_SIZE, window=hann(FRAME_SIZE))
    )
    previous = np.pad(magnitudes, ((0, 0), (1, 0)))[:, :-1]
    bark_bands = np.add.reduceat(magnitudes**2, _BARK_BINS, axis=0)[:-1]
    flatness = librosa.feature.spectral_flatness(S=bark_bands, power=1.0, amin=_SMALLEST)
    frames = np.vstack(
        [
            librosa.feature.spectral_centroid(S=magnitudes, sr=SAMPLE_RATE),
            librosa.feature.spectral_rolloff(
                S=magnitudes**2, sr=SAMPLE_RATE, roll_percent=_ROLLOFF_SHARE
            ),
            librosa.feature.spectral_bandwidth(S=magnitudes, sr=SAMPLE_RATE),
            np.linalg.norm(magnitudes - previous, axis=0),
            np.maximum(10 * np.log10(flatness), _FLATNESS_FLOOR_DB),
            librosa.feature.zero_crossing_rate(
                samples, frame_length=FRAME_SIZE, hop_length=HOP_SIZE
            ),
            _contrast(magnitudes.T).T,
        ]
    )
    return _row([frames.T])


def _contrast(magnitudes: Samples) -> Samples:
    """Return the shape-based spectral contrast (Akkermans et al., 2009), shape (frames, 6)."""
    weights = _contrast_weights()
    first = _CONTRAST_EDGES[0]
    ordered = magnitudes[:, first : first + len(weights)].copy()
    for low, high in pairwise(_CONTRAST_EDGES):
        ordered[:, low - first : high - first].sort(axis=1)
    means = (ordered @ weights).reshape(-1, 3, len(_CONTRAST_EDGES) - 1) + _SMALLEST
    valley, peak, band = means.transpose(1, 0, 2)
    contrast: Samples = -((peak / valley) ** (1 / np.log(band)))
    return contrast


@cache
def _contrast_weights() -> Samples:
    """Return weights for means of the least, the greatest and all bins of each sorted band."""
    first, *_, last = _CONTRAST_EDGES
    weights = np.zeros((last - first, 3, len(_CONTRAST_EDGES) - 1), np.float32)
    for band, (low, high) in enumerate(pairwise(_CONTRAST_EDGES)):
        bins = weights[low - first : high - first, :, band]
        neighbours = max(1, round(_CONTRAST_NEIGHBOURS * len(bins)))
        bins[:neighbours, 0] = bins[-neighbours:, 1] = 1 / neighbours
        bins[:, 2] = 1 / len(bins)
    return weights.reshape(last - first, -1)


_RANGES = {
    "centroid": (0, _NYQUIST),
    "rolloff": (0, _NYQUIST),
    "spread": (0, _NYQUIST / 2),
    "flatness": (_FLATNESS_FLOOR_DB, 0),
    "zero_crossing_rate": (0, 1),
    "contrast": (-1, 0),
}
"""Ranges of the means."""


def _row(blocks: Iterable[Values]) -> Row:
    means, stds = mean_and_std(blocks)
    row: Row = {}
    for i, name in enumerate(_SCALARS):
        row[f"{name}_mean"], row[f"{name}_std"] = float(means[i]), float(stds[i])
    contrast, contrast_std = means[len(_SCALARS) :], stds[len(_SCALARS) :]
    lowest, highest = _RANGES["contrast"]
    is_in_range = ((contrast >= lowest) & (contrast <= highest)).all()
    row["contrast_mean"] = contrast.tolist() if is_in_range else None
    row["contrast_std"] = contrast_std.tolist() if is_in_range else None
    return row


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    combined: Row = {}
    for name in (*_SCALARS, "contrast"):
        combined |= pool_moments(rows, durations, f"{name}_mean", f"{name}_std")
    return combined


def _columns() -> tuple[Column, ...]:
    described = {
        "centroid": ("Centre of gravity of the magnitude spectrum", "Hz"),
        "rolloff": ("Frequency below which 85 % of the energy lies", "Hz"),
        "spread": ("Bandwidth: standard deviation of the spectrum about its centroid", "Hz"),
        "flux": ("L2 norm of the change of the magnitude spectrum between frames", None),
        "flatness": (
            "Geometric over arithmetic mean of the energies of 27 Bark bands; -60 is a tone",
            "dB",
        ),
        "zero_crossing_rate": ("Share of samples at which the sign changes", None),
        "contrast": (
            "Shape-based spectral contrast of six bands from 20 Hz to 11 kHz; -1 is flat. NULL "
            "where samples far above full scale take it out of its range",
            None,
        ),
    }
    return tuple(
        Column(
            f"{name}_{short}",
            "FLOAT[6]" if name == "contrast" else "DOUBLE",
            f"{description}; {statistic} over frames",
            unit,
            *(_RANGES.get(name, (0, None)) if short == "mean" else (0, None)),
        )
        for name, (description, unit) in described.items()
        for short, statistic in (("mean", "mean"), ("std", "standard deviation"))
    )


def _picture(row: Row) -> str | None:
    return bars({name: row[f"{name}_mean"] for name in ("centroid", "spread", "rolloff")}, " Hz")


FEATURE_SET = FeatureSet(
    name="spectral",
    description=(
        "Shape of the magnitude spectrum (Peeters, 2004; flux by Tzanetakis and Cook, 1999; "
        "contrast by Akkermans, Serrà and Herrera, SMC 2009) of frames of 2048 samples every "
        "1024 samples at 44.1 kHz: mean and standard deviation over the track. NULL for silence."
    ),
    columns=_columns(),
    licence="AGPL-3.0 (Essentia), BSD-3-Clause (SciPy), ISC (librosa)",
    citation=(
        "G. Peeters, A large set of audio features for sound description (similarity and "
        "classification) in the CUIDADO project, 2004; G. Tzanetakis and P. Cook, "
        "Multifeature audio segmentation for browsing and annotation, WASPAA 1999; V. "
        "Akkermans, J. Serrà and P. Herrera, Shape-based spectral contrast descriptor, SMC "
        "2009"
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    picture=_picture,
    headline="centroid_mean",
    plotted=("centroid_mean", "rolloff_mean", "flux_mean", "flatness_mean"),
    position=70,
    code_version="2",
)
