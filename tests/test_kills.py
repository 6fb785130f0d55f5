"""What kill -9 and rivals cost: nothing. Real runs, real publishers, one truth at the end."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import duckdb
import numpy as np
import psutil
import pytest
import soundfile

from audio_assets.features import FEATURE_SETS
from tests.conftest import PROJECT, Home

KILLS = int(os.environ.get("AUDIO_TEST_KILLS", "1"))
FILES_PER_ROUND = 2
SEED = 11

# What `audio-assets publish` does, again and again, so that a kill finds it at it.
PUBLISHER = """
import time
from audio_assets.warehouse import publish
while True:
    publish()
    time.sleep(0.2)
"""


def add_files(library: Path, rng: random.Random, count: int = FILES_PER_ROUND) -> None:
    """Add short files of a content that no other has."""
    library.mkdir(exist_ok=True)
    for _ in range(count):
        t = np.arange(int(44100 * 1.5)) / 44100
        tone = 0.4 * np.sin(2 * np.pi * rng.uniform(100, 2000) * t) * (np.sin(20 * t) > 0)
        soundfile.write(library / f"{rng.randrange(10**9)}.wav", tone, 44100)


@contextmanager
def publishing(home: Home) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER], env=home.environment(), cwd=PROJECT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def expected_cells(library: Path) -> set[tuple[str, str]]:
    return {(f"{library.name}/{p.name}", name) for p in library.iterdir() for name in FEATURE_SETS}


def differences(home: Home, library: Path) -> list[str]:
    """Compare the cells of the library with Dagster's and with the database's."""
    expected = expected_cells(library)
    found = []
    with dg.DagsterInstance.from_config(str(home.path)) as instance:
        told = {
            (key, name)
            for name in FEATURE_SETS
            for key in instance.get_materialized_partitions(dg.AssetKey(["features", name]))
        }
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        rows = [
            (key, name)
            for name in FEATURE_SETS
            for (key,) in connection.execute(f"SELECT file_key FROM features.{name}").fetchall()
        ]
        inventory = connection.execute("SELECT file_key FROM library.files").fetchall()
        ids = connection.execute("SELECT row_id FROM robustness.attempts").fetchall()
        missing = connection.execute("FROM features.missing").fetchall()
    for what, cells in (("Dagster", told), ("DuckDB", set(rows))):
        found += [f"not in {what}: {cell}" for cell in expected - cells]
        found += [f"only in {what}: {cell}" for cell in cells - expected]
    found += [f"twice: {cell}" for cell, times in Counter(rows).items() if times > 1]
    found += [f"twice: {key}" for key, times in Counter(inventory).items() if times > 1]
    found += [f"twice: {row_id}" for row_id, times in Counter(ids).items() if times > 1]
    return found + [f"said to be missing: {cell}" for cell in missing]


@pytest.mark.timeout(300 + 200 * KILLS)
def test_killed_at_any_moment_everything_is_there_in_the_end(home: Home, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    library = tmp_path / "music"
    add_files(library, rng)
    started = time.monotonic()
    done = home.cli("analyze", str(library))
    assert done.returncode == 0, done.stdout + done.stderr
    usual_s = time.monotonic() - started
    assert differences(home, library) == []
    killed: Counter[str] = Counter()
    left_to_do = 0
    for number in range(KILLS):
        add_files(library, rng)
        victims = rng.choice(["run", "run", "publisher", "both"]) if number else "both"
        with publishing(home) as publisher:
            run = home.start("analyze", str(library))
            # The first third goes by with imports, where there is nothing to break.
            time.sleep(rng.uniform(0.3, 1.0) * usual_s)
            running = run.poll() is None
            if victims != "publisher":
                run.kill()
            if victims != "run":
                publisher.kill()
            killed[victims if running or victims == "publisher" else f"{victims}, run over"] += 1
            output, errors = run.communicate()
            assert run.returncode in (0, -9), output + errors
        done = home.cli("analyze", str(library))
        assert done.returncode == 0, done.stdout + done.stderr
        left_to_do += "Nothing to compute" not in done.stdout
        assert differences(home, library) == [], f"kill {number} of {victims}"
    print(f"{KILLS} kills {dict(killed)}, {left_to_do} left something to do, differences 0")


def test_killed_in_mid_batch_it_leaves_no_process(home: Home, tmp_path: Path) -> None:
    library = tmp_path / "music"
    add_files(library, random.Random(4), count=6)
    run = home.start("analyze", str(library))
    landed = home.path / "landing" / "features"
    while not list(landed.glob("*/*.parquet")):
        assert run.poll() is None
        time.sleep(0.1)
    family = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.communicate()
    assert family
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    done = home.cli("analyze", str(library))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing to compute" not in done.stdout
    assert differences(home, library) == []


@pytest.mark.timeout(600)
def test_two_runs_and_two_publishers_at_once_agree(home: Home, tmp_path: Path) -> None:
    library = tmp_path / "music"
    add_files(library, random.Random(1), count=3)
    with publishing(home), publishing(home):
        runs = [home.start("analyze", str(library)) for _ in range(2)]
        for run in runs:
            output, errors = run.communicate()
            assert run.returncode == 0, output + errors
    done = home.cli("publish")
    assert done.returncode == 0, done.stdout + done.stderr
    assert differences(home, library) == []
