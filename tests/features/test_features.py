"""Each feature set against the reference algorithms, its alternative, and hard inputs."""

import contextlib
import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import av.filter
import essentia.standard as es
import numpy as np
import pytest
import soundfile
from dagster._core.definitions.utils import DISALLOWED_NAMES
from scipy.signal import resample

from audio_assets.audio.decode import decode
from audio_assets.audio.pcm import SAMPLE_RATE, Audio, Samples
from audio_assets.defs.checks import published_tables
from audio_assets.defs.robustness_tables import robustness_tables
from audio_assets.extraction.recovery import DECODE, IDENTIFY
from audio_assets.extraction.worker import IDENTIFY_STAGES
from audio_assets.features import BROKEN_FEATURE_SETS, FEATURE_SETS
from audio_assets.features.base import (
    RESERVED_NAMES,
    Column,
    FeatureSet,
    ImplausibleValueError,
    Row,
    check_row,
)
from audio_assets.features.key import camelot
from tests.features.conftest import MakeAudio
from tests.features.signals import sine_of_levels

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:librosa")

PCM_SETS = [name for name, f in FEATURE_SETS.items() if f.reads_pcm and name != "musicnn"]


def spectra(samples: Samples, frame: int, hop: int, window: str = "hann") -> list[Samples]:
    windowing, spectrum = es.Windowing(type=window), es.Spectrum()
    frames = es.FrameGenerator(samples, frameSize=frame, hopSize=hop)
    return [spectrum(windowing(samples)) for samples in frames]


def numbers(value: object) -> list[float]:
    if isinstance(value, list):
        return [float(part) for part in value]
    return [float(value)] if isinstance(value, int | float) else []


def assert_rhythm_is_essentias(audio: Audio) -> None:
    row = FEATURE_SETS["rhythm"].extract(audio)
    bpm, beats, confidence, _, _ = es.RhythmExtractor2013(method="multifeature")(audio.mono())
    _, onset_rate = es.OnsetRate()(audio.mono())

    assert row["beats"] == beats.tolist()
    assert row["beats_count"] == len(beats)
    assert row["onset_rate"] == pytest.approx(onset_rate)
    if len(beats) >= 4 and 35 <= bpm <= 213:
        assert row["bpm"] == pytest.approx(bpm, rel=1e-5)
        assert row["beat_confidence"] == pytest.approx(confidence)
    else:
        assert row["bpm"] is row["beat_confidence"] is None


def assert_key_is_essentias(audio: Audio) -> None:
    row = FEATURE_SETS["key"].extract(audio)
    for profile, prefix in (("bgate", ""), ("temperley", "second_")):
        key, scale, strength = es.KeyExtractor(profileType=profile)(audio.mono())
        if strength == 0:
            assert row[f"{prefix}key"] is row[f"{prefix}strength"] is None
            continue
        assert (row[f"{prefix}key"], row[f"{prefix}scale"]) == (key, scale)
        assert row[f"{prefix}strength"] == pytest.approx(strength, rel=1e-5)


def assert_loudness_is_ffmpegs(audio: Audio) -> None:
    """Compare with FFmpeg's ebur128, which writes two decimals."""
    graph = av.filter.Graph()
    layout = "stereo" if audio.channels == 2 else "mono"
    options = f"sample_rate=44100:sample_fmt=flt:channel_layout={layout}:time_base=1/44100"
    source, sink = graph.add("abuffer", options), graph.add("abuffersink")
    meter = graph.add("ebur128", "metadata=1")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(audio.pcm.reshape(1, -1), format="flt", layout=layout)
    frame.sample_rate = SAMPLE_RATE
    source.push(frame)
    source.push(None)
    read = []
    with contextlib.suppress(av.EOFError):
        while True:
            read.append({name: float(value) for name, value in sink.pull().metadata.items()})
    row = FEATURE_SETS["loudness"].extract(audio)

    read = [values for values in read if values]  # what is left at the end has none
    assert row["integrated_lufs"] == pytest.approx(read[-1]["lavfi.r128.I"], abs=0.02)
    assert row["momentary_max_lufs"] == pytest.approx(
        max(values["lavfi.r128.M"] for values in read), abs=0.02
    )
    assert row["short_term_max_lufs"] == pytest.approx(
        max(values["lavfi.r128.S"] for values in read), abs=0.02
    )
    if audio.duration_s > 10:
        assert row["loudness_range_lu"] == pytest.approx(read[-1]["lavfi.r128.LRA"], abs=0.1)


@pytest.fixture(scope="module", params=["music", "recording"])
def audio(request: pytest.FixtureRequest, make_audio: MakeAudio, music: Samples) -> Audio:
    if request.param == "music":
        return make_audio(music)
    recorded: Audio = request.getfixturevalue("recording")
    return recorded


class TestReference:
    """The primary extractors give what the reference algorithm gives when called directly."""

    def test_rhythm(self, audio: Audio) -> None:
        assert_rhythm_is_essentias(audio)

    def test_loudness(self, audio: Audio) -> None:
        row = FEATURE_SETS["loudness"].extract(audio)
        second = audio.block(5.25, 6.25)
        oversampled = resample(second.pcm, 4 * len(second.pcm))
        part = FEATURE_SETS["loudness"].extract(second)

        assert_loudness_is_ffmpegs(audio)
        assert row["dynamic_complexity_db"] == pytest.approx(
            es.DynamicComplexity()(audio.mono())[0], abs=1e-4
        )
        assert part["true_peak_dbtp"] == pytest.approx(
            20 * math.log10(np.abs(oversampled).max()), abs=0.2
        )

    def test_danceability(self, audio: Audio) -> None:
        row = FEATURE_SETS["danceability"].extract(audio)
        danceability, dfa = es.Danceability()(audio.mono())

        assert row["danceability"] == pytest.approx(danceability, rel=1e-5)
        np.testing.assert_allclose(row["dfa_exponents"], dfa, atol=1e-4)

    def test_key(self, audio: Audio) -> None:
        assert_key_is_essentias(audio)

    def test_mfcc(self, audio: Audio) -> None:
        row = FEATURE_SETS["mfcc"].extract(audio)
        found = [es.MFCC()(s)[1] for s in spectra(audio.mono(), 2048, 1024)]
        frames = np.array(found, np.float64)

        for name, expected in (("mean", frames.mean(axis=0)), ("std", frames.std(axis=0))):
            np.testing.assert_allclose(row[name], expected, rtol=1e-6, atol=1e-3)

    def test_chroma(self, audio: Audio) -> None:
        row = FEATURE_SETS["chroma"].extract(audio)
        peaks = es.SpectralPeaks(
            orderBy="magnitude", magnitudeThreshold=1e-5, minFrequency=40, maxFrequency=5000
        )
        found = [peaks(s) for s in spectra(audio.mono(), 4096, 2048, "blackmanharris62")]
        hpcp, tuning = es.HPCP(), es.TuningFrequency()
        frames = np.array([hpcp(*peaks_of_frame) for peaks_of_frame in found], np.float64)

        np.testing.assert_allclose(row["mean"], frames.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(row["std"], frames.std(axis=0), atol=1e-5)
        assert row["tuning_hz"] == pytest.approx(
            [tuning(*peaks_of_frame)[0] for peaks_of_frame in found][-1]
        )

    def test_spectral(self, audio: Audio) -> None:
        row = FEATURE_SETS["spectral"].extract(audio)
        found = spectra(audio.mono(), 2048, 1024)
        flux = es.Flux()
        shape = [es.DistributionShape()(es.CentralMoments(range=22050)(s)) for s in found]
        expected = {
            "centroid": [es.Centroid(range=22050)(s) for s in found],
            "rolloff": [es.RollOff()(s) for s in found],
            "spread": [spread**0.5 for spread, _, _ in shape],
            "flux": [flux(s) for s in found],
            "flatness": [-60 * es.FlatnessDB()(es.BarkBands()(s)) for s in found],
            "zero_crossing_rate": [
                es.ZeroCrossingRate()(frame)
                for frame in es.FrameGenerator(audio.mono(), frameSize=2048, hopSize=1024)
            ],
            "contrast": [es.SpectralContrast(sampleRate=44100)(s)[0] for s in found],
        }
        for name, values in expected.items():
            frames = np.array(values, np.float64)
            # Bands that were filtered out hold the rounding errors of the Fourier transform.
            rtol = 1e-3 if name == "flatness" else 1e-5
            for which, value in (("mean", frames.mean(axis=0)), ("std", frames.std(axis=0))):
                np.testing.assert_allclose(row[f"{name}_{which}"], value, rtol=rtol, atol=2e-6)


class TestAlternative:
    """The alternative extractors measure the same thing in the same units."""

    @staticmethod
    def both(name: str, audio: Audio) -> tuple[Row, Row]:
        feature_set = FEATURE_SETS[name]
        return feature_set.extract(audio), feature_set.extract_alternative(audio)

    def test_rhythm(self, audio: Audio) -> None:
        primary, alternative = self.both("rhythm", audio)

        octaves = math.log2(alternative["bpm"] / primary["bpm"])
        assert octaves == pytest.approx(round(octaves), abs=0.03)
        assert len(alternative["beats"]) == alternative["beats_count"]
        assert np.median(np.diff(alternative["beats"])) == pytest.approx(
            60 / alternative["bpm"], rel=0.05
        )
        assert alternative["onset_rate"] == pytest.approx(primary["onset_rate"], rel=0.5)

    def test_loudness(self, audio: Audio) -> None:
        primary, alternative = self.both("loudness", audio)

        # Essentia's K-weighting at 44.1 kHz reads up to 0.5 LU below that of BS.1770.
        for name in ("integrated_lufs", "momentary_max_lufs", "short_term_max_lufs"):
            assert alternative[name] == pytest.approx(primary[name], abs=0.4)
        assert alternative["loudness_range_lu"] == pytest.approx(
            primary["loudness_range_lu"], abs=0.3
        )
        assert alternative["true_peak_dbtp"] == pytest.approx(primary["true_peak_dbtp"], abs=0.2)
        assert alternative["dynamic_complexity_db"] == pytest.approx(
            primary["dynamic_complexity_db"], abs=0.01
        )

    def test_danceability(self, audio: Audio) -> None:
        primary, alternative = self.both("danceability", audio)

        assert alternative["danceability"] == pytest.approx(primary["danceability"], rel=0.01)
        np.testing.assert_allclose(
            alternative["dfa_exponents"], primary["dfa_exponents"], atol=0.05
        )

    def test_key(self, audio: Audio) -> None:
        primary, alternative = self.both("key", audio)

        for name in ("key", "scale", "camelot", "second_key", "second_scale"):
            assert alternative[name] == primary[name]

    def test_mfcc(self, audio: Audio) -> None:
        primary, alternative = self.both("mfcc", audio)

        np.testing.assert_allclose(alternative["mean"], primary["mean"], rtol=0.01, atol=0.5)
        np.testing.assert_allclose(alternative["std"], primary["std"], rtol=0.01, atol=0.5)

    def test_chroma(self, audio: Audio) -> None:
        primary, alternative = self.both("chroma", audio)

        np.testing.assert_allclose(alternative["mean"], primary["mean"], atol=0.05)
        np.testing.assert_allclose(alternative["std"], primary["std"], atol=0.05)
        cents = 1200 * math.log2(alternative["tuning_hz"] / primary["tuning_hz"])
        assert abs(cents) < 15

    def test_spectral(self, audio: Audio) -> None:
        primary, alternative = self.both("spectral", audio)

        for name in ("centroid", "rolloff", "spread", "flux", "flatness"):
            assert alternative[f"{name}_mean"] == pytest.approx(primary[f"{name}_mean"], rel=0.01)
            assert alternative[f"{name}_std"] == pytest.approx(primary[f"{name}_std"], rel=0.01)
        np.testing.assert_allclose(
            alternative["contrast_mean"], primary["contrast_mean"], atol=0.005
        )
        assert alternative["zero_crossing_rate_mean"] == pytest.approx(
            primary["zero_crossing_rate_mean"], rel=0.02
        )


def test_known_music(make_audio: MakeAudio, music: Samples) -> None:
    audio = make_audio(music)
    rhythm = FEATURE_SETS["rhythm"].extract(audio)
    key = FEATURE_SETS["key"].extract(audio)

    assert rhythm["bpm"] == pytest.approx(120, abs=1)
    assert (key["key"], key["scale"], key["camelot"]) == ("C", "major", "8B")


def test_a_sure_tempo_is_told_from_noise(make_audio: MakeAudio, music: Samples) -> None:
    feature_set = FEATURE_SETS["rhythm"]
    sure, doubtful = (
        feature_set.extract(make_audio(samples)) for samples in (music, rhythmic_inputs()["noise"])
    )
    assert sure["bpm_confidence"] > 0.85
    assert sure["bpm_second"] == pytest.approx(60, abs=1)
    assert doubtful["bpm_confidence"] < 0.3
    alternative = feature_set.extract_alternative(make_audio(music))
    assert alternative["bpm_confidence"] is alternative["bpm_second"] is None


def test_loudness_of_the_ebu_test_tone(make_audio: MakeAudio) -> None:
    # EBU Tech 3341, test case 1: a stereo sine of 1 kHz at -23 dBFS measures -23 LUFS. In one
    # channel alone, and so in a mono file, it measures 3.01 LU less.
    time = np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE
    tone = 10 ** (-23 / 20) * np.sin(2 * np.pi * 1000 * time)
    for extract in (
        FEATURE_SETS["loudness"].extract,
        FEATURE_SETS["loudness"].extract_alternative,
    ):
        stereo, mono = extract(make_audio(np.stack([tone, tone], 1))), extract(make_audio(tone))
        assert stereo["integrated_lufs"] == pytest.approx(-23, abs=0.1)
        assert mono["integrated_lufs"] == pytest.approx(-26.01, abs=0.1)
        assert stereo["loudness_range_lu"] == pytest.approx(0, abs=0.1)
        assert stereo["true_peak_dbtp"] == pytest.approx(-23, abs=0.01)


@pytest.mark.parametrize(
    "parts",
    [
        [(10, -72), (10, -36), (60, -23), (10, -36), (10, -72)],
        [(20, -26), (20.1, -20), (20, -26)],
    ],
)
def test_gates_of_integrated_loudness(
    make_audio: MakeAudio, parts: list[tuple[float, float]]
) -> None:
    """EBU Tech 3341, test cases 4 and 5."""
    row = FEATURE_SETS["loudness"].extract(make_audio(sine_of_levels(*parts)))
    assert row["integrated_lufs"] == pytest.approx(-23, abs=0.1)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [((-20, -30), 10), ((-20, -15), 5), ((-40, -20), 20), ((-50, -35, -20, -35, -50), 15)],
)
def test_loudness_range_of_levels(
    make_audio: MakeAudio, levels: tuple[float, ...], expected: float
) -> None:
    """EBU Tech 3342, test cases 1 to 4."""
    audio = make_audio(sine_of_levels(*((20, level) for level in levels)))
    assert FEATURE_SETS["loudness"].extract(audio)["loudness_range_lu"] == pytest.approx(
        expected, abs=0.1
    )


@pytest.mark.parametrize("channels", [1, 2])
def test_loudness_below_hearing_is_filtered(make_audio: MakeAudio, channels: int) -> None:
    """A constant, which Essentia's K-weighting lets through, and a bass of 30 Hz."""
    samples = np.full((4 * SAMPLE_RATE, channels), 0.5)
    assert_loudness_is_ffmpegs(make_audio(samples))
    samples[:, 0] += 0.2 * np.sin(2 * np.pi * 30 * np.arange(len(samples)) / SAMPLE_RATE)
    assert_loudness_is_ffmpegs(make_audio(samples))


def test_true_peak_lies_between_samples(make_audio: MakeAudio) -> None:
    # A quarter of the sample rate at 45 degrees: samples at 0.707 of the peak.
    tone = 0.5 * np.sin(2 * np.pi * np.arange(2 * SAMPLE_RATE) / 4 + np.pi / 4)
    tone *= np.hanning(len(tone)) ** 0.1
    row = FEATURE_SETS["loudness"].extract(make_audio(tone))

    assert 20 * math.log10(np.abs(tone).max()) == pytest.approx(-9.03, abs=0.01)
    assert row["true_peak_dbtp"] == pytest.approx(-6.02, abs=0.05)


@pytest.mark.parametrize("place", [0, 31, 1000, 10 * SAMPLE_RATE - 1, 11 * SAMPLE_RATE - 2])
def test_true_peak_is_found_everywhere(make_audio: MakeAudio, place: int) -> None:
    """Two equal samples peak between them, louder than a larger sample elsewhere."""
    samples = np.zeros((11 * SAMPLE_RATE, 2))
    samples[5 * SAMPLE_RATE, 0] = 0.6
    samples[place : place + 2, 1] = 0.5
    row = FEATURE_SETS["loudness"].extract(make_audio(samples))
    assert 10 ** (row["true_peak_dbtp"] / 20) == pytest.approx(2 * 0.5 * 2 / np.pi, rel=0.005)


def rhythmic_inputs() -> dict[str, Samples]:
    generator = np.random.default_rng(3)
    noise = 0.1 * generator.standard_normal(12 * SAMPLE_RATE)
    inputs = {"noise": noise, "a second": noise[:SAMPLE_RATE], "a frame": noise[:2048]}
    inputs["a sample more"] = noise[:2049]
    inputs["after silence"] = np.concatenate([np.zeros(3 * SAMPLE_RATE), noise[: 3 * SAMPLE_RATE]])
    for bpm in (63, 97, 174):
        since_beat = np.arange(len(noise)) % round(60 / bpm * SAMPLE_RATE)
        inputs[f"{bpm} bpm"] = noise * (0.01 + np.exp(-since_beat / 500))
    return inputs


@pytest.mark.parametrize("kind", rhythmic_inputs())
def test_rhythm_is_that_of_essentia(make_audio: MakeAudio, kind: str) -> None:
    assert_rhythm_is_essentias(make_audio(rhythmic_inputs()[kind]))


@pytest.mark.parametrize("size", [1, 2049, 4096, 6144, 6145, 3 * SAMPLE_RATE])
def test_key_is_that_of_essentia(make_audio: MakeAudio, size: int) -> None:
    noise = np.random.default_rng(7).normal(0, 0.1, size)
    assert_key_is_essentias(make_audio(noise))
    assert_key_is_essentias(make_audio(np.concatenate([np.zeros(20000), noise])))


def test_chroma_starts_with_a(make_audio: MakeAudio) -> None:
    time = np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE
    feature_set = FEATURE_SETS["chroma"]
    for semitones in (0, 3, 11):
        audio = make_audio(0.3 * np.sin(2 * np.pi * 440 * 2 ** (semitones / 12) * time))
        assert np.argmax(feature_set.extract(audio)["mean"]) == semitones
        assert np.argmax(feature_set.extract_alternative(audio)["mean"]) == semitones


def test_camelot_wheel() -> None:
    known = {"8B": ("C", "major"), "8A": ("A", "minor"), "12B": ("E", "major")}
    known |= {"5A": ("C", "minor"), "1A": ("Ab", "minor"), "2B": ("F#", "major")}
    assert {camelot(*key): key for key in known.values()} == known
    tonics = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
    wheel = {camelot(*key) for key in itertools.product(tonics, ("major", "minor"))}
    assert wheel == {f"{number}{letter}" for number in range(1, 13) for letter in "AB"}


def hard_inputs() -> dict[str, Samples]:
    generator = np.random.default_rng(2)
    minute = np.zeros((5 * SAMPLE_RATE, 2))
    half = minute.copy()
    half[: len(half) // 2] = 0.1 * generator.standard_normal((len(half) // 2, 2))
    click = minute[:, 0].copy()
    click[1000] = 1.0
    return {
        "silence": minute,
        "one sample": np.full((1, 1), 0.5),
        "50 ms": 0.1 * generator.standard_normal((2205, 2)),
        "50 ms of silence": np.zeros((2205, 1)),
        "half a second": 0.1 * generator.standard_normal((SAMPLE_RATE // 2, 1)),
        "a constant": np.full((2 * SAMPLE_RATE, 1), 0.5),
        "then silence": half,
        "one click": click,
        "under the last bit": 1e-7 * generator.standard_normal(2 * SAMPLE_RATE),
        "far over full scale": 1e6 * generator.standard_normal((2 * SAMPLE_RATE, 2)),
        "clipped": np.sign(generator.standard_normal((2 * SAMPLE_RATE, 2))),
    }


def assert_fits(feature_set: FeatureSet, row: Row) -> None:
    check_row(feature_set, row, None)
    for column in feature_set.columns:
        value = row[column.name]
        assert value is None or type(value) in (int, float, str, list), column.name
        assert all(math.isfinite(number) for number in numbers(value)), column.name
        if column.type.endswith("]") and not column.type.endswith("[]") and value is not None:
            assert len(value) == int(column.type.split("[")[1][:-1]), column.name


@pytest.mark.parametrize("kind", hard_inputs())
@pytest.mark.parametrize("name", PCM_SETS)
def test_hard_inputs_give_values_or_null(make_audio: MakeAudio, name: str, kind: str) -> None:
    feature_set = FEATURE_SETS[name]
    audio = make_audio(hard_inputs()[kind])
    for extract in (feature_set.extract, feature_set.extract_alternative):
        assert_fits(feature_set, extract(audio))


@pytest.mark.parametrize("name", PCM_SETS)
def test_silence_has_no_values(make_audio: MakeAudio, name: str) -> None:
    feature_set = FEATURE_SETS[name]
    audio = make_audio(np.zeros(3 * SAMPLE_RATE))
    defined = {"beats_count": 0, "beats": [], "onset_rate": 0.0}
    for extract in (feature_set.extract, feature_set.extract_alternative):
        row = extract(audio)
        if name == "mfcc":
            # The cepstrum of a floor: level alone.
            assert row["mean"][0] < -1000
            assert row["mean"][1:] == pytest.approx([0] * 12, abs=0.01)
        else:
            assert row == {column: defined.get(column) for column in row}


class TestBlocks:
    """Rows of consecutive blocks join into the row of the file."""

    @staticmethod
    def combined(name: str, audio: Audio, seconds: float = 5.0) -> tuple[Row, Row]:
        feature_set = FEATURE_SETS[name]
        starts = np.arange(0, audio.duration_s, seconds)
        blocks = [audio.block(start, start + seconds) for start in starts]
        rows = [feature_set.extract(block) for block in blocks]
        row = feature_set.combine(rows, [block.duration_s for block in blocks])
        assert_fits(feature_set, row)
        return feature_set.extract(audio), row

    @pytest.mark.parametrize("name", ["mfcc", "spectral", "chroma"])
    def test_statistics_over_frames(self, name: str, make_audio: MakeAudio, music: Samples) -> None:
        whole, joined = self.combined(name, make_audio(music))

        for column, value in whole.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(joined[column], value, rtol=0.03, atol=0.05 * scale)

    def test_loudness(self, make_audio: MakeAudio, music: Samples) -> None:
        quiet_end = music * np.where(np.arange(len(music)) < len(music) // 2, 1, 0.5)[:, None]
        whole, joined = self.combined("loudness", make_audio(quiet_end))

        assert joined["integrated_lufs"] == pytest.approx(whole["integrated_lufs"], abs=0.2)
        for column in ("momentary_max_lufs", "short_term_max_lufs", "true_peak_dbtp"):
            assert joined[column] == pytest.approx(whole[column], abs=0.3)

    def test_rhythm(self, make_audio: MakeAudio, music: Samples) -> None:
        whole, joined = self.combined("rhythm", make_audio(music), 10.0)

        assert joined["bpm"] == pytest.approx(whole["bpm"], abs=1)
        assert joined["beats_count"] == len(joined["beats"])
        assert joined["beats_count"] == pytest.approx(whole["beats_count"], abs=6)
        beats = np.array(whole["beats"])
        distances = [np.abs(beats - beat).min() for beat in joined["beats"]]
        assert np.median(distances) < 0.05
        assert max(joined["beats"]) > 11

    def test_tempi_of_blocks_that_differ_make_it_doubtful(self) -> None:
        blocks = [
            FEATURE_SETS["rhythm"].empty_row
            | {"bpm": bpm, "bpm_confidence": confidence, "bpm_second": second}
            | {"beats": [0.0] if bpm else [], "beats_count": 1 if bpm else 0, "onset_rate": 1.0}
            for bpm, confidence, second in (
                *((120.0, 0.9, 60.0), (121.0, 0.9, 60.5), (121.0, 0.9, 181.0)),
                *((180.0, 0.6, 90.0), (None, None, None)),
            )
        ]
        row = FEATURE_SETS["rhythm"].combine(blocks, [30.0, 30.0, 30.0, 10.0, 300.0])

        assert (row["bpm"], row["bpm_second"]) == (121.0, 60.5)
        assert row["bpm_confidence"] == pytest.approx(0.81)

    def test_key_and_danceability(self, make_audio: MakeAudio, music: Samples) -> None:
        whole, joined = self.combined("key", make_audio(music), 10.0)
        assert (joined["key"], joined["scale"]) == (whole["key"], whole["scale"])
        whole, joined = self.combined("danceability", make_audio(music), 10.0)
        assert joined["danceability"] == pytest.approx(whole["danceability"], rel=0.2)

    def test_votes_weigh_duration_and_strength(self) -> None:
        blocks = [
            {"key": key, "scale": "major", "strength": strength, "camelot": None}
            | {"second_key": None, "second_scale": None, "second_strength": None}
            for key, strength in (("C", 0.9), ("G", 0.5), ("G", 0.6), (None, None))
        ]
        row = FEATURE_SETS["key"].combine(blocks, [30.0, 30.0, 30.0, 300.0])

        assert (row["key"], row["camelot"]) == ("G", "9B")
        assert row["strength"] == pytest.approx(0.55)
        assert row["second_key"] is None

    @pytest.mark.parametrize("name", PCM_SETS)
    def test_blocks_of_silence(self, name: str, make_audio: MakeAudio) -> None:
        _, joined = self.combined(name, make_audio(np.zeros(10 * SAMPLE_RATE)))
        assert joined == FEATURE_SETS[name].extract(make_audio(np.zeros(10 * SAMPLE_RATE)))


def test_feature_sets_are_whole() -> None:
    assert list(FEATURE_SETS) == [
        *("loudness", "danceability", "key", "chroma", "mfcc", "spectral"),
        *("rhythm", "musicnn", "metadata"),
    ]
    assert not BROKEN_FEATURE_SETS
    for feature_set in FEATURE_SETS.values():
        assert all(column.description for column in feature_set.columns)
        assert feature_set.licence
        assert feature_set.citation


def test_names_that_are_taken_are_reserved() -> None:
    """A feature set of such a name would keep Dagster from loading, or share a stage's history."""
    ops = {robustness_tables.op.name, published_tables.op.name}
    stages = {*IDENTIFY_STAGES, IDENTIFY, DECODE, "duration"}
    assert ops | stages | DISALLOWED_NAMES <= RESERVED_NAMES
    rhythm = FEATURE_SETS["rhythm"]
    for name in ("decode", "tracks", "class", "Rhythm", "rhythm!", ""):
        with pytest.raises(ValueError, match="cannot be the name of a feature set"):
            replace(rhythm, name=name)


def test_feature_set_with_columns_that_do_not_fit_is_refused() -> None:
    rhythm = FEATURE_SETS["rhythm"]
    bpm = Column("bpm", "DOUBLE", "Tempo")
    for columns in ([bpm, bpm], [Column("file_key", "VARCHAR", "")], [Column("BPM", "DOUBLE", "")]):
        with pytest.raises(ValueError, match="cannot be the name of a column"):
            replace(rhythm, columns=columns, plotted=())
    with pytest.raises(ValueError, match="headline"):
        replace(rhythm, headline="bmp")
    with pytest.raises(ValueError, match="plotted"):
        replace(rhythm, plotted=("beats",))
    with pytest.raises(ValueError, match="reads"):
        replace(rhythm, reads="nothing")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bpm": 5168.0}, "bpm is 5168, its range is 35 to 213"),
        ({"bpm": float("nan")}, "bpm is nan"),
        ({"bpm_confidence": 1.1}, "bpm_confidence is 1.1, its range is 0 to 1"),
        ({"bpm_second": 240.0}, "bpm_second is 240, its range is 35 to 213"),
        ({"bpm": np.float32("nan")}, "bpm is nan"),
        ({"beats": [0.5, float("inf")]}, "beats is inf"),
        ({"beats": np.array([-0.5, 0.5])}, "beats is -0.5, its range is ≥ 0"),
        ({"beats": [0.5, 1.0, 31.0]}, "a beat at 31.00 s is behind the end of the audio"),
        ({"beats": [1.0, 0.5, 2.0]}, "its beats are not in order"),
        ({"beats_count": 9}, "9 beats are said to be 3"),
    ],
)
def test_implausible_rows_are_refused(values: Row, said: str) -> None:
    sound: Row = {
        "bpm": 120.0,
        "bpm_confidence": 0.9,
        "bpm_second": 60.0,
        "beat_confidence": 3.0,
        "beats_count": 3,
        "beats": [0.5, 1.0, 1.5],
        "onset_rate": 2.0,
    }
    check_row(FEATURE_SETS["rhythm"], sound, 30.0)
    sound["beats_count"] = len(values.get("beats", sound["beats"]))
    with pytest.raises(ImplausibleValueError, match=re.escape(said)):
        check_row(FEATURE_SETS["rhythm"], sound | values, 30.0)


def test_comment_of_a_column_has_its_range_and_unit() -> None:
    assert Column("a", "DOUBLE", "Tempo", "1/min", 35, 213).comment == "Tempo (35 to 213 1/min)"
    assert Column("a", "DOUBLE", "Share", low=0, high=1).comment == "Share (0 to 1)"
    assert Column("a", "DOUBLE[]", "Times", "s", low=0).comment == "Times (≥ 0 s)"
    assert Column("a", "DOUBLE", "Peak", "dB", high=200).comment == "Peak (≤ 200 dB)"
    assert Column("a", "VARCHAR", "Title").comment == "Title"


def test_ranges_hold_for_lists_and_maps() -> None:
    musicnn, chroma = FEATURE_SETS["musicnn"], FEATURE_SETS["chroma"]
    for feature_set, column, value in (
        (musicnn, "msd_tags", {"rock": 1.5}),
        (chroma, "mean", [-0.1] * 12),
    ):
        row = feature_set.empty_row | {column: value}
        with pytest.raises(ImplausibleValueError, match=column):
            check_row(feature_set, row, None)


def test_channels_that_cancel_each_other_are_analysed(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE * 4)
    for name, right in (("out", -0.9 * noise), ("in", 0.9 * noise)):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, np.stack([noise, right], axis=1), SAMPLE_RATE, subtype="FLOAT")
        source = decode(path, tmp_path / "pcm.npy")
        audio = Audio.open(tmp_path / "pcm.npy", path)
        if name == "out":
            assert source.louder_channel == 0
            np.testing.assert_array_equal(audio.mono(), audio.pcm[:, 0])
            np.testing.assert_array_equal(audio.block(1, 2).mono(), audio.pcm[44100:88200, 0])
        else:
            assert source.louder_channel is None
            np.testing.assert_allclose(audio.mono(), 0.95 * noise, atol=1e-6)


def test_essentias_algorithms_are_made_when_they_are_used() -> None:
    subprocess.run(
        [
            *(sys.executable, "-c"),
            "from audio_assets.features.essentia_library import essentia\n"
            "assert 'Onsets' not in vars(essentia())\n"
            "from essentia.standard import FrameGenerator, Onsets\n"
            "assert essentia().Onsets is Onsets\n"
            "assert not hasattr(essentia(), 'Nonsense')\n",
        ],
        check=True,
    )
