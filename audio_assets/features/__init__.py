"""The nine feature sets, by name."""

from audio_assets.features import (
    chroma,
    danceability,
    key,
    loudness,
    metadata,
    mfcc,
    musicnn,
    rhythm,
    spectral,
)
from audio_assets.features.base import FeatureSet

FEATURE_SETS: dict[str, FeatureSet] = {
    module.FEATURE_SET.name: module.FEATURE_SET
    for module in (metadata, loudness, danceability, key, chroma, mfcc, spectral, rhythm, musicnn)
}
"""All feature sets by name, the cheap ones first."""


def get_feature_set(name: str) -> FeatureSet:
    """Return a feature set by its name.

    Raises
    ------
    KeyError
        If there is no such feature set; the message names those there are.
    """
    try:
        return FEATURE_SETS[name]
    except KeyError:
        raise KeyError(f"no feature set {name!r}; there are {', '.join(FEATURE_SETS)}") from None
