"""Extractors that really hang, crash, hoard memory or fail for a while."""

import os
import signal
import time
from pathlib import Path

from audio_assets.audio import Audio
from audio_assets.features.base import Column, FeatureSet, Row

HANG_S = 3600.0
TRACES = "AUDIO_ASSETS_TEST_TRACES"
"""Environment variable: directory in which an extractor notes that it was called."""


def sound(audio: Audio) -> Row:
    return {"value": audio.duration_s}


def _is_marked(audio: Audio) -> bool:
    """Only the file whose name says so is bad: the others show what a fault costs."""
    return "bad" in audio.path.name


def hang(audio: Audio) -> Row:
    if _is_marked(audio):
        time.sleep(HANG_S)
    return sound(audio)


def segfault(audio: Audio) -> Row:
    if _is_marked(audio):
        os.kill(os.getpid(), signal.SIGSEGV)
    return sound(audio)


def hoard(audio: Audio) -> Row:
    if _is_marked(audio):
        hoarded = []
        while True:
            hoarded.append(bytearray(os.urandom(1024)) * 32 * 1024)
    return sound(audio)


def hoard_unless_block(audio: Audio) -> Row:
    """Hold memory in proportion to the audio, as an extractor does that needs all of it."""
    held = bytearray(os.urandom(1024)) * int(audio.duration_s * 20 * 1024)
    time.sleep(0.5 if len(held) > 2**28 else 0.0)
    return sound(audio)


def flaky(audio: Audio) -> Row:
    if _is_marked(audio):
        directory = Path(os.environ[TRACES])
        calls = len(list(directory.iterdir()))
        (directory / str(calls)).touch()
        if calls < 2:
            raise ConnectionResetError("the model server hung up")
    return sound(audio)


def add_up(rows: list[Row], durations: list[float]) -> Row:
    return {"value": sum(row["value"] for row in rows)}


def feature_set(name: str, extract: object, alternative: object = sound) -> FeatureSet:
    return FeatureSet(
        name=name,
        description="A feature set that fails.",
        columns=(Column("value", "DOUBLE", "Duration", "s"),),
        extract=extract,  # type: ignore[arg-type]
        extract_alternative=alternative,  # type: ignore[arg-type]
        combine=add_up,  # type: ignore[arg-type]
        headline="value",
        plotted=("value",),
        extractor="primary",
        alternative="alternative",
    )
