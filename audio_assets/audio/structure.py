"""What the bytes of an audio file say of its audio: where it is, how long, whether it is cut."""

import io
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from audio_assets.library.formats import (
    HEAD_BYTES,
    Format,
    format_of,
    frame_bytes,
    mpeg_frame,
    starts_within,
)

_MOST_TAGS = 16
_MOST_CHUNKS = 10_000

_SALVAGE_BYTES = 4 << 20
"""How far into a file a stream is searched for."""

_OGG_TAIL_BYTES = 1 << 20
"""How far before the end of an Ogg file its last page is searched for."""

# First chunk, header, name of the chunk with the audio, size of what its size counts beside the
# content, alignment; by the format's name.
_CHUNKS = {
    "WAV": (12, "<4sI", b"data", 0, 2),
    "RF64": (12, "<4sI", b"data", 0, 2),
    "AIFF": (12, ">4sI", b"SSND", 0, 2),
    "Core Audio": (8, ">4sQ", b"data", 0, 1),
    "Wave64": (40, "<16sQ", bytes.fromhex("64617461f3acd3118cd100c04f8edb8a"), 24, 8),
}

# Recorders that cannot go back to fill in a chunk's size leave 0, 0x7FFF... or 0xFFFF...
_LARGEST_CHUNK_32, _LARGEST_CHUNK_64 = 0x7FFF0000, 1 << 62

_BOXES = {b"ftyp", b"styp", b"sidx", b"moov", b"moof", b"mdat", b"mfra", b"free", b"skip"}
_BOXES |= {b"meta", b"udta", b"uuid", b"emsg", b"prft", b"wide"}

_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_PROTECTION = (
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"),
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"),
)


class Section(io.RawIOBase):
    """A part of an open file, read as a file of its own; what is outside does not exist.

    Parameters
    ----------
    file : file object
        The file, whose own position stays.
    start, stop : int
        The part (bytes).
    """

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._file = file
        self._position = 0

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int | None = None) -> "Section":
        """Return a part of this part."""
        end = self.stop if stop is None else self.start + stop
        return Section(self._file, self.start + start, end)

    def at(self, position: int, size: int) -> bytes:
        """Return up to `size` bytes from a position."""
        size = max(min(size, len(self) - position), 0)
        return os.pread(self._file.fileno(), size, self.start + position) if size else b""

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def read(self, size: int | None = -1) -> bytes:  # noqa: D102
        found = self.at(self._position, len(self) if size is None or size < 0 else size)
        self._position += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self)}[whence]
        # FFmpeg goes wherever a damaged index sends it.
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:  # noqa: D102
        return self._position


def without_tags(file: BinaryIO) -> Section:
    """Return a file without the ID3v2, ID3v1, APEv2 and Lyrics3 tags around its content.

    Sources: ID3v2.4, section 3.1; APEv2; Lyrics3 v2.00.
    """
    size = os.fstat(file.fileno()).st_size
    whole = Section(file, 0, size)
    start, stop = 0, size
    for _ in range(_MOST_TAGS):
        head = whole.at(start, 32)
        if head[:3] == b"ID3" and len(head) >= 10:
            length = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(head[9:5:-1]))
            start += 10 + length + (10 if head[5] & 0x10 else 0)
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            start += 32 + struct.unpack_from("<I", head, 12)[0]
        else:
            break
    if start >= size:
        start = 0
    for _ in range(_MOST_TAGS):
        tail = whole.at(max(stop - 128, start), min(128, stop - start))
        if len(tail) == 128 and tail[:3] == b"TAG":
            length = 128
        elif tail[-32:-24] == b"APETAGEX":
            content, _, flags = struct.unpack_from("<III", tail, len(tail) - 20)
            length = content + (32 if flags >> 31 else 0)
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            length = int(tail[-15:-9]) + 15
        else:
            break
        if not 0 < length < stop - start:
            break
        stop -= length
    return Section(file, start, stop)


def streams_within(file: Section) -> Iterator[tuple[Section, Format]]:
    """Yield what may be audio behind other bytes at the start of a file, the first one first."""
    data = file.at(0, _SALVAGE_BYTES)
    for start, known in starts_within(data):
        yield file.part(start), known


def ogg_links(file: Section) -> Sequence[Section]:
    """Return the links of a chained Ogg file, which follow one another; other files are one.

    Source: RFC 3533, section 4.
    """
    if file.at(0, 4) != b"OggS":
        return [file]
    starts, end_of_page = [0], 0
    for start, flags in _ogg_pages(file):
        if flags & 2:
            if start != end_of_page:  # not beside another first page
                starts.append(start)
            end_of_page = start + _page_bytes(file.at(start, 27 + 255))
    return [file.part(a, b) for a, b in zip(starts, [*starts[1:], len(file)], strict=True)]


def _ogg_pages(file: Section) -> Iterator[tuple[int, int]]:
    """Yield the position and the flags of what begins like an Ogg page."""
    block, overlap = 1 << 20, 5
    for base in range(0, len(file), block):
        data = file.at(base, block + overlap)
        for match in re.finditer(rb"OggS\0([\0-\7])", data, re.DOTALL):
            if match.start() < block:
                yield base + match.start(), match[1][0]


def _page_bytes(page: bytes) -> int:
    """Return the size of an Ogg page by its header; more than any if that is cut."""
    if len(page) < 27 or len(page) < 27 + page[26]:
        return 1 << 17
    return 27 + page[26] + sum(page[27 : 27 + page[26]])


def stated_seconds(file: Section) -> float | None:
    """Return the length that the header of a FLAC or MP3 file states (s); None if it states none.

    Sources: RFC 9639, section 8.2; the Xing and VBRI headers.
    """
    head = file.at(0, HEAD_BYTES)
    if head[:4] == b"fLaC" and len(head) >= 26:
        rate, samples = head[18] << 12 | head[19] << 4 | head[20] >> 4, head[21] & 15
        samples = samples << 32 | int.from_bytes(head[22:26], "big")
        return samples / rate if rate and samples else None
    frame = mpeg_frame(head)
    if frame is None:
        return None
    first = head[: frame.size]
    if (at := first.find(b"VBRI")) >= 0:
        frames = first[at + 14 : at + 18]
    elif (at := max(first.find(b"Xing"), first.find(b"Info"))) >= 0 and first[at + 7] & 1:
        frames = first[at + 8 : at + 12]
    else:
        return None
    return int.from_bytes(frames, "big") * frame.samples / frame.sample_rate or None


def stored_share(file: Section) -> float | None:
    """Return the share of the audio that its header states which the file holds; None if unknown.

    It is known of files whose headers state a number of bytes: WAV, RF64, Wave64, AIFF, CAF, AU and
    WMA. Decoders report no error at the end of such a file, wherever it is cut.
    """
    head = file.at(0, HEAD_BYTES)
    found = format_of(head)
    name = found.name if found else ""
    if name == "ASF":
        return _stored_share_of_asf(file, head)
    if name == "AU":
        start, length = struct.unpack_from(">II", head, 4)
        return _share(len(file) - start, length, _LARGEST_CHUNK_32)
    if name not in _CHUNKS:
        return None
    position, layout, data, counted, alignment = _CHUNKS[name]
    header_bytes = struct.calcsize(layout)
    length_64: int | None = None
    for _ in range(_MOST_CHUNKS):
        header = file.at(position, header_bytes)
        if len(header) < header_bytes:
            break
        chunk, length = struct.unpack(layout, header)
        length -= counted
        position += header_bytes
        if chunk == b"ds64":
            length_64 = int.from_bytes(file.at(position + 8, 8), "little")
        elif chunk == data:
            largest = _LARGEST_CHUNK_32 if header_bytes == 8 else _LARGEST_CHUNK_64
            if length_64 is not None:
                length, largest = length_64, _LARGEST_CHUNK_64
            return _share(len(file) - position, length, largest)
        position += length + -length % alignment
    return None


def _share(stored: int, length: int, largest: int) -> float | None:
    return min(1.0, stored / length) if 0 < length < largest else None


def _stored_share_of_asf(file: Section, head: bytes) -> float | None:
    """Compare a WMA file's size (bytes) with its File Properties Object."""
    properties = head[head.find(_ASF_FILE_PROPERTIES) :][:92]
    if len(properties) < 92 or not properties.startswith(_ASF_FILE_PROPERTIES):
        return None
    (stated,) = struct.unpack_from("<Q", properties, 40)
    is_broadcast = properties[88] & 1
    return None if is_broadcast else _share(len(file), stated, _LARGEST_CHUNK_64)


def is_protected_asf(file: Section) -> bool:
    """Return whether a WMA file is encrypted."""
    head = file.at(0, 1 << 16)
    return any(protection in head for protection in _ASF_PROTECTION)


def ends_in_mid_page(file: Section) -> bool:
    """Return whether the last page of an Ogg file is cut."""
    tail = file.at(max(0, len(file) - _OGG_TAIL_BYTES), _OGG_TAIL_BYTES)
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    return page[:4] == b"OggS" and len(page) < _page_bytes(page)


def ends_in_mid_box(file: Section) -> bool:
    """Return whether the last of an MP4 file's boxes is cut (ISO/IEC 14496-12, 4.2)."""
    position = 0
    for _ in range(_MOST_CHUNKS):
        header = file.at(position, 16)
        if len(header) < 8 or header[4:8] not in _BOXES:
            return False
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: to the end of the file
            return False
        position += length
        if position >= len(file):
            return position > len(file)
    return False


def ends_in_mid_frame(packet: bytes) -> bool:
    """Return whether the last packet of an MPEG audio or ADTS stream is a part of a frame."""
    return frame_bytes(packet) > len(packet) > 0
