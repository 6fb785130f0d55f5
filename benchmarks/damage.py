"""What is had of damaged files: a plain loop over Essentia and the project, on one library.

python -m benchmarks.damage [--quick] [--results DIRECTORY]
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import soundfile
import soxr

from audio_assets.audio.pcm import SAMPLE_RATE, Audio
from audio_assets.features import FEATURE_SETS
from benchmarks.corpus import find_source
from benchmarks.measure import PROJECT, clean_environment, machine, run_tree, write_results
from tests.audio.damage import AROUND, FORMATS, encode, overwritten

SECONDS, QUICK_SECONDS = 20.0, 11.0
FILE_LIMIT_S = 120
RATE = 48000
SUFFIXES = {"adts": "aac", "ipod": "m4a", "asf": "wma", "matroska": "mka"}
DAMAGES = {
    "cut at 90 %": lambda content: content[: len(content) * 9 // 10],
    "cut at 50 %": lambda content: content[: len(content) // 2],
    "cut at 30 %": lambda content: content[: len(content) * 3 // 10],
    "1 % overwritten": overwritten,
    **AROUND,
}
QUICK_DAMAGES = ("cut at 50 %", "1 % overwritten")
AUDIO_SETS = [feature_set for feature_set in FEATURE_SETS.values() if feature_set.reads_pcm]


def make_damaged_library(scratch: Path, *, quick: bool) -> Path:
    """Make one file of each format and damage, each of another recording or part of one."""
    recordings = find_source(scratch).files
    library = scratch / "damaged"
    library.mkdir()
    whole = scratch / "whole"
    formats = ["MP3 without"] if quick else FORMATS
    damages = QUICK_DAMAGES if quick else DAMAGES
    seconds = QUICK_SECONDS if quick else SECONDS
    for number, name in enumerate(formats):
        codec, container, options, _ = FORMATS[name]
        samples, rate = soundfile.read(recordings[number % len(recordings)], dtype="float32")
        if samples.ndim == 1:
            samples = np.repeat(samples[:, None], 2, axis=1)
        samples = np.resize(soxr.resample(samples[:, :2], rate, RATE), (int(seconds * RATE), 2))
        encode(whole, codec, samples, RATE, container=container, options=options)
        for damage in damages:
            suffix = SUFFIXES.get(container, container)
            (library / f"{name}, {damage}.{suffix}").write_bytes(
                DAMAGES[damage](whole.read_bytes())
            )
    return library


def essentia_loop(paths: list[Path]) -> None:
    """Print what is had of each file in the plain way, with try and except."""
    from audio_assets.features.essentia_library import essentia

    for path in paths:
        signal.alarm(FILE_LIMIT_S)  # ends the process
        had, seconds = [], 0.0
        try:
            samples, rate, *_ = essentia().AudioLoader(filename=str(path))()
            pcm = soxr.resample(samples, rate, SAMPLE_RATE)
            seconds = len(pcm) / SAMPLE_RATE
        except Exception:  # noqa: BLE001 - as the loop of a script does
            pcm = np.zeros((0, 2), np.float32)
        for feature_set in AUDIO_SETS:
            try:
                if len(pcm):
                    feature_set.extract(Audio(path, None, pcm))
                    had.append(feature_set.name)
            except Exception:  # noqa: BLE001
                continue
        print(json.dumps({"ended": path.name, "had": had, "seconds": seconds}), flush=True)


def run_loop(paths: list[Path]) -> dict[str, Any]:
    """Run the loop; one that crashes or hangs is started again behind the file."""
    found: dict[str, Any] = {"had": {}, "seconds": {}, "crashes_or_hangs": []}
    while paths:
        for line in _lines_of_loop(paths):
            if "ended" in line:
                found["had"][line["ended"]] = line["had"]
                found["seconds"][line["ended"]] = line["seconds"]
        rest = [path for path in paths if path.name not in found["had"]]
        if rest:
            found["crashes_or_hangs"].append(rest.pop(0).name)
        paths = rest
    return found


def _lines_of_loop(paths: list[Path]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.damage", "--loop", *map(str, paths)]
    done = subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert done.stdout
    with done, done.stdout:
        for line in done.stdout:
            if line.startswith("{"):
                yield json.loads(line)


def run_project(library: Path, home: Path) -> dict[str, Any]:
    """Analyse the library in a new home, and read what the tables say."""
    home.mkdir()
    (home / "dagster.yaml").write_bytes((PROJECT / "dagster_home" / "dagster.yaml").read_bytes())
    run_tree(
        [sys.executable, "-m", "audio_assets", "analyze", str(library)],
        clean_environment(DAGSTER_HOME=str(home), AUDIO_VIDEO="mp4 webm"),
        log=home / "run.log",
    )
    found: dict[str, Any] = {"had": {}}
    with duckdb.connect(str(home / "warehouse.duckdb"), read_only=True) as connection:
        for feature_set in AUDIO_SETS:
            rows = connection.execute(f"SELECT file_key FROM features.{feature_set.name}")
            for (key,) in rows.fetchall():
                found["had"].setdefault(key.partition("/")[2], []).append(feature_set.name)
        found["seconds"] = {
            key.partition("/")[2]: seconds
            for key, seconds in connection.execute(
                "SELECT file_key, duration_s FROM features.metadata"
            ).fetchall()
        }
    return found


def figures(found: dict[str, Any], paths: list[Path]) -> dict[str, Any]:
    """Return what a system had of each damage."""
    names = {path.name: path.stem.rpartition(", ")[2] for path in paths}
    return {
        "cells_possible": len(paths) * len(AUDIO_SETS),
        "cells_had": sum(len(found["had"].get(name, ())) for name in names),
        "cells_had_by_damage": {
            damage: sum(len(found["had"].get(n, ())) for n, its in names.items() if its == damage)
            for damage in DAMAGES
        },
        "seconds": sum(found["seconds"].get(name) or 0.0 for name in names if name in found["had"]),
        "crashes_or_hangs": len(found.get("crashes_or_hangs", ())),
        "without_a_cell": sorted(name for name in names if not found["had"].get(name)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one format, two damages")
    parser.add_argument("--results", type=Path, help="directory for damage.json")
    parser.add_argument("--loop", nargs="+", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        essentia_loop(arguments.loop)
        return
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        library = make_damaged_library(scratch, quick=arguments.quick)
        paths = sorted(library.iterdir())
        systems = {
            "essentia_loop": figures(run_loop(paths), paths),
            "product": figures(run_project(library, scratch / "home"), paths),
        }
    results = {
        "machine": machine(),
        "quick": arguments.quick,
        "files": len(paths),
        "seconds_per_file": QUICK_SECONDS if arguments.quick else SECONDS,
        "systems": systems,
    }
    print(write_results("damage", results, arguments.results))


if __name__ == "__main__":
    main()
