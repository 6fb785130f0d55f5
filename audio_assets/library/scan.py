"""Scanning the library's roots for audio files."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from audio_assets.library.file_keys import MAX_KEY_BYTES, FileKeyError, decode_key, encode_key
from audio_assets.library.files import open_regular
from audio_assets.library.formats import AUDIO_EXTENSIONS, HEAD_BYTES, VIDEO_EXTENSIONS, format_of

SYSTEM_DIRECTORIES = frozenset(
    ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
"""Directories that systems add: thumbnails, recycle bins, indices."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the library.

    Parameters
    ----------
    file_key : str
        Its partition key.
    path : Path
        Absolute path.
    size : int
        Size (bytes).
    mtime_ns : int
        Time of the last modification (ns since the epoch).
    """

    file_key: str
    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something below a root that a user may expect in the library, but that is left out.

    Parameters
    ----------
    path : Path
        Absolute path of the file or directory.
    file_key : str
        The key it would have.
    reason : str
        Why it is left out: a printable text for the user.
    """

    path: Path
    file_key: str
    reason: str


@dataclass(slots=True)
class LibraryScan:
    """The result of a scan.

    Parameters
    ----------
    files : list of FileEntry
        The files of the library, sorted by key.
    left_out : list of LeftOut
        What is left out with a reason, sorted by path.
    unread : list of Path
        Directories and files that exist but cannot be read now.
    unreachable : dict of str to str
        Why a root is unreachable, by the root's name.
    """

    files: list[FileEntry] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    unreachable: dict[str, str] = field(default_factory=dict)


class Library:
    """A music library: one or more directories.

    A file belongs to it if its extension is one of `audio_extensions`, whatever its content, so
    that the owner of a damaged or mislabelled file sees it fail; or if its first bytes are those
    of an audio format and its extension is not one of `VIDEO_EXTENSIONS`.

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

        Hidden files and directories are left out; names that begin with two dots or more are not
        hidden (``...And Justice for All``). A symbolic link to a file within its root is a file of
        its own; links to directories are not followed. Files may come and go during the scan.

        Parameters
        ----------
        only_reachable : bool
            Scan the other roots where one is unreachable, and report that in the result.

        Returns
        -------
        LibraryScan
            The files found and what was left out.

        Raises
        ------
        OSError
            If a root is unreachable: missing, not a directory or not readable.
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
        """Return the root of a file.

        Raises
        ------
        FileKeyError
            If it is not a file key, or of a root that is not in this library.
        """
        name, _ = decode_key(file_key)
        if name not in self.roots:
            raise FileKeyError(
                f"{file_key!r} is in library root {name!r}, which this library has not: "
                f"its roots are {', '.join(map(repr, self.roots))}"
            )
        return self.roots[name]

    def path_of(self, file_key: str) -> Path:
        """Return the absolute path of a file, without access to the storage.

        Raises
        ------
        FileKeyError
            As `root_of`.
        """
        return self.root_of(file_key) / os.fsdecode(decode_key(file_key)[1])

    def checked_path_of(self, file_key: str) -> Path:
        """Return the absolute path of a file that is really below its root.

        Raises
        ------
        FileKeyError
            As `root_of`, or if the path leads out of the root by a symbolic link.
        """
        path = self.path_of(file_key)
        if not Path(os.path.realpath(path)).is_relative_to(self.root_of(file_key)):
            raise FileKeyError(f"{file_key!r} leads out of its library root by a symbolic link")
        return path


class _RootScan:
    """The scan of one root; its results are added to `found`."""

    def __init__(self, name: str, root: str, found: LibraryScan) -> None:
        self.name = name
        self.root = root
        self.below_root = root.rstrip("/") + "/"
        self.found = found
        self.audio_extensions = audio_extensions()

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
                    continue  # removed during the scan
                self.found.unread.append(Path(directory))
                self.leave_out(directory, f"the directory cannot be read: {error.strerror}")

    def visit(self, entry: os.DirEntry[str]) -> bool:
        """Add or leave out a file; return whether the entry is a directory to scan."""
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
            pass  # removed during the scan
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
        if _extension(entry.name) in self.audio_extensions:
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
        has_audio_extension = extension in self.audio_extensions
        if _is_hidden(entry.name):
            if has_audio_extension and not entry.name.startswith("._"):
                self.leave_out(entry.path, "a hidden file")
        elif has_audio_extension or (
            extension not in VIDEO_EXTENSIONS and _holds_audio(entry.path)
        ):
            self.add_file(entry)

    def add_file(self, entry: os.DirEntry[str]) -> None:
        file_key = self.key_of(entry.path)
        if len(file_key.encode()) > MAX_KEY_BYTES:
            self.leave_out(
                entry.path, f"its partition key would be longer than {MAX_KEY_BYTES} bytes"
            )
            return
        status = entry.stat()
        self.found.files.append(
            FileEntry(file_key, Path(entry.path), status.st_size, status.st_mtime_ns)
        )

    def leave_out(self, path: str, reason: str) -> None:
        self.found.left_out.append(LeftOut(Path(path), self.key_of(path), reason))

    def key_of(self, path: str) -> str:
        return encode_key(self.name, os.fsencode(path.removeprefix(self.below_root)))


def audio_extensions() -> frozenset[str]:
    """Return the extensions (lower case) of files that belong to a library, whatever they hold."""
    from audio_assets.settings import get_settings  # takes long, and no worker needs it

    videos = get_settings().audio_video.lower().split()
    return AUDIO_EXTENSIONS | {f".{extension.lstrip('.')}" for extension in videos}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and not name.startswith("..")


def _extension(name: str) -> str:
    _, dot, extension = name.rpartition(".")
    return f"{dot}{extension}".lower()


def _holds_audio(path: str) -> bool:
    with open_regular(path) as file:
        return format_of(file.read(HEAD_BYTES)) is not None


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe, not a file"
    if stat.S_ISSOCK(mode):
        return "a socket, not a file"
    return "a device, not a file"
