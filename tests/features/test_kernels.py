"""Kernels where what Numba keeps of them cannot be used."""

from pathlib import Path

import numba
import pytest

from audio_assets.features.kernels import _compiled


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
