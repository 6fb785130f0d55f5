"""Extractors that really hang, crash, hoard memory or fail for a while."""

import os
import signal
import sqlite3
import time
import urllib.request
from pathlib import Path

import numpy as np

from audio_assets.audio.pcm import Audio
from audio_assets.features.base import Column, FeatureSet, Row

HANG_S = 3600.0


def sound(audio: Audio) -> Row:
    return {"value": audio.duration_s}


def length_of_file(audio: Audio) -> Row:
    return {"value": float(audio.path.stat().st_size)}


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


def median_level(audio: Audio) -> Row:
    """Need memory for the whole signal at once."""
    return {"value": float(np.median(np.abs(audio.mono())))}


def _traces(audio: Audio) -> Path:
    """Directory beside the library in which extractors leave word for each other."""
    directory = audio.path.parent.parent / "traces"
    directory.mkdir(exist_ok=True)
    return directory


def _call_number(audio: Audio) -> int:
    """Count the calls for the bad file, over all processes, from 1."""
    directory = _traces(audio)
    number = len(list(directory.glob("call-*"))) + 1
    (directory / f"call-{number}").touch()
    return number


def implausible(audio: Audio) -> Row:
    return {"value": -1.0} if _is_marked(audio) else sound(audio)


def flaky(audio: Audio) -> Row:
    if _is_marked(audio) and _call_number(audio) < 3:
        raise RuntimeError("the library is in a bad mood")
    return sound(audio)


def in_burst(audio: Audio) -> Row:
    """Fail for every file while somebody says so."""
    if (_traces(audio) / "burst").exists():
        raise RuntimeError("the library is in a bad mood")
    return sound(audio)


def in_burst_too(audio: Audio) -> Row:
    return in_burst(audio) if (_traces(audio) / "burst of both").exists() else sound(audio)


def slow(audio: Audio) -> Row:
    """Take as long as the file beside the library says (s)."""
    if _is_marked(audio):
        time.sleep(float((_traces(audio) / "seconds").read_text()))
    return sound(audio)


def ask_server(audio: Audio) -> Row:
    """Ask the server whose address is in a file beside the library."""
    if _is_marked(audio):
        urllib.request.urlopen((_traces(audio) / "url").read_text(), timeout=10).close()
    return sound(audio)


_connection: sqlite3.Connection | None = None


def note_in_database(audio: Audio) -> Row:
    """Write through a connection that is kept open; another writer makes its view stale."""
    global _connection
    if _is_marked(audio):
        database = _traces(audio) / "index.db"
        if _connection is None:
            _connection = sqlite3.connect(database, timeout=0, isolation_level=None)
            _connection.execute("PRAGMA journal_mode = wal")
            _connection.execute("CREATE TABLE IF NOT EXISTS seen (path)")
            _connection.execute("BEGIN")
            _connection.execute("SELECT count(*) FROM seen").fetchone()
            if _call_number(audio) == 1:
                with sqlite3.connect(database) as other:
                    other.execute("INSERT INTO seen VALUES ('elsewhere')")
        _connection.execute("INSERT INTO seen VALUES (?)", (audio.path.name,))
        _connection.execute("COMMIT")
    return sound(audio)


def replace_the_file(audio: Audio) -> Row:
    """Put another file in the place of the one that is analysed, once."""
    if _is_marked(audio) and _call_number(audio) == 1:
        (_traces(audio) / "other.wav").replace(audio.path)
    return sound(audio)


def slow_everywhere(audio: Audio) -> Row:
    time.sleep(2.0)
    return sound(audio)


def take_storage_away(audio: Audio) -> Row:
    """Make the library vanish under its readers, once, as a mount does that goes away."""
    root = audio.path.parent
    if _is_marked(audio) and _call_number(audio) == 1:
        root.rename(root.with_name("away"))
    audio.path.read_bytes()
    return sound(audio)


def delete_the_file(audio: Audio) -> Row:
    if _is_marked(audio):
        audio.path.unlink()
    audio.path.read_bytes()
    return sound(audio)


def delete_the_first(audio: Audio) -> Row:
    if _is_marked(audio) and _call_number(audio) == 1:
        audio.path.unlink()
        audio.path.read_bytes()
    return sound(audio)


def verdict(audio: Audio) -> Row:
    """Say what decoding found."""
    if audio.source is not None:
        return {"verdict": audio.source.codec}
    assert audio.decode_error is not None
    return {"verdict": audio.decode_error.error_type.value}


def add_up(rows: list[Row], durations: list[float]) -> Row:
    return {"value": sum(row["value"] for row in rows)}


def feature_set(
    name: str, extract: object, alternative: object = sound, *, code_version: str = "1"
) -> FeatureSet:
    return FeatureSet(
        name=name,
        description="A feature set that fails.",
        columns=(Column("value", "DOUBLE", "Duration", "s", low=0),),
        licence="none",
        citation="none",
        extract=extract,  # type: ignore[arg-type]
        extract_alternative=alternative,  # type: ignore[arg-type]
        combine=add_up,  # type: ignore[arg-type]
        headline="value",
        plotted=("value",),
        extractor="primary",
        alternative="alternative",
        code_version=code_version,
    )
