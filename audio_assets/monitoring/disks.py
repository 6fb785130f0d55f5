"""The disks in use: whether each can be written, and when it will be full at the present rate.

How much was free before is kept in ``$DAGSTER_HOME/.disks.json``, a sample every `SAMPLE_S`.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from audio_assets.library.files import replacing
from audio_assets.monitoring.findings import Finding, Severity, span
from audio_assets.settings import get_settings
from robustness.settings import get_settings as get_robustness_settings

MIN_FREE_MIB = 512
"""With less free space than this a disk counts as full (MiB)."""

MIN_FREE_INODES = 0.01
"""With a smaller share of its inodes free a disk counts as full."""

FULL_IN_S = 86_400.0
"""A disk that will be full sooner than this is a finding (s)."""

SAMPLE_S = 300.0
WINDOW_S = 6 * 3600.0
"""The rate is that of this time (s)."""

HORIZON = 10
"""Nothing is foretold further ahead than this many times the time that a disk was watched."""

_MIB = 2**20
_PROBE = b"\0" * 65_536


@dataclass(frozen=True)
class Disk:
    """A disk, or a directory with a quota of its own.

    Parameters
    ----------
    path : Path
        A directory of it.
    used_for : tuple of str
        What it is used for.
    free_mib : float
        What is free for this user (MiB).
    free_inodes : float
        Share of its inodes that is free; 1 if it has no such limit.
    full_in_s : float or None
        When it will be full at the rate of the last hours (s); None if it is not filling up, or
        that is further ahead than `HORIZON`.
    """

    path: Path
    used_for: tuple[str, ...]
    free_mib: float
    free_inodes: float
    full_in_s: float | None


def places() -> dict[str, Path]:
    """Return the directories in which this product writes, by what for."""
    settings = get_settings()
    landing, url = urlsplit(settings.landing), get_robustness_settings().state_url or ""
    found = {
        "home": settings.dagster_home,
        "scratch": settings.scratch,
        "warehouse": settings.warehouse.absolute().parent,
        "temporary files": Path(tempfile.gettempdir()),
    }
    if landing.scheme in ("", "file", "local"):
        found["landing"] = Path(landing.path)
    if url.startswith("sqlite:///"):
        found["state"] = Path(url.removeprefix("sqlite:///")).absolute().parent
    return found


def check_place(purpose: str, path: Path, now: float, *, writes: bool = True) -> Iterator[Finding]:
    """Check that a directory can be written, if it exists, and that its disk has space.

    Parameters
    ----------
    purpose : str
        What the directory is used for.
    path : Path
        The directory.
    now : float
        The time (s since the epoch).
    writes : bool
        Write to it, which wakes a sleeping disk: a quota does not show otherwise.
    """
    if not path.is_dir():
        return
    try:
        if writes:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(_PROBE)
    except OSError as error:
        yield Finding(
            "disks",
            Severity.BROKEN,
            f"The directory for {purpose} cannot be written",
            f"{path}: {error.strerror}",
            "free space on this disk, lift the quota, or correct its permissions",
            subject=purpose,
        )
        return
    disk = _measured(path, (purpose,), now, samples())
    seen = f"{path}: {disk.free_mib:.0f} MiB free"
    if disk.free_inodes < MIN_FREE_INODES:
        seen += f", {disk.free_inodes:.1%} of its inodes"
    is_full = disk.free_mib < MIN_FREE_MIB or disk.free_inodes < MIN_FREE_INODES
    if is_full or (disk.full_in_s is not None and disk.full_in_s < FULL_IN_S):
        fills = "" if disk.full_in_s is None else f"; full in {span(disk.full_in_s)} at this rate"
        yield Finding(
            "disks",
            Severity.BROKEN if is_full else Severity.DEGRADED,
            f"The disk for {purpose} is {'full' if is_full else 'filling up'}",
            seen + fills,
            "free space on this disk, or move what it is used for: docs/operating.md, Disk",
            subject=purpose,
        )


def disks(now: float) -> list[Disk]:
    """Return the disks in use, each once."""
    by_device: dict[int, list[tuple[str, Path]]] = {}
    for purpose, path in places().items():
        with suppress(OSError):
            by_device.setdefault(path.stat().st_dev, []).append((purpose, path))
    known = samples()
    found = []
    for used in by_device.values():
        with suppress(OSError):
            found.append(_measured(used[0][1], tuple(purpose for purpose, _ in used), now, known))
    return found


def samples() -> dict[str, list[tuple[float, float]]]:
    """Return what was free before, by device: times (s since the epoch) and MiB."""
    try:
        known = json.loads(_samples_file().read_text("utf-8"))
        return {
            str(device): [(float(when), float(free)) for when, free in rows]
            for device, rows in known.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def take_sample(now: float) -> None:
    """Note what is free now, if the last sample is old enough."""
    known, is_due = samples(), False
    for path in places().values():
        with suppress(OSError):
            device, free_mib = str(path.stat().st_dev), _free_mib(os.statvfs(path))
            kept = [row for row in known.get(device, []) if now - WINDOW_S <= row[0] <= now]
            if not kept or now - kept[-1][0] >= SAMPLE_S:
                known[device], is_due = [*kept, (now, free_mib)], True
    if not is_due:
        return
    with suppress(OSError), replacing(_samples_file()) as partial:  # full: what is known stays
        partial.write_text(json.dumps(known), "utf-8")


def _samples_file() -> Path:
    return get_settings().dagster_home / ".disks.json"


def _measured(
    path: Path,
    used_for: tuple[str, ...],
    now: float,
    known: Mapping[str, list[tuple[float, float]]],
) -> Disk:
    status = os.statvfs(path)
    free_mib = _free_mib(status)
    before = [row for row in known.get(str(path.stat().st_dev), []) if now - row[0] <= WINDOW_S]
    watched_s = now - before[0][0] if before else 0.0
    spent = before[0][1] - free_mib if watched_s >= SAMPLE_S else 0.0
    full_in_s = watched_s * free_mib / spent if spent * HORIZON > free_mib else None
    inodes = status.f_favail / status.f_files if status.f_files else 1.0
    return Disk(path, used_for, free_mib, inodes, full_in_s)


def _free_mib(status: os.statvfs_result) -> float:
    return status.f_bavail * status.f_frsize / _MIB
