"""A single file: how it is opened, and how its content is identified."""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from blake3 import blake3

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Identity:
    """A file's content.

    Parameters
    ----------
    content_hash : str
        BLAKE3 of the file's bytes, hexadecimal.
    size : int
        Size (bytes).
    mtime_ns : int
        Time of the last modification (ns since the epoch).
    duration_s : float or None
        Duration in the container's header (s); None if it states none.
    """

    content_hash: str
    size: int
    mtime_ns: int
    duration_s: float | None


@dataclass(frozen=True, slots=True)
class FileStamp:
    """File metadata that shows whether a file has changed, without reading it.

    Parameters
    ----------
    device, inode : int
        Identify the file on this machine, whatever its name.
    size : int
        Size (bytes).
    mtime_ns, ctime_ns : int
        Times of the last change of its content and of its metadata (ns since the epoch).
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the stamp in a result of `os.stat` or `os.fstat`."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


class FileChangedError(Exception):
    """A file has changed, or been replaced, since it was identified."""

    error_type = "FILE_SYSTEM"

    def __init__(self, message: str = "is being changed or replaced while it is analysed") -> None:
        super().__init__(message)


def open_regular(path: str | Path, stamp: FileStamp | None = None) -> BinaryIO:
    """Open a regular file for reading, without a name.

    A library given this file sees the number of a descriptor in place of a name: it recognizes
    the format by content alone, and the name need not be text. Unlike `open`, this never waits
    for the other end of a pipe.

    Parameters
    ----------
    path : str or Path
        The file.
    stamp : FileStamp, optional
        The stamp it must still have.

    Raises
    ------
    OSError
        If it cannot be opened or is not a regular file.
    FileChangedError
        If it has another stamp.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
            raise OSError(kind, "not a regular file", str(path))
        if stamp is not None and FileStamp.of(status) != stamp:
            raise FileChangedError
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def content_hash(
    file: BinaryIO, block_mib: int = 1, before_block: Callable[[], None] | None = None
) -> str:
    """Return the BLAKE3 hash of an open file's bytes.

    Parameters
    ----------
    file : file object
        The file, at its start.
    block_mib : int
        Size of a block (MiB).
    before_block : callable, optional
        Called before each block is read.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    hasher, number = blake3(), 0
    while True:
        if before_block and number % block_mib == 0:
            before_block()
        block = file.read(_BLOCK_BYTES)
        if not block:
            return hasher.hexdigest()
        hasher.update(block)
        number += 1


def fsync_folder(folder: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file, which takes the place of `path` once it is complete.

    Raises
    ------
    OSError
        If it cannot be written, or `path` is there and not a file.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    partial = path.with_name(f".{os.getpid()}.{threading.get_native_id()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
