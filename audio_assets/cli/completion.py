"""Names that the shell completes."""

import os
from collections.abc import Iterable

from audio_assets.cli import home


def root_names(incomplete: str) -> list[str]:
    """Return names of the library's roots."""
    from audio_assets.library.roots import library_roots

    _set_home()
    try:
        return _beginning_with(incomplete, library_roots())
    except ValueError:
        return []


def feature_set_names(incomplete: str) -> list[str]:
    """Return names of the installed feature sets, without loading them."""
    from importlib.metadata import entry_points

    return _beginning_with(incomplete, entry_points(group="audio_assets.feature_sets").names)


def breaker_names(incomplete: str) -> list[str]:
    """Return names of the breakers in the state store."""
    from robustness.circuit_breaker import all_circuit_breakers

    _set_home()
    return _beginning_with(incomplete, all_circuit_breakers())


def _set_home() -> None:
    os.environ["DAGSTER_HOME"] = home.find()


def _beginning_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
