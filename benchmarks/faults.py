"""What faults cost: plain Dagster, fixed settings and the project, on one library.

python -m benchmarks.faults [--quick] [--seed N] [--results DIRECTORY]
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from audio_assets.features import FEATURE_SETS
from benchmarks.corpus import Source, find_source, make_library, make_tiny_library
from benchmarks.injection import PLAN
from benchmarks.measure import (
    PROJECT,
    Usage,
    clean_environment,
    machine,
    run_tree,
    write_results,
)

Cell = tuple[str, str]
"""Name of a file, feature set."""

Event = dict[str, Any]

SYSTEMS = ("product", "plain", "fixed")
WORKER_MEMORY_MIB = 1200
FIXED_SETTINGS = {
    # Base timeouts only, state of the process's own, no memory budget, no
    # retry budget.
    "ROBUSTNESS_TIMEOUT_MIN_SAMPLES": "1000000000",
    "ROBUSTNESS_STATE_URL": "sqlite://",
    "ROBUSTNESS_RETRY_BUDGET_RATIO": "1000",
    "MEMORY_AWARE": "false",
}
PRODUCT_SETTINGS = {"ROBUSTNESS_WORKER_MEMORY_MIB": str(WORKER_MEMORY_MIB)}

_LOCKED_S = 8.0
_FULL_S = 30.0
_FULL_AFTER_CELLS = 100
_LOCK_AFTER_EVENTS = (40, 200)


@dataclass(frozen=True)
class Scale:
    """How large the benchmark is.

    Parameters
    ----------
    files : int
        Sound files.
    seconds : float
        Length of each (s).
    slow_s : float
        What a slow disk adds to a read (s).
    burst_s : float
        How long every cell of one feature set fails (s).
    plain_limit_s : float
        When the plain system is stopped (s).
    """

    files: int
    seconds: float
    slow_s: float
    burst_s: float
    plain_limit_s: float


FULL = Scale(files=90, seconds=30.0, slow_s=3.0, burst_s=20.0, plain_limit_s=240.0)
QUICK = Scale(files=6, seconds=1.5, slow_s=0.2, burst_s=0.0, plain_limit_s=30.0)


# The library and its plan of faults


def make_faulty_library(
    source: Source, directory: Path, scale: Scale, seed: int, *, quick: bool
) -> tuple[list[str], dict[str, str]]:
    """Make the library; return the names of sound files, and what is wrong with the others."""
    rng = random.Random(seed)
    sound = make_library(source, directory, files=scale.files, seconds=scale.seconds, seed=seed)
    names = [path.name for path in sound]
    for path in rng.sample(sound, 1 if quick else 3):
        wrong = path.with_suffix(".wav" if path.suffix != ".wav" else ".flac")
        path.rename(wrong)
        names[names.index(path.name)] = wrong.name
    damaged = {}
    folder = directory / "damaged"
    whole = make_library(
        source, folder, files=1 if quick else 3, seconds=10.0, seed=seed + 1, formats=("FLAC",)
    )
    for number, path in enumerate(whole):
        target = path.with_name(f"damaged {path.name}")
        content = path.read_bytes()
        path.unlink()
        if number == 0:
            target.write_bytes(content[: len(content) // 2])
            damaged[target.name] = "truncated"
        else:
            half = len(content) // 2
            target.write_bytes(content[:half] + rng.randbytes(half // 2) + content[half:])
            damaged[target.name] = "corrupt"
    for name, content, fault in (
        ("lyrics.mp3", b"Last stop, last stop,\nthe driver turns the key.\n" * 40, "unsupported"),
        ("archive.flac", b"PK\x03\x04" + rng.randbytes(20000), "unsupported"),
    )[: 1 if quick else 2]:
        (folder / name).write_bytes(content)
        damaged[name] = fault
    return names, damaged


def make_plan(names: Sequence[str], scale: Scale, seed: int, *, quick: bool) -> dict[str, Any]:
    """Deal faults out to files, at most one to each."""
    dealt = random.Random(seed).sample(list(names), len(names))
    extract: dict[str, dict[str, Any]] = defaultdict(dict)
    decode: dict[str, Any] = {}

    def at(feature_set: str, kind: str, **more: Any) -> None:
        extract[dealt.pop()][feature_set] = {"kind": kind, **more}

    if quick:
        decode[dealt.pop()] = {"kind": "io_error", "tries": 1}
        at("key", "flaky", tries=1)
        at("loudness", "segfault")
        return {"decode": decode, "extract": extract, "feature_sets": QUICK_SETS, "hog_mib": 0}
    for tries in (1, 1, 2):
        decode[dealt.pop()] = {"kind": "io_error", "tries": tries}
    for _ in range(2):
        decode[dealt.pop()] = {"kind": "slow", "seconds": scale.slow_s}
    for feature_set in ("metadata", "loudness", "spectral"):
        at(feature_set, "slow", seconds=scale.slow_s)
    at("metadata", "io_error", tries=1)
    at("loudness", "hang")
    at("key", "hang")
    at("metadata", "hang", both=True)
    at("mfcc", "segfault")
    at("rhythm", "segfault")
    at("danceability", "segfault", both=True)
    at("spectral", "hog")
    at("danceability", "hog")
    at("rhythm", "flaky", tries=1)
    at("musicnn", "flaky", tries=2)
    at("key", "flaky", tries=1)
    return {
        "decode": decode,
        "extract": extract,
        "feature_sets": list(FEATURE_SETS),
        "burst": {"feature_set": "chroma", "seconds": scale.burst_s},
        "hog_mib": 3 * WORKER_MEMORY_MIB,
    }


QUICK_SETS = ["metadata", "loudness", "key"]
NO_FAULTS: dict[str, Any] = {"decode": {}, "extract": {}, "burst": None}


def cells_to_have(
    names: Iterable[str], damaged: Mapping[str, str], plan: Mapping[str, Any]
) -> tuple[set[Cell], set[Cell]]:
    """Return the cells that could be had, and those that nothing can give.

    The tags of a damaged file may be there or not: they are in neither.
    """
    never = {(name, s) for name in damaged for s in plan["feature_sets"] if s != "metadata"}
    possible = set()
    for name in names:
        for feature_set in plan["feature_sets"]:
            fault = plan["extract"].get(name, {}).get(feature_set, {})
            (never if fault.get("both") else possible).add((name, feature_set))
    return possible, never


# Faults from outside


@contextmanager
def held_open(database: Path) -> Any:
    """Have the DuckDB file open for writing, so that nobody else can open it."""
    if not database.exists():
        yield
        return
    connection = duckdb.connect(str(database))
    try:
        yield
    finally:
        connection.close()


def lock_now_and_then(state: Path, trace: Path) -> Callable[[threading.Event], None]:
    """Return a function that twice holds the state store's write lock while a run goes on."""

    def lock(ended: threading.Event) -> None:
        for events in _LOCK_AFTER_EVENTS:
            while not (trace.exists() and trace.read_bytes().count(b"\n") >= events):
                if ended.wait(0.2):
                    return
            with suppress(sqlite3.OperationalError):
                connection = sqlite3.connect(state, timeout=5, isolation_level=None)
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    ended.wait(_LOCKED_S)
                finally:
                    connection.close()

    return lock


# The systems


@dataclass
class Outcome:
    """What a system did."""

    usage: Usage
    had: set[Cell]
    trace: list[Event]
    attempts: list[dict[str, Any]]
    ended_at: float


def run_system(
    system: str,
    library: Path,
    plan: Mapping[str, Any],
    directory: Path,
    *,
    limit_s: float | None = None,
    learned_from: Path | None = None,
    outside_faults: bool = True,
) -> Outcome:
    """Run a system on the library in a home of its own."""
    environment = _prepare(system, plan, directory)
    home = directory / "home"
    if learned_from:
        _copy_timings(learned_from, home / "robustness.db")
    if system != "plain" and outside_faults:
        tiny = directory / "tiny"
        make_tiny_library(tiny, 1)  # the database is there before the run
        run_tree(
            [sys.executable, "-m", "audio_assets", "analyze", str(tiny)],
            environment,
            log=directory / "before.log",
        )
    trace = directory / "trace.jsonl"
    with ExitStack() as stack:
        outside = None
        if outside_faults:
            stack.enter_context(held_open(home / "warehouse.duckdb"))
            outside = lock_now_and_then(home / "robustness.db", trace)
        usage = run_tree(
            _command(system, library),
            environment,
            log=directory / "run.log",
            limit_s=limit_s,
            watch_memory=True,
            while_running=outside,
        )
    ended_at = time.time()
    events = _events(trace)
    if system == "plain":
        had = {
            (json.loads(line)["file"], path.stem)
            for path in home.glob("*.jsonl")
            for line in path.open()
        }
        return Outcome(usage, had, events, [], ended_at)
    had, attempts = _results(home / "warehouse.duckdb", plan["feature_sets"], library.name)
    return Outcome(usage, had, events, attempts, ended_at)


def _prepare(system: str, plan: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Make a home and a plan of faults in a new directory; return the environment of a system."""
    home = directory / "home"
    home.mkdir(parents=True)
    shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", home)
    plan_path = directory / "plan.json"
    plan_path.write_text(json.dumps({**plan, "directory": str(directory)}))
    settings = {"plain": {}, "fixed": FIXED_SETTINGS, "product": PRODUCT_SETTINGS}[system]
    return clean_environment(
        DAGSTER_HOME=str(home), AUDIO_ASSETS_BATCH_SIZE="100", **settings, **{PLAN: str(plan_path)}
    )


def _command(system: str, library: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.fault_systems", system, str(library)]


def _events(trace: Path) -> list[Event]:
    return [json.loads(line) for line in trace.open()] if trace.exists() else []


# Incidents: what hits the whole project, rather than a file


def power_cut(
    library: Path, plan: Mapping[str, Any], directory: Path, possible: set[Cell], after_s: float
) -> dict[str, Any]:
    """Kill all processes of a run after a time, start it again, and return the figures."""
    environment = _prepare("product", plan, directory)
    command, trace = _command("product", library), directory / "trace.jsonl"
    run_tree(command, environment, log=directory / "before.log", limit_s=after_s)
    before = len(_cells_done(_events(trace)))
    again = time.time()
    usage = run_tree(command, environment, log=directory / "after.log")
    events = _events(trace)
    first = min(
        (e["at"] for e in events if e["event"] == "done" and e["at"] > again), default=again
    )
    return _incident(directory, library, plan, possible, usage, first - again) | {
        "cells_before": before,
        "computed_twice": sum(e["event"] == "done" for e in events) - len(_cells_done(events)),
    }


def full_disk(
    library: Path, plan: Mapping[str, Any], directory: Path, possible: set[Cell]
) -> dict[str, Any]:
    """Fill the disk of the landing in the middle of a run, free it later; return the figures."""
    environment = _prepare("product", plan, directory)
    disk, trace = directory / "disk", directory / "trace.jsonl"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    freed = recovered = 0.0

    def fill_and_free(ended: threading.Event) -> None:
        nonlocal freed, recovered
        while len(_cells_done(_events(trace))) < _FULL_AFTER_CELLS:
            if ended.wait(0.2):
                return
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))
        ended.wait(_FULL_S)
        parts = set(disk.rglob("*.parquet"))
        filler.unlink()
        freed = time.time()
        while not recovered and not ended.wait(0.1):
            if set(disk.rglob("*.parquet")) - parts:
                recovered = time.time()

    try:
        usage = run_tree(
            _command("product", library),
            environment | {"AUDIO_LANDING": str(disk / "landing")},
            log=directory / "run.log",
            while_running=fill_and_free,
        )
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return _incident(directory, library, plan, possible, usage, recovered - freed) | {
        "full_s": _FULL_S
    }


def _incident(
    directory: Path,
    library: Path,
    plan: Mapping[str, Any],
    possible: set[Cell],
    usage: Usage,
    recovery_s: float,
) -> dict[str, Any]:
    database = directory / "home" / "warehouse.duckdb"
    had, _ = _results(database, plan["feature_sets"], library.name)
    return {
        "recovery_s": recovery_s,
        "wall_s": usage.wall_s,
        "cells_had": len(possible & had),
        "cells_possible": len(possible),
    }


def _cells_done(events: Iterable[Event]) -> set[Cell]:
    return {(e["file"], e["feature_set"]) for e in events if e["event"] == "done"}


def _copy_timings(source: Path, target: Path) -> None:
    """Give a home what another one has learned of times, and nothing else of its state."""
    with sqlite3.connect(source) as connection, sqlite3.connect(target) as copy:
        connection.backup(copy)
        tables = copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in tables:
            if name not in ("timings", "alembic_version") and not name.startswith("sqlite_"):
                copy.execute(f"DELETE FROM {name}")


def _results(
    database: Path, feature_sets: Iterable[str], root: str
) -> tuple[set[Cell], list[dict[str, Any]]]:
    of_root = f"starts_with(file_key, '{root}/')"
    with duckdb.connect(str(database), read_only=True) as connection:
        had = {
            (key.rsplit("/", 1)[-1], name)
            for name in feature_sets
            for (key,) in connection.execute(
                f"SELECT file_key FROM features.{name} WHERE {of_root}"
            ).fetchall()
        }
        cursor = connection.execute(
            "SELECT file_key, feature_set, attempt, outcome, error_type, message, timeout_s, "
            f"recovery_strategy FROM robustness.attempts WHERE {of_root} AND attempt > 0"
        )
        columns = [column[0] for column in cursor.description or ()]
        attempts = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    for attempt in attempts:
        attempt["file"] = attempt.pop("file_key").rsplit("/", 1)[-1]
    return had, attempts


# Figures


def recovery_times(trace: Sequence[Event], end: float) -> list[float]:
    """Return the time (s) from each fault until its worker, or one started since, had a good cell.

    Where none did, the time to the run's end.
    """
    started: dict[int, float] = {}
    for event in trace:
        started.setdefault(event["pid"], event["at"])
    times = []
    for fault in trace:
        if fault["event"] == "fault":
            good = (
                event["at"]
                for event in trace
                if event["event"] == "done"
                and event["at"] > fault["at"]
                and (event["pid"] == fault["pid"] or started[event["pid"]] > fault["at"])
            )
            times.append(min(good, default=max(end, fault["at"])) - fault["at"])
    return times


def figures(
    outcome: Outcome, possible: set[Cell], never: set[Cell], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a system's figures."""
    tried = Counter(
        (event["file"], event["feature_set"])
        for event in outcome.trace
        if event["event"] == "attempt"
    )
    lost = possible - outcome.had
    times = recovery_times(outcome.trace, outcome.ended_at)
    killing = {
        (name, feature_set)
        for name, faults in plan["extract"].items()
        for feature_set, fault in faults.items()
        if fault["kind"] in ("hang", "hog")
    }
    killed = [
        attempt
        for attempt in outcome.attempts
        if attempt["outcome"] == "failed"
        and (attempt["error_type"] or "").upper() in ("TIMEOUT", "MEMORY")
        and (attempt["file"], attempt["feature_set"]) not in killing
    ]
    workers = {event["pid"] for event in outcome.trace}
    peak = max((mib for pid, mib in outcome.usage.peak_mib.items() if pid in workers), default=0)
    return {
        "cells_possible": len(possible),
        "cells_had": len(possible & outcome.had),
        "success_rate": len(possible & outcome.had) / len(possible),
        "cells_given_up": len({cell for cell in lost if tried[cell]}),
        "cells_not_reached": len({cell for cell in lost if not tried[cell]}),
        "lost": _by_kind(lost, plan),
        "wrong_retries": sum(max(tried[cell] - 1, 0) for cell in never),
        "attempts": sum(tried.values()),
        "honest_cells_killed": len(killed),
        "killed": killed[:10],
        "wall_s": outcome.usage.wall_s,
        "cpu_s": outcome.usage.cpu_s,
        "returncode": outcome.usage.returncode,
        "faults": len(times),
        "recovery_p50_s": statistics.median(times) if times else None,
        "recovery_p95_s": _quantile(times, 0.95),
        "recovery_max_s": max(times, default=None),
        "recovery_s": sorted(times),
        "done_at_s": _had_at(outcome.trace),
        "worker_peak_mib": peak,
        "faults_by_kind": dict(
            Counter(event["kind"] for event in outcome.trace if event["event"] == "fault")
        ),
        "recovery_by_kind_s": _recovery_by_kind(outcome.trace, times),
    }


def _recovery_by_kind(trace: Sequence[Event], times: Sequence[float]) -> dict[str, float]:
    faults = [event["kind"] for event in trace if event["event"] == "fault"]
    by_kind = defaultdict(list)
    for kind, seconds in zip(faults, times, strict=True):
        by_kind[kind].append(seconds)
    return {kind: statistics.median(values) for kind, values in by_kind.items()}


def _had_at(trace: Sequence[Event]) -> list[float]:
    """Return when each cell was had first, in seconds since the first attempt."""
    began = min((event["at"] for event in trace), default=0.0)
    first: dict[Cell, float] = {}
    for event in trace:
        if event["event"] == "done":
            cell = (event["file"], event["feature_set"])
            first.setdefault(cell, round(event["at"] - began, 2))
    return sorted(first.values())


def _quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _by_kind(lost: Iterable[Cell], plan: Mapping[str, Any]) -> dict[str, int]:
    """Count lost cells by the fault that struck them, or their feature set, or their file."""

    def kind(cell: Cell) -> str:
        name, feature_set = cell
        fault = plan["extract"].get(name, {}).get(feature_set)
        burst = plan.get("burst")
        if fault:
            return str(fault["kind"])
        if burst and burst["feature_set"] == feature_set:
            return "burst"
        if name in plan["decode"]:
            return f"decode: {plan['decode'][name]['kind']}"
        return "no fault of its own"

    return dict(Counter(map(kind, lost)))


def run(*, quick: bool, seed: int, scratch: Path, systems: Sequence[str]) -> dict[str, Any]:
    """Run the systems and return the results."""
    scale = QUICK if quick else FULL
    source = find_source(scratch)
    library = scratch / "music"
    names, damaged = make_faulty_library(source, library, scale, seed, quick=quick)
    plan = make_plan(names, scale, seed, quick=quick)
    calm = {**plan, **NO_FAULTS}
    results: dict[str, Any] = {
        "machine": machine(),
        "seed": seed,
        "quick": quick,
        "source": source.about(),
        "library": {
            "files": len(names) + len(damaged),
            "damaged": damaged,
            "seconds_per_file": scale.seconds,
        },
        "faults": {"decode": plan["decode"], "extract": plan["extract"]}
        | {"burst": plan.get("burst"), "state_store_locked_s": [_LOCKED_S, _LOCKED_S]}
        | {"slow_s": scale.slow_s, "plain_limit_s": scale.plain_limit_s},
        "worker_memory_mib": WORKER_MEMORY_MIB,
        "systems": {},
    }

    def note(name: str, outcome: Outcome, used: Mapping[str, Any]) -> None:
        possible, never = cells_to_have(names, damaged, used)
        found = figures(outcome, possible, never, used)
        results["systems"][name] = found
        print(
            f"{name:22} {found['cells_had']}/{found['cells_possible']} cells, "
            f"{found['wall_s']:.0f} s, recovery p95 {found['recovery_p95_s'] or 0:.1f} s",
            flush=True,
        )

    without = run_system("product", library, calm, scratch / "calm", outside_faults=False)
    note("product_without_faults", without, calm)
    learned = scratch / "calm" / "home" / "robustness.db"
    if not quick:
        possible, _ = cells_to_have(names, damaged, calm)
        cut_s = without.usage.wall_s / 2
        incidents = {"power_cut": power_cut(library, calm, scratch / "cut", possible, cut_s)}
        if os.geteuid() == 0:  # only root may mount a small disk
            incidents["full_disk"] = full_disk(library, calm, scratch / "full", possible)
        print(incidents, flush=True)
        results["incidents"] = incidents
    for system in systems:
        outcome = run_system(
            system,
            library,
            plan,
            scratch / system,
            limit_s=scale.plain_limit_s if system == "plain" else None,
            learned_from=learned if system == "product" else None,
            outside_faults=not quick,
        )
        note(system, outcome, plan)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny library, few faults, no incidents"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--results", type=Path, help="directory for faults.json")
    parser.add_argument("--keep", type=Path, help="keep libraries, homes and logs here")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        if arguments.keep:
            arguments.keep.mkdir(parents=True)
            scratch = arguments.keep
        else:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = run(
            quick=arguments.quick, seed=arguments.seed, scratch=scratch, systems=arguments.systems
        )
    print(write_results("faults", results, arguments.results))


if __name__ == "__main__":
    main()
