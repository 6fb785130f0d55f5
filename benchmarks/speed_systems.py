"""The systems that `benchmarks.speed` compares, each run as a process of its own.

    python -m benchmarks.speed_systems SYSTEM LIBRARY

SYSTEM is bare, algorithms, project, plain, essentia, mixxx, sonara or bliss.

Each writes what it knows of its own time to the file that `REPORT` names; its CPU time as a whole
is measured from outside. Nothing heavy is imported at the top: workers run this module again.
"""

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

REPORT = "AUDIO_ASSETS_BENCHMARK_REPORT"
FEATURE_SETS_WANTED = "AUDIO_ASSETS_BENCHMARK_FEATURE_SETS"
CANNED = "AUDIO_ASSETS_BENCHMARK_CANNED"
"""Environment variable: JSON of rows that feature sets return in place of analysing anything."""


PEERS = {
    "essentia": "essentia.standard",
    "mixxx": "mixxx_analyzer",
    "sonara": "sonara",
    "bliss": "bliss_audio",
}
"""Extractors of others, and their modules."""


def main() -> None:
    system, library = sys.argv[1:]
    keep_wanted()
    if system in PEERS:
        _run_peer(system, library)
    else:
        {
            "bare": lambda library: _run_bare(library, extract_all),
            "algorithms": lambda library: _run_bare(library, run_algorithms),
            "project": _run_project,
            "plain": _run_plain,
        }[system](library)


def keep_wanted() -> None:
    """Leave only the wanted feature sets, in this process."""
    from dataclasses import replace

    from audio_assets.features import FEATURE_SETS

    wanted = os.environ[FEATURE_SETS_WANTED].split(",")
    for name in list(FEATURE_SETS):
        if name not in wanted:
            del FEATURE_SETS[name]
        elif CANNED in os.environ:
            FEATURE_SETS[name] = replace(
                FEATURE_SETS[name],
                extract=CannedRow(name),
                extract_alternative=CannedRow(name),
                reads="file",
            )


class CannedRow:
    """An extractor that costs nothing."""

    def __init__(self, feature_set: str) -> None:
        self.feature_set = feature_set

    def __call__(self, _: object) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = _canned_rows()
        return rows[self.feature_set]


def _canned_rows(kept: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006 - read once per process
    if not kept:
        kept.update(json.loads(Path(os.environ[CANNED]).read_text()))
    return kept


def _files(library: str) -> list[Path]:
    return sorted(path for path in Path(library).rglob("*") if path.is_file())


def _workers() -> int:
    return len(os.sched_getaffinity(0))


def _report(found: dict[str, Any]) -> None:
    Path(os.environ[REPORT]).write_text(json.dumps(found))


def _timed(name: str, function: Callable[..., Any], *args: Any) -> Any:
    began = time.process_time()
    try:
        return function(*args)
    finally:
        with Path(f"{os.environ[REPORT]}.parts").open("a") as file:
            file.write(json.dumps({name: time.process_time() - began}) + "\n")


def _parts() -> dict[str, float]:
    """Return the CPU time of each part (s), of all processes."""
    path = Path(f"{os.environ[REPORT]}.parts")
    total: dict[str, float] = defaultdict(float)
    for line in path.read_text().splitlines() if path.exists() else ():
        for name, seconds in json.loads(line).items():
            total[name] += seconds
    return dict(total)


# The project's extractors, Essentia's algorithms and other extractors, in a process pool


def extract_all(path: Path) -> None:
    """Decode a file once and extract everything."""
    import tempfile

    from audio_assets.audio.decode import decode
    from audio_assets.audio.pcm import Audio
    from audio_assets.features import FEATURE_SETS

    with tempfile.TemporaryDirectory() as directory:
        pcm = Path(directory) / "pcm.npy"
        _timed("decode", decode, path, pcm)
        audio = Audio.open(pcm, path)
        for name, feature_set in FEATURE_SETS.items():
            _timed(name, feature_set.extract, audio)


def run_algorithms(path: Path) -> None:
    """Do the same by Essentia's own algorithms."""
    from audio_assets.features import FEATURE_SETS
    from benchmarks import essentia_algorithms

    stereo = _timed("decode", essentia_algorithms.load, path)
    for name in FEATURE_SETS:
        _timed(name, essentia_algorithms.extract, name, path, stereo)


def _run_bare(library: str, extract: Callable[[Path], None]) -> None:
    import multiprocessing

    import audio_assets.extraction.preload  # noqa: F401 - before the fork, once for all workers

    with multiprocessing.get_context("fork").Pool(_workers()) as pool:
        pool.map(extract, _files(library), chunksize=1)
        pool.close()
        pool.join()
    _report({"parts_cpu_s": _parts()})


def music_extractor(path: Path) -> None:
    """Run Essentia's MusicExtractor, which decodes and computes all of its descriptors."""
    import essentia
    import essentia.standard

    essentia.log.infoActive = essentia.log.warningActive = False
    essentia.standard.MusicExtractor()(str(path))


def mixxx_analyzer(path: Path) -> None:
    """Run Mixxx's analyzer: tempo, beat grid, key and loudness."""
    import mixxx_analyzer

    mixxx_analyzer.analyze(str(path))


def sonara(path: Path) -> None:
    """Run sonara with all of its features, at 22.05 kHz."""
    import sonara

    sonara.analyze_file(str(path))


def bliss(path: Path) -> None:
    """Run bliss: tempo, zero crossings, spectral shape, level and chroma, at 22.05 kHz mono."""
    import bliss_audio

    bliss_audio.Song(str(path))


def _run_peer(system: str, library: str) -> None:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from importlib import import_module

    import_module(PEERS[system])  # before the fork
    extract = {
        "essentia": music_extractor,
        "mixxx": mixxx_analyzer,
        "sonara": sonara,
        "bliss": bliss,
    }[system]
    # multiprocessing's own pool would wait for ever for a worker that crashes or panics.
    with ProcessPoolExecutor(_workers(), multiprocessing.get_context("fork")) as pool:
        list(pool.map(extract, _files(library)))
    _report({})


# The project, watched


class Watch:
    """CPU time of the calling thread and wall time by category, each moment in one category."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._inner = threading.local()

    def method(self, owner: Any, name: str, category: str) -> None:
        """Watch a function of a class or module."""
        original: Callable[..., Any] = getattr(owner, name)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            stack = self._inner.__dict__.setdefault("stack", [])
            stack.append([0.0, 0.0])
            cpu, wall = time.thread_time(), time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
                inner_cpu, inner_wall = stack.pop()
                if stack:
                    stack[-1][0] += cpu
                    stack[-1][1] += wall
                with self._lock:
                    self.cpu[category] += cpu - inner_cpu
                    self.wall[category] += wall - inner_wall
                    self.calls[category] += 1

        setattr(owner, name, watched)


def timed_decode(*args: Any) -> Any:
    """Decode, and append the CPU time to the report's list."""
    from audio_assets.extraction.worker import decode_file

    return _timed("decode", decode_file, *args)


def timed_extract(file: Any, feature_set: Any, *args: Any) -> Any:
    """Extract, and append the CPU time to the report's list."""
    from audio_assets.extraction.worker import extract

    return _timed(feature_set.name, extract, file, feature_set, *args)


def _run_project(library: str) -> None:
    import dagster as dg

    from audio_assets.cli import analyze, app, runs
    from audio_assets.extraction import dispatch
    from audio_assets.extraction.engine import Engine
    from audio_assets.warehouse.landing import Landing
    from audio_assets.warehouse.publisher import Publisher
    from benchmarks import speed_systems as importable
    from robustness.adaptive_timeout import AdaptiveTimeoutManager
    from robustness.state import StateStore
    from robustness.worker_pool import WorkerPool

    watch = Watch()
    for owner, name, category in (
        (dg.DagsterInstance, "handle_new_event", "events"),
        (dg.DagsterInstance, "create_run_for_job", "creating runs"),
        (dg.DagsterInstance, "create_run", "creating runs"),
        (dg.DagsterInstance, "get_records_for_run", "progress bar"),
        (Landing, "append", "landing"),
        (Landing, "latest", "reading the landing"),
        (Publisher, "publish", "publishing"),
        (StateStore, "transact", "state store"),
        (StateStore, "query", "state store"),
        (dispatch.Dispatcher, "_next_task", "handing out stages"),
        (Engine, "_conclude", "taking in results"),
        (WorkerPool, "_run_lane", "workers' lanes (IPC)"),
        (AdaptiveTimeoutManager, "timeout_in_force", "timeouts"),
        (AdaptiveTimeoutManager, "record_performance", "timeouts"),
        (analyze, "run_batches", "Dagster and the rest of a run"),
    ):
        watch.method(owner, name, category)
    run_batches = analyze.run_batches

    started: dict[str, float] = {}

    def noted(*args: Any, **kwargs: Any) -> None:
        started["cpu"] = time.process_time()
        run_batches(*args, **kwargs)

    analyze.run_batches = noted
    if CANNED not in os.environ:
        dispatch.decode_file = importable.timed_decode
        dispatch.extract = importable.timed_extract
    runs._show_results = lambda *_: 0  # it shows columns of all feature sets
    try:
        app.app(["analyze", library])
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        _report(
            {
                "parts_cpu_s": _parts(),
                "main_cpu_s": time.process_time(),
                "startup_cpu_s": started.get("cpu", 0.0),
                "main_parts_cpu_s": watch.cpu,
                "main_parts_wall_s": watch.wall,
                "main_parts_calls": watch.calls,
                "cells_missing": _cells_missing(),
                "gaps_s": _gaps(),
            }
        )


def _cells_missing() -> int:
    return len(_query("FROM features.missing"))


def _gaps() -> list[float]:
    """Return the times from the last attempt of a run to the first of the next (s)."""
    gaps = _query("""
        SELECT epoch(first - lag(last) OVER (ORDER BY first)) AS gap FROM (
            SELECT min(started_at) AS first, max(started_at + to_seconds(duration_s)) AS last
            FROM robustness.attempts GROUP BY run_id
        ) QUALIFY gap IS NOT NULL
    """)
    return [gap for (gap,) in gaps]


def _query(sql: str) -> list[tuple[Any, ...]]:
    import duckdb

    warehouse = Path(os.environ["DAGSTER_HOME"]) / "warehouse.duckdb"
    with duckdb.connect(str(warehouse), read_only=True) as connection:
        return connection.execute(sql).fetchall()


# Plain Dagster: a run per file, an asset per feature set, each of which decodes the file and calls
# Essentia


def plain_job():  # noqa: ANN201 - dagster is imported when it runs
    import dagster as dg

    from audio_assets.features import FEATURE_SETS

    keep_wanted()
    definitions = dg.Definitions(
        assets=[_plain_asset(name) for name in FEATURE_SETS], jobs=[dg.define_asset_job("plain")]
    )
    return definitions.resolve_job_def("plain")


def _plain_asset(name):  # noqa: ANN001, ANN202
    import dagster as dg

    @dg.asset(name=name)
    def extract(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from benchmarks import essentia_algorithms

        path = Path(context.run.tags["file"])
        row = essentia_algorithms.extract(name, path, essentia_algorithms.load(path))
        return dg.MaterializeResult(metadata={"row": json.dumps(row, default=str)})

    return extract


def _run_plain(library: str) -> None:
    import dagster as dg

    from benchmarks.speed_systems import plain_job as importable

    with dg.DagsterInstance.get() as instance:
        for path in _files(library):
            dg.execute_job(
                dg.reconstructable(importable),
                instance,
                tags={"file": str(path)},
                run_config={
                    "execution": {"config": {"multiprocess": {"max_concurrent": _workers()}}}
                },
            )
    _report({})


if __name__ == "__main__":
    main()
