"""The library's roots: the directories in ``AUDIO_LIBRARY``, and those that were remembered."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from audio_assets.library.files import replacing
from audio_assets.settings import get_settings


def parse_roots(text: str) -> dict[str, Path]:
    """Parse the value of ``AUDIO_LIBRARY``.

    Parameters
    ----------
    text : str
        ``path`` or ``name=path``, several of them separated by `os.pathsep`. Text before the first
        ``=`` is a name unless it contains a slash. A root without a name has its directory's.

    Returns
    -------
    dict of str to Path
        Absolute paths by name.

    Raises
    ------
    ValueError
        If there is no root, a root has no name, two have the same, or one lies within another.
    """
    roots: dict[str, Path] = {}
    for item in filter(None, text.split(os.pathsep)):
        name, equals, given = item.partition("=")
        if not equals or "/" in name:
            name, given = "", item
        if not given:
            raise ValueError(f"library root {item!r} has no path")
        try:
            path = Path(given).expanduser().resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"library root {given!r} cannot be: {error}") from None
        name = name or path.name
        if not name:
            raise ValueError(f"library root {given!r} needs a name: write name={given}")
        if name in roots:
            raise ValueError(
                f"two library roots are named {name!r}, {roots[name]} and {path}: give them names "
                f"of their own, for instance one={roots[name]}{os.pathsep}two={path}"
            )
        for other_name, other in roots.items():
            if path.is_relative_to(other) or other.is_relative_to(path):
                raise ValueError(
                    f"library roots {other_name!r} ({other}) and {name!r} ({path}) overlap: what "
                    "they share would be in the library twice; leave one of them out"
                )
        roots[name] = path
    if not roots:
        raise ValueError("no library root is given")
    return roots


def library_roots() -> dict[str, Path]:
    """Return all roots by name.

    Raises
    ------
    ValueError
        If ``AUDIO_LIBRARY`` is not valid, see `parse_roots`, or the file of remembered roots.
    """
    return _remembered() | _configured()


def name_roots(library: str) -> dict[str, Path]:
    """Return directories that are to become roots, by name.

    Parameters
    ----------
    library : str
        Directories as in ``AUDIO_LIBRARY``; roots keep the names they have.

    Returns
    -------
    dict of str to Path
        The directories by name.

    Raises
    ------
    ValueError
        If `library` is not valid, or another root has the name of one of the directories.
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
    """Add roots to the file that all processes, Dagster's included, read them from."""
    _save(_remembered() | dict(roots))


def forget_root(name: str) -> Path:
    """Undo `remember_roots` for a root, and return its directory.

    Raises
    ------
    ValueError
        If no root is remembered by that name, or ``AUDIO_LIBRARY`` names it as well.
    """
    roots = _remembered()
    if name in _configured():
        raise ValueError(f"AUDIO_LIBRARY names {name!r}: take it out there first")
    if name not in roots:
        known = f"there are {', '.join(sorted(roots))}" if roots else "there is none"
        raise ValueError(f"no directory is remembered as {name!r}; {known}")
    _save({other: root for other, root in roots.items() if other != name})
    return roots[name]


def _save(roots: Mapping[str, Path]) -> None:
    text = json.dumps({name: str(root) for name, root in roots.items()}, indent=2)
    with replacing(_path()) as partial:
        partial.write_text(text, "utf-8")


def _configured() -> dict[str, Path]:
    configured = get_settings().audio_library
    return parse_roots(configured) if configured else {}


def _remembered() -> dict[str, Path]:
    try:
        roots = json.loads(_path().read_text("utf-8"))
        return {name: Path(root) for name, root in roots.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{_path()} does not hold directories by name ({error}): correct it, or delete it and "
            "give `audio-assets scan` the directories again"
        ) from None


def _path() -> Path:
    return get_settings().dagster_home / "library_roots.json"
