"""Tasks for workers: their module is imported in each worker, so it imports little."""

import ctypes
import errno
import gc
import mmap
import os
import signal
import sqlite3
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from robustness.worker_pool import report_stage

MIB = 1024 * 1024
kept: list[bytes] = []


def pid() -> int:
    return os.getpid()


def double(value: int) -> int:
    return 2 * value


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def compute(seconds: float) -> int:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    return os.getpid()


def compute_on_one_core(seconds: float) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    compute(seconds)
    os.sched_setaffinity(0, cores)


def hang() -> None:
    while True:
        time.sleep(3600)


def hang_in_c() -> None:
    """Sleep in C without giving up the interpreter lock: no thread, no handler can run."""
    ctypes.PyDLL(None).sleep(3600)


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def segfault() -> None:
    ctypes.string_at(0)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once(status: int) -> None:
    os._exit(status)


def leave() -> None:
    raise SystemExit(3)


def eat_memory(chunk_mib: int) -> None:
    eaten = []
    while True:
        eaten.append(b"x" * (chunk_mib * MIB))
        time.sleep(0.005)


def leak(mib: int) -> int:
    kept.append(b"x" * (mib * MIB))
    return os.getpid()


def map_file(path: Path, mib: int) -> int:
    """Read a memory-mapped file through: resident, but the kernel may drop it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        total = sum(mapped[offset] for offset in range(0, mib * MIB, 4096))
        time.sleep(0.3)
    return total


def data(size: int) -> bytes:
    return b"x" * size


def length(value: bytes) -> int:
    return len(value)


def threads() -> int:
    return threading.active_count()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class OddError(Exception):
    """Cannot be unpickled: its constructor takes other arguments than its base class got."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path}, line {line}")


class DiskFullError(OSError):
    """Holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/track.pcm")
        self.lock = threading.Lock()


class MaintenanceError(OddError):
    """Declares its type and when to come back, as attributes of the class."""

    error_type = "NETWORK"
    retry_after = 7.5
    systemic = False


class DamagedError(OddError):
    """Declares its type on the instance; its text cannot be made."""

    def __init__(self) -> None:
        super().__init__("a file", 3)
        self.error_type = "CORRUPT_FILE"

    def __str__(self) -> str:
        raise LookupError("no text")


def local_error(base: type[Exception]) -> Exception:
    class LocalError(base):  # type: ignore[valid-type, misc]
        """Known to nobody outside this function."""

    return LocalError("struck")


UNSENDABLE: dict[str, Callable[[], Exception]] = {
    "odd": lambda: OddError("a file", 3),
    "disk full": DiskFullError,
    "declared by the class": lambda: MaintenanceError("a file", 3),
    "declared by the instance": DamagedError,
    "local, network": lambda: local_error(ConnectionError),
    "local, memory": lambda: local_error(MemoryError),
    "local, timeout": lambda: local_error(TimeoutError),
    "local, SQLite": lambda: local_error(sqlite3.Error),
    "local, unknown": lambda: local_error(Exception),
}
"""Exceptions that do not survive the way to another process."""


def fail(kind: str) -> None:
    if kind == "chained":
        try:
            raise FileNotFoundError(2, "No such file or directory", "/nowhere")
        except FileNotFoundError as error:
            raise ValueError("cannot use it") from error
    raise UNSENDABLE[kind]()


def unpicklable() -> object:
    return threading.Lock()


def staged(*stages: tuple[str, float]) -> str:
    for name, seconds in stages:
        report_stage(name)
        time.sleep(seconds)
    return "done"


def report_for_ever() -> None:
    while True:
        report_stage("again")


def stop_amid_message() -> None:
    """Announce a message of 1000 bytes, send a few of them, and stop."""
    connection = next(
        item
        for item in gc.get_objects()
        if isinstance(item, Connection) and not item.closed and item.readable and item.writable
    )
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"half a message")
    stop_itself()
