"""Truncated files: whether a file holds all the audio that its header promises."""

import os
import struct
from typing import BinaryIO

from audio_assets.audio.errors import CorruptFileError
from audio_assets.library.formats import HEAD_BYTES, format_of

# A file is truncated if more than this share and more than this many seconds of what its header
# promises are missing; encoder delay and padding are less.
_MISSING_SHARE = 0.02
_MISSING_SECONDS = 0.1

CONTAINERS_STATING_LENGTH = {"flac", "mov", "matroska"}
"""FFmpeg's containers whose header states the length of the audio; elsewhere FFmpeg estimates."""

# Recorders that cannot go back to fill in a chunk's size leave 0, 0x7FFF... or 0xFFFF...
_LARGEST_STATED_CHUNK = 0x7FFF0000

_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def check_complete(file: BinaryIO, seconds: float, stated_s: float | None) -> None:
    """Check that a file does not end before its audio does.

    Parameters
    ----------
    file : file object
        The file.
    seconds : float
        Length of the audio that was decoded (s).
    stated_s : float or None
        Length that the decoder read in the header (s), if that states it.

    Raises
    ------
    CorruptFileError
        If audio is missing at the end.
    """
    stored = _stored_share(file)
    if stored is not None:
        stated_s = seconds / stored if stored else None
    if stated_s is not None:
        missing = stated_s - seconds
        if missing > _MISSING_SECONDS and missing > _MISSING_SHARE * stated_s:
            raise CorruptFileError(
                f"breaks off after {seconds:.1f} s of the {stated_s:.1f} s its header promises"
            )
    if not _ends_like_ogg(file):
        raise CorruptFileError(
            f"breaks off after {seconds:.1f} s: the page that ends an Ogg stream is missing"
        )


def _stored_share(file: BinaryIO) -> float | None:
    """Return the share of its stated data that a WAV, AIFF or WMA file holds; None if unknown.

    Decoders report no error at the end of such a file, wherever it is cut.
    """
    size = os.fstat(file.fileno()).st_size
    head = _head(file)
    found = format_of(head)
    match found and found.name:
        case "WAV" | "RF64":
            layout, data = "<4sI", b"data"
        case "AIFF":
            layout, data = ">4sI", b"SSND"
        case "ASF":
            return _stored_share_of_asf(head, size)
        case _:
            return None
    file.seek(12)
    data_size_64: int | None = None
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack(layout, header)
        if name == b"ds64":
            data_size_64 = struct.unpack("<8xQ", file.read(16))[0]
            length -= 16
        elif name == data:
            if data_size_64 is not None:
                length = data_size_64
            elif not 0 < length < _LARGEST_STATED_CHUNK:
                return None
            return min(1.0, (size - file.tell()) / length) if length else None
        file.seek(length + length % 2, os.SEEK_CUR)
    return None


def _stored_share_of_asf(head: bytes, size: int) -> float | None:
    """Compare a WMA file's size (bytes) with its File Properties Object."""
    properties = head[head.find(_ASF_FILE_PROPERTIES) :][:92]
    if len(properties) < 92 or not properties.startswith(_ASF_FILE_PROPERTIES):
        return None
    (stated,) = struct.unpack_from("<Q", properties, 40)
    is_broadcast = properties[88] & 1
    return None if is_broadcast or not stated else min(1.0, size / stated)


def mp3_states_length(file: BinaryIO) -> bool:
    """Return whether an MP3's first frame is a Xing, Info or VBRI header."""
    position = file.tell()  # a decoder is reading it
    file.seek(0)
    head = file.read(10)
    start = 0
    if len(head) == 10 and head[:3] == b"ID3":
        # The tag's size: four bytes of seven bits each, without its header of ten bytes.
        start = 10 + sum(
            (byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)
        )
    file.seek(start)
    frame = file.read(256)
    file.seek(position)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def _ends_like_ogg(file: BinaryIO) -> bool:
    """Return False for an Ogg file whose last page is cut or does not end its stream."""
    if not _head(file).startswith(b"OggS"):
        return True
    largest_page = 65307
    file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * largest_page))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    end = 27 + page[26] + sum(page[27 : 27 + page[26]])
    return bool(page[5] & 4) and len(page) >= end


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(HEAD_BYTES)
