"""Damaged, cut, joined and padded files: what is decoded of them, and what is said of it."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_assets.audio.decode import Limits, decode
from audio_assets.audio.errors import AudioFileError, CorruptFileError, UnsupportedFormatError
from audio_assets.audio.pcm import SAMPLE_RATE, SourceInfo
from audio_assets.library.formats import mpeg_frame
from tests.audio.damage import AROUND, FORMATS, encode, id3v2, noise, overwritten
from tests.conftest import PROJECT

SECONDS = 8.0
TIME = np.arange(int(SECONDS * 48000)) / 48000
SWEEP = np.stack([0.4 * np.sin((300 + 40 * TIME) * 6 * TIME), 0.2 * np.sin(2000 * TIME)], axis=1)
SWEEP += np.random.default_rng(0).normal(0, 0.02, SWEEP.shape)

# An end that no structure of these proves, as a packet may end anywhere.
CUT_UNSEEN = {"VOC, PCM", "AC-3"}
# What is overwritten is decoded as it is: nothing in these has a checksum.
NOISE_UNSEEN = {name for name in FORMATS if name.endswith(", PCM")} | {"ADTS, AAC"}

# FFmpeg's readers of these may not find back.
LOSES_THE_REST = {"Matroska, FLAC", "WebM, Opus", "WavPack"}

NO_LIMITS = Limits()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Encode a format once, when it is first asked for."""
    directory = tmp_path_factory.mktemp("formats")

    def content_of(name: str) -> bytes:
        codec, container, options, _ = FORMATS[name]
        path = directory / name
        if not path.exists():
            encode(
                path, codec, SWEEP.astype(np.float32), 48000, container=container, options=options
            )
        return path.read_bytes()

    return content_of


def decoded(directory: Path, content: bytes, limits: Limits = NO_LIMITS) -> SourceInfo:
    """Decode as a run does: by the decoders in turn."""
    path = directory / "file"
    path.write_bytes(content)
    first: AudioFileError | None = None
    for decoder in ("av", "soundfile", "salvage"):
        try:
            return decode(path, directory / "pcm.npy", decoder=decoder, limits=limits)  # type: ignore[arg-type]
        except AudioFileError as error:
            first = first or error
    assert first
    raise first


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_file_is_whole(tmp_path: Path, files: Callable[[str], bytes], name: str) -> None:
    source = decoded(tmp_path, files(name))
    assert source.damage is None
    assert source.complete_share == (1.0 if FORMATS[name][3] else None)
    assert source.duration_s == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_cut_file_what_is_there_is_decoded(
    tmp_path: Path, files: Callable[[str], bytes], name: str
) -> None:
    content = files(name)
    for share in (0.9, 0.501):
        source = decoded(tmp_path, content[: int(len(content) * share)])
        assert source.duration_s == pytest.approx(share * SECONDS, abs=1.1)
        if FORMATS[name][3]:
            assert source.complete_share == pytest.approx(source.duration_s / SECONDS, abs=0.02)
            assert source.damage
        else:
            assert source.complete_share is None
            assert source.damage or name in CUT_UNSEEN
    # Two seconds of eight are no song, but what is whole may be short.
    if name not in CUT_UNSEEN | {"MP3 without"}:
        with pytest.raises(CorruptFileError, match=r"breaks off|be decoded|incomplete"):
            decoded(tmp_path, content[: len(content) // 8])
        with pytest.raises(CorruptFileError, match=r"breaks off|cannot be decoded"):
            decoded(tmp_path, content[: int(len(content) * 0.9)], Limits(shortest_s=math.inf))
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "pcm.npy", "pcm.npy.json"}


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_goes_on_behind_what_is_damaged(
    tmp_path: Path, files: Callable[[str], bytes], name: str
) -> None:
    source = decoded(tmp_path, overwritten(files(name)))
    least = 0.4 if name in LOSES_THE_REST else 0.7
    assert least * SECONDS < source.duration_s < SECONDS + 0.2
    small = source.duration_s > SECONDS - 0.15
    assert source.damage or small or name in NOISE_UNSEEN


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_around_the_audio_is_passed_over(
    tmp_path: Path, files: Callable[[str], bytes], name: str
) -> None:
    content = files(name)
    for what, put in AROUND.items():
        source = decoded(tmp_path, put(content))
        # FFmpeg plays what follows the samples of an AU file.
        longer = 1.1 if name == "AU, PCM" and what == "zeros behind" else 0.15
        assert -0.3 < source.duration_s - SECONDS < longer, what
        assert source.damage is None, what


def test_streams_that_follow_one_another_are_one(tmp_path: Path) -> None:
    sweep = SWEEP.astype(np.float32)
    first = encode(tmp_path / "a", "vorbis", sweep[:192000], 48000, container="ogg").read_bytes()
    other = encode(
        tmp_path / "b", "flac", sweep[:96000, :1], 24000, container="ogg", layout="mono"
    ).read_bytes()
    source = decoded(tmp_path, first + other + first)
    assert source.duration_s == pytest.approx(12.0, abs=0.1)
    assert (source.sample_rate, source.channels) == (48000, 2)
    assert (source.complete_share, source.damage) == (None, None)

    source = decoded(tmp_path, first + other[: len(other) // 2])
    assert source.damage is not None
    assert source.damage.startswith("breaks off after")


def test_joined_mp3s_are_one(tmp_path: Path, files: Callable[[str], bytes]) -> None:
    source = decoded(tmp_path, files("MP3 with Xing or VBRI header") * 2)
    assert source.duration_s == pytest.approx(2 * SECONDS, abs=0.2)
    assert source.damage is None


def test_an_mp3_that_states_its_length_behind_two_tags_is_cut(
    tmp_path: Path, files: Callable[[str], bytes]
) -> None:
    content = id3v2() * 2 + files("MP3 with Xing or VBRI header")
    source = decoded(tmp_path, content[: len(content) // 2])
    assert source.complete_share == pytest.approx(0.5, abs=0.02)


def test_an_ogg_file_needs_no_last_page(tmp_path: Path, files: Callable[[str], bytes]) -> None:
    content = files("Ogg, Opus")
    whole_pages = content[: content.rindex(b"OggS")]
    assert decoded(tmp_path, whole_pages).damage is None


def test_what_another_track_lasts_says_nothing(tmp_path: Path) -> None:
    import av

    path = tmp_path / "two.mka"
    with av.open(str(path), "w", format="matroska") as output:
        streams = [output.add_stream("flac", rate=48000, layout="mono") for _ in range(2)]
        packets = []
        for stream, seconds in zip(streams, (4, 8), strict=True):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, seconds * 48000), np.int16), format="s16", layout="mono"
            )
            frame.sample_rate, frame.pts = 48000, 0
            packets += [*stream.encode(frame), *stream.encode(None)]
        output.mux(packets)
    source = decode(path, tmp_path / "pcm.npy")
    assert source.duration_s in (4.0, 8.0)
    assert source.damage is None


def test_a_protected_file_says_so(tmp_path: Path, files: Callable[[str], bytes]) -> None:
    content = bytearray(files("MP4, AAC"))
    at = content.index(b"mp4a", content.index(b"stsd"))
    content[at : at + 4] = b"drms"
    start = content.index(b"mdat") + 8
    content[start:] = noise(len(content) - start)
    with pytest.raises(UnsupportedFormatError, match=r"is protected \(DRM\)"):
        decoded(tmp_path, bytes(content))


def test_compressed_data_is_never_taken_for_samples(
    tmp_path: Path, files: Callable[[str], bytes]
) -> None:
    frames = files("ADTS, AAC")[:40_000]
    for rubbish in (noise(400_000), frames[1000:2000] + noise(300_000)):
        with pytest.raises(AudioFileError):
            decoded(tmp_path, rubbish)


def test_frames_say_their_size(files: Callable[[str], bytes]) -> None:
    content = files("MP3 without")
    content = content[content.index(b"\xff\xfb") :]
    frame = mpeg_frame(content)
    assert frame
    assert (frame.samples, frame.sample_rate) == (1152, 48000)
    assert mpeg_frame(content[frame.size :]) is not None
    assert frame.sample_rate != SAMPLE_RATE


def test_the_document_says_what_these_tests_show() -> None:
    rows = "".join(
        f"| {name} | {'yes' if states else 'no'} | {'no' if name in CUT_UNSEEN else 'yes'} "
        f"| {damage_shown(name)} |\n"
        for name, (_, _, _, states) in FORMATS.items()
    )
    assert rows in (PROJECT / "docs" / "formats.md").read_text("utf-8"), rows


def damage_shown(name: str) -> str:
    if name in NOISE_UNSEEN:
        return "not detected"
    return "the rest may be lost" if name in LOSES_THE_REST else "it costs itself"
