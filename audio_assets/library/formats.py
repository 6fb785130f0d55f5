"""How audio files begin: the one table of formats, and what is derived from it."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from robustness.file_evidence import PLAUSIBLE, FileEvidence, FileState

_FRAMES, _FRAMES_BYTES = 6, 1 << 16
"""Frames that must follow one another within other bytes, and what holds them."""

HEAD_BYTES = 4096
"""Bytes of a file that its format is recognized by, its *head*: two MPEG audio frames fit in."""


@dataclass(frozen=True)
class Format:
    """How the files of a format begin.

    Parameters
    ----------
    name : str
        Name, for people.
    signature : bytes
        Regular expression (DOTALL) for the first bytes of such a file.
    demuxer : str
        FFmpeg's name of what reads it; empty for what may be of several formats.
    always, sometimes : str
        Extensions, separated by spaces, of files that always begin so and of files that may.
    by_soundfile : bool
        Whether libsndfile reads the format; FFmpeg reads them all.
    framed : bool
        Whether the signature is of a frame, too short to tell the format: other frames must follow.
    """

    name: str
    signature: bytes
    demuxer: str = ""
    always: str = ""
    sometimes: str = ""
    by_soundfile: bool = False
    framed: bool = False

    def matches(self, head: bytes, frames: int = 2) -> bool:
        """Return whether a file with this head is of the format."""
        return bool(re.match(self.signature, head, re.DOTALL)) and (
            not self.framed or _has_frames(head, frames)
        )

    @property
    def extensions(self) -> frozenset[str]:
        """Extensions such a file may have: lower case, with a dot."""
        return _extensions(self.always, self.sometimes)


def _extensions(*texts: str) -> frozenset[str]:
    return frozenset(f".{extension}" for text in texts for extension in text.split())


_KILOBITS = {  # By (whether MPEG 1, layer), for the bit rate indices from 1.
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@dataclass(frozen=True)
class MpegFrame:
    """What the header of an MPEG audio frame says: its size (bytes), samples and rate (Hz)."""

    size: int
    samples: int
    sample_rate: int


def mpeg_frame(data: bytes) -> MpegFrame | None:
    """Return the MPEG audio frame whose header `data` begins with; None if there is none.

    Sources: ISO/IEC 11172-3, 2.4.1.3 and 2.4.3.1, with the lower sample rates of ISO/IEC 13818-3
    and of MPEG 2.5.
    """
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    version, layer = data[1] >> 3 & 3, 4 - (data[1] >> 1 & 3)
    bit_rate, sample_rate, padding = data[2] >> 4, data[2] >> 2 & 3, data[2] >> 1 & 1
    if version == 1 or layer == 4 or bit_rate in (0, 15) or sample_rate == 3:
        return None
    is_mpeg_1 = version == 3
    hertz = (44100, 48000, 32000)[sample_rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits_per_second = 1000 * _KILOBITS[(is_mpeg_1, layer)][bit_rate - 1]
    if layer == 1:
        return MpegFrame((12 * bits_per_second // hertz + padding) * 4, 384, hertz)
    samples = 576 if layer == 3 and not is_mpeg_1 else 1152
    return MpegFrame(samples // 8 * bits_per_second // hertz + padding, samples, hertz)


def frame_bytes(data: bytes) -> int:
    """Return the size of the MPEG audio or ADTS frame `data` begins with; 0 if there is none.

    Source for ADTS: ISO/IEC 13818-7, 6.2.
    """
    if frame := mpeg_frame(data):
        return frame.size
    is_adts = len(data) >= 6 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0
    if is_adts and data[2] >> 2 & 15 < 13:
        return (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
    return 0


def _has_frames(data: bytes, count: int) -> bool:
    """Return whether as many frames of MPEG audio or ADTS follow one another at the start."""
    position = 0
    for _ in range(count):
        if not (length := frame_bytes(data[position : position + 6])):
            return False
        position += length
    return True


# fmt: off
FORMATS = (
    Format("WAV", rb"RIFF....WAVE", "wav", "wav wave bwf", "dts", by_soundfile=True),
    Format("RF64", rb"(?:RF64|BW64)....WAVE", "wav", "rf64", "wav wave bwf", by_soundfile=True),
    Format("Wave64", rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0", "w64", "w64",
           by_soundfile=True),
    Format("AIFF", rb"FORM....AIF[FC]", "aiff", "aif aiff aifc", by_soundfile=True),
    Format("FLAC", rb"fLaC[\0\x80]\0\0\x22", "flac", "flac", by_soundfile=True),
    Format("Ogg", rb"OggS\0\x02", "ogg", "ogg oga opus spx ogv", by_soundfile=True),
    Format("MP4", rb"\0\0\0.ftyp(?!hei|hev|mif1|msf1|avi|crx|jxl)",  # not the still images
           "mov", "m4a m4b m4p m4r 3ga alac", "mp4 mov 3gp 3g2 aac"),
    Format("ASF", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\0\xaa\0\x62\xce\x6c", "asf",
           "wma asf wmv"),
    Format("Matroska", rb"\x1a\x45\xdf\xa3", "matroska", "mka mkv webm weba"),
    Format("Core Audio", rb"caff\0\x01\0\0", "caf", "caf", by_soundfile=True),
    # Versions 3.80 to 4.00, which rule out text.
    Format("Monkey's Audio", rb"MAC (?:[\xd8-\xff]\x0e|[\0-\xa0]\x0f)", "ape", "ape"),
    Format("WavPack", rb"wvpk", "wv", "wv"),
    Format("True Audio", rb"TTA1", "tta", "tta"),
    Format("Musepack SV8", rb"MPCK", "mpc8", "mpc mpp"),
    Format("Musepack SV7", rb"MP\+[\x07\x17]", "mpc", "mpc mpp mp+"),
    Format("TAK", rb"tBaK", "tak", "tak"),
    Format("Shorten", rb"ajkg[\2\3]", "shn", "shn"),
    Format("AU", rb"\.snd\0", "au", "au snd", by_soundfile=True),
    Format("VOC", rb"Creative Voice File\x1a", "voc", "voc", by_soundfile=True),
    Format("DSF", rb"DSD \x1c\0\0\0", "dsf", "dsf"),
    Format("DSDIFF", rb"FRM8.{8}DSD ", "iff", "dff"),
    Format("AMR", rb"#!AMR", "amr", "amr awb"),
    Format("RealAudio", rb"\.ra\xfd", "rm", "", "ra"),
    Format("DTS", rb"\x7f\xfe\x80\x01", "dts", "", "dts"),
    # ID3v2 tags are put before several formats.
    Format("ID3-tagged audio", rb"ID3[\2-\4]", "",
           "", "mp3 mp2 mpga aac flac tta wav aif aiff dsf ape mpc", by_soundfile=True),
    Format("ADTS AAC", rb"\xff[\xf0\xf1\xf8\xf9]", "aac", "", "aac adts", framed=True),
    Format("MPEG audio", rb"\xff[^\xf0\xf1\xf8\xf9]", "mp3", "", "mp3 mp2 mp1 mpga mpeg",
           by_soundfile=True, framed=True),
)
"""The formats that the decoders read."""

VIDEO_EXTENSIONS = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".ogm", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv",
})
"""Extensions (lower case) of films, some of whose containers may hold sound alone."""

# fmt: on

_KNOWN = frozenset[str]().union(*(known.extensions for known in FORMATS))
_ALWAYS = frozenset[str]().union(*(_extensions(known.always) for known in FORMATS))

AUDIO_EXTENSIONS = _KNOWN - VIDEO_EXTENSIONS | {".ac3", ".eac3", ".gsm"}
"""Extensions (lower case) that say that a file holds audio and nothing else."""

_OTHER_CONTENT = {
    b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"\x1f\x8b\x08": "a gzip file",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x7fELF": "a program",
    b"SQLite format 3\0": "a SQLite database",
    # macOS keeps attributes beside each file of a foreign volume in a `._` file.
    b"\x00\x05\x16\x07": "an AppleDouble file",
}


def format_of(head: bytes) -> Format | None:
    """Return the format of a file by its head; None if it is no audio file.

    Containers of sound and films alike (MP4, Matroska, ASF, Ogg) count as audio, still images in
    them do not.
    """
    return next((known for known in FORMATS if known.matches(head)), None)


def starts_within(data: bytes) -> Iterator[tuple[int, Format]]:
    """Yield the positions where a file of some format may begin, and the format, in order.

    Where a signature is of a single frame, a run of frames counts as one start.
    """
    found = []
    for known in FORMATS:
        if not known.demuxer:
            continue
        for match in re.finditer(known.signature, data, re.DOTALL):
            if known.matches(data[match.start() : match.start() + _FRAMES_BYTES], _FRAMES):
                found.append((match.start(), known))
                if known.framed:
                    break
    yield from sorted(found, key=lambda start: start[0])


def is_text(head: bytes) -> bool:
    """Return whether a file with this head is UTF-8 text."""
    if any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its end may cut a character
    except UnicodeDecodeError:
        return False
    return True


def check_content(head: bytes, path: Path) -> FileEvidence:
    """Compare a file's head with what its name says, for `robustness.file_evidence`."""
    extension = path.suffix.lower()
    if found := format_of(head):
        if extension in _KNOWN - found.extensions:
            return FileEvidence(FileState.MISLABELLED, f"the file is {found.name}, not {extension}")
        return PLAUSIBLE
    for magic, name in _OTHER_CONTENT.items():
        if head.startswith(magic):
            return FileEvidence(FileState.WRONG_CONTENT, f"the file is {name}, not audio")
    if is_text(head):
        return FileEvidence(FileState.WRONG_CONTENT, "the file is text")
    if extension in _ALWAYS:
        return FileEvidence(FileState.HEADER_DAMAGED, f"the file has no {extension} header")
    return PLAUSIBLE
