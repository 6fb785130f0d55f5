"""File locks that a process holds until it ends, however it ends."""

import fcntl
import os
from pathlib import Path

from audio_assets.library.files import fsync_folder


class LockedFile:
    """A new file with an exclusive ``flock``, which worker processes do not inherit.

    Parameters
    ----------
    path : Path
        The file, which does not exist yet.

    Raises
    ------
    OSError
        If it cannot be created, or its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        self._descriptor = os.open(partial, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.rename(path)
            fsync_folder(path.parent)  # without the file the run would seem alive after a power cut
        except OSError:
            os.close(self._descriptor)
            partial.unlink(missing_ok=True)
            raise

    def release(self) -> None:
        """Remove the file and end the lock."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process holds a file's lock.

    Raises
    ------
    OSError
        If the file does not exist or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
