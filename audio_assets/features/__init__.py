"""The feature sets, by name."""

from importlib import import_module

from audio_assets.features.base import FeatureSet

_MODULES = (
    "metadata",
    "loudness",
    "danceability",
    "key",
    "chroma",
    "mfcc",
    "spectral",
    "rhythm",
    "musicnn",
)

FEATURE_SETS: dict[str, FeatureSet] = {
    module: import_module(f"audio_assets.features.{module}").FEATURE_SET for module in _MODULES
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
