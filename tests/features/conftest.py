import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_assets.audio.decode import decode
from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples

MakeAudio = Callable[[Samples], Audio]


@pytest.fixture(scope="session")
def music() -> Samples:
    """Twenty seconds of stereo music in C major at 120 beats per minute."""
    generator = np.random.default_rng(1)
    beat = SAMPLE_RATE // 2
    time = np.arange(4 * beat) / SAMPLE_RATE
    chords = [(60, 64, 67), (65, 69, 72), (67, 71, 74), (60, 64, 67), (57, 60, 64)]
    bars = []
    for chord in chords * 2:
        bar = np.zeros((4 * beat, 2))
        for place, note in enumerate(chord):
            frequency = 440 * 2 ** ((note - 69) / 12)
            tone = sum(np.sin(2 * np.pi * frequency * k * time) / k**1.5 for k in range(1, 7))
            bar[:, place % 2] += 0.12 * tone
            bar[:, (place + 1) % 2] += 0.06 * tone
        for start in range(0, 4 * beat, beat):
            decay = np.exp(-np.arange(beat) / 1500)
            bar[start : start + beat] += 0.4 * (generator.standard_normal(beat) * decay)[:, None]
        bars.append(bar)
    samples = np.concatenate(bars)
    return (0.8 * samples / np.abs(samples).max()).astype(np.float32)


@pytest.fixture(scope="session")
def make_audio() -> MakeAudio:
    """Make an `Audio` from samples, shape (samples,) or (samples, channels)."""

    def make(samples: Samples) -> Audio:
        pcm = samples.astype(np.float32)
        return Audio(Path("synthetic"), None, pcm[:, None] if pcm.ndim == 1 else pcm)

    return make


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Audio:
    """A minute of recorded jazz in stereo, where the recordings are at hand."""
    root = Path(
        os.environ.get(
            "AUDIO_TEST_RECORDINGS", Path(__file__).parents[2].parent / "shared" / "audio"
        )
    )
    path = root / "music" / "vibe_ace.ogg"
    if not path.exists():
        pytest.skip("the test recordings are not here")
    target = tmp_path_factory.mktemp("recording") / "pcm.npy"
    decode(path, target)
    return Audio.open(target, path)
