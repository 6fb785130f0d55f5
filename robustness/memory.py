"""How much memory there is, how much is left, and how much a process holds.

In a container the machine's memory is not what the process may use: the limits of the control
group it runs in (cgroup version 1 or 2), and of the groups around that one, count as well.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1024 * 1024

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _GroupFiles:
    """Names of the files in which a version of cgroup says what a group uses."""

    limit: str
    usage: str
    reclaimable: bytes


_V1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file")
_V2 = _GroupFiles("memory.max", "memory.current", b"inactive_file")


def memory_limit_mib() -> float:
    """Memory this process and its children may use together, at most.

    Returns
    -------
    float
        The smaller of the machine's memory and the limits of the control groups around this
        process, in MiB.
    """
    limits = [limit for limit, _ in _group_budgets()]
    return min([psutil.virtual_memory().total, *limits]) / MIB


def available_memory_mib() -> float:
    """Memory that can be taken now without swapping and without reaching a limit.

    File pages the kernel can drop at once count as available, on the machine (psutil's
    ``available``) and in a control group (its limit less its working set).

    Returns
    -------
    float
        MiB, 0 or more.
    """
    left = [max(0, limit - used) for limit, used in _group_budgets()]
    return min([psutil.virtual_memory().available, *left]) / MIB


def worker_budget_mib(workers: int) -> float:
    """Memory budget (MiB) of each of several workers that run at once.

    It is ``WORKER_MEMORY_MIB`` if that is set. Otherwise together they get 80 % of
    `memory_limit_mib`; the rest is for the parent process, the page cache and everything else.
    """
    from robustness.settings import get_settings  # takes long, and no worker needs it

    return get_settings().worker_memory_mib or memory_limit_mib() * 0.8 / workers


def process_memory_mib(pid: int) -> float | None:
    """Memory a process holds that cannot simply be dropped and read again.

    This is its anonymous and shared memory (``RssAnon`` + ``RssShmem``): memory-mapped files do not
    count, since the kernel takes their pages back whenever it needs them. Pages that a forked
    process still shares with its parent count in full.

    Parameters
    ----------
    pid : int
        Process id.

    Returns
    -------
    float or None
        MiB; None if there is no such process (any more).
    """
    try:
        status = (_PROC / str(pid) / "status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A process that has died and waits to be reaped has no memory lines.
    lines = (line.split() for line in status.splitlines())
    return sum(int(line[1]) for line in lines if line[0] in (b"RssAnon:", b"RssShmem:")) / 1024


def offer_to_oom_killer() -> None:
    """Ask the kernel to take this process first when memory runs out."""
    with contextlib.suppress(OSError):  # /proc may be mounted read-only
        (_PROC / str(os.getpid()) / "oom_score_adj").write_text("1000")


def _group_budgets() -> Iterator[tuple[int, int]]:
    """Limit and working set in bytes of each control group around this process that has a limit."""
    for directory, files in _memory_groups():
        try:
            limit = (directory / files.limit).read_text().strip()
            if limit == "max":
                continue
            usage = int((directory / files.usage).read_text())
            yield int(limit), usage - _reclaimable(directory / "memory.stat", files.reclaimable)
        except FileNotFoundError:
            # The root group has no such files, and in a container's own cgroup namespace the
            # path may start outside what is mounted.
            continue


def _memory_groups() -> Iterator[tuple[Path, _GroupFiles]]:
    """Directories of the memory control groups around this process, innermost first."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, files = _CGROUP, _V2
        elif "memory" in controllers.split(","):
            mount, files = _CGROUP / "memory", _V1
        else:
            continue
        group = mount / path.lstrip("/")
        yield group, files
        while group != mount:
            group = group.parent
            yield group, files


def _reclaimable(stat: Path, key: bytes) -> int:
    """Bytes of file pages not used lately in a group's ``memory.stat``."""
    for line in stat.read_bytes().splitlines():
        name, value = line.split()
        if name == key:
            return int(value)
    return 0
