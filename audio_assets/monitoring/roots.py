"""The library's roots: whether each is mounted."""

import os
from collections.abc import Iterator
from pathlib import Path

from audio_assets.monitoring.findings import Finding, Severity


def check_root(name: str, root: Path, now: float) -> Iterator[Finding]:
    """Check that a root can be read and has something in it."""
    problem = None
    try:
        with os.scandir(root) as entries:
            if next(entries, None) is None:
                problem = "it is empty"
    except OSError as error:
        problem = error.strerror
    if problem:
        yield Finding(
            "roots",
            Severity.DEGRADED,
            f"The root {name} is not reachable: its files wait",
            f"{root}: {problem}",
            "mount it, or correct AUDIO_LIBRARY",
            subject=name,
        )
