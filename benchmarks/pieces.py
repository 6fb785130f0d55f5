"""Pieces of music whose tempo, beats, key and tuning are known by construction."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from audio_assets.cli.synthesis import PITCH_CLASSES, Piece

Drums = dict[str, str]


@dataclass(frozen=True)
class Metre:
    """How a bar is divided, and what drums and bass play in it."""

    steps_per_beat: int
    drums: Sequence[Drums]
    bass: Sequence[str]


METRES: Mapping[str, Metre] = {
    "4/4": Metre(
        4,
        (
            {"kick": "x...x...x...x...", "clap": "....x.......x...", "hat": "..x...x...x...x."},
            {"kick": "x.......x.x.....", "snare": "....x.......x...", "hat": "x.o.x.o.x.o.x.o."},
            {"kick": "x.........x.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "x.....x.x.......", "snare": "....x.......x...", "ride": "x...x...x...x..."},
            {"kick": "x.......x......."},
            {"kick": "x..x..x...x.x...", "snare": "..x..o.x.o..x...", "hat": "xoxoxoxoxoxoxoxo"},
            {},
            {"kick": "x..o..x.x..o..x.", "ride": "x.x.x.x.x.x.x.x."},
        ),
        ("x...x...x...x...", "x.....x.x.......", "x..x..x.x..x..x.", "x..............."),
    ),
    "3/4": Metre(
        4,
        (
            {"kick": "x...........", "snare": "....x...x..."},
            {"kick": "x.......x...", "snare": "....x.......", "hat": "x.x.x.x.x.x."},
            {},
            {"kick": "x...........", "ride": "x...x..xx..."},
        ),
        ("x...........", "x...x...x..."),
    ),
    "6/8": Metre(
        3,
        (
            {"kick": "x.....", "snare": "...x..", "hat": "xoxxox"},
            {"kick": "x....x", "snare": "...x..", "ride": "x.xx.x"},
            {"kick": "x.....", "hat": "xxxxxx"},
            {},
        ),
        ("x..x..", "x....."),
    ),
}
"""In 6/8 the beat is the dotted quarter."""

INSTRUMENTS = (
    ("strings", "synth bass", "lead"),
    ("piano", "picked bass", "flute"),
    ("electric piano", "sub bass", "guitar"),
    ("organ", "picked bass", "chip"),
    ("guitar", "picked bass", "flute"),
    ("strings", "sub bass", "flute"),
)
_CHORDS = ((0, 5, 3, 4), (0, 3, 4, 0), (0, 4, 5, 3), (0, 0, 3, 4))


def make_piece(
    rng: random.Random,
    number: int,
    bpm: float,
    seconds: float,
    metre: str,
    drums: Drums,
    instruments: tuple[str, str, str],
) -> Piece:
    """Return a piece of about a length; what is not given is drawn, but for the key's turn."""
    of_metre = METRES[metre]
    bass = rng.choice(of_metre.bass)
    beats_per_bar = len(bass) / of_metre.steps_per_beat
    return Piece(
        seed=number,
        bpm=bpm,
        key=PITCH_CLASSES[number % 12],
        scale=("major", "minor")[number // 12 % 2],
        bars=max(4, round(seconds * bpm / 60 / beats_per_bar)),
        chords=rng.choice(_CHORDS),
        drums=drums,
        bass=bass,
        instruments=instruments,
        swing=rng.choice([0, 0, 0.33, 0.6]) if of_metre.steps_per_beat == 4 else 0,
        room=rng.choice([0.2, 0.6, 1.8]),
        level=rng.choice([0.1, 0.5, 0.9]),
        steps_per_beat=of_metre.steps_per_beat,
    )


def beat_count(piece: Piece) -> int:
    """Return how many beats a piece has."""
    return piece.bars * len(piece.bass) // piece.steps_per_beat
