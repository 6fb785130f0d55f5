"""A small synthesizer: plays a piece of known tempo and key.

Instruments are sums of harmonics under an envelope, drums are shaped noise and sweeps, and the
tune is improvised over the chords by a seeded random walk.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Signal = npt.NDArray[np.float32]
"""Samples of shape (frames, channels), in -1..1."""

PITCH_CLASSES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
"""Names of the keys, spelled as Essentia spells them."""

_STEPS = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
_TABLE_SIZE = 8192


@dataclass(frozen=True)
class _Timbre:
    """Amplitudes of the harmonics, and an envelope.

    `attack` (s) is a linear rise, `decay` (s) the time to fall to 1/e, `release` (s) a linear
    fall after the note's end, `detune` (cents) the distance of the two channels.
    """

    harmonics: tuple[float, ...]
    attack: float
    decay: float
    release: float
    detune: float = 0.0


_SAW = tuple(1 / k for k in range(1, 31))
_SQUARE = tuple(k % 2 / k for k in range(1, 30))

_TIMBRES = {
    "strings": _Timbre(_SAW, attack=0.15, decay=8.0, release=0.3, detune=9),
    "organ": _Timbre((1, 0.7, 0.5, 0.4, 0, 0.25, 0, 0.2), 0.01, 20.0, 0.06, detune=2),
    "piano": _Timbre((1, 0.5, 0.25, 0.2, 0.1, 0.08, 0.05), 0.004, 0.9, 0.2),
    "electric piano": _Timbre((1, 0.1, 0.02, 0.25, 0, 0, 0.06), 0.005, 1.2, 0.25, detune=3),
    "guitar": _Timbre(tuple(k**-1.3 for k in range(1, 25)), 0.003, 0.45, 0.1),
    "chip": _Timbre(_SQUARE, 0.002, 1.5, 0.02),
    "flute": _Timbre((1, 0.3, 0.12, 0.04), 0.06, 5.0, 0.1),
    "lead": _Timbre(_SAW, 0.01, 1.0, 0.08, detune=5),
    "sub bass": _Timbre((1, 0.35, 0.1), 0.008, 2.0, 0.05),
    "picked bass": _Timbre(tuple(k**-1.5 for k in range(1, 17)), 0.004, 0.5, 0.05),
    "synth bass": _Timbre(tuple(k**-2.0 for k in range(1, 13)), 0.01, 1.0, 0.06),
}


@dataclass(frozen=True)
class Piece:
    """What to play.

    Parameters
    ----------
    seed : int
        Of the tune and the noise.
    bpm : float
        Tempo (beats per minute).
    key, scale : str
        Tonic, one of `PITCH_CLASSES`, and ``major`` or ``minor``.
    bars : int
        Length.
    chords : tuple of int
        Degrees (from 0) of the triads, one per bar, repeated.
    drums : dict of str to str
        The steps of a bar, by drum (kick, snare, clap, hat, ride): ``x`` is a stroke, ``o`` a soft
        one, ``.`` a rest.
    bass : str
        The same for the bass, as many steps.
    instruments : tuple of str
        Names of the instruments of chords, bass and tune.
    swing : float
        Delay of every second step (steps).
    room : float
        Reverberation time (s).
    level : float
        Peak of the samples, up to 1.
    steps_per_beat : int
        4, or 3 where a beat is divided in three.
    """

    seed: int
    bpm: float
    key: str
    scale: str
    bars: int
    chords: tuple[int, ...]
    drums: dict[str, str]
    bass: str
    instruments: tuple[str, str, str]
    swing: float = 0.0
    room: float = 0.4
    level: float = 0.9
    steps_per_beat: int = 4


def play(piece: Piece, sample_rate: int) -> Signal:
    """Play a piece.

    Parameters
    ----------
    piece : Piece
        What to play.
    sample_rate : int
        Sample rate (Hz).

    Returns
    -------
    ndarray of float32, shape (frames, 2)
        The samples, the same at every call.
    """
    random = np.random.default_rng(piece.seed)
    steps = len(piece.bass)
    step = 60 / piece.bpm / piece.steps_per_beat
    chord_timbre, bass_timbre, tune_timbre = (_TIMBRES[name] for name in piece.instruments)
    kit = {name: _drum(name, sample_rate, random) for name in piece.drums}
    tonic = 48 + PITCH_CLASSES.index(piece.key)
    frames = int((piece.bars * steps * step + 1.0) * sample_rate)
    music, rhythm = np.zeros((2, frames, 2), np.float32)
    tune_degree = 7

    def note(timbre: _Timbre, pitch: int, start: float, seconds: float, gain: float) -> None:
        _add(music, _note(timbre, pitch, seconds, sample_rate), gain, start, sample_rate)

    for bar in range(piece.bars):
        starts = [(bar * steps + i + piece.swing * (i % 2)) * step for i in range(steps)]
        # The last bar has the tonic.
        root = 0 if bar == piece.bars - 1 else piece.chords[bar % len(piece.chords)]
        triad = [tonic + _semitones(piece.scale, root + third, root) for third in (0, 2, 4)]
        for pitch in triad:
            voiced = pitch if pitch > tonic + 9 else pitch + 12
            note(chord_timbre, voiced, starts[0], (steps - 1) * step, 0.16)
        bass_pitch = triad[0] - 12 if triad[0] < tonic + 7 else triad[0] - 24
        for i, strength in _strokes(piece.bass):
            note(bass_timbre, bass_pitch, starts[i], 1.6 * step, 0.4 * strength)
        for i in range(0, steps, piece.steps_per_beat // 2) if bar > 0 else ():
            on_strong_beat = i % (2 * piece.steps_per_beat) == 0
            if not on_strong_beat and random.random() < 0.45:
                continue
            tune_degree = int(np.clip(tune_degree + random.integers(-2, 3), 4, 13))
            if on_strong_beat:
                while (tune_degree - root) % 7 not in (0, 2, 4):
                    tune_degree -= 1
            pitch = tonic + 12 + _semitones(piece.scale, tune_degree, root)
            note(tune_timbre, pitch, starts[i], 1.8 * step, 0.18)
        for name, pattern in piece.drums.items():
            for i, strength in _strokes(pattern):
                gain = strength * random.uniform(0.92, 1.0)
                _add(rhythm, kit[name], gain, starts[i], sample_rate)

    echo = _reverberation(music, piece.room, sample_rate, random)
    mix: Signal = np.tanh(0.66 * rhythm + 1.2 * music + 0.3 * echo)
    mix *= piece.level / np.abs(mix).max()
    return mix


def _strokes(pattern: str) -> list[tuple[int, float]]:
    """Return steps and strengths (0..1) of the strokes of a pattern."""
    strength = {"x": 1.0, "o": 0.45}
    return [(step, strength[mark]) for step, mark in enumerate(pattern) if mark != "."]


def _semitones(scale: str, degree: int, root: int) -> int:
    """Return a degree's distance from the tonic; in minor the dominant has the leading note."""
    octave, within = divmod(degree, 7)
    leading = scale == "minor" and root == 4 and within == 6
    return 12 * octave + _STEPS[scale][within] + leading


def _note(timbre: _Timbre, pitch: int, seconds: float, sample_rate: int) -> Signal:
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    time = np.arange(int((seconds + timbre.release) * sample_rate), dtype=np.float32) / sample_rate
    audible = timbre.harmonics[: max(1, int(0.45 * sample_rate / frequency))]
    spectrum = np.zeros(_TABLE_SIZE // 2 + 1, np.complex64)
    spectrum[1 : len(audible) + 1] = -0.5j * _TABLE_SIZE * np.array(audible)
    table = np.asarray(np.fft.irfft(spectrum), np.float32)
    envelope = np.minimum(time / timbre.attack, 1) * np.exp(-time / timbre.decay)
    envelope *= np.minimum((seconds + timbre.release - time) / timbre.release, 1)
    spread = 2 ** (timbre.detune / 2400)
    turns = time[:, np.newaxis] * np.array([frequency * spread, frequency / spread], np.float32)
    wave = table[(turns * _TABLE_SIZE).astype(np.int32) % _TABLE_SIZE]
    return np.asarray(wave * envelope[:, np.newaxis], np.float32)


def _drum(name: str, sample_rate: int, random: np.random.Generator) -> Signal:
    """Strike a drum once; returns samples of shape (frames, 1)."""
    time = np.arange(int(0.35 * sample_rate)) / sample_rate
    noise = np.fft.rfft(random.standard_normal(len(time)) * np.sqrt(sample_rate / 44100))
    frequency = np.fft.rfftfreq(len(time), 1 / sample_rate)

    def band(low: float, high: float) -> npt.NDArray[np.float64]:
        return np.fft.irfft(noise * ((frequency > low) & (frequency < high)), len(time))

    match name:
        case "kick":
            turns = 48 * time + 3.85 * (1 - np.exp(-time / 0.035))
            sound = 1.3 * np.sin(2 * np.pi * turns) * np.exp(-time / 0.12)
        case "snare":
            tone = np.sin(2 * np.pi * 185 * time)
            sound = (0.5 * band(900, 9000) + 0.6 * tone) * np.exp(-time / 0.06)
        case "clap":
            hands = [np.exp(-np.abs(time - late) / 0.004) for late in (0, 0.01, 0.02)]
            sound = band(800, 5000) * (sum(hands) + np.exp(-time / 0.07))
        case "hat":
            sound = 0.5 * band(6000, 16000) * np.exp(-time / 0.025)
        case "ride":
            sound = 0.3 * band(4000, 16000) * np.exp(-time / 0.11)
        case _:
            raise ValueError(f"no drum is named {name}")
    return sound.astype(np.float32)[:, np.newaxis]


def _add(track: Signal, sound: Signal, gain: float, start: float, sample_rate: int) -> None:
    first = int(start * sample_rate)
    part = track[first : first + len(sound)]
    part += gain * sound[: len(part)]


def _reverberation(
    signal: Signal, seconds: float, sample_rate: int, random: np.random.Generator
) -> Signal:
    """Return the echo of a room: convolution with noise that has decayed by 60 dB at `seconds`."""
    from scipy import fft

    time = np.arange(int(seconds * sample_rate), dtype=np.float32)[:, np.newaxis] / sample_rate
    room = random.standard_normal((len(time), 2), np.float32) * 10 ** (-3 * time / seconds)
    room /= np.sqrt((room**2).sum(axis=0))
    size = fft.next_fast_len(len(signal) + len(room), real=True)
    spectrum = fft.rfft(signal, size, axis=0) * fft.rfft(room, size, axis=0)
    return np.asarray(fft.irfft(spectrum, size, axis=0)[: len(signal)], np.float32)
