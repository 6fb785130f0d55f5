"""The feature sets, by name."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audio_assets.features.base import FeatureSet
    from audio_assets.features.registry import BrokenFeatureSet

FEATURE_SETS: dict[str, "FeatureSet"]
"""All feature sets by name, in the order in which a file's cells are computed."""

BROKEN_FEATURE_SETS: list["BrokenFeatureSet"]
"""Those that are left out."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Loaded when first used: a package that offers one imports this package first.
        if name not in ("FEATURE_SETS", "BROKEN_FEATURE_SETS"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        global FEATURE_SETS, BROKEN_FEATURE_SETS
        from audio_assets.features.registry import load_feature_sets

        FEATURE_SETS, BROKEN_FEATURE_SETS = load_feature_sets()
        return globals()[name]
