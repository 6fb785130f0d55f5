"""The audio that benchmarks run on: excerpts of real recordings, each file unlike the others.

Files of one content are computed once by the project, so that copies would flatter it.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from audio_assets.sample_library import make_sample_library
from benchmarks.measure import PROJECT

_SUFFIXES = {"FLAC": ".flac", "WAV": ".wav", "OGG": ".ogg", "MP3": ".mp3"}
_EDGE_SAMPLES = 4410
_BLOCK_SAMPLES = 1 << 16


@dataclass(frozen=True)
class Source:
    """Recordings to make a library from.

    Parameters
    ----------
    kind : str
        ``library``, ``recordings`` or ``sample library``; what the results say.
    files : sequence of Path
        What libsndfile reads of them.
    """

    kind: str
    files: Sequence[Path]


def find_source(scratch: Path) -> Source:
    """Return LIBRARY's files, else the test recordings, else a synthesized sample library."""
    candidates = [
        ("library", os.environ.get("LIBRARY")),
        ("recordings", os.environ.get("AUDIO_TEST_RECORDINGS")),
        ("recordings", str(PROJECT.parent / "shared" / "audio")),
    ]
    for kind, directory in candidates:
        if directory and Path(directory).expanduser().is_dir():
            files = _readable(Path(directory).expanduser())
            if files:
                return Source(kind, files)
        if directory and kind == "library":
            raise SystemExit(f"LIBRARY={directory} is no directory with audio that can be read.")
    directory = str(scratch / "sample_library")
    make_sample_library(Path(directory))
    return Source("sample library", _readable(Path(directory)))


def _readable(directory: Path) -> list[Path]:
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            try:
                if soundfile.info(path).duration >= 1:
                    found.append(path)
            except soundfile.LibsndfileError:
                continue
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
    made = []
    for number in range(files):
        recording = source.files[number % len(source.files)]
        samples, rate = soundfile.read(recording, dtype="float32", always_2d=True)
        samples = samples[:, :2]
        wanted = round(seconds * rate)
        start = rng.randrange(max(len(samples) - wanted, 1))
        samples = np.resize(samples[start:], (wanted, samples.shape[1])) * rng.uniform(0.5, 0.99)
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
