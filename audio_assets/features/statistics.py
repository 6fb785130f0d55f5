"""Statistics shared by the feature sets: over the frames of a file, and over its blocks."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audio_assets.audio.pcm import Audio, Samples
from audio_assets.features.base import Row

SILENCE_DBFS = -90.0
"""A file whose largest sample stays under this level (dBFS) is silent."""

_BLOCK_SECONDS = 10


def is_silent(samples: Samples) -> bool:
    """Return whether all samples are below `SILENCE_DBFS`, the last bit of 16-bit audio."""
    threshold = 10 ** (SILENCE_DBFS / 20)
    return bool(samples.max() < threshold and samples.min() > -threshold)


def channels_are_silent(audio: Audio) -> bool:
    """Return whether each channel is silent; reads no more than it needs to."""
    return all(is_silent(block.pcm) for block in audio.blocks(_BLOCK_SECONDS))


def mono_is_silent(audio: Audio) -> bool:
    """Return whether the mean of the channels is silent; reads no more than it needs to."""
    return all(is_silent(block.mono()) for block in audio.blocks(_BLOCK_SECONDS))


def finite(value: float | np.floating) -> float | None:
    """Return a plain float, or None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None


def finite_list(values: ArrayLike) -> list[float] | None:
    """Return a list of plain floats, or None if any is NaN or infinite."""
    array = np.asarray(values, dtype=np.float64)
    return array.tolist() if np.isfinite(array).all() else None


def mean_and_std(
    blocks: Iterable[NDArray[np.floating]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and population standard deviation over frames that come in blocks.

    In constant memory, and without cancellation (Chan, Golub and LeVeque, The American Statistician
    37(3), 1983).

    Parameters
    ----------
    blocks : iterable of ndarray, shape (frames, values)
        At least one frame in all.
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for block in blocks:
        block_mean = block.mean(axis=0, dtype=np.float64)
        share = len(block) / (count + len(block))
        change = block_mean - mean
        squares = squares + np.square(block - block_mean).sum(axis=0) + share * count * change**2
        mean = mean + share * change
        count += len(block)
    return mean, np.sqrt(squares / count)


def weighted_mean(values: Iterable[float | None], weights: Sequence[float]) -> float | None:
    """Return the weighted mean of those values that are not None; None if all are."""
    known = [(value, w) for value, w in zip(values, weights, strict=True) if value is not None]
    if not known:
        return None
    return float(np.average([value for value, _ in known], weights=[w for _, w in known]))


def largest(values: Iterable[float | None]) -> float | None:
    """Return the largest value that is not None; None if all are."""
    return max((value for value in values if value is not None), default=None)


def pool_moments(rows: Sequence[Row], durations: Sequence[float], mean: str, std: str) -> Row:
    """Join means and standard deviations of consecutive blocks into those of the whole.

    Exact but for the frames at the blocks' edges, which the blocks pad with zeros.

    Parameters
    ----------
    rows : sequence of Row
        The blocks' rows.
    durations : sequence of float
        The blocks' durations (s).
    mean, std : str
        Names of the two columns, both scalars or both lists.
    """
    known = [
        (row[mean], row[std], duration)
        for row, duration in zip(rows, durations, strict=True)
        if row[mean] is not None and row[std] is not None
    ]
    if not known:
        return {mean: None, std: None}
    means, stds = (np.array([entry[i] for entry in known]) for i in (0, 1))
    weights = [entry[2] for entry in known]
    pooled = np.average(means, axis=0, weights=weights)
    variance = np.average(stds**2 + (means - pooled) ** 2, axis=0, weights=weights)
    return {mean: pooled.tolist(), std: np.sqrt(variance).tolist()}
