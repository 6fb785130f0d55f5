"""The time of `audio-assets analyze` over that of its algorithms in a bare process pool.

Both run on the same files, one after the other, with as many processes.

    python -m benchmarks.main_path LIBRARY
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

from audio_assets.audio import Audio, decode
from audio_assets.features import FEATURE_SETS
from audio_assets.library import Library
from audio_assets.settings import usable_cores


def extract_all(path: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        pcm = Path(directory) / "pcm.npy"
        decode(path, pcm)
        audio = Audio.open(pcm, path)
        for feature_set in FEATURE_SETS.values():
            feature_set.extract(audio)


def bare(paths: list[Path]) -> float:
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(usable_cores()) as pool:
        for result in [pool.apply_async(extract_all, (path,)) for path in paths]:
            try:
                result.get()
            except Exception as error:  # noqa: BLE001 - a file that cannot be analysed
                print(f"  left out by the bare pool: {error}")
    return time.perf_counter() - started


def project(library: Path) -> tuple[float, list[tuple[str, float]]]:
    with tempfile.TemporaryDirectory() as home:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "audio_assets", "analyze", str(library)],
            env=os.environ | {"DAGSTER_HOME": home},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        seconds = time.perf_counter() - started
        with duckdb.connect(f"{home}/warehouse.duckdb", read_only=True) as connection:
            parts = connection.execute(
                "SELECT 'in the workers, all feature sets', sum(duration_s) "
                "FROM robustness.attempts UNION ALL SELECT 'the run, from start to end', "
                "sum(epoch(ended_at) - epoch(started_at)) FROM robustness.runs"
                " UNION ALL SELECT 'of it decoding', sum(decode_s) FROM robustness.attempts"
            ).fetchall()
    return seconds, parts


def main() -> None:
    library = Path(sys.argv[1])
    files = Library({"library": library}).scan().files
    bare_seconds = bare([entry.path for entry in files])
    seconds, parts = project(library)
    print(f"bare pool {bare_seconds:.1f} s, analyze {seconds:.1f} s, {len(files)} files")
    print(f"ratio {seconds / bare_seconds:.2f}")
    for name, part in parts:
        print(f"  {name}: {part:.1f} s")


if __name__ == "__main__":
    main()
