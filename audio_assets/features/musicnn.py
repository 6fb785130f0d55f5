"""Tags and embedding of the MusiCNN networks.

The spectrum is what the networks were trained on: mono at 16 kHz, 96 mel bands (Slaney's scale,
triangles of equal area) of the power spectra of 512-sample periodic Hann windows, 256 apart and
zero-centred, as ``log10(10000 * power + 1)``. It is cut into patches of 187 frames (3 s) without
overlap; as in the `musicnn` package, frames that do not fill a last patch are left out, and
activations are averaged over the patches.

Where the package has no answer or a wrong one:

- A file shorter than a patch is tagged from one patch as short as the file: the networks pool
  over time, so they take any length. On 3 s excerpts of recordings cut to 0.25-2.5 s this came
  closer to the tags of the whole excerpt than filling the patch with silence or with repetitions.
- A silent patch is left out: the networks answer it with how frequent each tag was in training
  ("rock", "guitar"). A file without sound has no tags.
- The embedding is the mean of every patch's penultimate layer; the package gives that of the
  first patch for all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import cast

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from audio_assets.audio.pcm import Audio, Samples
from audio_assets.features.base import Column, FeatureSet, Row
from audio_assets.features.essentia_library import essentia, filters_of
from audio_assets.features.pictures import bars
from audio_assets.features.statistics import is_silent

SAMPLE_RATE = 16_000
FRAME_SIZE = 512
HOP_SIZE = 256
MEL_BANDS = 96
PATCH_FRAMES = 187
TOP_TAGS = 5

MelPower = Callable[[Samples], NDArray[np.float32]]


def _extract(audio: Audio) -> Row:
    return _tag(audio, mel_power_essentia)


def _extract_alternative(audio: Audio) -> Row:
    return _tag(audio, mel_power_librosa)


def _tag(audio: Audio, mel_power: MelPower) -> Row:
    # Loads onnx and onnxruntime, which only workers need.
    from audio_assets.features.musicnn_network import load_network

    msd, mtt = load_network("MSD_musicnn"), load_network("MTT_musicnn")
    msd_tags, mtt_tags, embeddings = [], [], []
    for samples in patches(audio.resampled_mono(SAMPLE_RATE)):
        if is_silent(samples):
            continue
        log_mel = np.log10(10_000 * mel_power(samples) + 1)
        # Samples far beyond full scale may have an infinite power.
        if not np.isfinite(log_mel).all():
            continue
        activations, embedding = msd.run(log_mel)
        msd_tags.append(activations)
        embeddings.append(embedding)
        mtt_tags.append(mtt.run(log_mel)[0])
    if not embeddings:
        return FEATURE_SET.empty_row | {"patches": 0}
    return _row(
        dict(zip(msd.tags, _mean(msd_tags), strict=True)),
        dict(zip(mtt.tags, _mean(mtt_tags), strict=True)),
        _mean(embeddings),
        len(embeddings),
    )


def _mean(vectors: Sequence[ArrayLike], weights: Sequence[int] | None = None) -> list[float]:
    means = np.average(np.asarray(vectors, dtype=np.float64), axis=0, weights=weights)
    return cast("list[float]", means.tolist())


def _row(
    msd_tags: dict[str, float],
    mtt_tags: dict[str, float],
    embedding: list[float],
    patch_count: int,
) -> Row:
    top_tags = sorted(msd_tags, key=msd_tags.__getitem__, reverse=True)[:TOP_TAGS]
    return {
        "msd_tags": msd_tags,
        "mtt_tags": mtt_tags,
        "top_tags": top_tags,
        "top_tag": top_tags[0],
        "embedding": embedding,
        "patches": patch_count,
    }


def _combine(rows: Sequence[Row], durations: Sequence[float]) -> Row:
    """Average over the blocks by their numbers of patches."""
    sounding = [row for row in rows if row["patches"]]
    if not sounding:
        return FEATURE_SET.empty_row | {"patches": 0}
    weights = [row["patches"] for row in sounding]

    def mean_tags(column: str) -> dict[str, float]:
        activations = _mean([list(row[column].values()) for row in sounding], weights)
        return dict(zip(sounding[0][column], activations, strict=True))

    embedding = _mean([row["embedding"] for row in sounding], weights)
    return _row(mean_tags("msd_tags"), mean_tags("mtt_tags"), embedding, sum(weights))


def patches(blocks: Iterable[Samples]) -> Iterator[Samples]:
    """Cut a recording into what the patches' spectra are made of.

    Parameters
    ----------
    blocks : iterable of ndarray of float32, shape (n,)
        The recording, mono at 16 kHz, in blocks of any lengths.

    Yields
    ------
    ndarray of float32, shape (48128,)
        The samples of 187 frames, the first and last frames of the recording padded with zeros;
        for a recording shorter than that, once, of the frames there are.
    """
    size = (PATCH_FRAMES - 1) * HOP_SIZE + FRAME_SIZE
    padding = np.zeros(FRAME_SIZE // 2, np.float32)
    rest, is_short = padding, True
    for block in chain(blocks, [padding]):
        rest = np.concatenate([rest, block])
        while len(rest) >= size:
            yield rest[:size]
            rest, is_short = rest[PATCH_FRAMES * HOP_SIZE :], False
    if is_short:
        yield rest[: len(rest) // HOP_SIZE * HOP_SIZE]


def mel_power_essentia(samples: Samples) -> NDArray[np.float32]:
    """Mel power spectra of the whole frames in some samples, with Essentia's bands.

    Essentia's own ``TensorflowInputMusiCNN`` has a symmetric window, which is not what the
    networks were trained on; with the periodic one the bands are those of librosa.

    Parameters
    ----------
    samples : ndarray of float32, shape (n,)
        Samples at 16 kHz, at least a frame of 512.

    Returns
    -------
    ndarray of float32, shape (1 + (n - 512) // 256, 96)
        Power in each band, unscaled.
    """
    window, filters = _window_and_filters()
    frames = sliding_window_view(samples, FRAME_SIZE)[::HOP_SIZE]
    spectra = np.fft.rfft(frames * window)
    return np.asarray((spectra.real**2 + spectra.imag**2) @ filters, np.float32)


@cache
def _window_and_filters() -> tuple[Samples, NDArray[np.float32]]:
    """Return the periodic Hann window, and what each bin gives to each band, shape (257, 96)."""
    mel_bands = essentia().MelBands(
        inputSize=FRAME_SIZE // 2 + 1,
        sampleRate=SAMPLE_RATE,
        numberBands=MEL_BANDS,
        highFrequencyBound=SAMPLE_RATE / 2,
        warpingFormula="slaneyMel",
        weighting="linear",
        normalize="unit_tri",
    )
    window: Samples = np.hanning(FRAME_SIZE + 1)[:-1].astype(np.float32)
    return window, filters_of(mel_bands, FRAME_SIZE // 2 + 1)


def mel_power_librosa(samples: Samples) -> NDArray[np.float32]:
    """Mel power spectra of the whole frames in some samples, by librosa.

    Parameters
    ----------
    samples : ndarray of float32, shape (n,)
        Samples at 16 kHz, at least a frame of 512.

    Returns
    -------
    ndarray of float32, shape (1 + (n - 512) // 256, 96)
        Power in each band, unscaled.
    """
    import librosa

    power: NDArray[np.float32] = librosa.feature.melspectrogram(
        y=samples,
        sr=SAMPLE_RATE,
        n_fft=FRAME_SIZE,
        hop_length=HOP_SIZE,
        n_mels=MEL_BANDS,
        center=False,
    )
    return power.T


def _picture(row: Row) -> str | None:
    activations = dict(row["msd_tags"] or {})
    return bars({tag: activations[tag] for tag in row["top_tags"] or []})


FEATURE_SET = FeatureSet(
    name="musicnn",
    description=(
        "Tags and embedding by the MusiCNN networks (Pons & Serra 2019), trained on the Million "
        "Song Dataset (MSD) and on MagnaTagATune (MTT); means over patches of 3 s."
    ),
    columns=(
        Column(
            "msd_tags",
            "MAP(VARCHAR, FLOAT)",
            "Mean activation of each of the 50 tags (genre, mood, era, voice) of the "
            "network trained on MSD",
            low=0,
            high=1,
        ),
        Column(
            "mtt_tags",
            "MAP(VARCHAR, FLOAT)",
            "Mean activation of each of the 50 tags (instrument, voice, genre, pace) of the "
            "network trained on MTT",
            low=0,
            high=1,
        ),
        Column(
            "top_tags",
            "VARCHAR[]",
            "The five MSD tags with the highest mean activation, highest first",
        ),
        Column("top_tag", "VARCHAR", "The MSD tag with the highest mean activation"),
        Column(
            "embedding",
            "FLOAT[200]",
            "Mean of the penultimate layer of the network trained on MSD; cosine distance is low "
            "between recordings that are tagged alike",
        ),
        Column(
            "patches",
            "INTEGER",
            "Patches of 3 s that the means are over, silent ones left out; 1 also for a file "
            "shorter than a patch",
            low=0,
        ),
    ),
    licence=(
        "ISC (musicnn with its weights), MIT (ONNX Runtime), AGPL-3.0 (Essentia), ISC (librosa)"
    ),
    citation=(
        "J. Pons and X. Serra, musicnn: pre-trained convolutional neural networks for music "
        "audio tagging, ISMIR late-breaking demo, 2019"
    ),
    extract=_extract,
    extract_alternative=_extract_alternative,
    combine=_combine,
    picture=_picture,
    headline="top_tag",
    plotted=("patches",),
    position=90,
    code_version="2",
    kinds=frozenset({"python", "essentia", "onnx"}),
)
