"""Onset detection functions for beats and onsets, from two short-time Fourier transforms.

Essentia's RhythmExtractor2013 and OnsetRate transform a signal five times and take a phase, a sine
and a cosine for every bin. Here frames that several functions read are transformed once, and phases
are complex numbers of modulus 1, which are added by multiplying. The signal is read block by block,
so that memory holds no more than the functions and, for each frame, the 40 bands of the beat
emphasis.

The functions are those of Essentia, deviations from the papers included, and equal its values to
about 1e-5 of each function's maximum. Its quirks are marked as such.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, product

import numpy as np
from numpy.typing import NDArray

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.essentia_library import essentia, filters_of
from audio_assets.features.spectra import hann

Spectra = NDArray[np.complex64]

HOP_SIZE = 512
"""Samples between frames, in both transforms."""

_BEAT_FRAME_SIZE = 2048
_ONSET_FRAME_SIZE = 1024
_FRAMES_PER_BLOCK = 64  # even, so that every other frame is the same one in each block
_SILENCE_DB = -200.0
_MEL_FLOOR = 1e-10

_BANDS = 40
_SMOOTHING_FRAMES = 17
_LAGS = 512
_PREFERRED_LAG = 43  # frames: 120 beats per minute
_COMBS = 4

_GAIN_BINS = (2, 233)  # 40 Hz to 5 kHz


@dataclass(frozen=True)
class BeatFunctions:
    """The onset detection functions of the multi-feature beat tracker, each ≥ 0.

    Parameters
    ----------
    complex_difference, energy_flux, mel_flux : ndarray of float32, shape (frames,)
        Of frames of 2048 samples every 1024 samples.
    beat_emphasis, information_gain : ndarray of float32, shape (frames,)
        Of frames of 2048 samples every 512 samples.
    """

    complex_difference: Samples
    energy_flux: Samples
    mel_flux: Samples
    beat_emphasis: Samples
    information_gain: Samples


def beat_functions(audio: Audio) -> BeatFunctions:
    """Compute the five functions of the multi-feature beat tracker.

    They are the complex spectral difference (Bello et al., IEEE Signal Processing Letters 11(6),
    2004), the rise of the energy (Laroche, JAES 51(4), 2003), the rise of the levels of Mel bands
    (Ellis, Journal of New Music Research 36(1), 2007), the beat emphasis function (Davies, Plumbley
    and Eck, WASPAA 2009) and the information gain between past and present spectra (Hainsworth and
    Macleod, ICMC 2003), as chosen by Zapata, Davies and Gómez (IEEE/ACM TASLP 22(4), 2014).

    Parameters
    ----------
    audio : Audio
        At least one sample.
    """
    from audio_assets.features import kernels

    frames = _frame_count(audio, _BEAT_FRAME_SIZE, HOP_SIZE)
    double_hop_frames = _frame_count(audio, _BEAT_FRAME_SIZE, 2 * HOP_SIZE)
    # The last frame of one hop size may lie behind the last of the other, padded with zeros.
    total = max(frames, 2 * double_hop_frames - 1)
    bands = np.empty((_BANDS, total), np.float32)
    complex_difference, energy_flux, mel_flux, gain = [], [], [], []
    history = 2 * kernels.GAIN_FRAMES
    blocks = _polar(audio, _BEAT_FRAME_SIZE, total, history)
    for first, (spectra, magnitudes, phasors) in zip(count(0, _FRAMES_PER_BLOCK), blocks):
        emphasis = kernels.squared_distance(spectra, magnitudes, phasors) @ _erb_filters()
        bands[:, first : first + len(emphasis)] = emphasis.T
        complex_difference.append(kernels.complex_difference(spectra, magnitudes, phasors, 2))
        double_hop = magnitudes[history - 2 :: 2]
        energy = np.einsum("ij,ij->i", double_hop, double_hop)
        energy_flux.append(_rise(np.sqrt(energy) / double_hop.shape[1]))
        mel_power = np.square(double_hop[:, : len(_mel_filters())]) @ _mel_filters()
        mel_flux.append(_rise(_levels(mel_power)).sum(axis=1))
        gain.append(kernels.information_gain(magnitudes, *_GAIN_BINS))
    energy_flux[0][0] = mel_flux[0][0] = 0
    return BeatFunctions(
        complex_difference=np.concatenate(complex_difference)[:double_hop_frames],
        energy_flux=np.concatenate(energy_flux)[:double_hop_frames],
        mel_flux=np.concatenate(mel_flux)[:double_hop_frames],
        beat_emphasis=_beat_emphasis(bands[:, :frames]),
        information_gain=np.concatenate(gain)[:frames],
    )


def periodicity(functions: BeatFunctions) -> NDArray[np.float64]:
    """Return the mean autocorrelation of the functions, at lags of 0 to 511 times `HOP_SIZE`.

    Their means are subtracted first. It is 1 at lag 0; a function that is constant adds nothing.
    """
    lags = np.arange(_LAGS)
    correlations = []
    for function, hops in (
        (functions.complex_difference, 2),
        (functions.energy_flux, 2),
        (functions.mel_flux, 2),
        (functions.beat_emphasis, 1),
        (functions.information_gain, 1),
    ):
        correlation = _autocorrelation(function - function.mean())
        if correlation[0] > 0:
            correlations.append(np.interp(lags / hops, lags, correlation / correlation[0]))
    return np.mean(correlations, axis=0) if correlations else np.zeros(_LAGS)


def onset_functions(audio: Audio) -> Samples:
    """Compute the two functions of OnsetRate, of frames of 1024 samples every 512 samples.

    They are the high-frequency content (Masri and Bateman, ICMC 1996) and the complex spectral
    difference (Bello et al., 2004).

    Parameters
    ----------
    audio : Audio
        At least one sample.

    Returns
    -------
    ndarray of float32, shape (2, frames)
    """
    from audio_assets.features import kernels

    total = _frame_count(audio, _ONSET_FRAME_SIZE, HOP_SIZE)
    frequencies = np.linspace(0, SAMPLE_RATE / 2, _ONSET_FRAME_SIZE // 2 + 1, dtype=np.float32)
    functions = []
    for spectra, magnitudes, phasors in _polar(audio, _ONSET_FRAME_SIZE, total, history=2):
        difference = kernels.complex_difference(spectra, magnitudes, phasors, 1)
        functions.append([magnitudes[2:] @ frequencies, difference])
    return np.concatenate(functions, axis=1)


def _frame_count(audio: Audio, frame_size: int, hop_size: int) -> int:
    """Return how many frames Essentia cuts: the last is the first that reaches the end."""
    return max(0, -(-(len(audio.pcm) - frame_size) // hop_size)) + 1


def _polar(
    audio: Audio, frame_size: int, total: int, history: int
) -> Iterator[tuple[Spectra, Samples, Spectra]]:
    """Yield spectra, their magnitudes and phases as phasors, of successive blocks of frames.

    Magnitudes and phasors have ``history`` more frames than spectra: those before the block. Before
    the first frame, and where there is no magnitude, the phase is 0.
    """
    from audio_assets.features import kernels

    shape = (history + _FRAMES_PER_BLOCK, frame_size // 2 + 1)
    magnitudes = np.zeros(shape, np.float32)
    phasors = np.ones(shape, np.complex64)
    for first in range(0, total, _FRAMES_PER_BLOCK):
        frames = min(_FRAMES_PER_BLOCK, total - first)
        stop = history + frames
        magnitudes[:history] = magnitudes[-history:]
        phasors[:history] = phasors[-history:]
        spectra = _spectra(audio, frame_size, first, frames)
        kernels.polar(spectra, magnitudes[:stop], phasors[:stop])
        yield spectra, magnitudes[:stop], phasors[:stop]


def _spectra(audio: Audio, frame_size: int, first: int, count: int) -> Spectra:
    """Transform frames of the mono signal, padded with zeros at its end."""
    from scipy import fft

    parts = frame_size // HOP_SIZE
    start, stop = first * HOP_SIZE, (first + count - 1 + parts) * HOP_SIZE
    samples = np.zeros(stop - start, np.float32)
    mono = audio.block(start / SAMPLE_RATE, stop / SAMPLE_RATE).mono()
    samples[: len(mono)] = mono
    hops = samples.reshape(-1, HOP_SIZE)
    window = _window(frame_size).reshape(parts, HOP_SIZE)
    frames = np.empty((count, parts, HOP_SIZE), np.float32)
    for part in range(parts):
        # Phases are relative to the middle of the frame: its second half comes first.
        np.multiply(hops[part : part + count], window[part], out=frames[:, part - parts // 2])
    spectra: Spectra = fft.rfft(frames.reshape(count, -1), axis=1, overwrite_x=True)
    return spectra


def _rise(values: Samples) -> Samples:
    """Return how much each frame but the first exceeds the one before."""
    rise: Samples = np.maximum(np.diff(values, axis=0), 0)
    return rise


def _levels(powers: Samples) -> Samples:
    """Return twice the levels (dB) of powers, as Essentia takes them for amplitudes."""
    levels: Samples = 20 * np.log10(np.maximum(powers, _MEL_FLOOR))
    levels[powers < _MEL_FLOOR] = _SILENCE_DB
    return levels


def _beat_emphasis(bands: Samples) -> Samples:
    """Add up the bands that are most periodic, shape (bands, frames); overwrites them."""
    from scipy.ndimage import uniform_filter1d

    frames = bands.shape[1]
    periodicity = np.zeros(_BANDS)
    for number, band in enumerate(bands):
        deviation = band.std(dtype=np.float64)
        if deviation > 0:
            band /= deviation
        # Essentia averages the frame and those after it, and correlates the padding as well.
        padded = np.pad(band, (0, _SMOOTHING_FRAMES - 1), mode="edge")
        mean = uniform_filter1d(
            padded, _SMOOTHING_FRAMES, mode="nearest", origin=-(_SMOOTHING_FRAMES // 2)
        )
        padded[:frames] = band[:] = np.maximum(band - mean[:frames], 0)
        periodicity[number] = max(0.0, (_autocorrelation(padded) @ _combs()).max())
    # Essentia keeps the bands from the weight of number 24 upwards: it sorts an empty vector where
    # it means to find the 60th percentile.
    kept = np.where(periodicity >= periodicity[24], periodicity, 0)
    largest = periodicity.max()
    emphasis: Samples = (kept / largest if largest else kept).astype(np.float32) @ bands
    return emphasis


def _autocorrelation(samples: Samples) -> NDArray[np.float64]:
    """Return the unbiased autocorrelation at lags of 0 to 511 frames; 0 beyond the signal."""
    from scipy import fft

    size = fft.next_fast_len(len(samples) + _LAGS, real=True)
    spectrum = fft.rfft(samples, size)
    correlation = fft.irfft(spectrum * spectrum.conj(), size)[:_LAGS].astype(np.float64)
    lags = np.arange(_LAGS)
    correlation[len(samples) :] = 0
    return correlation / np.maximum(len(samples) - lags, 1)


@cache
def _combs() -> NDArray[np.float64]:
    """Return combs of four teeth, one for each period, weighted by tempo; shape (lags, periods)."""
    periods = np.arange(_COMBS - 1, (_LAGS - _COMBS + 1) // _COMBS - 1)
    preference = (periods + 1) / _PREFERRED_LAG**2
    preference *= np.exp(-((periods + 1) ** 2) / (2 * _PREFERRED_LAG**2))
    combs = np.zeros((_LAGS, len(periods)))
    for column, tooth in product(range(len(periods)), range(1, _COMBS + 1)):
        middle = periods[column] * tooth
        combs[middle - tooth + 1 : middle + tooth, column] += preference[column] / (2 * tooth - 1)
    return combs


@cache
def _window(size: int) -> Samples:
    window: Samples = hann(size).astype(np.float32)
    return window


@cache
def _erb_filters() -> Samples:
    """Return Slaney's gammatone filters from 80 Hz to 22050 Hz, shape (bins, bands)."""
    bands = essentia().ERBBands(
        inputSize=_BEAT_FRAME_SIZE // 2 + 1,
        numberBands=_BANDS,
        lowFrequencyBound=80,
        highFrequencyBound=SAMPLE_RATE / 2,
        type="magnitude",
    )
    return filters_of(bands, _BEAT_FRAME_SIZE // 2 + 1)


@cache
def _mel_filters() -> Samples:
    """Return Mel filters from 0 Hz to 4 kHz, shape (bins up to 4 kHz, bands)."""
    bands = essentia().MelBands(
        inputSize=_BEAT_FRAME_SIZE // 2 + 1,
        numberBands=_BANDS,
        lowFrequencyBound=0,
        highFrequencyBound=4000,
        type="magnitude",
    )
    highest = 4000 * _BEAT_FRAME_SIZE // SAMPLE_RATE
    return filters_of(bands, _BEAT_FRAME_SIZE // 2 + 1)[: highest + 1]
