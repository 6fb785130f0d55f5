"""Benchmarks run on the audio that their results name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks import corpus
from benchmarks.corpus import FULL_RATE, Sampling, find_source, make_library

HALF_RATE = Sampling(22050, 1)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def make(*samplings: Sampling) -> Path:
        directory = tmp_path / "library"
        directory.mkdir()
        for its in samplings:
            tone = np.sin(np.arange(2 * its.sample_rate) * 440 * 2 * np.pi / its.sample_rate) * 0.5
            samples = np.tile(tone[:, None], its.channels)
            soundfile.write(directory / f"{its}.wav", samples, its.sample_rate)
        (directory / "notes.txt").write_text("no audio")
        monkeypatch.setenv("LIBRARY", str(directory))
        return directory

    return make


def made(source: corpus.Source, directory: Path) -> set[tuple[int, int, float]]:
    paths = make_library(source, directory, files=4, seconds=3, seed=1)
    return {(i.samplerate, i.channels, round(i.duration, 1)) for i in map(soundfile.info, paths)}


@pytest.mark.parametrize("wanted", [FULL_RATE, HALF_RATE])
def test_only_recordings_of_the_wanted_kind(
    library: Callable[..., Path], tmp_path: Path, wanted: Sampling
) -> None:
    directory = library(FULL_RATE, HALF_RATE, Sampling(48000, 2), Sampling(44100, 1))
    source = find_source(tmp_path, wanted)
    assert source.files == [directory / f"{wanted}.wav"]
    rate, channels = wanted
    assert source.about() == {"kind": "library", "sample_rate": rate, "channels": channels}
    assert made(source, tmp_path / "made") == {(rate, channels, 3.0)}


def test_every_recording_where_no_kind_is_wanted(
    library: Callable[..., Path], tmp_path: Path
) -> None:
    library(FULL_RATE, HALF_RATE)
    source = find_source(tmp_path)
    assert source.about() == {"kind": "library", "sample_rate": None, "channels": None}
    assert made(source, tmp_path / "made") == {(*FULL_RATE, 3.0), (*HALF_RATE, 3.0)}


@pytest.mark.slow
def test_the_sample_library_where_none_is_44_khz_stereo(
    library: Callable[..., Path], tmp_path: Path
) -> None:
    library(HALF_RATE)
    source = find_source(tmp_path, FULL_RATE)
    assert source.kind == "sample library"
    assert len(source.files) > 2
    assert made(source, tmp_path / "made") == {(*FULL_RATE, 3.0)}


def test_a_library_without_audio(library: Callable[..., Path], tmp_path: Path) -> None:
    library()
    with pytest.raises(SystemExit, match="LIBRARY="):
        find_source(tmp_path, FULL_RATE)
