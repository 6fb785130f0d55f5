"""Test signals that are known by a formula."""

import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Samples


def sine_of_levels(*parts: tuple[float, float]) -> Samples:
    """A stereo sine of 1 kHz, for some seconds at a level (dBFS) after another."""
    levels = np.concatenate([np.full(round(s * SAMPLE_RATE), 10 ** (db / 20)) for s, db in parts])
    sine = np.sin(2 * np.pi * 1000 * np.arange(len(levels)) / SAMPLE_RATE)
    return np.stack([levels * sine] * 2, axis=1)
