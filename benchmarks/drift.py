"""Whether a slowdown of 30 % is found, and unchanged runs raise nothing: real runs of the engine.

python -m benchmarks.drift [--quick] [--results DIRECTORY]
"""

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from audio_assets.audio.pcm import Audio
from audio_assets.extraction.engine import Engine
from audio_assets.extraction.scratch import Scratch
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import FeatureSet, Row
from audio_assets.library.scan import Library
from audio_assets.monitoring.landed import LandedRows
from audio_assets.monitoring.performance import EVIDENCE, Trend, trends
from audio_assets.settings import usable_cores
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import warehouse_tables
from benchmarks.corpus import FULL_RATE, find_source, make_library
from benchmarks.measure import machine, write_results
from robustness.worker_pool import WorkerPool

QUIET_RUNS = 10
SLOWDOWN = 1.3
LENGTHS_S = (10.0, 25.0)
FILES = 30
"""Of each length."""
FILES_AT_ONCE = 10
"""Files of a slowed run; after each it is asked whether the slowdown is found."""
MOST_CELLS = 200
SETS = ("loudness", "danceability", "key", "chroma", "mfcc", "spectral", "rhythm")


@dataclass(frozen=True)
class Slowed:
    """An extractor that computes for longer."""

    extract: Callable[[Audio], Row]

    def __call__(self, audio: Audio) -> Row:
        began = time.thread_time()
        row = self.extract(audio)
        until = began + SLOWDOWN * (time.thread_time() - began)
        while time.thread_time() < until:
            pass
        return row


class History:
    """The runs of a library, and what they say of its speed."""

    def __init__(self, root: Path, library: Path) -> None:
        self._root, self._library = root, Library({"music": library})
        self._landing = Landing(str(root / "landing"), warehouse_tables(FEATURE_SETS.values()))
        self._rows = LandedRows(self._landing)
        self._runs = 0

    def run(self, keys: Sequence[str], feature_sets: Sequence[FeatureSet]) -> dict[str, Trend]:
        """Compute all cells of some files, and return the trends by feature set."""
        self._runs += 1
        run_id, workers = f"run {self._runs}", usable_cores()
        record = {
            "run_id": run_id,
            "started_at": datetime.now(UTC),
            "host": socket.gethostname(),
            "workers": workers,
        }
        self._landing.append("robustness/runs", [record])
        with (
            Scratch(self._root / "scratch", run_id, 4096) as scratch,
            WorkerPool(workers, preload=("audio_assets.extraction.preload",)) as pool,
        ):
            engine = Engine(run_id, self._library, self._landing, pool, scratch)
            engine.begin(feature_sets, keys, force=True)
            for feature_set in feature_sets:
                for _ in engine.drive(feature_set.name):
                    pass
        with self._rows.up_to_date() as connection:
            return {trend.feature_set: trend for trend in trends(connection)}


def measure(scratch: Path, *, quick: bool) -> dict[str, Any]:
    """Run the library unchanged, then with slowed extractors until they are found."""
    source = find_source(scratch, FULL_RATE)
    library = scratch / "music"
    files = [
        path
        for seed, seconds in enumerate(LENGTHS_S)
        for path in make_library(
            source,
            library / f"{seconds:g}",
            files=4 if quick else FILES,
            seconds=seconds,
            seed=seed,
            formats=("FLAC",),
        )
    ]
    keys = [f"music/{path.relative_to(library)}" for path in sorted(files, key=lambda p: p.name)]
    usual = [FEATURE_SETS[name] for name in (SETS[:2] if quick else SETS)]
    slowed = [replace(each, extract=Slowed(each.extract)) for each in usual]
    history = History(scratch, library)
    quiet = []
    for number in range(2 if quick else QUIET_RUNS):
        found = history.run(keys, usual)
        quiet.append({name: trend.evidence for name, trend in found.items()})
        print(f"run {number + 1}: { ({n: round(e, 1) for n, e in quiet[-1].items()}) }", flush=True)
    found_after: dict[str, int] = {}
    for start in range(0, 10 if quick else MOST_CELLS, FILES_AT_ONCE):
        batch = [keys[(start + n) % len(keys)] for n in range(FILES_AT_ONCE)]
        for name, trend in history.run(batch, slowed).items():
            if trend.is_slower:
                found_after.setdefault(name, start + FILES_AT_ONCE)
        if len(found_after) == len(slowed):
            break
    print(f"found after cells: {found_after}")
    return {
        "source": source.about(),
        "files": len(keys),
        "quiet_evidence": quiet,
        "found_after_cells": found_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="too few cells for any figure")
    parser.add_argument("--results", type=Path, help="directory for drift.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.environ["ROBUSTNESS_STATE_URL"] = f"sqlite:///{directory}/state.db"
        os.environ["OMP_NUM_THREADS"] = "1"
        about = machine()
        results = measure(Path(directory), quick=arguments.quick)
    results |= {
        "machine": about,
        "quick": arguments.quick,
        "slowdown": SLOWDOWN,
        "evidence_needed": EVIDENCE,
    }
    print(write_results("drift", results, arguments.results))


if __name__ == "__main__":
    main()
