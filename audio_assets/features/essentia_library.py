"""Essentia's algorithms, imported when first needed."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from audio_assets.audio.pcm import Samples


@cache
def essentia() -> ModuleType:
    """Return ``essentia.standard``, which makes the class of an algorithm when it is first used.

    When imported, the library itself makes all 253 with an instance of each: more than a second.
    """
    import essentia as library

    # Its remarks on short or silent input say nothing that the rows do not.
    library.log.infoActive = False
    library.log.warningActive = False
    # Not public: the library offers no other way to leave classes out.
    names = library._essentia.keys
    library._essentia.keys = lambda: ["FrameCutter"]  # what FrameGenerator is made of
    try:
        standard = import_module("essentia.standard")
    finally:
        library._essentia.keys = names

    def make_class(name: str) -> Any:
        if name not in names():
            raise AttributeError(f"Essentia has no algorithm {name}")
        return standard._create_essentia_class(name)

    vars(standard)["__getattr__"] = make_class
    return standard


def filters_of(bands: Callable[[Samples], Samples], bins: int) -> Samples:
    """Return what each bin gives to each band of one of Essentia's filter banks.

    Parameters
    ----------
    bands : callable
        An instance of ``MelBands``, ``ERBBands`` or the like.
    bins : int
        Bins of the spectrum that it takes.

    Returns
    -------
    ndarray of float32, shape (bins, bands)
    """
    return np.array([bands(bin_) for bin_ in np.eye(bins, dtype=np.float32)])
