"""A small library of synthesized tracks, to try the project without music of one's own.

Each track has drums that mark the tempo, and a bass, chords and a tune in one key, so that tempo
and key are known exactly. Two files are faulty on purpose.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import av
import mutagen
import numpy as np
import soundfile
from mutagen.asf import ASF
from mutagen.id3 import Encoding, Frames
from mutagen.mp4 import MP4

from audio_assets.cli.synthesis import Piece, Signal, play


@dataclass(frozen=True)
class SampleTrack:
    """A file of the sample library, with its tempo and key.

    Parameters
    ----------
    path : Path
        The file.
    title, artist, album : str
        Its tags.
    bpm : float or None
        Tempo (beats per minute); None if the file is faulty.
    key : str or None
        Tonic, one of `PITCH_CLASSES`; None if the file is faulty.
    scale : str or None
        ``major`` or ``minor``; None if the file is faulty.
    fault : str or None
        What is wrong with the file; None if nothing is.
    """

    path: Path
    title: str
    artist: str
    album: str
    bpm: float | None
    key: str | None
    scale: str | None
    fault: str | None = None


@dataclass(frozen=True)
class _Format:
    """Format of a file, encoded by FFmpeg if it has a bit rate (bit/s), else by libsndfile."""

    sample_rate: int
    channels: int
    container: str
    codec: str
    bit_rate: int | None = None


@dataclass(frozen=True)
class _Recording:
    """A file to write to `path` below the library; only the share `kept` of it is kept."""

    path: str
    title: str
    artist: str
    album: str
    genre: str
    year: int
    piece: Piece
    format: _Format
    kept: float = 1.0


def make_sample_library(directory: Path) -> list[SampleTrack]:
    """Make the sample library, or its missing files.

    Parameters
    ----------
    directory : Path
        Where to make it; existing files are not changed.

    Returns
    -------
    list of SampleTrack
        The sound tracks, then the two faulty files.

    Raises
    ------
    OSError
        If the directory is not writable.
    """
    tracks = []
    for recording in _RECORDINGS:
        path = directory / recording.path
        _make(path, partial(_record, recording))
        sound = recording.kept == 1
        tracks.append(
            SampleTrack(
                path=path,
                title=recording.title,
                artist=recording.artist,
                album=recording.album,
                bpm=recording.piece.bpm if sound else None,
                key=recording.piece.key if sound else None,
                scale=recording.piece.scale if sound else None,
                fault=None if sound else "the second half of the file is missing",
            )
        )
    path = directory / _NOT_AUDIO
    _make(path, lambda part: part.write_text(_LYRICS, encoding="utf-8"))
    fault = "a text file named as an MP3"
    tracks.append(SampleTrack(path, path.stem, "", "", bpm=None, key=None, scale=None, fault=fault))
    return tracks


def _make(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that `path` is complete or does not exist."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        write(part)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _record(recording: _Recording, path: Path) -> None:
    storage = recording.format
    signal = play(recording.piece, storage.sample_rate)
    if storage.channels == 1:
        signal = signal.mean(axis=1, keepdims=True)
    if storage.bit_rate is None:
        soundfile.write(
            path, signal, storage.sample_rate, format=storage.container, subtype=storage.codec
        )
    else:
        _encode(path, signal, storage)
    _tag(path, recording)
    if recording.kept < 1:
        os.truncate(path, int(path.stat().st_size * recording.kept))


def _encode(path: Path, signal: Signal, storage: _Format) -> None:
    layout = "mono" if storage.channels == 1 else "stereo"
    planes = np.ascontiguousarray(signal.T)
    frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
    frame.sample_rate = storage.sample_rate
    with av.open(path, "w", format=storage.container) as output:
        stream = output.add_stream(
            storage.codec, rate=storage.sample_rate, layout=layout, bit_rate=storage.bit_rate
        )
        assert isinstance(stream, av.AudioStream)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


_TAG_NAMES = {
    MP4: ("\xa9nam", "\xa9ART", "\xa9alb", "\xa9gen", "\xa9day"),
    ASF: ("Title", "Author", "WM/AlbumTitle", "WM/Genre", "WM/Year"),
}
_VORBIS_COMMENTS = ("title", "artist", "album", "genre", "date")
_ID3_FRAMES = ("TIT2", "TPE1", "TALB", "TCON", "TDRC")


def _tag(path: Path, recording: _Recording) -> None:
    file = mutagen.File(path)
    if file.tags is None:
        file.add_tags()
    title, artist, album = recording.title, recording.artist, recording.album
    texts = (title, artist, album, recording.genre, str(recording.year))
    if hasattr(file.tags, "getall"):  # ID3, in an MP3, WAV or AIFF file
        for name, text in zip(_ID3_FRAMES, texts, strict=True):
            file.tags.add(Frames[name](encoding=Encoding.UTF8, text=text))
    else:
        file.update(zip(_TAG_NAMES.get(type(file), _VORBIS_COMMENTS), texts, strict=True))
    file.save()


_FOUR_TO_THE_FLOOR = {
    "kick": "x...x...x...x...",
    "clap": "....x.......x...",
    "hat": "..x...x...x...x.",
}
_ROCK = {"kick": "x.......x.x.....", "snare": "....x.......x...", "hat": "x.o.x.o.x.o.x.o."}
_BREAK = {"kick": "x.........x.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."}
_POP = {"kick": "x.....x.x.......", "snare": "....x.......x...", "ride": "x...x...x...x..."}

_CD = _Format(44100, 2, "FLAC", "PCM_16")

# fmt: off
_RECORDINGS = (
    _Recording(
        path="Ada Ferrous/Night Bus/01 Night Bus.wav",
        title="Night Bus", artist="Ada Ferrous",
        album="Night Bus", genre="House", year=2019,
        piece=Piece(
            seed=1, bpm=124, key="A", scale="minor", bars=10,
            chords=(0, 5, 3, 4), drums=_FOUR_TO_THE_FLOOR, bass="..x...x...x...x.",
            instruments=("strings", "synth bass", "lead"), level=0.98,
        ),
        format=_Format(44100, 1, "WAV", "PCM_16"),
    ),
    _Recording(
        path='Ada Ferrous/Night Bus/02 "Last Stop".wav',
        title='"Last Stop"', artist="Ada Ferrous",
        album="Night Bus", genre="Pop", year=2019,
        piece=Piece(
            seed=2, bpm=110, key="C", scale="major", bars=7,
            chords=(0, 5, 3, 4), drums=_ROCK, bass="x.....x.x.......",
            instruments=("piano", "picked bass", "flute"),
        ),
        format=_Format(48000, 2, "WAV", "PCM_24"),
    ),
    _Recording(
        path="Moiré/Interference #2/01 Glass Lift.flac",
        title="Glass Lift", artist="Moiré",
        album="Interference #2", genre="Ambient techno", year=2022,
        piece=Piece(
            seed=3, bpm=120, key="E", scale="minor", bars=7,
            chords=(0, 3, 4, 0), drums=_FOUR_TO_THE_FLOOR, bass="x..x..x.x..x..x.",
            instruments=("electric piano", "sub bass", "guitar"), room=1.8, level=0.6,
        ),
        format=_Format(96000, 2, "FLAC", "PCM_24"),
    ),
    _Recording(
        path="Moiré/Interference #2/02 50% Grey.mp3",
        title="50% Grey", artist="Moiré",
        album="Interference #2", genre="Indie rock", year=2022,
        piece=Piece(
            seed=4, bpm=128, key="G", scale="major", bars=11,
            chords=(0, 3, 4, 0), drums=_ROCK, bass="x.x.x.x.x.x.x.x.",
            instruments=("guitar", "picked bass", "lead"),
        ),
        format=_Format(44100, 2, "MP3", "MPEG_LAYER_III"),
    ),
    _Recording(
        path="Söderström & Vega/...And Then It Rained/01 Gutters.ogg",
        title="Gutters", artist="Söderström & Vega",
        album="...And Then It Rained", genre="Synthwave", year=2016,
        piece=Piece(
            seed=5, bpm=104, key="D", scale="minor", bars=8,
            chords=(0, 5, 3, 4), drums=_POP, bass="x.x.x.x.x.x.x.x.",
            instruments=("strings", "synth bass", "chip"), room=1.0,
        ),
        format=_Format(44100, 2, "OGG", "VORBIS"),
    ),
    _Recording(
        path="Söderström & Vega/...And Then It Rained/02 Umbrella Weather.m4a",
        title="Umbrella Weather", artist="Söderström & Vega",
        album="...And Then It Rained", genre="Soul", year=2016,
        piece=Piece(
            seed=6, bpm=92, key="F", scale="major", bars=7,
            chords=(0, 3, 0, 4), drums=_ROCK, bass="x......xx.......",
            instruments=("electric piano", "synth bass", "flute"), swing=0.2, level=0.8,
        ),
        format=_Format(44100, 2, "ipod", "aac", bit_rate=160_000),
    ),
    _Recording(
        path="DJ Sine Wave/Summer 🎧 EP/01 Ice Cream 🍦.opus",
        title="Ice Cream 🍦", artist="DJ Sine Wave",
        album="Summer 🎧 EP", genre="Electro", year=2024,
        piece=Piece(
            seed=7, bpm=132, key="D", scale="major", bars=11,
            chords=(0, 4, 3, 0), drums=_FOUR_TO_THE_FLOOR, bass="x..x..x...x.x...",
            instruments=("chip", "sub bass", "lead"),
        ),
        format=_Format(48000, 2, "ogg", "libopus", bit_rate=128_000),
    ),
    _Recording(
        path="DJ Sine Wave/Summer 🎧 EP/02 What Now?.wma",
        title="What Now?", artist="DJ Sine Wave",
        album="Summer 🎧 EP", genre="Trance", year=2024,
        piece=Piece(
            seed=8, bpm=138, key="F#", scale="minor", bars=11,
            chords=(0, 5, 3, 4), drums=_FOUR_TO_THE_FLOOR, bass="..xx..xx..xx..xx",
            instruments=("strings", "synth bass", "lead"), room=1.2,
        ),
        format=_Format(44100, 2, "asf", "wmav2", bit_rate=160_000),
    ),
    _Recording(
        path="The Brass Rail/Live at Nobody's/Side A.aiff",
        title="Side A", artist="The Brass Rail",
        album="Live at Nobody's", genre="Gospel", year=1974,
        piece=Piece(
            seed=9, bpm=98, key="Bb", scale="major", bars=7,
            chords=(0, 3, 4, 0), drums=_POP, bass="x...x...x...x...",
            instruments=("organ", "synth bass", "piano"), level=0.7,
        ),
        format=_Format(44100, 2, "AIFF", "PCM_16"),
    ),
    _Recording(
        path="The Brass Rail/Live at Nobody's/Radio edit.wav",
        title="Radio edit", artist="The Brass Rail",
        album="Live at Nobody's", genre="Funk", year=1974,
        piece=Piece(
            seed=10, bpm=108, key="E", scale="major", bars=8,
            chords=(0, 0, 3, 4), drums=_ROCK, bass="x..x..x.x...x.x.",
            instruments=("organ", "picked bass", "guitar"), room=0.2,
        ),
        format=_Format(22050, 1, "WAV", "PCM_16"),
    ),
    _Recording(
        path="unsorted/untitled (3)",
        title="untitled (3)", artist="Ada Ferrous",
        album="Demos", genre="Breakbeat", year=2017,
        piece=Piece(
            seed=11, bpm=116, key="C", scale="minor", bars=9,
            chords=(0, 3, 4, 0), drums=_BREAK, bass="x.....x...x.....",
            instruments=("electric piano", "sub bass", "flute"),
        ),
        format=_Format(32000, 1, "OGG", "VORBIS"),
    ),
    _Recording(
        path="unsorted/voice memo 12.mp3",
        title="voice memo 12", artist="Söderström & Vega",
        album="Demos", genre="Folk", year=2015,
        piece=Piece(
            seed=12, bpm=112, key="A", scale="major", bars=8,
            chords=(0, 3, 4, 0), drums=_POP, bass="x.......x.......",
            instruments=("guitar", "picked bass", "flute"), level=0.4,
        ),
        format=_Format(24000, 1, "MP3", "MPEG_LAYER_III"),
    ),
    _Recording(
        path="unsorted/broken download.flac",
        title="broken download", artist="Moiré",
        album="Interference #2", genre="Ambient techno", year=2022,
        piece=Piece(
            seed=13, bpm=120, key="B", scale="minor", bars=8,
            chords=(0, 5, 3, 4), drums=_BREAK, bass="x.x.x.x.x.x.x.x.",
            instruments=("organ", "synth bass", "lead"),
        ),
        format=_CD,
        kept=0.5,
    ),
)
# fmt: on

_NOT_AUDIO = "unsorted/lyrics.mp3"
_LYRICS = "Last stop, last stop,\nthe driver turns the key.\n" * 40
