"""The state of a file, as evidence for or against what an error says about it."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

SAMPLE_BYTES = 4096
"""Bytes that `inspect_file` reads at each of three places of a file."""


class FileState(Enum):
    """The result of inspecting a file; the last three are up to a `ContentCheck`."""

    PLAUSIBLE = auto()
    MISSING = auto()
    STORAGE_UNREACHABLE = auto()
    UNREADABLE = auto()
    NOT_A_FILE = auto()
    EMPTY = auto()
    ZERO_FILLED = auto()
    WRONG_CONTENT = auto()
    MISLABELLED = auto()
    HEADER_DAMAGED = auto()


@dataclass(frozen=True, slots=True)
class FileEvidence:
    """The state of a file.

    Parameters
    ----------
    state : FileState
        The state.
    finding : str
        The same in words, for instance ``the file is empty``.
    """

    state: FileState
    finding: str


PLAUSIBLE = FileEvidence(FileState.PLAUSIBLE, "")

ContentCheck = Callable[[bytes, Path], FileEvidence]
"""Compares a file's first bytes, at most `SAMPLE_BYTES`, with what its path says."""

_UNREACHABLE_ERRNOS = frozenset(
    {
        errno.EIO,
        errno.ENODEV,
        errno.ENXIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ETIMEDOUT,
    }
)


def inspect_file(
    path: Path, root: Path | None = None, check_content: ContentCheck | None = None
) -> FileEvidence:
    """Inspect a file: does it exist, can it be read, and is it what its name says.

    Reads at most three times `SAMPLE_BYTES`.

    Parameters
    ----------
    path : Path
        The file.
    root : Path, optional
        The library directory the file is in: if that is missing or empty, its storage is
        unreachable and the file may not be missing. By default the file's own directory.
    check_content : callable, optional
        Judges the content of a file that can be read, is not empty and not all zeros.

    Returns
    -------
    FileEvidence
        `FileState.PLAUSIBLE` if nothing is wrong with the file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return FileEvidence(FileState.NOT_A_FILE, "it is not a regular file")
        if status.st_size == 0:
            return FileEvidence(FileState.EMPTY, "the file is empty")
        samples = list(_samples(path, status.st_size))
    except (FileNotFoundError, NotADirectoryError):
        if _is_unreachable(root or path.parent):
            return FileEvidence(FileState.STORAGE_UNREACHABLE, "its storage is unreachable")
        return FileEvidence(FileState.MISSING, "the file is no longer there")
    except PermissionError:
        return FileEvidence(FileState.UNREADABLE, "the file may not be read")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _UNREACHABLE_ERRNOS:
            return FileEvidence(
                FileState.STORAGE_UNREACHABLE, f"its storage does not answer: {error}"
            )
        return FileEvidence(FileState.NOT_A_FILE, f"its path cannot be used: {error}")
    if not any(any(sample) for sample in samples):
        return FileEvidence(FileState.ZERO_FILLED, "the file holds nothing but zeros")
    return check_content(samples[0], path) if check_content else PLAUSIBLE


def _is_unreachable(directory: Path) -> bool:
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _samples(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(start)
            yield file.read(SAMPLE_BYTES)
