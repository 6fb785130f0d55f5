"""Frames, spectra and peaks against Essentia's, and statistics over blocks of frames."""

import essentia.standard as es
import numpy as np
import pytest

from audio_assets.features.spectra import find_peaks, frame_blocks, magnitude_spectra
from audio_assets.features.statistics import mean_and_std
from tests.features.conftest import MakeAudio


@pytest.mark.parametrize(("frame_size", "hop_size"), [(2048, 1024), (4096, 4096)])
@pytest.mark.parametrize("hops", [0, 0.5, 1, 1.5, 3, 62.5, 63, 64.5, 130])
def test_frames_are_those_of_essentia(
    make_audio: MakeAudio, frame_size: int, hop_size: int, hops: float
) -> None:
    for size in (int(hops * hop_size) + more for more in (0, 1)):
        if size == 0:
            continue
        audio = make_audio(np.random.default_rng(size).normal(size=(size, 2)))
        frames = np.concatenate(list(frame_blocks(audio, frame_size, hop_size)))
        expected = es.FrameGenerator(audio.mono(), frameSize=frame_size, hopSize=hop_size)
        np.testing.assert_array_equal(frames, list(expected))


@pytest.mark.parametrize("window", ["hann", "blackmanharris62"])
def test_spectra_are_those_of_essentia(window: str) -> None:
    frames = np.random.default_rng(4).normal(size=(3, 4096)).astype(np.float32)
    windowing, spectrum = es.Windowing(type=window), es.Spectrum()
    expected = [spectrum(windowing(frame)) for frame in frames]
    np.testing.assert_allclose(magnitude_spectra(frames, window), expected, rtol=1e-4, atol=1e-8)


NOISE = np.random.default_rng(5).random((40, 1025))
PLATEAUS = np.random.default_rng(5).integers(0, 6, (160, 1025))


@pytest.mark.parametrize(
    # Of peaks of one height it is chance which are among the highest.
    ("spectra", "most"),
    [(NOISE, 30), (PLATEAUS, 1000), (np.zeros((2, 1025)), 30)],
    ids=["noise", "plateaus", "silence"],
)
def test_peaks_are_those_of_essentia(spectra: np.ndarray, most: int) -> None:
    spectra = spectra.astype(np.float32)
    peaks = find_peaks(spectra, 25, 3500, 0.5, most)
    reference = es.SpectralPeaks(
        orderBy="magnitude",
        minFrequency=25,
        maxFrequency=3500,
        magnitudeThreshold=0.5,
        maxPeaks=most,
    )
    for number, spectrum in enumerate(spectra):
        frequencies, magnitudes = reference(spectrum)
        # A plateau at the end of the range begins or ends beyond it.
        inside, found = frequencies < 3450, (peaks.frames == number) & (peaks.frequencies < 3450)
        frequencies, magnitudes = frequencies[inside], magnitudes[inside]
        order, expected_order = np.argsort(peaks.frequencies[found]), np.argsort(frequencies)
        np.testing.assert_allclose(
            peaks.frequencies[found][order], frequencies[expected_order], rtol=1e-5
        )
        np.testing.assert_allclose(
            peaks.magnitudes[found][order], magnitudes[expected_order], rtol=1e-5
        )


def test_statistics_over_blocks_are_those_of_all_frames() -> None:
    frames = np.random.default_rng(6).normal(1e6, [[1, 0]], size=(100, 2))
    mean, std = mean_and_std(np.split(frames, [1, 2, 40]))
    np.testing.assert_allclose(mean, frames.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(std, frames.std(axis=0), rtol=1e-9)
