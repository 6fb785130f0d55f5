"""Faults in the decoder and the extractors, the same for whoever calls them.

A plan, a JSON file named by the environment variable `PLAN`, says which call fails and how. Every
call leaves a line in the plan's trace: what was tried, when a fault struck, what was had.
"""

import contextlib
import ctypes
import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import audio_assets.extraction.worker
from audio_assets.audio.pcm import Audio, SourceInfo
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Row

PLAN = "AUDIO_ASSETS_BENCHMARK_PLAN"

HANG_S = 3600.0
_HOG_STEP_MIB = 64
_HOG_STEP_S = 0.05

_decode = audio_assets.extraction.worker.decode
_originals: dict[str, dict[str, Callable[[Audio], Row]]] = {
    name: {"primary": feature_set.extract, "alternative": feature_set.extract_alternative}
    for name, feature_set in FEATURE_SETS.items()
}


@cache
def plan() -> dict[str, Any]:
    """Return the plan that the environment names."""
    loaded: dict[str, Any] = json.loads(Path(os.environ[PLAN]).read_text())
    return loaded


def install() -> None:
    """Put the plan in force in this process: its feature sets alone, and their faults."""
    for name in list(FEATURE_SETS):
        if name not in plan()["feature_sets"]:
            del FEATURE_SETS[name]
            continue
        FEATURE_SETS[name] = replace(
            FEATURE_SETS[name],
            extract=Faulty(name, "primary"),
            extract_alternative=Faulty(name, "alternative"),
        )
    audio_assets.extraction.worker.decode = _decode_with_faults
    # A file is decoded for the first of its feature sets that needs audio.
    entering(next(name for name, each in FEATURE_SETS.items() if each.reads_pcm))


@dataclass(frozen=True)
class Faulty:
    """An extractor with the plan's faults."""

    feature_set: str
    extractor: str

    def __call__(self, audio: Audio) -> Row:
        name = audio.path.name
        if not _Call.decoding:
            _trace("attempt", name, self.feature_set)
        _Call.decoding = False
        burst = plan().get("burst")
        if burst and burst["feature_set"] == self.feature_set and _in_burst(burst["seconds"]):
            _trace("fault", name, self.feature_set, kind="burst")
            raise ConnectionRefusedError("the model server refused the connection")
        fault = plan()["extract"].get(name, {}).get(self.feature_set)
        if fault and (self.extractor == "primary" or fault.get("both")):
            _strike(fault, name, self.feature_set, audio.path)
        row = _originals[self.feature_set][self.extractor](audio)
        _trace("done", name, self.feature_set)
        return row


class _Call:
    """What the worker is at."""

    feature_set = ""
    decoding = False


def entering(feature_set: str) -> None:
    """Name the feature set that audio is decoded for."""
    _Call.feature_set = feature_set
    _Call.decoding = False


def _decode_with_faults(
    path: Path,
    target: Path,
    **options: Any,
) -> SourceInfo:
    _trace("attempt", path.name, _Call.feature_set)
    fault = plan()["decode"].get(path.name)
    if fault:
        _strike(fault, path.name, _Call.feature_set, path)
    source = _decode(path, target, **options)
    _Call.decoding = True
    return source


def _strike(fault: dict[str, Any], name: str, feature_set: str, path: Path) -> None:
    kind = fault["kind"]
    if kind == "slow":
        time.sleep(fault["seconds"])
        return
    if "tries" in fault and _count(f"{name}.{kind}") > fault["tries"]:
        return
    _trace("fault", name, feature_set, kind=kind)
    match kind:
        case "io_error":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        case "flaky":
            raise ConnectionResetError("the model server hung up")
        case "hang":
            time.sleep(HANG_S)
        case "segfault":
            ctypes.string_at(0)
        case "hog":
            held = []
            for _ in range(plan()["hog_mib"] // _HOG_STEP_MIB):
                held.append(bytearray(os.urandom(1024)) * (_HOG_STEP_MIB * 1024))
                time.sleep(_HOG_STEP_S)
            raise MemoryError(f"{plan()['hog_mib']} MiB are not enough")
        case _:
            raise ValueError(f"the plan has an unknown fault {kind!r}")


def _count(name: str) -> int:
    """Count a call over all processes, by the size of a file."""
    with (Path(plan()["directory"]) / f"{name}.count").open("ab") as file:
        file.write(b".")
        return file.tell()


def _in_burst(seconds: float) -> bool:
    marker = Path(plan()["directory"]) / "burst"
    with contextlib.suppress(FileExistsError):
        marker.touch(exist_ok=False)
    return time.time() < marker.stat().st_mtime + seconds


def _trace(event: str, name: str, feature_set: str, **more: Any) -> None:
    line = {"at": time.time(), "pid": os.getpid(), "event": event, "file": name}
    line |= {"feature_set": feature_set} | more
    descriptor = os.open(
        Path(plan()["directory"]) / "trace.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT
    )
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)
