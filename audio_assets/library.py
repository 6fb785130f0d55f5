"""The audio files below the roots of a library: finding them, their keys, their content."""

import errno
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from blake3 import blake3

from audio_assets.errors import FileChangedError
from audio_assets.file_formats import AUDIO_EXTENSIONS, HEAD_BYTES, VIDEO_EXTENSIONS, holds_audio
from audio_assets.file_keys import MAX_KEY_BYTES, FileKeyError, decode_key, encode_key

_BLOCK_BYTES = 1 << 20

SYSTEM_DIRECTORIES = frozenset(
    ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
"""Directories that systems put among the user's: thumbnails, waste bins, indices."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """An audio file of the library as the scan found it.

    Parameters
    ----------
    file_key : str
        Partition key.
    path : Path
        Absolute path.
    size : int
        Size (bytes).
    mtime_ns : int
        Time of the last modification (ns since the epoch).
    device, inode : int
        What identifies the file on this machine, whatever its name.
    """

    file_key: str
    path: Path
    size: int
    mtime_ns: int
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells that a file is still the one it was, without reading it.

    Parameters
    ----------
    device, inode : int
        What identifies the file on this machine, whatever its name.
    size : int
        Size (bytes).
    mtime_ns, ctime_ns : int
        Times of the last change of its content and of its status (ns since the epoch).
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the stamp in what `os.stat` or `os.fstat` found."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something below a root that a user may take for a file of the library, but is not.

    Parameters
    ----------
    path : Path
        Absolute path of the file or directory.
    file_key : str
        The key it would have: its path in printable characters.
    reason : str
        Why it is left out, for the user to read; printable.
    """

    path: Path
    file_key: str
    reason: str


@dataclass(slots=True)
class LibraryScan:
    """What a scan found.

    Parameters
    ----------
    files : list of FileEntry
        The files of the library, by key.
    left_out : list of LeftOut
        What is left out with a reason, by path.
    not_audio : int
        Number of files that are plainly something else: covers, texts, films, hidden files that
        have no audio extension.
    unread : list of Path
        Directories and files that are there but cannot be read now: what is in them is out of
        reach, not gone.
    unreachable : dict of str to str
        What keeps a root from being read, by the root's name.
    """

    files: list[FileEntry] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    not_audio: int = 0
    unread: list[Path] = field(default_factory=list)
    unreachable: dict[str, str] = field(default_factory=dict)


class Library:
    """A music library: one or more directories.

    A file belongs to it if its extension is one of `AUDIO_EXTENSIONS`, whatever it holds, so that
    a damaged or mislabelled file fails where its owner sees it; or, with any extension but a
    film's or with none, if its first bytes are those of an audio format.

    Parameters
    ----------
    roots : mapping of str to Path
        Directories by the name that begins the keys of their files.

    Raises
    ------
    ValueError
        If there is no root or a root's name is empty.
    """

    def __init__(self, roots: Mapping[str, Path]) -> None:
        if not roots:
            raise ValueError("a library needs at least one root directory")
        self.roots = {name: path.expanduser().resolve() for name, path in roots.items()}
        for name in self.roots:
            encode_key(name, b"file")

    def scan(self, *, only_reachable: bool = False) -> LibraryScan:
        """Find the files of all roots.

        Hidden files and directories are left out; a name that begins with two dots or more is
        none (``...And Justice for All``). A symbolic link to a file within its root is a file of
        its own; a link to a directory within its root is not followed, as that is scanned in its
        own place. Files that come or go during the scan do not disturb it.

        Returns
        -------
        LibraryScan
            The files found and what was left out.

        Raises
        ------
        OSError
            If a root is missing, is not a directory or cannot be read: its files are not gone,
            they are out of reach.
        """
        scan = LibraryScan()
        for name, root in self.roots.items():
            try:
                _RootScan(name, str(root), scan).run()
            except OSError as error:
                if not only_reachable:
                    raise
                scan.unreachable[name] = str(error)
        scan.files.sort(key=lambda entry: entry.file_key)
        scan.left_out.sort(key=lambda left_out: left_out.path)
        return scan

    def root_of(self, file_key: str) -> Path:
        """Return the root that a file is below.

        Raises
        ------
        FileKeyError
            If it is not a key, or names a root this library has not.
        """
        name, _ = decode_key(file_key)
        if name not in self.roots:
            raise FileKeyError(
                f"{file_key!r} is in library root {name!r}, which this library has not: "
                f"its roots are {', '.join(map(repr, self.roots))}"
            )
        return self.roots[name]

    def path_of(self, file_key: str) -> Path:
        """Return the path of a file, whether it exists or not, without a look at the storage.

        Parameters
        ----------
        file_key : str
            Partition key.

        Returns
        -------
        Path
            Absolute path below the root that the key names.

        Raises
        ------
        FileKeyError
            As `root_of`.
        """
        return self.root_of(file_key) / os.fsdecode(decode_key(file_key)[1])

    def checked_path_of(self, file_key: str) -> Path:
        """Return the path of a file that is really below its root.

        Raises
        ------
        FileKeyError
            As `root_of`, or if the path leads out of the root by a symbolic link.
        """
        path = self.path_of(file_key)
        if not Path(os.path.realpath(path)).is_relative_to(self.root_of(file_key)):
            raise FileKeyError(f"{file_key!r} leads out of its library root by a symbolic link")
        return path


def parse_roots(text: str) -> dict[str, Path]:
    """Read the roots of a library from a text.

    Parameters
    ----------
    text : str
        ``path`` or ``name=path``, several of them separated by `os.pathsep`. What comes before
        the first ``=`` is a name unless there is a slash in it. A root without a name has the
        name of its directory.

    Returns
    -------
    dict of str to Path
        Absolute paths by name.

    Raises
    ------
    ValueError
        If there is no root, a root has no name, two have the same, or one lies within another.
    """
    roots: dict[str, Path] = {}
    for item in filter(None, text.split(os.pathsep)):
        name, equals, given = item.partition("=")
        if not equals or "/" in name:
            name, given = "", item
        if not given:
            raise ValueError(f"library root {item!r} has no path")
        path = Path(given).expanduser().resolve()
        name = name or path.name
        if not name:
            raise ValueError(f"library root {given!r} needs a name: write name={given}")
        if name in roots:
            raise ValueError(
                f"two library roots are named {name!r}, {roots[name]} and {path}: give them names "
                f"of their own, for instance one={roots[name]}{os.pathsep}two={path}"
            )
        for other_name, other in roots.items():
            if path.is_relative_to(other) or other.is_relative_to(path):
                raise ValueError(
                    f"library roots {other_name!r} ({other}) and {name!r} ({path}) overlap: what "
                    "they share would be in the library twice; leave one of them out"
                )
        roots[name] = path
    if not roots:
        raise ValueError("no library root is given")
    return roots


def content_hash(
    file: BinaryIO, block_mib: int = 1, before_block: Callable[[], None] | None = None
) -> str:
    """Return the BLAKE3 hash of an open file's bytes.

    Parameters
    ----------
    file : file object
        The file, from where it is to be hashed.
    block_mib : int
        What is read between two calls of `before_block` (MiB).
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


def open_regular(path: str | Path, stamp: FileStamp | None = None) -> BinaryIO:
    """Open a regular file such that only its content can tell the format.

    Libraries see a descriptor's number in place of a name: they would let the extension weigh
    against the content, and file names need not be text. Unlike `open`, this never waits for the
    other end of a pipe.

    Parameters
    ----------
    path : Path
        The file.
    stamp : FileStamp, optional
        What the file must still be.

    Raises
    ------
    OSError
        If it cannot be opened or is not a regular file.
    FileChangedError
        If it is another one than `stamp` says, or has changed.
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


class _RootScan:
    """The scan of one root, which adds to `found`."""

    def __init__(self, name: str, root: str, found: LibraryScan) -> None:
        self.name = name
        self.root = root
        self.below_root = root.rstrip("/") + "/"
        self.found = found

    def run(self) -> None:
        directories = [self.root]
        while directories:
            directory = directories.pop()
            try:
                with os.scandir(directory) as entries:
                    directories.extend(entry.path for entry in entries if self.visit(entry))
            except OSError as error:
                if directory == self.root:
                    raise
                if isinstance(error, FileNotFoundError):
                    continue  # It went away during the scan.
                self.found.unread.append(Path(directory))
                self.leave_out(directory, f"the directory cannot be read: {error.strerror}")

    def visit(self, entry: os.DirEntry[str]) -> bool:
        """Take in a file or leave it out; return whether it is a directory to scan."""
        try:
            if entry.is_symlink():
                self.visit_link(entry)
            elif entry.is_dir():
                return self.is_wanted(entry)
            elif entry.is_file():
                self.visit_file(entry)
            else:
                self.leave_out(entry.path, _kind(entry.stat().st_mode))
        except FileNotFoundError:
            pass  # It went away during the scan.
        except OSError as error:
            self.found.unread.append(Path(entry.path))
            self.leave_out(entry.path, f"it cannot be read: {error.strerror}")
        return False

    def is_wanted(self, entry: os.DirEntry[str]) -> bool:
        if entry.name in SYSTEM_DIRECTORIES:
            return False
        if _is_hidden(entry.name):
            self.leave_out(entry.path, "a hidden directory")
            return False
        if _extension(entry.name) in AUDIO_EXTENSIONS:
            self.leave_out(entry.path, "a directory with a file's name; what is in it is scanned")
        return True

    def visit_link(self, entry: os.DirEntry[str]) -> None:
        try:
            target = os.path.realpath(entry.path, strict=True)
        except FileNotFoundError:
            self.leave_out(entry.path, "a symbolic link to nothing")
            return
        except OSError as error:
            self.leave_out(entry.path, f"a symbolic link that leads nowhere: {error.strerror}")
            return
        if not f"{target}/".startswith(self.below_root):
            self.leave_out(entry.path, f"a symbolic link that leaves the root, to {target!r}")
        elif entry.is_dir():
            self.leave_out(
                entry.path,
                f"a symbolic link to {target!r}, a directory of this root that is scanned there",
            )
        elif entry.is_file():
            self.visit_file(entry)
        else:
            self.leave_out(
                entry.path, f"a symbolic link to {target!r}: {_kind(entry.stat().st_mode)}"
            )

    def visit_file(self, entry: os.DirEntry[str]) -> None:
        extension = _extension(entry.name)
        has_audio_extension = extension in AUDIO_EXTENSIONS
        if _is_hidden(entry.name):
            if has_audio_extension and not entry.name.startswith("._"):
                self.leave_out(entry.path, "a hidden file")
            else:
                self.found.not_audio += 1
            return
        if not has_audio_extension and (extension in VIDEO_EXTENSIONS or not _sniff(entry.path)):
            self.found.not_audio += 1
            return
        file_key = self.key_of(entry.path)
        if len(file_key.encode()) > MAX_KEY_BYTES:
            self.leave_out(
                entry.path, f"its partition key would be longer than {MAX_KEY_BYTES} bytes"
            )
            return
        status = entry.stat()
        self.found.files.append(
            FileEntry(
                file_key=file_key,
                path=Path(entry.path),
                size=status.st_size,
                mtime_ns=status.st_mtime_ns,
                device=status.st_dev,
                inode=status.st_ino,
            )
        )

    def leave_out(self, path: str, reason: str) -> None:
        self.found.left_out.append(LeftOut(Path(path), self.key_of(path), reason))

    def key_of(self, path: str) -> str:
        return encode_key(self.name, os.fsencode(path.removeprefix(self.below_root)))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and not name.startswith("..")


def _extension(name: str) -> str:
    _, dot, extension = name.rpartition(".")
    return f"{dot}{extension}".lower()


def _sniff(path: str) -> bool:
    with open_regular(path) as file:
        return holds_audio(file.read(HEAD_BYTES))


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe, not a file"
    if stat.S_ISSOCK(mode):
        return "a socket, not a file"
    return "a device, not a file"
