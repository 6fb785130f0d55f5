"""Tasks for workers: their module is imported in each worker, so it imports little."""

import ctypes
import gc
import mmap
import os
import signal
import struct
import threading
import time
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


def fail(kind: str) -> None:
    if kind == "chained":
        try:
            raise FileNotFoundError(2, "No such file or directory", "/nowhere")
        except FileNotFoundError as error:
            raise ValueError("cannot use it") from error
    if kind == "odd":
        raise OddError("a file", 3)
    raise AssertionError(kind)


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


def write_line(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def fail_to_start() -> None:
    raise RuntimeError("no licence")
