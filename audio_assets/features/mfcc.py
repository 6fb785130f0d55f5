"""Mel-frequency cepstral coefficients."""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.essentia_library import essentia, filters_of
from audio_assets.features.pictures import columns
from audio_assets.features.spectra import frame_blocks, hann, magnitude_spectra
from audio_assets.features.statistics import finite_list, mean_and_std, pool_moments

FRAME_SIZE = 2048
HOP_SIZE = 1024
COEFFICIENTS = 13
BANDS = 40
HIGHEST_HZ = 11000.0
SILENCE = 1e-10


def _extract(audio: Audio) -> Row:
    filters = _mel_filters()
    return _row(
        np.square(magnitude_spectra(frames)[:, : len(filters)]) @ filters
        for frames in frame_blocks(audio, FRAME_SIZE, HOP_SIZE)
    )


@cache
def _mel_filters() -> Samples:
    """Return Essentia's Mel filters for powers, shape (bins up to the highest, bands)."""
    bands = essentia().MelBands(numberBands=BANDS, highFrequencyBound=HIGHEST_HZ, type="magnitude")
    highest = int(HIGHEST_HZ * FRAME_SIZE / SAMPLE_RATE)
    return filters_of(bands, FRAME_SIZE // 2 + 1)[: highest + 1]


def _extract_alternative(audio: Audio) -> Row:
    import librosa

    mel = librosa.feature.melspectrogram(
        y=audio.mono(),
        sr=SAMPLE_RATE,
        n_fft=FRAME_SIZE,
        hop_length=HOP_SIZE,
        window=hann(FRAME_SIZE),
        power=2.0,
        n_mels=BANDS,
        fmin=0.0,
        fmax=HIGHEST_HZ,
        htk=True,
        norm=1,
    )
    return _row([mel.T])


def _row(blocks: Iterable[Samples]) -> Row:
    """Return the statistics of the cepstrum of Mel spectra, each block of shape (frames, bands)."""
    from scipy import fft

    def cepstra(bands: Samples) -> Samples:
        # Twice the level of a power: Essentia takes it for an amplitude.
        levels = 20 * np.log10(np.maximum(bands, SILENCE))
        coefficients: Samples = fft.dct(levels, type=2, norm="ortho")[:, :COEFFICIENTS]
        return coefficients

    mean, std = mean_and_std(map(cepstra, blocks))
    return {"mean": finite_list(mean), "std": finite_list(std)}


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    return pool_moments(rows, durations, "mean", "std")


def _picture(row: Row) -> str | None:
    # The first coefficient follows the level and would dwarf the others.
    return columns((row["mean"] or [])[1:])


FEATURE_SET = FeatureSet(
    name="mfcc",
    description=(
        "Mel-frequency cepstral coefficients (Davis and Mermelstein, 1980; the 40-band filter "
        "bank of Ganchev et al., 2005) of frames of 2048 samples every 1024 samples at "
        "44.1 kHz: mean and standard deviation over the track."
    ),
    columns=(
        Column(
            "mean",
            "FLOAT[13]",
            "Mean of each coefficient; the first follows the level (about -1100 for silence), the "
            "others stay within about ±300",
            "dB",
        ),
        Column("std", "FLOAT[13]", "Standard deviation of each coefficient", "dB", low=0),
    ),
    licence="AGPL-3.0 (Essentia), BSD-3-Clause (SciPy), ISC (librosa)",
    citation=(
        "S. Davis and P. Mermelstein, Comparison of parametric representations for "
        "monosyllabic word recognition in continuously spoken sentences, IEEE TASSP 28(4), "
        "1980; T. Ganchev, N. Fakotakis and G. Kokkinakis, Comparative evaluation of various "
        "MFCC implementations on the speaker verification task, SPECOM 2005"
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    picture=_picture,
    headline="mean",
    position=60,
    code_version="2",
)
