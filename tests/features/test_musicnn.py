import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnxruntime import get_available_providers

from audio_assets.audio.decode import decode
from audio_assets.audio.pcm import SAMPLE_RATE, Audio
from audio_assets.features import musicnn
from audio_assets.features.base import Row, check_row
from audio_assets.features.musicnn import FEATURE_SET
from audio_assets.features.musicnn_network import (
    DeviceError,
    WeightsError,
    load_network,
    read_checkpoint,
)

Extractor = Callable[[Audio], Row]

MODELS = {"MSD_musicnn": "msd_tags", "MTT_musicnn": "mtt_tags"}
PATCH_S = musicnn.PATCH_FRAMES * musicnn.HOP_SIZE / musicnn.SAMPLE_RATE
EXTRACTORS = [
    pytest.param(FEATURE_SET.extract, id="essentia"),
    pytest.param(FEATURE_SET.extract_alternative, id="librosa"),
]


def synthesized(seconds: float) -> NDArray[np.float32]:
    """Struck chords with overtones, another every half second, each with a click of noise."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    chord = np.floor(time * 2)
    signal = np.zeros_like(time)
    for step in (0, 4, 7):
        pitch = 220 * 2 ** ((step + chord * 5 % 12) / 12)
        for overtone in range(1, 6):
            signal += np.sin(2 * np.pi * pitch * overtone * time) / overtone
    decay = np.exp(-8 * (time * 2 % 1))
    noise = np.random.Generator(np.random.PCG64(1)).uniform(-1, 1, len(time))
    samples: NDArray[np.float64] = 0.08 * signal * decay + 0.2 * noise * decay**8
    return samples.astype(np.float32)


def audio(samples: NDArray[np.float32]) -> Audio:
    return Audio(Path("synthesized.wav"), None, np.atleast_2d(samples.T).T)


def activations(row: Row) -> list[float]:
    return [activation for column in MODELS.values() for activation in row[column].values()]


# --- Against the original network --------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What the original network said of a recording, by model."""

    audio: Audio
    expected: Mapping[str, Any]


@pytest.fixture(scope="module", params=["music/vibe_ace.ogg", "music/sugar_plum_fairy.ogg"])
def reference(
    request: pytest.FixtureRequest, recordings: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    file, numbers = recordings / request.param, recordings.parent / "musicnn_reference.json"
    if not (file.is_file() and numbers.is_file()):
        pytest.skip(f"no {file} or no {numbers}")
    scratch = tmp_path_factory.mktemp("scratch") / "audio.npy"
    decode(file, scratch)
    expected = json.loads(numbers.read_text("utf-8"))[f"audio/{request.param}"]
    return Reference(Audio.open(scratch, file), expected)


@pytest.mark.parametrize("extract", EXTRACTORS)
def test_tags_are_those_of_the_original_network(extract: Extractor, reference: Reference) -> None:
    row = extract(reference.audio)

    for model, column in MODELS.items():
        expected = reference.expected[model]
        assert row["patches"] == expected["patches"]
        assert list(row[column].values()) == pytest.approx(expected["mean_tags"], abs=1e-5)


@pytest.mark.parametrize("mel_power", [musicnn.mel_power_essentia, musicnn.mel_power_librosa])
def test_embedding_is_that_of_the_original_network(
    mel_power: musicnn.MelPower, reference: Reference
) -> None:
    """The original's means are over as many copies of the first patch's embedding."""
    first_patch = next(musicnn.patches(reference.audio.resampled_mono(musicnn.SAMPLE_RATE)))
    log_mel = np.log10(10_000 * mel_power(first_patch) + 1)

    for model, expected in reference.expected.items():
        _, embedding = load_network(model).run(log_mel)
        assert embedding.tolist() == pytest.approx(expected["mean_penultimate"], abs=1e-4)


# --- Without recordings ------------------------------------------------------------------------


@pytest.mark.parametrize("extract", EXTRACTORS)
def test_synthesized_music_keeps_its_values(extract: Extractor) -> None:
    """The values were computed when those of the recordings were right."""
    row = extract(audio(synthesized(7)))

    check_row(FEATURE_SET, row, None)
    assert row["patches"] == 2
    assert len(row["msd_tags"]) == len(row["mtt_tags"]) == 50
    assert len(row["embedding"]) == 200
    assert row["top_tags"] == ["electronic", "electro", "electronica", "House", "dance"]
    assert row["top_tag"] == "electronic"
    msd_tags = {"electronic": 0.45584, "electro": 0.19730, "dance": 0.11156}
    assert {tag: row["msd_tags"][tag] for tag in msd_tags} == pytest.approx(msd_tags, abs=1e-4)
    mtt_tags = {"guitar": 0.54582, "strings": 0.22825, "solo": 0.08872}
    assert {tag: row["mtt_tags"][tag] for tag in mtt_tags} == pytest.approx(mtt_tags, abs=1e-4)
    embedding = {83: 2.7356, 117: 2.4284, 119: 2.4055, 75: 2.3934}
    assert {unit: row["embedding"][unit] for unit in embedding} == pytest.approx(
        embedding, abs=1e-3
    )


def test_both_libraries_make_one_spectrum() -> None:
    [samples] = audio(synthesized(4)).resampled_mono(musicnn.SAMPLE_RATE)

    essentia, librosa = (
        10_000 * power(samples) for power in (musicnn.mel_power_essentia, musicnn.mel_power_librosa)
    )

    assert essentia.shape == librosa.shape
    np.testing.assert_allclose(np.log10(essentia + 1), np.log10(librosa + 1), rtol=0, atol=2e-3)
    np.testing.assert_allclose(essentia.sum(), librosa.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [(1, [1]), (186, [186]), (187, [187]), (373, [187]), (374, [187, 187])],
)
def test_patches_do_not_overlap_and_the_rest_is_left_out(frames: int, expected: list[int]) -> None:
    samples = np.arange(1, (frames - 1) * musicnn.HOP_SIZE + 1, dtype=np.float32)

    patches = list(musicnn.patches(np.array_split(samples, 7)))

    assert [musicnn.mel_power_librosa(patch).shape for patch in patches] == [
        (length, 96) for length in expected
    ]
    half = musicnn.FRAME_SIZE // 2
    assert not patches[0][:half].any()
    for index, patch in enumerate(patches[1:], start=1):
        assert patch[half] == index * musicnn.PATCH_FRAMES * musicnn.HOP_SIZE + 1


@pytest.mark.parametrize("extract", EXTRACTORS)
@pytest.mark.parametrize("seconds", [0.001, 0.05, 1.0, 2.95])
def test_a_recording_shorter_than_a_patch_has_tags(extract: Extractor, seconds: float) -> None:
    row = extract(audio(synthesized(seconds) + np.float32(0.01)))

    check_row(FEATURE_SET, row, None)
    assert row["patches"] == 1
    assert np.isfinite(row["embedding"]).all()
    assert all(0 <= activation <= 1 for activation in activations(row))


def test_a_recording_just_shorter_than_a_patch_is_tagged_like_the_patch() -> None:
    whole, short = (FEATURE_SET.extract(audio(synthesized(seconds))) for seconds in (3.0, 2.9))

    assert activations(short) == pytest.approx(activations(whole), abs=0.05)


@pytest.mark.parametrize("extract", EXTRACTORS)
@pytest.mark.parametrize("seconds", [0, 1e-9, 0.05, 7])
def test_silence_has_no_tags(extract: Extractor, seconds: float) -> None:
    row = extract(audio(np.zeros((math.ceil(seconds * SAMPLE_RATE), 2), dtype=np.float32)))

    check_row(FEATURE_SET, row, None)
    assert row.pop("patches") == 0
    assert set(row.values()) == {None}


def test_silent_patches_do_not_count() -> None:
    sound = synthesized(1.5 * PATCH_S)

    short, long = (
        FEATURE_SET.extract(
            audio(np.pad(sound, (0, round(silent_patches * PATCH_S * SAMPLE_RATE))))
        )
        for silent_patches in (0.6, 4)
    )

    assert short["patches"] == long["patches"] == 2
    assert activations(long) == pytest.approx(activations(short))


@pytest.mark.parametrize("extract", EXTRACTORS)
@pytest.mark.parametrize("gain", [1e-4, 1e4, 1e25])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_any_level_gives_finite_values_or_none(extract: Extractor, gain: float) -> None:
    row = extract(audio(synthesized(3.5) * np.float32(gain)))

    assert row["patches"] == 0 or np.isfinite(activations(row) + row["embedding"]).all()


def test_blocks_combine_by_their_patches() -> None:
    samples = synthesized(4 * PATCH_S)
    split = round(3 * PATCH_S * SAMPLE_RATE)
    whole = audio(samples)
    blocks = [audio(samples[:split]), audio(samples[split:])]

    row = FEATURE_SET.combine(
        [FEATURE_SET.extract(block) for block in blocks], [block.duration_s for block in blocks]
    )

    expected = FEATURE_SET.extract(whole)
    check_row(FEATURE_SET, row, None)
    assert row["patches"] == expected["patches"] == 4
    assert activations(row) == pytest.approx(activations(expected), abs=5e-3)
    assert row["embedding"] == pytest.approx(expected["embedding"], abs=5e-2)
    assert row["top_tag"] == expected["top_tag"]


def test_silent_blocks_do_not_count() -> None:
    sound = FEATURE_SET.extract(audio(synthesized(3.5)))
    silence = FEATURE_SET.extract(audio(np.zeros(5 * SAMPLE_RATE, dtype=np.float32)))

    assert FEATURE_SET.combine([silence, sound, silence], [5.0, 3.5, 5.0]) == sound
    assert FEATURE_SET.combine([silence, silence], [5.0, 5.0]) == silence


# --- The checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the weights, with this project's metadata, that is found before the installed."""
    installed = Path(str(distribution("audio-assets").locate_file("")))
    for folder in ("audio_assets_weights", f"audio_assets-{version('audio-assets')}.dist-info"):
        shutil.copytree(installed / folder, tmp_path / folder)
    monkeypatch.syspath_prepend(tmp_path)
    load_network.cache_clear()
    yield tmp_path / "audio_assets_weights"
    load_network.cache_clear()


def test_the_weights_have_their_licence(weights: Path) -> None:
    assert "Permission to use, copy, modify" in (weights / "LICENSE.md").read_text("utf-8")


def test_missing_weights_are_noticed(weights: Path) -> None:
    assert load_network("MSD_musicnn").tags[:2] == ("rock", "pop")

    load_network.cache_clear()
    shutil.rmtree(weights / "MSD_musicnn")
    with pytest.raises(WeightsError, match=r"MSD_musicnn/\.index of MusiCNN's weights is missing"):
        load_network("MSD_musicnn")


def test_damaged_weights_are_noticed(weights: Path) -> None:
    data = weights / "MSD_musicnn" / ".data-00000-of-00001"
    damaged = bytearray(data.read_bytes())
    damaged[4_000_000] ^= 1
    data.write_bytes(damaged)

    with pytest.raises(WeightsError, match="damaged: `audio-assets doctor` says how"):
        load_network("MSD_musicnn")


@pytest.fixture(params=["auto", "cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AUDIO_ASSETS_DEVICE", request.param)
    load_network.cache_clear()
    yield request.param
    load_network.cache_clear()


def test_only_a_gpu_that_is_demanded_must_be_there(device: str) -> None:
    if "CUDAExecutionProvider" in get_available_providers():
        pytest.skip("ONNX Runtime may find a GPU")
    if device == "cuda":
        with pytest.raises(DeviceError, match="finds no GPU that it can use"):
            load_network("MSD_musicnn")
    else:
        providers = load_network("MSD_musicnn").session.get_providers()
        assert providers == ["CPUExecutionProvider"]


def test_the_trained_variables_are_read() -> None:
    folder = Path(str(distribution("audio-assets").locate_file("audio_assets_weights/MTT_musicnn")))

    variables = read_checkpoint(folder / ".index", folder / ".data-00000-of-00001")

    assert variables["conv2d/kernel"].shape == (7, 38, 1, 204)
    assert variables["conv2d_4/kernel"].shape == (32, 1, 1, 51)
    assert variables["dense_1/bias"].shape == (50,)
    assert variables["beta1_power"].shape == ()
    assert all(np.isfinite(value).all() for value in variables.values())
    assert all(
        (value > 0).all() for name, value in variables.items() if name.endswith("/moving_variance")
    )


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    values = np.random.Generator(np.random.PCG64(2)).normal(size=500).astype(np.float32)
    written = {
        "layer/bias": values[:200],
        "layer/kernel": values[200:].reshape(5, 1, 60),
        "layer_1/bias": values[:0],
        "step": values[7:8].reshape(()),
    }

    read = read_checkpoint(*write_checkpoint(tmp_path, written))

    assert list(read) == list(written)
    for name, value in written.items():
        assert read[name].shape == value.shape
        np.testing.assert_array_equal(read[name], value)


def test_what_is_no_checkpoint_of_floats_is_refused(tmp_path: Path) -> None:
    value = {"weights": np.ones(3, dtype=np.float32)}
    index, data = write_checkpoint(tmp_path, value, data_type=9)
    with pytest.raises(ValueError, match="weights of the checkpoint is not float32"):
        read_checkpoint(index, data)

    index, data = write_checkpoint(tmp_path, value, compression=1)
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(index, data)

    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a TensorFlow checkpoint index"):
        read_checkpoint(index, data)


def varint(value: int) -> bytes:
    """A number in seven bits a byte."""
    encoded = b""
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer message, which leaves out numbers that are 0."""
    encoded = b""
    for number, value in fields:
        if isinstance(value, bytes):
            encoded += varint(number << 3 | 2) + varint(len(value)) + value
        elif value:
            encoded += varint(number << 3) + varint(value)
    return encoded


def block(entries: Iterable[tuple[bytes, bytes]], compression: int = 0) -> bytes:
    """A table block, in which keys share what they can with the one before, and its trailer."""
    content, before = b"", b""
    for key, value in entries:
        shared = next(n for n in range(len(before), -1, -1) if key.startswith(before[:n]))
        content += varint(shared) + varint(len(key) - shared) + varint(len(value))
        content += key[shared:] + value
        before = key
    return content + struct.pack("<IIB", 0, 1, compression) + b"CRC."


def write_checkpoint(
    folder: Path,
    variables: Mapping[str, NDArray[np.float32]],
    data_type: int = 1,
    compression: int = 0,
) -> tuple[Path, Path]:
    """Write a checkpoint whose index has two variables in a block."""
    data, entries = b"", [(b"", message((1, 1)))]
    for name, value in variables.items():
        shape = message(*((2, message((1, size))) for size in value.shape))
        entry = message((1, data_type), (2, shape), (4, len(data)), (5, value.nbytes))
        # The checksum, a fixed-size field.
        entries.append((name.encode(), entry + varint(6 << 3 | 5) + b"CRC."))
        data += value.tobytes()
    index, handles = b"", []
    for first in range(0, len(entries), 2):
        part = entries[first : first + 2]
        written = block(part, compression)
        handles.append((part[-1][0], varint(len(index)) + varint(len(written) - 5)))
        index += written
    written = block(handles)
    footer = varint(0) + varint(0) + varint(len(index)) + varint(len(written) - 5)
    index += written + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    paths = folder / ".index", folder / ".data"
    for path, content in zip(paths, (index, data), strict=True):
        path.write_bytes(content)
    return paths
