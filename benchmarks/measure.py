"""Running a contestant as a process tree of its own, and what that took."""

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from robustness.memory import process_memory_mib

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1


@dataclass
class Usage:
    """What a process tree took.

    Parameters
    ----------
    wall_s : float
        From its start to the end of its last process.
    cpu_s : float
        User and system time of every process of it, those that died on the way too.
    returncode : int
        That of its first process; -SIGKILL if it was over its wall time.
    peak_mib : dict of int to float
        Most memory seen in each process (MiB, as `process_memory_mib`), by process id; measured
        only on request.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    returncode: int = 0
    peak_mib: dict[int, float] = field(default_factory=dict)


def run_tree(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    log: Path,
    limit_s: float | None = None,
    watch_memory: bool = False,
    while_running: Callable[[threading.Event], None] | None = None,
) -> Usage:
    """Run a command to the end of all the processes it starts.

    Orphans come to this process (``PR_SET_CHILD_SUBREAPER``), which waits for them too: so the
    CPU time of pools, fork servers and killed workers counts, each once. The caller must have no
    other child.

    Parameters
    ----------
    arguments : sequence of str
        The command.
    environment : mapping of str to str
        Its environment.
    log : Path
        Where its output goes.
    limit_s : float, optional
        Kill the tree after this time (s).
    watch_memory : bool
        Measure each process's memory ten times a second.
    while_running : callable, optional
        Called in a thread beside the command, with an event that is set when the command ends.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    usage = Usage()
    ended = threading.Event()
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            list(arguments), env=dict(environment), cwd=PROJECT, stdout=output, stderr=output
        )
    threads = [threading.Thread(target=_watch, args=(usage, started, limit_s, watch_memory, ended))]
    if while_running:
        threads.append(threading.Thread(target=while_running, args=(ended,)))
    for thread in threads:
        thread.start()
    try:
        while True:
            try:
                pid, status, resources = os.wait4(-1, 0)
            except ChildProcessError:
                break
            usage.cpu_s += resources.ru_utime + resources.ru_stime
            if pid == process.pid:
                usage.returncode = os.waitstatus_to_exitcode(status)
                process.returncode = usage.returncode
    except BaseException:
        _kill_descendants()
        raise
    finally:
        usage.wall_s = time.perf_counter() - started
        ended.set()
        for thread in threads:
            thread.join()
    return usage


def _watch(
    usage: Usage,
    started: float,
    limit_s: float | None,
    watch_memory: bool,
    ended: threading.Event,
) -> None:
    while not ended.wait(_POLL_S):
        if watch_memory:
            for child in _descendants():
                memory = process_memory_mib(child.pid) or 0.0
                usage.peak_mib[child.pid] = max(usage.peak_mib.get(child.pid, 0.0), memory)
        if limit_s is not None and time.perf_counter() - started > limit_s:
            _kill_descendants()


def _descendants() -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process().children(recursive=True)
    return []


def _kill_descendants() -> None:
    for child in _descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)


def clean_environment(**extra: str) -> dict[str, str]:
    """Return the environment without what would change the project's behaviour."""
    ours = ("AUDIO_", "ROBUSTNESS_", "DAGSTER_", "TIMEOUT_", "CIRCUIT_BREAKER_", "MEMORY_AWARE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # As the project's own resource has it: a worker is one core's work.
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return kept | one_thread | {"PYTHONPATH": str(PROJECT)} | extra


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    packages = ("dagster", "duckdb", "essentia", "librosa", "onnxruntime")
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write_results(name: str, results: Mapping[str, Any], directory: Path | None) -> Path:
    """Write a command's results as JSON and return where."""
    path = (directory or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return path
