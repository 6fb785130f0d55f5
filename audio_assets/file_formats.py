"""What tells an audio file from another, by its extension or its first bytes."""

# fmt: off
AUDIO_EXTENSIONS = frozenset({
    ".3ga", ".aac", ".ac3", ".adts", ".aif", ".aifc", ".aiff", ".alac", ".amr", ".ape", ".au",
    ".awb", ".bwf", ".caf", ".dff", ".dsf", ".dts", ".eac3", ".flac", ".gsm", ".m4a", ".m4b",
    ".m4p", ".m4r", ".mka", ".mp1", ".mp2", ".mp3", ".mpc", ".mpga", ".mpp", ".oga", ".ogg",
    ".opus", ".ra", ".rf64", ".shn", ".snd", ".spx", ".tak", ".tta", ".voc", ".w64", ".wav",
    ".wave", ".weba", ".wma", ".wv",
})
"""Extensions (lower case) that say that a file holds audio and nothing else."""

VIDEO_EXTENSIONS = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".ogm", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv",
})
"""Extensions (lower case) of films, some of whose containers may hold sound alone."""
# fmt: on

HEAD_BYTES = 4096
"""How many of a file's first bytes `holds_audio` wants: two frames of MPEG audio fit in."""

_MAGIC = (
    b"fLaC",
    b"ID3\x02",
    b"ID3\x03",
    b"ID3\x04",
    b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00",  # Sony Wave64
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",  # ASF: WMA
    b"\x1a\x45\xdf\xa3",  # Matroska
    b"\x7f\xfe\x80\x01",  # DTS
    b"wvpk",  # WavPack
    b"MPCK",  # Musepack 8
    b"MP+\x07",  # Musepack 7
    b"MP+\x17",
    b"TTA1",
    b"tBaK",
    b"ajkg\x02",  # Shorten
    b"ajkg\x03",
    b"DSD \x1c\x00\x00\x00",
    b".snd\x00",
    b"caff\x00",
    b"#!AMR",
    b".ra\xfd",  # RealAudio
    b"Creative Voice File\x1a",
)
_OGG_CODECS = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")
_IMAGE_BRANDS = (b"hei", b"hev", b"mif1", b"msf1", b"avi", b"crx", b"jxl")
_KILOBITS = {  # By (whether MPEG 1, layer), for the bit rate indices from 1.
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def holds_audio(head: bytes) -> bool:
    """Tell whether a file that begins so is an audio file.

    Parameters
    ----------
    head : bytes
        The first `HEAD_BYTES` of the file, or the whole of a shorter one.

    Returns
    -------
    bool
        True for the formats the decoders read. Containers of sound and films alike (MP4,
        Matroska, ASF) count as audio, still images in them do not.
    """
    if head.startswith((b"RIFF", b"RF64", b"BW64")):
        return head[8:12] == b"WAVE"
    if head.startswith(b"FORM"):
        return head[8:12] in (b"AIFF", b"AIFC")
    if head.startswith(b"FRM8"):
        return head[12:16] == b"DSD "
    if head.startswith(b"OggS"):
        return head[28:].startswith(_OGG_CODECS)
    if head.startswith(b"MAC "):  # Monkey's Audio; its version, 3.80 to 4.00, rules out text.
        return 3800 <= int.from_bytes(head[4:6], "little") <= 4000
    if head[4:8] == b"ftyp":
        return not head[8:].startswith(_IMAGE_BRANDS)
    return head.startswith(_MAGIC) or _is_mpeg_audio(head)


def _is_mpeg_audio(head: bytes) -> bool:
    """Tell whether two frames of MPEG audio or ADTS follow one another at the start."""
    length = _frame_bytes(head)
    return length > 0 and _frame_bytes(head[length:]) > 0


def _frame_bytes(data: bytes) -> int:
    """Return the length of the frame whose header `data` begins with, 0 if there is none.

    MPEG audio: ISO/IEC 11172-3, 2.4.1.3 and 2.4.3.1, with the lower sample rates of
    ISO/IEC 13818-3 and of MPEG 2.5; ADTS: ISO/IEC 13818-7, 6.2.
    """
    if len(data) < 6 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return 0
    version, layer = data[1] >> 3 & 3, 4 - (data[1] >> 1 & 3)
    if layer == 4:
        is_adts = data[1] & 0x10 and data[2] >> 2 & 15 < 13
        return (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5 if is_adts else 0
    bit_rate, sample_rate, padding = data[2] >> 4, data[2] >> 2 & 3, data[2] >> 1 & 1
    if version == 1 or bit_rate in (0, 15) or sample_rate == 3:
        return 0
    is_mpeg_1 = version == 3
    hertz = (44100, 48000, 32000)[sample_rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits_per_second = 1000 * _KILOBITS[(is_mpeg_1, layer)][bit_rate - 1]
    if layer == 1:
        return (12 * bits_per_second // hertz + padding) * 4
    samples = 576 if layer == 3 and not is_mpeg_1 else 1152
    return samples // 8 * bits_per_second // hertz + padding
