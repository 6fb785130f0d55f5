import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mutagen
import numpy as np
import pytest
import soundfile

from audio_assets.audio.decode import decode
from audio_assets.audio.errors import AudioFileError
from audio_assets.audio.pcm import Audio
from audio_assets.cli.sample_library import SampleTrack, make_sample_library
from audio_assets.cli.synthesis import PITCH_CLASSES
from audio_assets.library.scan import Library


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made") / "sample_library"


@pytest.fixture(scope="module")
def tracks(directory: Path) -> list[SampleTrack]:
    return make_sample_library(directory)


@pytest.fixture(scope="module")
def sound_tracks(tracks: list[SampleTrack]) -> list[SampleTrack]:
    return [track for track in tracks if track.fault is None]


@pytest.fixture(scope="module")
def samples(
    sound_tracks: list[SampleTrack], tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, np.ndarray]:
    scratch = tmp_path_factory.mktemp("decoded") / "pcm.npy"
    decoded = {}
    for track in sound_tracks:
        decode(track.path, scratch)
        decoded[track.path] = Audio.open(scratch, track.path).mono()
    return decoded


def test_the_scan_finds_just_these_files(directory: Path, tracks: list[SampleTrack]) -> None:
    found = Library({"samples": directory}).scan()
    assert {entry.path for entry in found.files} == {track.path for track in tracks}
    assert found.left_out == []
    assert sum(entry.size for entry in found.files) < 30e6
    assert len({entry.path.read_bytes() for entry in found.files}) == len(tracks)


def test_the_tracks_are_of_many_kinds(sound_tracks: list[SampleTrack]) -> None:
    assert len(sound_tracks) == 12
    suffixes = {track.path.suffix for track in sound_tracks}
    assert suffixes >= {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".wma", ""}
    assert len({track.bpm for track in sound_tracks}) == 12
    assert len({(track.key, track.scale) for track in sound_tracks}) == 12
    assert {track.scale for track in sound_tracks} == {"major", "minor"}
    wav, flac = (
        next(t.path for t in sound_tracks if t.path.suffix == s) for s in (".wav", ".flac")
    )
    assert soundfile.info(wav).subtype == "PCM_16"
    assert soundfile.info(flac).samplerate == 96000


def test_the_tracks_are_short_and_not_clipped(
    sound_tracks: list[SampleTrack], samples: dict[Path, np.ndarray]
) -> None:
    for track in sound_tracks:
        mono = samples[track.path]
        assert 12 <= len(mono) / 44100 <= 30
        assert 0.02 < np.sqrt(np.mean(mono**2)) < 0.5
        assert np.mean(np.abs(mono) > 0.99) < 1e-3


def test_essentia_finds_tempo_and_key(
    sound_tracks: list[SampleTrack], samples: dict[Path, np.ndarray]
) -> None:
    standard = pytest.importorskip("essentia.standard")
    found = {}
    for track in sound_tracks:
        mono = samples[track.path]
        bpm = standard.RhythmExtractor2013(method="multifeature")(mono)[0]
        key, scale, _ = standard.KeyExtractor()(mono)
        found[track.title] = (bpm == pytest.approx(track.bpm, rel=0.02), key, scale)
    assert found == {track.title: (True, track.key, track.scale) for track in sound_tracks}
    assert {track.key for track in sound_tracks} <= set(PITCH_CLASSES)


def test_the_tracks_are_tagged(sound_tracks: list[SampleTrack]) -> None:
    for track in sound_tracks:
        text = mutagen.File(track.path).tags.pprint()
        assert track.title in text
        assert track.artist in text
        assert track.album in text


def test_the_faulty_files_are_as_described(tracks: list[SampleTrack], tmp_path: Path) -> None:
    cut, text = (track for track in tracks if track.fault is not None)
    assert (cut.bpm, cut.key, text.bpm, text.key) == (None, None, None, None)
    source = decode(cut.path, tmp_path / "cut.npy")
    assert source.complete_share == pytest.approx(0.5, abs=0.1)
    assert source.damage
    with pytest.raises(AudioFileError):
        decode(text.path, tmp_path / "text.npy")


def test_a_complete_library_is_not_changed(directory: Path, tracks: list[SampleTrack]) -> None:
    def state() -> Counter[tuple[Path, int, int]]:
        paths = (directory, *directory.rglob("*"))
        return Counter((path, path.stat().st_mtime_ns, path.stat().st_ino) for path in paths)

    before = state()
    assert make_sample_library(directory) == tracks
    assert state() == before


def test_a_missing_file_is_made_again_identically(
    directory: Path, tracks: list[SampleTrack]
) -> None:
    path = next(track.path for track in tracks if track.path.suffix == ".aiff")
    content = path.read_bytes()
    path.unlink()
    assert make_sample_library(directory) == tracks
    assert path.read_bytes() == content


def test_interrupted_making_leaves_only_complete_files_and_is_completed(tmp_path: Path) -> None:
    directory = tmp_path / "samples"
    make = (
        "from pathlib import Path\n"
        "from audio_assets.cli.sample_library import make_sample_library\n"
        f"make_sample_library(Path({str(directory)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", make])
    while len(list(directory.rglob("*.wav"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tracks = make_sample_library(directory)
    found = Library({"samples": directory}).scan()
    assert {entry.path for entry in found.files} == {track.path for track in tracks}
    for track in tracks:
        if track.fault is None:
            decode(track.path, tmp_path / "pcm.npy")
