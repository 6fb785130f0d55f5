"""Magnitude spectra of a signal's frames and the peaks in them, block by block.

Frames, windows and peaks are those of Essentia's FrameGenerator, Windowing, Spectrum and
SpectralPeaks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.features.essentia_library import essentia

Values = NDArray[np.float64]
Indices = NDArray[np.intp]

A_HZ = 440.0

_FRAMES_PER_BLOCK = 64


@dataclass(frozen=True)
class Peaks:
    """Peaks of the spectra of some frames.

    Parameters
    ----------
    frames : ndarray of int, shape (peaks,)
        Which frame each is in.
    frequencies, magnitudes : ndarray of float64, shape (peaks,)
        Where it is (Hz), and how high, on the parabola through three bins.
    """

    frames: Indices
    frequencies: Values
    magnitudes: Values


def frame_blocks(audio: Audio, frame_size: int, hop_size: int) -> Iterator[Samples]:
    """Yield the frames of the mono signal, many at once, in constant memory.

    The first frame is centred on the first sample, the last is the first one whose centre is at the
    end or behind it. Outside the signal there are zeros.

    Parameters
    ----------
    audio : Audio
        At least one sample.
    frame_size, hop_size : int
        In samples.

    Yields
    ------
    ndarray of float32, shape (frames, frame_size)
        Read-only.
    """
    size, half = len(audio.pcm), frame_size // 2
    # A frame begins before the end, also where frames do not overlap.
    total = min(-(-size // hop_size) + 1, -(-(size + half) // hop_size))
    for first in range(0, total, _FRAMES_PER_BLOCK):
        count = min(_FRAMES_PER_BLOCK, total - first)
        start = first * hop_size - half
        samples = np.zeros((count - 1) * hop_size + frame_size, np.float32)
        stop = start + len(samples)
        mono = audio.block(max(start, 0) / SAMPLE_RATE, stop / SAMPLE_RATE).mono()
        samples[max(-start, 0) :][: len(mono)] = mono
        yield np.lib.stride_tricks.sliding_window_view(samples, frame_size)[::hop_size]


def magnitude_spectra(frames: Samples, window: str = "hann") -> Samples:
    """Return the magnitude spectrum of each frame; a sine of amplitude 1 peaks at 1.

    Parameters
    ----------
    frames : ndarray of float32, shape (frames, frame_size)
        Of any level.
    window : str
        Essentia's name of a window.

    Returns
    -------
    ndarray of float32, shape (frames, frame_size // 2 + 1)
    """
    from scipy import fft

    windowed = frames * _window(window, frames.shape[1])
    magnitudes: Samples = np.abs(fft.rfft(windowed, axis=1, overwrite_x=True))
    return magnitudes


def hann(size: int) -> Values:
    """Return the Hann window that Essentia has: symmetric, with a sum of 2."""
    window = np.hanning(size)
    window *= 2 / window.sum()
    return window


@cache
def _window(kind: str, size: int) -> Samples:
    window: Samples = essentia().Windowing(type=kind, zeroPhase=False)(np.ones(size, np.float32))
    return window


def find_peaks(
    magnitudes: Samples, lowest_hz: float, highest_hz: float, threshold: float, most: int
) -> Peaks:
    """Find the highest peaks of each spectrum (Smith and Serra, ICMC 1987).

    A peak is a bin, or several of one magnitude, between lower ones, or the first bin of the range.

    Parameters
    ----------
    magnitudes : ndarray of float32, shape (frames, bins)
        Spectra from 0 Hz to half the sample rate.
    lowest_hz, highest_hz : float
        Range (Hz) of the peaks, above the first bin and below the last but two.
    threshold : float
        Magnitude that a bin exceeds to be a peak.
    most : int
        How many to return of each spectrum.
    """
    from audio_assets.features.kernels import spectral_peaks

    bin_hz = SAMPLE_RATE / 2 / (magnitudes.shape[1] - 1)
    start, stop = math.ceil(lowest_hz / bin_hz) - 1, math.floor(highest_hz / bin_hz) + 3
    size = most * len(magnitudes)
    frames, places, heights = np.empty(size, np.int64), np.empty(size), np.empty(size)
    count = spectral_peaks(
        *(magnitudes, start, stop, highest_hz / bin_hz, threshold), frames, places, heights
    )
    return Peaks(frames[:count], places[:count] * bin_hz, heights[:count])


def semitones(frequencies: Samples | Values) -> Values:
    """Return the distance of frequencies (Hz) from the tuning tone `A_HZ` in semitones."""
    distance: Values = 12 * np.log2(frequencies / A_HZ)
    return distance


def pitch_classes(pitches: Values) -> tuple[Indices, Values]:
    """Return the nearest pitch class, from A, and the distance from it.

    Parameters
    ----------
    pitches : ndarray of float64
        In semitones from A.

    Returns
    -------
    classes : ndarray of int
        0 to 11.
    deviations : ndarray of float64
        In semitones, -0.5 to 0.5.
    """
    nearest = np.rint(pitches)
    return nearest.astype(np.intp) % 12, pitches - nearest
