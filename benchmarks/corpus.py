"""The audio that benchmarks run on: excerpts of real recordings, each file unlike the others.

Files of one content are computed once by the project, so that copies would flatter it.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from audio_assets.cli.sample_library import make_sample_library
from benchmarks.measure import PROJECT

_SUFFIXES = {"FLAC": ".flac", "WAV": ".wav", "OGG": ".ogg", "MP3": ".mp3"}
_EDGE_SAMPLES = 4410
_BLOCK_SAMPLES = 1 << 16


class Sampling(NamedTuple):
    """A sample rate (Hz) and a number of channels."""

    sample_rate: int
    channels: int

    def __str__(self) -> str:
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        return f"{self.sample_rate / 1000:g} kHz {channels}"


FULL_RATE = Sampling(44100, 2)


@dataclass(frozen=True)
class Source:
    """Recordings to make a library from.

    Parameters
    ----------
    kind : str
        ``library``, ``recordings`` or ``sample library``.
    files : sequence of Path
        What libsndfile reads of them.
    sampling : Sampling, optional
        That of all that is made from them; by default each recording's own.
    """

    kind: str
    files: Sequence[Path]
    sampling: Sampling | None = None

    def about(self) -> dict[str, Any]:
        """Return what the results say of it; what differs from file to file is None."""
        sample_rate, channels = self.sampling or (None, None)
        return {"kind": self.kind, "sample_rate": sample_rate, "channels": channels}


def find_source(scratch: Path, sampling: Sampling | None = None) -> Source:
    """Return LIBRARY's files, else the test recordings, else a synthesized sample library.

    Parameters
    ----------
    scratch : Path
        Where the sample library is made.
    sampling : Sampling, optional
        Take only files that have it.
    """
    shared = PROJECT.parent / "shared" / "audio"
    for kind, directory in (
        ("library", os.environ.get("LIBRARY")),
        ("recordings", os.environ.get("AUDIO_TEST_RECORDINGS")),
        ("recordings", sampling and shared / "music44"),  # music, where one kind will do
        ("recordings", shared),
    ):
        if directory:
            readable = _readable(Path(directory).expanduser())
            if kind == "library" and not readable:
                raise SystemExit(
                    f"LIBRARY={directory} is no directory with audio that can be read."
                )
            files = [path for path, its in readable.items() if sampling in (None, its)]
            if files:
                return Source(kind, files, sampling)
            if kind == "library":
                break
    directory = scratch / "sample_library"
    faulty = {track.path for track in make_sample_library(directory) if track.fault}
    files = [path for path, its in _readable(directory).items() if sampling in (None, its)]
    return Source("sample library", [path for path in files if path not in faulty], sampling)


def _readable(directory: Path) -> dict[Path, Sampling]:
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            try:
                info = soundfile.info(path)
            except soundfile.LibsndfileError:
                continue
            if info.duration >= 1:
                found[path] = Sampling(info.samplerate, info.channels)
    return found


def make_library(
    source: Source,
    directory: Path,
    *,
    files: int,
    seconds: float,
    seed: int,
    formats: Sequence[str] = ("FLAC", "MP3", "OGG", "WAV"),
) -> list[Path]:
    """Make files of equal length, cut from the source's recordings at random.

    Recordings shorter than that are repeated; a gain of its own makes each file another one.

    Parameters
    ----------
    source : Source
        Where the audio comes from.
    directory : Path
        The library's root.
    files : int
        How many.
    seconds : float
        Their length (s).
    seed : int
        Another seed makes another library.
    formats : sequence of str
        libsndfile's names of formats, taken in turn.
    """
    rng = random.Random(seed)
    read = lru_cache(8)(partial(soundfile.read, dtype="float32", always_2d=True))
    made = []
    for number in range(files):
        recording = source.files[number % len(source.files)]
        samples, rate = read(recording)
        samples = samples[:, :2]
        wanted = round(seconds * rate)
        start = rng.randrange(max(len(samples) - wanted, 1))
        samples = np.resize(samples[start : start + wanted], (wanted, samples.shape[1]))
        samples *= rng.uniform(0.5, 0.99)
        fade = np.linspace(0, 1, min(_EDGE_SAMPLES, wanted), dtype=np.float32)[:, None]
        samples[: len(fade)] *= fade
        name = formats[number % len(formats)]
        path = directory / f"{number // 10:03}" / f"{number:05} {recording.stem}{_SUFFIXES[name]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with soundfile.SoundFile(path, "w", rate, samples.shape[1], format=name) as file:
            # Whole, a long one is too much for libsndfile's Vorbis encoder.
            for block in range(0, wanted, _BLOCK_SAMPLES):
                file.write(samples[block : block + _BLOCK_SAMPLES])
        made.append(path)
    return made


def make_tiny_library(directory: Path, files: int) -> list[Path]:
    """Make files of a twentieth of a second, to count what is not analysis."""
    made = []
    for number in range(files):
        path = directory / f"{number // 100:03}" / f"{number:05}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = np.sin(np.arange(400) * (0.01 + number * 1e-5)) * 0.5
        soundfile.write(path, tone.astype(np.float32), 8000, subtype="PCM_16")
        made.append(path)
    return made
