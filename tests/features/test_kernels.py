"""Kernels on numbers at the limit, and where what Numba keeps of them cannot be used."""

from pathlib import Path

import numba
import numpy as np
import pytest

from audio_assets.features.kernels import _compiled
from audio_assets.features.onset_functions import beat_functions, onset_functions
from tests.features.conftest import MakeAudio


def double(number: float) -> float:
    return 2 * number


def test_a_kernel_whose_kept_code_is_damaged_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    _compiled("float64(float64)")(double)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])
    assert _compiled("float64(float64)")(double)(2.5) == 5


def test_onset_functions_of_sound_that_fades_to_nothing_are_finite(make_audio: MakeAudio) -> None:
    noise = np.random.default_rng(1).standard_normal(100_000)
    audio = make_audio(noise * np.exp(-np.arange(len(noise)) / 700))
    for function in (*vars(beat_functions(audio)).values(), onset_functions(audio)):
        assert np.isfinite(function).all()
