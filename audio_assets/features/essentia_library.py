"""Essentia's algorithms, imported when first needed."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def essentia() -> ModuleType:
    """Return ``essentia.standard``; importing it takes most of a second."""
    import essentia as library

    # Its remarks on short or silent input say nothing that the rows do not.
    library.log.infoActive = False
    library.log.warningActive = False
    return import_module("essentia.standard")
