"""Inner loops over samples and bins, compiled to machine code by Numba.

They are compiled as this module is imported, which takes seconds once, and kept beside it or in the
user's cache directory. To import Numba takes time, too: this module is imported where a kernel is
called, and by the workers' fork server.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def _compiled(signature: str, *, reorders: bool = True) -> Callable[[Kernel], Kernel]:
    """Compile a function for arguments of these types.

    Sums may be added up in another order, if it ``reorders``: recursive filters become slower by
    that, as everything waits for the sample before. Kernels do not call one another: processes that
    compile such ones at once can leave code that crashes (github.com/numba/numba/issues/4807).
    """

    def compile_now(function: Kernel) -> Kernel:
        options: dict[str, Any] = {
            "nogil": True,
            "error_model": "numpy",
            "fastmath": {"arcp", "contract", "nsz"} | ({"reassoc"} if reorders else set()),
        }
        try:
            kernel = njit(signature, cache=True, **options)(function)
        except Exception:  # noqa: BLE001 - what is kept is damaged, or nothing can be kept
            kernel = njit(signature, **options)(function)
        return cast("Kernel", kernel)

    return compile_now


# Of onset detection functions. Arrays have a row for each frame; magnitudes and phasors begin with
# earlier frames than spectra.

GAIN_FRAMES = 5
"""Frames of the past and of the present, of which `information_gain` says how they differ."""

_AT_ONCE = 7
_EPSILON = np.finfo(np.float32).eps
_LARGEST = np.finfo(np.float32).max
_SMALLEST = np.finfo(np.float32).tiny


@_compiled("void(complex64[:,::1], float32[:,::1], complex64[:,::1])")
def polar(
    spectra: NDArray[np.complex64],
    magnitudes: NDArray[np.float32],
    phasors: NDArray[np.complex64],
) -> None:
    """Write the magnitudes of spectra and their phases, as complex numbers of modulus 1.

    Both are 0 where the square of the magnitude is no normal number: processors' fast square roots
    of such numbers are NaN.
    """
    before = len(magnitudes) - len(spectra)
    for frame in range(len(spectra)):
        for k in range(spectra.shape[1]):
            x = spectra[frame, k]
            square = x.real * x.real + x.imag * x.imag
            present = square >= _SMALLEST
            magnitude = np.sqrt(square) if present else np.float32(0)
            magnitudes[before + frame, k] = magnitude
            phasors[before + frame, k] = (
                x * (np.float32(1) / magnitude) if present else np.complex64(1)
            )


@_compiled("float32[:,::1](complex64[:,::1], float32[:,::1], complex64[:,::1])")
def squared_distance(
    spectra: NDArray[np.complex64],
    magnitudes: NDArray[np.float32],
    phasors: NDArray[np.complex64],
) -> NDArray[np.float32]:
    """Return the squared distance of each bin from what the two frames before let expect.

    Essentia adds the earlier phase where the paper subtracts it.
    """
    before = len(magnitudes) - len(spectra)
    squares = np.empty(spectra.shape, np.float32)
    for frame in range(len(spectra)):
        last = before + frame - 1
        for k in range(spectra.shape[1]):
            expected = phasors[last, k] * phasors[last, k] * phasors[last - 1, k]
            turned = spectra[frame, k] * np.conj(expected)
            along = turned.real - magnitudes[last, k]
            squares[frame, k] = along * along + turned.imag * turned.imag
    return squares


@_compiled("float32[::1](complex64[:,::1], float32[:,::1], complex64[:,::1], int64)")
def complex_difference(
    spectra: NDArray[np.complex64],
    magnitudes: NDArray[np.float32],
    phasors: NDArray[np.complex64],
    step: int,
) -> NDArray[np.float32]:
    """Return the summed distance of every ``step``-th frame from what the two before let expect."""
    before = len(magnitudes) - len(spectra)
    sums = np.empty((len(spectra) + step - 1) // step, np.float32)
    for number in range(len(sums)):
        frame = number * step
        last = before + frame - step
        distance = np.float32(0)
        for k in range(spectra.shape[1]):
            expected = phasors[last, k] * phasors[last, k] * np.conj(phasors[last - step, k])
            turned = spectra[frame, k] * np.conj(expected)
            along = turned.real - magnitudes[last, k]
            distance += np.sqrt(along * along + turned.imag * turned.imag)
        sums[number] = distance
    return sums


@_compiled("float32[::1](float32[:,::1], int64, int64)")
def information_gain(magnitudes: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
    """Compare five frames with the five before the one before them, in bits, over some bins.

    There is a value for each frame but the first ten: the last of the five.
    """
    gain = np.empty(len(magnitudes) - 2 * GAIN_FRAMES, np.float32)
    ratios = np.ones(-(-(stop - start) // _AT_ONCE) * _AT_ONCE, np.float32)
    for frame in range(len(gain)):
        for k in range(start, stop):
            past = present = np.float32(0)
            for distance in range(GAIN_FRAMES):
                weight = np.float32(1 - 0.9 * distance / GAIN_FRAMES)
                past += weight * magnitudes[frame + GAIN_FRAMES - 1 - distance, k]
                present += weight * magnitudes[frame + GAIN_FRAMES + 1 + distance, k]
            past = past if past > 0 else np.float32(1)
            present = present if present > 0 else _EPSILON
            ratios[k - start] = min(max(present / past, np.float32(1)), _LARGEST)
        bits = 0.0
        for k in range(0, len(ratios), _AT_ONCE):
            product = 1.0  # of as many float32 as do not overflow
            for ratio in ratios[k : k + _AT_ONCE]:
                product *= ratio
            bits += np.log2(product)
        gain[frame] = bits
    return gain


# Of spectra, with a row for each frame.


@_compiled(
    "int64(float32[:,::1], int64, int64, float64, float64, int64[::1], float64[::1], float64[::1])"
)
def spectral_peaks(
    magnitudes: NDArray[np.float32],
    start: int,
    stop: int,
    highest: float,
    threshold: float,
    frames: NDArray[np.int64],
    places: NDArray[np.float64],
    heights: NDArray[np.float64],
) -> int:
    """Find the highest peaks of each spectrum, and return how many there are in all.

    Parameters
    ----------
    magnitudes : ndarray of float32, shape (frames, bins)
        The spectra.
    start, stop : int
        The bins to read: each spectrum is taken to rise from the first to the next one.
    highest : float
        Highest place of a peak (bins).
    threshold : float
        Magnitude that the bins of a peak exceed.
    frames, places, heights : ndarray, shape (most * frames,)
        Overwritten: the frame, place (bins) and height of each peak.
    """
    most = len(frames) // len(magnitudes)
    count = 0
    for frame in range(len(magnitudes)):
        first = count
        left, rises, level = start, False, np.float32(-1)
        for k in range(start + 1, stop):
            last, level = level, magnitudes[frame, k]
            if level > last:
                left, rises = k, True
            elif level < last and rises:
                rises = False
                is_single, is_first = left == k - 1, left == start + 1
                place, height = (left + k - 1) / 2, np.float64(last)
                if is_single and not is_first:
                    before, after = np.float64(magnitudes[frame, k - 2]), np.float64(level)
                    beside = 0.5 * (before - after) / (before - 2 * height + after)
                    place += beside
                    height -= 0.25 * (before - after) * beside
                if last > threshold and place <= highest and (is_single or not is_first):
                    if count - first < most:
                        at = count
                        count += 1
                    else:
                        at = first + int(np.argmin(heights[first:count]))
                        if height <= heights[at]:
                            continue
                    frames[at], places[at], heights[at] = frame, place, height
    return count


@_compiled("float64[:,::1](float32[:,::1], float32[::1], float64)")
def spectral_shape(
    magnitudes: NDArray[np.float32], last: NDArray[np.float32], share: float
) -> NDArray[np.float64]:
    """Describe each spectrum by its centroid, spread, roll-off and flux; shape (frames, 4).

    Parameters
    ----------
    magnitudes : ndarray of float32, shape (frames, bins)
        The spectra.
    last : ndarray of float32, shape (bins,)
        The spectrum before them, from which the flux of the first is counted.
    share : float
        Share of the energy up to the roll-off.

    Returns
    -------
    ndarray of float64, shape (frames, 4)
        The first three in bins.
    """
    shape = np.empty((len(magnitudes), 4))
    for frame in range(len(magnitudes)):
        weight = first = second = energy = change = 0.0
        for k in range(magnitudes.shape[1]):
            magnitude = np.float64(magnitudes[frame, k])
            weight += magnitude
            first += k * magnitude
            second += k * (k * magnitude)
            energy += magnitude * magnitude
            change += (magnitude - last[k]) ** 2
        last = magnitudes[frame]
        if weight == 0:
            weight = 1.0
        centroid = first / weight
        wanted, rolloff = share * energy, -1
        below = 0.0
        while below < wanted:
            rolloff += 1
            below += np.float64(last[rolloff]) ** 2
        shape[frame, 0], shape[frame, 1] = centroid, np.sqrt(max(second / weight - centroid**2, 0))
        shape[frame, 2], shape[frame, 3] = max(rolloff, 0), np.sqrt(change)
    return shape


@_compiled("float32[:,::1](float32[:,::1], int64[::1])")
def band_energies(magnitudes: NDArray[np.float32], edges: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the energy of each spectrum from each of the edges (bins) to the next."""
    energies = np.zeros((len(magnitudes), len(edges) - 1), np.float32)
    for frame in range(len(magnitudes)):
        for band in range(len(edges) - 1):
            energy = np.float32(0)
            for k in range(edges[band], edges[band + 1]):
                energy += magnitudes[frame, k] * magnitudes[frame, k]
            energies[frame, band] = energy
    return energies


# Of loudness. Decoded audio is memory-mapped, and read-only.

_INAUDIBLE = 1e-30
"""What is left in a filter is set to 0 below this: denormal numbers take fifty times as long."""

_INTERPOLATED_AT_ONCE = 128


@_compiled(
    "float64[:,::1](Array(float32, 2, 'C', readonly=True), float64[:,::1], int64)", reorders=False
)
def step_energies(
    pcm: NDArray[np.float32], biquads: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """Return the energy of each whole step of each channel behind two biquad filters.

    Parameters
    ----------
    pcm : ndarray of float32, shape (samples, channels)
        The signal.
    biquads : ndarray of float64, shape (2, 5)
        Coefficients b0, b1, b2, a1, a2 of each filter; a0 is 1.
    size : int
        Samples of a step.

    Returns
    -------
    ndarray of float64, shape (steps, channels)
    """
    b0, b1, b2, a1, a2 = biquads[0]
    d0, d1, d2, c1, c2 = biquads[1]
    energies = np.empty((len(pcm) // size, pcm.shape[1]))
    for channel in range(pcm.shape[1]):
        x1 = x2 = y1 = y2 = z1 = z2 = 0.0
        for step in range(len(energies)):
            energy = 0.0
            for i in range(step * size, (step + 1) * size):
                x = np.float64(pcm[i, channel])
                y = b0 * x + b1 * x1 + b2 * x2 - a2 * y2 - a1 * y1
                z = d0 * y + d1 * y1 + d2 * y2 - c2 * z2 - c1 * z1
                x1, x2, y1, y2, z1, z2 = x, x1, y, y1, z, z1
                energy += z * z
            if abs(y1) + abs(y2) < _INAUDIBLE:
                y1 = y2 = 0.0
            if abs(z1) + abs(z2) < _INAUDIBLE:
                z1 = z2 = 0.0
            energies[step, channel] = energy
    return energies


@_compiled(
    "float64[::1](Array(float32, 1, 'C', readonly=True), float64, int64, float64[::1])",
    reorders=False,
)
def frame_powers(
    mono: NDArray[np.float32], decay: float, size: int, state: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the power behind a high-pass at the end of each whole frame.

    Parameters
    ----------
    mono : ndarray of float32, shape (samples,)
        The signal, or a block of it.
    decay : float
        What is left of the weight of a power after a sample, in 0..1.
    size : int
        Samples of a frame.
    state : ndarray of float64, shape (3,)
        Zeros before the signal; overwritten, for the block that follows.

    Returns
    -------
    ndarray of float64, shape (frames,)
    """
    x1, y, power = state
    powers = np.empty(len(mono) // size)
    for frame in range(len(powers)):
        for i in range(frame * size, (frame + 1) * size):
            x = np.float64(mono[i])
            y = 0.98595 * (x - x1) + 0.9719 * y
            x1 = x
            power = (1 - decay) * (y * y) + decay * power
        if abs(y) < _INAUDIBLE:
            y = 0.0
        if power < _INAUDIBLE:
            power = 0.0
        powers[frame] = power
    state[0], state[1], state[2] = x1, y, power
    return powers


@_compiled("float32(Array(float32, 2, 'C', readonly=True), float32[:,::1], float32)")
def interpolated_peak(
    pcm: NDArray[np.float32], filters: NDArray[np.float32], reach: float
) -> np.float32:
    """Return the largest modulus of the samples and of what filters interpolate between them.

    Between two samples a filter gives at most the larger one, or more by ``reach`` times the root
    sum square of the second differences of all samples that it reads. Only parts of the signal
    where this could exceed the peak so far are interpolated: the result is that of the whole.

    Parameters
    ----------
    pcm : ndarray of float32, shape (samples, channels)
        The signal; outside it there are zeros.
    filters : ndarray of float32, shape (places, taps)
        For places between two samples, which are in the middle of those read.
    reach : float
        Of the filters' deviations from straight lines between the two samples, written as weights
        of second differences, the largest root sum square.
    """
    (size, channels), (places, taps) = pcm.shape, filters.shape
    flat = pcm.reshape(-1)
    part = np.empty(_INTERPOLATED_AT_ONCE + taps - 1, np.float32)
    values = np.empty(_INTERPOLATED_AT_ONCE, np.float32)
    peak = np.float32(0)
    for start in range(1 - taps // 2, size + 1 - taps // 2, _INTERPOLATED_AT_ONCE):
        stop = start + len(part)
        if start > 0 and stop < size:
            before = flat[(start - 1) * channels : (stop - 1) * channels]
            here = flat[start * channels : stop * channels]
            after = flat[(start + 1) * channels : (stop + 1) * channels]
            squares = np.float32(0)
            for i in range(len(here)):
                squares += ((after[i] - here[i]) - (here[i] - before[i])) ** 2
            enough = peak - reach * np.sqrt(squares)
            count = 0
            for i in range(len(here)):
                count += abs(here[i]) > enough
            if count == 0:
                continue
        for channel in range(channels):
            part[:] = 0
            for i in range(max(start, 0), min(stop, size)):
                part[i - start] = pcm[i, channel]
            for i in range(len(part)):
                peak = max(peak, abs(part[i]))
            for place in range(places):
                values[:] = 0
                for tap in range(taps):
                    weight, read = filters[place, tap], part[tap : tap + len(values)]
                    for i in range(len(values)):
                        values[i] += weight * read[i]
                for i in range(len(values)):
                    peak = max(peak, abs(values[i]))
    return peak
