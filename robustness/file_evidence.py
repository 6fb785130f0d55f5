"""What a file looks like from outside: evidence for or against what an error says about it."""

import codecs
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

SAMPLE_BYTES = 4096
"""Bytes looked at, at each of three places of a file."""


class FileState(Enum):
    """What a look at a file found."""

    PLAUSIBLE = auto()
    MISSING = auto()
    STORAGE_AWAY = auto()
    UNREADABLE = auto()
    NOT_A_FILE = auto()
    EMPTY = auto()
    ZERO_FILLED = auto()
    NOT_AUDIO = auto()
    MISLABELLED = auto()
    HEADER_DAMAGED = auto()


@dataclass(frozen=True, slots=True)
class FileEvidence:
    """The finding, and a sentence that says it.

    Parameters
    ----------
    state : FileState
        What was found.
    finding : str
        The same in words, for instance ``the file is empty``.
    """

    state: FileState
    finding: str


@dataclass(frozen=True, slots=True)
class _Signature:
    name: str
    magic: bytes
    extensions: frozenset[str]
    second: bytes = b""
    """What follows at byte 8, for containers whose first bytes are shared with other formats."""
    at: int = 0

    def fits(self, head: bytes) -> bool:
        return head.startswith(self.magic, self.at) and head.startswith(self.second, 8)


_AUDIO = tuple(
    _Signature(name, magic, frozenset(extensions.split()), second, at)
    for name, magic, extensions, second, at in (
        ("WAV", b"RIFF", "wav wave bwf amb", b"WAVE", 0),
        ("RF64", b"RF64", "wav wave rf64 bwf", b"WAVE", 0),
        ("Wave64", b"riff\x2e\x91\xcf\x11", "w64", b"", 0),
        ("AIFF", b"FORM", "aif aiff aifc", b"AIF", 0),
        ("FLAC", b"fLaC", "flac fla", b"", 0),
        ("Ogg", b"OggS", "ogg oga opus spx ogv ogx", b"", 0),
        # ID3v2 tags are put before several formats.
        ("ID3-tagged audio", b"ID3", "mp3 mp2 mpga aac flac tta wav aif aiff dsf", b"", 0),
        ("MP4", b"ftyp", "m4a m4b m4p m4r mp4 mov 3gp 3g2 alac aac", b"", 4),
        ("ASF", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wma asf wmv", b"", 0),
        ("Monkey's Audio", b"MAC ", "ape", b"", 0),
        ("WavPack", b"wvPK", "wv", b"", 0),
        ("True Audio", b"TTA", "tta", b"", 0),
        ("Musepack", b"MPCK", "mpc", b"", 0),
        ("Musepack", b"MP+", "mpc mp+ mpp", b"", 0),
        ("Matroska", b"\x1a\x45\xdf\xa3", "mka mkv webm weba", b"", 0),
        ("Core Audio", b"caff", "caf", b"", 0),
        ("AU", b".snd", "au snd", b"", 0),
        ("DSF", b"DSD ", "dsf", b"", 0),
        ("DSDIFF", b"FRM8", "dff", b"", 0),
        ("AMR", b"#!AMR", "amr awb", b"", 0),
        ("MPEG audio", b"\xff\xfb", "mp3 mp2 mp1 mpga mpeg", b"", 0),
        ("MPEG audio", b"\xff\xf3", "mp3 mp2 mp1 mpga mpeg", b"", 0),
        ("MPEG audio", b"\xff\xf2", "mp3 mp2 mp1 mpga mpeg", b"", 0),
        ("MPEG audio", b"\xff\xfa", "mp3 mp2 mp1 mpga mpeg", b"", 0),
        ("MPEG audio", b"\xff\xfd", "mp3 mp2 mp1 mpga mpeg", b"", 0),
        ("ADTS AAC", b"\xff\xf1", "aac adts", b"", 0),
        ("ADTS AAC", b"\xff\xf9", "aac adts", b"", 0),
    )
)
_OTHER = tuple(
    (name, magic)
    for name, magic in (
        ("a PDF document", b"%PDF-"),
        ("a ZIP archive", b"PK\x03\x04"),
        ("a RAR archive", b"Rar!\x1a\x07"),
        ("a 7-Zip archive", b"7z\xbc\xaf\x27\x1c"),
        ("a gzip file", b"\x1f\x8b\x08"),
        ("a PNG image", b"\x89PNG\r\n\x1a\n"),
        ("a JPEG image", b"\xff\xd8\xff"),
        ("a GIF image", b"GIF8"),
        ("a program", b"\x7fELF"),
        ("a SQLite database", b"SQLite format 3\0"),
        # macOS keeps attributes beside each file of a foreign volume in a `._` file.
        ("an AppleDouble file", b"\x00\x05\x16\x07"),
    )
)
_KNOWN_EXTENSIONS = frozenset().union(*(signature.extensions for signature in _AUDIO))
# Formats that begin with their signature, always; MPEG and AAC streams may begin anywhere.
_SIGNED_EXTENSIONS = _KNOWN_EXTENSIONS - {
    *("mp1", "mp2", "mp3", "mpga", "mpeg", "aac", "adts"),
    *("mp4", "mov", "3gp", "3g2"),
}
_AWAY_ERRNOS = frozenset(
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


def inspect_file(path: Path, root: Path | None = None) -> FileEvidence:
    """Look at a file: is it there, can it be read, and is it what its name says.

    Reads at most three times `SAMPLE_BYTES`.

    Parameters
    ----------
    path : Path
        The file.
    root : Path, optional
        The root of the library it belongs to: if that is gone or empty, the storage is away
        rather than the file. Without a root the file's own folder stands for it.

    Returns
    -------
    FileEvidence
        `FileState.PLAUSIBLE` if nothing speaks against the file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return FileEvidence(FileState.NOT_A_FILE, "it is not a regular file")
        if status.st_size == 0:
            return FileEvidence(FileState.EMPTY, "the file is empty")
        samples = list(_samples(path, status.st_size))
    except (FileNotFoundError, NotADirectoryError):
        if _is_away(root or path.parent):
            return FileEvidence(FileState.STORAGE_AWAY, "the storage it is on is away")
        return FileEvidence(FileState.MISSING, "the file is no longer there")
    except PermissionError:
        return FileEvidence(FileState.UNREADABLE, "the file may not be read")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _AWAY_ERRNOS:
            return FileEvidence(FileState.STORAGE_AWAY, f"its storage does not answer: {error}")
        return FileEvidence(FileState.NOT_A_FILE, f"its path cannot be used: {error}")
    return _look_at_content(samples, path.suffix.lower().removeprefix("."))


def _is_away(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _samples(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(start)
            yield file.read(SAMPLE_BYTES)


def _look_at_content(samples: list[bytes], extension: str) -> FileEvidence:
    head = samples[0]
    if not any(any(sample) for sample in samples):
        return FileEvidence(FileState.ZERO_FILLED, "the file holds nothing but zeros")
    for name, magic in _OTHER:
        if head.startswith(magic):
            return FileEvidence(FileState.NOT_AUDIO, f"the file is {name}, not audio")
    # Several signatures may fit, as more than one format begins with an ID3 tag.
    fitting = [signature for signature in _AUDIO if signature.fits(head)]
    if fitting:
        fits_name = any(extension in signature.extensions for signature in fitting)
        if extension in _KNOWN_EXTENSIONS and not fits_name:
            return FileEvidence(
                FileState.MISLABELLED, f"the file is {fitting[0].name}, not .{extension}"
            )
        return FileEvidence(FileState.PLAUSIBLE, "")
    if _is_text(head):
        return FileEvidence(FileState.NOT_AUDIO, "the file is text, not audio")
    if extension in _SIGNED_EXTENSIONS:
        return FileEvidence(FileState.HEADER_DAMAGED, f"the file has no .{extension} header")
    return FileEvidence(FileState.PLAUSIBLE, "")


def _is_text(head: bytes) -> bool:
    if any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its end may cut a character
    except UnicodeDecodeError:
        return False
    return True
