import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from audio_assets.audio.decode import decode
from audio_assets.audio.errors import CorruptFileError, UnsupportedFormatError
from audio_assets.audio.opening import unrecognized
from audio_assets.library.formats import (
    FORMATS,
    HEAD_BYTES,
    Format,
    check_content,
    format_of,
    starts_within,
)
from audio_assets.library.scan import Library
from robustness.file_evidence import SAMPLE_BYTES, FileState, inspect_file

ENCODED = [
    ("WAV", "pcm_s16le", "wav", 44100),
    ("RF64", "pcm_s16le", "wav", 44100),
    ("Wave64", "pcm_s16le", "w64", 44100),
    ("AIFF", "pcm_s16be", "aiff", 44100),
    ("FLAC", "flac", "flac", 44100),
    ("Ogg", "libopus", "ogg", 48000),
    ("Ogg", "vorbis", "ogg", 44100),
    ("MP4", "aac", "ipod", 44100),
    ("ASF", "wmav2", "asf", 44100),
    ("Matroska", "libopus", "matroska", 48000),
    ("Core Audio", "pcm_s16be", "caf", 44100),
    ("WavPack", "wavpack", "wv", 44100),
    ("True Audio", "tta", "tta", 44100),
    ("AU", "pcm_s16be", "au", 44100),
    ("VOC", "pcm_s16le", "voc", 44100),
    ("AMR", "libopencore_amrnb", "amr", 8000),
    ("ID3-tagged audio", "libmp3lame", "mp3", 44100),
    ("ADTS AAC", "aac", "adts", 44100),
    ("MPEG audio", "mp2", "mp2", 48000),
    ("MPEG audio", "libmp3lame", "mp3", 16000),
    ("MPEG audio", "libmp3lame", "mp3", 8000),
    ("MPEG audio", "libmp3lame", "mp3", 48000),
]
# Formats that FFmpeg reads but does not write.
HEADERS = {
    "Monkey's Audio": b"MAC \x96\x0f\0\0",
    "Musepack SV7": b"MP+\x07",
    "Musepack SV8": b"MPCKSH",
    "TAK": b"tBaK\x01",
    "Shorten": b"ajkg\x02",
    "DSF": b"DSD \x1c\0\0\0\0\0\0\0",
    "DSDIFF": b"FRM8\0\0\0\0\0\0\x01\0DSD FVER",
    "RealAudio": b".ra\xfd\0\x04",
    "DTS": b"\x7f\xfe\x80\x01\xfc",
}


def encode(path: Path, name: str, codec: str, container: str, rate: int) -> Path:
    layout = "mono" if name == "AMR" else "stereo"
    shape = (1 if name == "AMR" else 2, rate)
    frame = av.AudioFrame.from_ndarray(
        np.random.default_rng(0).uniform(-0.1, 0.1, shape).astype(np.float32),
        format="fltp",
        layout=layout,
    )
    frame.sample_rate = rate
    options = {
        "RF64": {"rf64": "always"},
        "MPEG audio": {"id3v2_version": "0", "write_xing": "0"} if container == "mp3" else {},
    }.get(name, {})
    with av.open(path, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = 12_200 if name == "AMR" else 64_000
        stream.codec_context.options = {"strict": "experimental"}
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def by_name(name: str) -> Format:
    return next(known for known in FORMATS if known.name == name)


def assert_all_agree(content: bytes, expected: Format, tmp_path: Path) -> None:
    """Assert that scan, classifier and decoders recognize a format by its first bytes."""
    head = content[:HEAD_BYTES]
    assert [known.name for known in FORMATS if known.matches(head)] == [expected.name]

    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "no extension").write_bytes(content)
    assert len(Library({"music": tmp_path / "music"}).scan().files) == 1

    for extension in expected.extensions:
        path = tmp_path / f"song{extension}"
        path.write_bytes(content)
        assert inspect_file(path, check_content=check_content).state is FileState.PLAUSIBLE
    foreign = ".flac" if ".flac" not in expected.extensions else ".wv"
    assert check_content(head, Path(f"song{foreign}")).state is FileState.MISLABELLED

    assert isinstance(unrecognized(io.BytesIO(content)), CorruptFileError)
    by_soundfile = unrecognized(io.BytesIO(content), by_soundfile=True)
    assert isinstance(by_soundfile, CorruptFileError) is expected.by_soundfile


def test_the_classifier_reads_a_whole_head() -> None:
    assert SAMPLE_BYTES >= HEAD_BYTES


def test_every_format_has_an_example() -> None:
    assert {name for name, *_ in ENCODED} | set(HEADERS) == {known.name for known in FORMATS}


@pytest.mark.parametrize(("name", "codec", "container", "rate"), ENCODED)
def test_encoded_files_are_recognized_and_read_as_the_table_says(
    tmp_path: Path, name: str, codec: str, container: str, rate: int
) -> None:
    path = encode(tmp_path / "sound", name, codec, container, rate)
    content = path.read_bytes()
    expected = by_name(name)
    assert format_of(content[:3]) is None
    assert_all_agree(content, expected, tmp_path)

    assert decode(path, tmp_path / "pcm.npy").duration_s == pytest.approx(1.0, abs=0.2)
    if expected.by_soundfile:
        assert soundfile.info(io.BytesIO(content)).samplerate == rate
    else:
        with pytest.raises(UnsupportedFormatError, match="no audio format that the decoder knows"):
            decode(path, tmp_path / "pcm.npy", decoder="soundfile")
    if expected.demuxer:
        within = b"\xa5" * 1000 + content
        assert next(starts_within(within)) == (1000, expected)
        path.write_bytes(within)
        whole = decode(path, tmp_path / "pcm.npy", decoder="salvage")
        assert whole.duration_s == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_recognized(tmp_path: Path, name: str) -> None:
    assert_all_agree(HEADERS[name].ljust(HEAD_BYTES, b"\xa5"), by_name(name), tmp_path)


def test_random_bytes_and_text_are_no_audio() -> None:
    chance = np.random.default_rng(3)
    for _ in range(20_000):
        assert format_of(b"\xff" + chance.bytes(60)) is None
    for _ in range(3):
        assert not list(starts_within(chance.bytes(4 << 20)))
    for encoding in ("utf-8", "utf-16", "utf-32", "latin-1"):
        assert format_of(("Ähnliche Texte\n" * 300).encode(encoding)[:HEAD_BYTES]) is None


@pytest.mark.parametrize(
    ("head", "name", "state", "finding"),
    [
        (b"%PDF-1.7", "a.mp3", FileState.WRONG_CONTENT, "the file is a PDF document, not audio"),
        ("Öl\n".encode(), "a.mp3", FileState.WRONG_CONTENT, "the file is text"),
        (b"fLaC\0\0\0\x22", "a.MP3", FileState.MISLABELLED, "the file is FLAC, not .mp3"),
        (b"wvPK\xff\xff", "a.wv", FileState.HEADER_DAMAGED, "the file has no .wv header"),
        (b"\xa5\xff\xff", "a.mp3", FileState.PLAUSIBLE, ""),
        (b"\xa5\xff\xff", "a.xyz", FileState.PLAUSIBLE, ""),
        (b"fLaC\0\0\0\x22", "a.xyz", FileState.PLAUSIBLE, ""),
    ],
)
def test_content_is_compared_with_the_name(
    head: bytes, name: str, state: FileState, finding: str
) -> None:
    evidence = check_content(head, Path(name))
    assert (evidence.state, evidence.finding) == (state, finding)
