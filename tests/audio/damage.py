"""Files of many formats, and what may happen to them."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import av
import numpy as np

from audio_assets.audio.pcm import SAMPLE_RATE, Samples

# Codec, container, its options, and whether the file states its length.
FORMATS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "WAV, PCM": ("pcm_s16le", "wav", {}, True),
    "RF64, PCM": ("pcm_s16le", "wav", {"rf64": "always"}, True),
    "WAV, MS ADPCM": ("adpcm_ms", "wav", {}, True),
    "WAV, MP3": ("libmp3lame", "wav", {}, True),
    "Wave64, PCM": ("pcm_s16le", "w64", {}, True),
    "AIFF, PCM": ("pcm_s16be", "aiff", {}, True),
    "CAF, PCM": ("pcm_s16be", "caf", {}, True),
    "AU, PCM": ("pcm_s16be", "au", {}, True),
    "VOC, PCM": ("pcm_s16le", "voc", {}, False),
    "FLAC": ("flac", "flac", {}, True),
    "MP3 with Xing or VBRI header": ("libmp3lame", "mp3", {}, True),
    "MP3 without": ("libmp3lame", "mp3", {"write_xing": "0"}, False),
    "Ogg, Vorbis": ("vorbis", "ogg", {}, False),
    "Ogg, Opus": ("libopus", "ogg", {}, False),
    "Ogg, FLAC": ("flac", "ogg", {}, False),
    "MP4, AAC": ("aac", "ipod", {"movflags": "faststart"}, True),
    "MP4, ALAC": ("alac", "ipod", {"movflags": "faststart"}, True),
    "MP4 in fragments, AAC": ("aac", "mp4", {"movflags": "frag_keyframe+empty_moov"}, False),
    "Matroska, FLAC": ("flac", "matroska", {}, True),
    "WebM, Opus": ("libopus", "webm", {}, True),
    "ASF, WMA 2": ("wmav2", "asf", {}, True),
    "ADTS, AAC": ("aac", "adts", {}, False),
    "AC-3": ("ac3", "ac3", {}, False),
    "WavPack": ("wavpack", "wv", {}, True),
    "True Audio": ("tta", "tta", {}, True),
}


def noise(size: int) -> bytes:
    """Return bytes of noise, the same whichever tests ran before."""
    return np.random.default_rng(1).bytes(size)


def encode(
    path: Path,
    codec: str,
    samples: Samples,
    sample_rate: int = SAMPLE_RATE,
    *,
    container: str | None = None,
    layout: str = "stereo",
    options: Mapping[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", format=container, options=dict(options or {})) as output:
        stream = output.add_stream(codec, rate=sample_rate, layout=layout)
        stream.codec_context.options = {"strict": "experimental"}
        if codec == "wmav2":
            stream.bit_rate = 128_000
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples).reshape(1, -1), format="flt", layout=layout
        )
        frame.sample_rate = sample_rate
        frame.pts = 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    return path


def id3v2(title: bytes = b"hello") -> bytes:
    frame = b"TIT2" + struct.pack(">I", len(title) + 1) + b"\0\0\0" + title
    return b"ID3\x03\0\0\0\0\0" + bytes([len(frame)]) + frame


def apev2() -> bytes:
    item = struct.pack("<II", 5, 0) + b"Title\0hello"
    size = len(item) + 32
    header = b"APETAGEX" + struct.pack("<IIII", 2000, size, 1, 0xA0000000) + bytes(8)
    return header + item + b"APETAGEX" + struct.pack("<IIII", 2000, size, 1, 0x80000000) + bytes(8)


def overwritten(content: bytes) -> bytes:
    size, middle = len(content) // 100, len(content) // 2
    return content[:middle] + noise(size) + content[middle + size :]


AROUND: dict[str, Callable[[bytes], bytes]] = {
    "rubbish before": lambda content: noise(3000) + content,
    "zeros before": lambda content: bytes(200_000) + content,
    "rubbish behind": lambda content: content + noise(3000),
    "zeros behind": lambda content: content + bytes(200_000),
    "tags": lambda content: id3v2() + content + apev2() + b"TAG".ljust(128, b"\0"),
    "two tags": lambda content: id3v2(b"a") + id3v2(b"b") + content,
}
