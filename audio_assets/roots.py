"""Which directories the library consists of."""

import json
from collections.abc import Mapping
from pathlib import Path

from audio_assets.library import parse_roots
from audio_assets.settings import get_settings


def library_roots() -> dict[str, Path]:
    """Return the roots by name: those of ``AUDIO_LIBRARY``, and those remembered.

    Raises
    ------
    ValueError
        If ``AUDIO_LIBRARY`` cannot be understood.
    """
    return _remembered() | _configured()


def name_roots(library: str) -> dict[str, Path]:
    """Name directories, as roots to be added.

    Parameters
    ----------
    library : str
        Directories as in ``AUDIO_LIBRARY``; those known already keep their names.

    Returns
    -------
    dict
        The directories by name.

    Raises
    ------
    ValueError
        If `library` cannot be understood, or another root has the name of one of these.
    """
    roots = library_roots()
    names = {root.resolve(): name for name, root in roots.items()}
    chosen = {}
    for name, directory in parse_roots(library).items():
        root = directory.resolve()
        chosen[names.get(root, name)] = root
    for name, root in chosen.items():
        if roots.get(name, root).resolve() != root:
            raise ValueError(
                f"{roots[name]} is already called {name!r}, and partition keys begin with the "
                f"root's name: give {root} another one, as in '{name}-2={root}'"
            )
    return chosen


def remember_roots(roots: Mapping[str, Path]) -> None:
    """Add directories to the roots, so that Dagster's own processes know them too."""
    _write(_remembered() | dict(roots))


def forget_root(name: str) -> Path:
    """Take a directory that was remembered from the roots, and return it.

    Raises
    ------
    ValueError
        If none is remembered by that name, or ``AUDIO_LIBRARY`` names it as well.
    """
    roots = _remembered()
    if name in _configured():
        raise ValueError(f"AUDIO_LIBRARY names {name!r}: take it out there first")
    if name not in roots:
        known = f"there are {', '.join(sorted(roots))}" if roots else "there is none"
        raise ValueError(f"no directory is remembered as {name!r}; {known}")
    _write({other: root for other, root in roots.items() if other != name})
    return roots[name]


def _write(roots: Mapping[str, Path]) -> None:
    path = _path()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({name: str(r) for name, r in roots.items()}, indent=2), "utf-8")
    partial.replace(path)


def _configured() -> dict[str, Path]:
    configured = get_settings().audio_library
    return parse_roots(configured) if configured else {}


def _remembered() -> dict[str, Path]:
    try:
        roots = json.loads(_path().read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return {name: Path(root) for name, root in roots.items()}


def _path() -> Path:
    return get_settings().dagster_home / "library_roots.json"
