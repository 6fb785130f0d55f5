"""Scratch: decoded audio of the files in processing."""

import contextlib
import fcntl
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self


class Scratch:
    """A directory of decoded audio, for one run.

    A lock marks the directory as in use, so that one left by a killed run is removed by the next.

    Parameters
    ----------
    root : Path
        Parent directory, shared by all runs.
    run_id : str
        The run.
    limit_mib : float
        Decoded audio kept for deferred files (MiB).

    Attributes
    ----------
    directory : Path
        The run's own directory.
    """

    def __init__(self, root: Path, run_id: str, limit_mib: float) -> None:
        self._root = root
        self.directory = root / run_id
        self._limit = limit_mib * 2**20

    def __enter__(self) -> Self:
        self._root.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        self.directory.mkdir(exist_ok=True)
        self._lock = (self.directory / ".lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def path_of(self, name: str) -> Path:
        """Return where decoded audio of this name is, or goes."""
        return self.directory / f"{name}.npy"

    def drop(self, name: str) -> None:
        """Remove decoded audio of this name, complete or partial."""
        for path in self.directory.glob(f"{name}*"):
            path.unlink(missing_ok=True)

    @property
    def is_full(self) -> bool:
        """Whether there is more decoded audio than is kept for deferred files."""
        used = 0
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a worker renames what it has finished
                used += path.stat().st_size
        return used > self._limit

    def _remove_abandoned(self) -> None:
        for lock in self._root.glob("*/.lock"):
            with contextlib.suppress(OSError), lock.open("r+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
