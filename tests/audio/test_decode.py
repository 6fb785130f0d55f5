import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from audio_assets.audio.decode import Limits, decode
from audio_assets.audio.errors import CorruptFileError, UnsupportedFormatError
from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from tests.audio.damage import encode

SECONDS = 3.0
TONE_HZ = 440.0


def tone(sample_rate: int = SAMPLE_RATE, channels: int = 2) -> Samples:
    time = np.arange(int(SECONDS * sample_rate)) / sample_rate
    gains = np.linspace(1, 0.5, channels)
    return (0.5 * gains * np.sin(2 * np.pi * TONE_HZ * time)[:, None]).astype(np.float32)


FORMATS = {
    "wav8.wav": ("pcm_u8", {}),
    "wav16.wav": ("pcm_s16le", {}),
    "wav24.wav": ("pcm_s24le", {}),
    "wav32.wav": ("pcm_s32le", {}),
    "float.wav": ("pcm_f32le", {}),
    "double.wav": ("pcm_f64le", {}),
    "rf64.wav": ("pcm_s16le", {"rf64": "always"}),
    "a.aiff": ("pcm_s16be", {}),
    "a.flac": ("flac", {}),
    "a.mp3": ("libmp3lame", {}),
    "a.ogg": ("vorbis", {}),
    "a.opus": ("libopus", {}),
    "a.m4a": ("aac", {"movflags": "faststart"}),
    "alac.m4a": ("alac", {"movflags": "faststart"}),
    "a.wma": ("wmav2", {}),
    "a.mka": ("aac", {}),
}
LOSSLESS = {"wav16.wav", "wav24.wav", "wav32.wav", "float.wav", "double.wav", "rf64.wav", "a.aiff"}
LOSSLESS |= {"a.flac", "alac.m4a"}


def encode_format(directory: Path, name: str) -> Path:
    codec, options = FORMATS[name]
    rate = 48000 if codec == "libopus" else SAMPLE_RATE
    return encode(directory / name, codec, tone(rate), rate, options=options)


def decoded(path: Path, **options: str) -> Audio:
    target = path.with_name(path.name + ".npy")
    decode(path, target, **options)  # type: ignore[arg-type]
    return Audio.open(target, path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_tone(tmp_path: Path, name: str) -> None:
    audio = decoded(encode_format(tmp_path, name))

    assert audio.channels == 2
    assert audio.duration_s == pytest.approx(SECONDS, abs=0.06)
    middle = audio.pcm[SAMPLE_RATE : 2 * SAMPLE_RATE]
    spectrum = np.abs(np.fft.rfft(middle, axis=0))
    assert (spectrum.argmax(axis=0) == TONE_HZ).all()
    levels = np.sqrt(2 * (middle.astype(np.float64) ** 2).mean(axis=0))
    # FFmpeg's own Vorbis encoder is no model of fidelity.
    assert levels == pytest.approx([0.5, 0.25], rel=0.002 if name in LOSSLESS else 0.1)


@pytest.mark.parametrize("name", ["wav16.wav", "wav24.wav", "float.wav", "a.flac", "a.aiff"])
def test_both_decoders_give_the_same_samples(tmp_path: Path, name: str) -> None:
    path = encode_format(tmp_path, name)
    by_av = decoded(path)
    samples = by_av.pcm.copy()
    by_soundfile = decoded(path, decoder="soundfile")

    assert by_av.source is not None
    assert by_soundfile.source is not None
    assert (by_av.source.decoder, by_soundfile.source.decoder) == ("av", "soundfile")
    np.testing.assert_array_equal(by_soundfile.pcm, samples)


def test_source_is_the_stream_as_decoded(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.m4a", "aac", tone(channels=1), layout="mono")
    content = bytearray(path.read_bytes())
    at = content.index(b"mp4a", content.index(b"stsd")) + 20
    assert content[at : at + 2] == b"\0\1"
    content[at + 1] = 2  # as many programs write for mono
    path.write_bytes(content)
    source = decoded(path).source

    assert source is not None
    assert (source.codec, source.sample_rate, source.channels) == ("aac", SAMPLE_RATE, 1)
    with av.open(str(path)) as container:
        assert source.stream_bytes == sum(packet.size for packet in container.demux(audio=0))


def test_wav_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "wav16.wav")
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[4:8] = content[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)

    assert decoded(path).duration_s == pytest.approx(SECONDS)


@pytest.mark.parametrize(
    ("name", "lie"), [("a.mp3", "a.wav"), ("a.flac", "a.mp3"), ("a.ogg", "a"), ("a.m4a", "a.txt")]
)
def test_the_content_tells_the_format(tmp_path: Path, name: str, lie: str) -> None:
    (tmp_path / "truth").mkdir()
    path = encode_format(tmp_path / "truth", name)
    mislabelled = path.rename(tmp_path / lie)

    assert decoded(mislabelled).duration_s == pytest.approx(SECONDS, abs=0.06)


def test_names_need_not_be_text(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "a.flac")
    odd = path.rename(tmp_path / os.fsdecode(b"http:\xff %d ?#\n.flac"))

    decode(odd, tmp_path / "out.npy")

    assert Audio.open(tmp_path / "out.npy", odd).duration_s == pytest.approx(SECONDS)


def picture(path: Path) -> None:
    with av.open(str(path), "w", format="image2") as output:
        stream = output.add_stream("mjpeg", rate=1)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)


@pytest.mark.parametrize("decoder", ["av", "soundfile"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bytes(5000), "zero bytes"),
        ("Not a song, söng or sông.\n".encode() * 400, "the file is text"),
        (b"ffconcat version 1.0\nfile a.wav\n", "the file is text"),
        (np.random.default_rng(0).bytes(50_000), "no audio"),
    ],
    ids=["zeros", "text", "concat script", "noise"],
)
def test_what_is_no_audio_says_so(tmp_path: Path, content: bytes, words: str, decoder: str) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(content)

    with pytest.raises(UnsupportedFormatError, match=words):
        decoded(path, decoder=decoder)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("decoder", ["av", "soundfile"])
def test_an_empty_file_is_corrupt(tmp_path: Path, decoder: str) -> None:
    path = tmp_path / "song.wav"
    path.touch()
    with pytest.raises(CorruptFileError, match="the file is empty"):
        decoded(path, decoder=decoder)


def test_a_picture_holds_no_audio(tmp_path: Path) -> None:
    picture(tmp_path / "cover.jpg")
    path = (tmp_path / "cover.jpg").rename(tmp_path / "song.mp3")

    with pytest.raises(UnsupportedFormatError, match="only a picture or video"):
        decoded(path)


def test_a_playlist_does_not_open_other_files(tmp_path: Path) -> None:
    other = encode(tmp_path / "other.aac", "aac", tone(), container="adts")
    playlist = tmp_path / "song.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{other}\n#EXT-X-ENDLIST\n")

    with pytest.raises(UnsupportedFormatError):
        decoded(playlist)


def test_errors_of_the_file_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "missing.wav", tmp_path / "out.npy")
    with pytest.raises(IsADirectoryError):
        decode(tmp_path, tmp_path / "out.npy")
    path = encode_format(tmp_path, "wav16.wav")
    with pytest.raises(FileNotFoundError):
        decode(path, tmp_path / "no such folder" / "out.npy")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "wav16.wav")
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from audio_assets.audio.decode import decode\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: decode(Path(sys.argv[1]), Path(sys.argv[1] + '.npy'))\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )

    assert result.stdout == "OSError\n"
    assert list(tmp_path.iterdir()) == [path]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = encode_format(tmp_path, "wav16.wav")
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 8
    size = 600 * SAMPLE_RATE * 4
    content[place - 4 : place] = size.to_bytes(4, "little")
    path.write_bytes(content[:place])
    os.truncate(path, place + size)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from audio_assets.audio.decode import decode\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "info = decode(Path(sys.argv[1]), Path(sys.argv[1] + '.npy'))\n"
        "print(info.duration_s, (peak() - before) // 1024)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )

    seconds, mebibytes = result.stdout.split()
    assert float(seconds) == 600
    assert int(mebibytes) < 40


def test_non_finite_samples_become_zero(tmp_path: Path) -> None:
    samples = tone()
    samples[100:200, 0] = np.nan
    samples[300, 1] = np.inf
    audio = decoded(encode(tmp_path / "a.wav", "pcm_f32le", samples))

    assert audio.source is not None
    assert audio.source.non_finite == 101
    assert np.isfinite(audio.pcm).all()
    assert not audio.pcm[100:200, 0].any()
    np.testing.assert_array_equal(audio.pcm[100:200, 1], samples[100:200, 1])


@pytest.mark.parametrize("sample_rate", [8000, 22050, 96000, 192000])
def test_other_rates_are_resampled(tmp_path: Path, sample_rate: int) -> None:
    path = encode(tmp_path / "a.wav", "pcm_f32le", tone(sample_rate), sample_rate)
    audio = decoded(path)

    assert audio.source is not None
    assert audio.source.sample_rate == sample_rate
    assert audio.duration_s == pytest.approx(SECONDS, abs=1e-4)
    inside = slice(1000, -1000)
    np.testing.assert_allclose(audio.pcm[inside], tone()[inside], atol=1e-4)


def test_mono_stays_mono(tmp_path: Path) -> None:
    samples = tone(channels=1)
    audio = decoded(encode(tmp_path / "a.wav", "pcm_f32le", samples, layout="mono"))

    assert audio.channels == 1
    np.testing.assert_array_equal(audio.mono(), samples[:, 0])
    np.testing.assert_array_equal(audio.stereo(), np.repeat(samples, 2, axis=1))


@pytest.mark.parametrize("decoder", ["av", "soundfile"])
def test_eight_channels_are_mixed_to_stereo(tmp_path: Path, decoder: str) -> None:
    # A different level in each of FL FR FC LFE BL BR SL SR tells their gains apart.
    levels = np.array([0.01, 0.02, 0.04, 0.08, 0.001, 0.002, 0.003, 0.005], np.float32)
    samples = np.tile(levels, (SAMPLE_RATE, 1))
    path = encode(tmp_path / "a.wav", "pcm_f32le", samples, layout="7.1")
    audio = decoded(path, decoder=decoder)

    half = np.sqrt(0.5)
    left = 0.01 + half * (0.04 + 0.001 + 0.003)
    right = 0.02 + half * (0.04 + 0.002 + 0.005)
    assert audio.channels == 2
    np.testing.assert_allclose(audio.pcm[5000], [left, right], rtol=1e-5)


@pytest.mark.parametrize("codec", ["flac", "aac", "libopus"])
def test_eight_channels_of_any_codec(tmp_path: Path, codec: str) -> None:
    path = encode(tmp_path / "a.mka", codec, tone(48000, channels=8), 48000, layout="7.1")
    audio = decoded(path)

    assert audio.source is not None
    assert audio.source.channels == 8
    assert audio.channels == 2
    assert audio.duration_s == pytest.approx(SECONDS, abs=0.06)


def test_channels_without_names_are_averaged(tmp_path: Path) -> None:
    samples = tone(channels=16)
    audio = decoded(encode(tmp_path / "a.wav", "pcm_f32le", samples, layout="16 channels"))

    np.testing.assert_allclose(audio.pcm[:, 0], samples.mean(axis=1), atol=1e-6)


def test_a_few_samples_are_enough(tmp_path: Path) -> None:
    audio = decoded(encode(tmp_path / "a.wav", "pcm_s16le", tone()[:2]))

    assert audio.pcm.shape == (2, 2)


def test_blocks_are_views_of_the_file(tmp_path: Path) -> None:
    audio = decoded(encode_format(tmp_path, "a.flac"))
    block = audio.block(1.0, 2.5)

    assert block.duration_s == 1.5
    assert np.shares_memory(block.pcm, audio.pcm)
    np.testing.assert_array_equal(block.pcm, audio.pcm[44100:110250])


def test_mono_is_the_mean_at_any_rate(tmp_path: Path) -> None:
    audio = decoded(encode_format(tmp_path, "float.wav"))
    expected = tone(16000).mean(axis=1)

    np.testing.assert_allclose(audio.mono(), tone().mean(axis=1), atol=1e-6)
    assert audio.mono() is audio.mono()
    [resampled] = audio.resampled_mono(16000)
    assert len(resampled) == len(expected)
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=1e-4)


def test_blocks_are_resampled_as_one() -> None:
    noise = np.random.Generator(np.random.PCG64(4)).uniform(-1, 1, 130 * SAMPLE_RATE)
    audio = Audio(Path("noise.wav"), None, noise.astype(np.float32)[:, np.newaxis])

    resampled = list(audio.resampled_mono(16000))

    assert len(resampled) == 3
    expected = soxr.resample(audio.mono(), SAMPLE_RATE, 16000)
    np.testing.assert_array_equal(np.concatenate(resampled), expected)


def test_audio_without_samples_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without its samples"):
        Audio.without_pcm(tmp_path / "a.wav").mono()


# Bounds


def write_wav(path: Path, sample_rate: int, channels: int = 1, seconds: float = 1.0) -> Path:
    samples = np.zeros((max(int(sample_rate * seconds), 1), channels), np.float32)
    soundfile.write(path, samples, sample_rate, subtype="PCM_16", format="WAV")
    return path


@pytest.mark.parametrize("decoder", ["av", "soundfile"])
@pytest.mark.parametrize(("rate", "channels"), [(1, 1), (999, 2), (800_000, 1), (44100, 65)])
def test_rates_and_channels_that_do_not_exist_are_refused(
    tmp_path: Path, decoder: str, rate: int, channels: int
) -> None:
    path = write_wav(tmp_path / "a.wav", rate, channels, seconds=100_000 if rate == 1 else 0.1)
    with pytest.raises(UnsupportedFormatError, match=r"sample rate|channels"):
        decoded(path, decoder=decoder)


def test_of_audio_that_is_too_long_the_beginning_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(8000 * 30), 8000)
    assert decode(path, tmp_path / "a.npy", limits=Limits(longest_h=0.01)).damage is None
    source = decode(path, tmp_path / "b.npy", limits=Limits(longest_h=0.002))
    assert source.damage == "is longer than 0.002 h, which AUDIO_MAX_HOURS allows"
    assert source.complete_share == pytest.approx(source.duration_s / 30.0, abs=0.03)
    assert 7.2 <= source.duration_s < 17.0
    with pytest.raises(CorruptFileError, match="AUDIO_MAX_HOURS"):
        decode(path, tmp_path / "c.npy", limits=Limits(longest_h=0.002, shortest_s=math.inf))
    assert not list(tmp_path.glob("c.npy*"))


def test_decoding_leaves_space_on_the_disk(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", 8000)
    with pytest.raises(OSError, match="kept free") as raised:
        decode(path, tmp_path / "b.npy", limits=Limits(reserve_mib=1 << 40))
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("b.npy*"))
