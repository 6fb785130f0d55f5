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


def _compiled(signature: str) -> Callable[[Kernel], Kernel]:
    """Compile a function for arguments of these types.

    Sums may be added up in another order. Kernels do not call one another: processes that compile
    such ones at once can leave code that crashes (github.com/numba/numba/issues/4807).
    """

    def compile_now(function: Kernel) -> Kernel:
        options: dict[str, Any] = {
            "nogil": True,
            "error_model": "numpy",
            "fastmath": {"arcp", "contract", "nsz", "reassoc"},
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
