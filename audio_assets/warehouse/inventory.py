"""The inventory (table ``library.files``): the files of the library and their contents."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from audio_assets.features.base import Row
from audio_assets.library.file_keys import FileKeyError, decode_key, encoded_root
from audio_assets.library.files import Identity
from audio_assets.library.scan import FileEntry, LibraryScan
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import FILES


def inventory_row(file_key: str, path: Path, identity: Identity | None) -> Row:
    """Return the inventory's row of a file; without identity, of one that could not be read."""
    return {
        "file_key": file_key,
        "path": os.fsencode(path).decode("utf-8", "backslashreplace"),
        "size": identity and identity.size,
        "mtime_ns": identity and identity.mtime_ns,
        "duration_s": identity and identity.duration_s,
        "content_hash": identity and identity.content_hash,
        "seen_at": datetime.now(UTC),
        "gone": False,
    }


def known_identities(landing: Landing, file_keys: Collection[str]) -> dict[str, Identity]:
    """Return the last known identities of files, by key; unhashed files are left out."""
    return {
        row["file_key"]: Identity(
            row["content_hash"], row["size"], row["mtime_ns"], row["duration_s"]
        )
        for row in landing.latest(FILES.landing_name, where=("file_key", file_keys))
        if row["content_hash"] is not None
    }


def unchanged_contents(files: Sequence[FileEntry], landing: Landing) -> dict[str, str]:
    """Return the content hashes, by key, of files that have not changed since they were hashed."""
    columns = ("file_key", "size", "mtime_ns", "content_hash")
    known = {
        row["file_key"]: row
        for row in landing.latest(FILES.landing_name, columns=columns)
        if row["content_hash"] is not None
    }
    return {
        entry.file_key: row["content_hash"]
        for entry in files
        if (row := known.get(entry.file_key)) and _is_unchanged(entry, row)
    }


class MissingFiles:
    """The files of the inventory that a scan did not find: gone, or unreachable.

    A file is unreachable, rather than gone, below a root or directory that cannot be read, and
    below a root in which the scan found no file at all, as where a disk is not mounted.

    Parameters
    ----------
    scan : LibraryScan
        The scan.
    roots : mapping of str to Path
        The roots that were scanned, by name.
    may_be_empty : bool
        Treat a root without any file as empty, rather than not mounted.

    Attributes
    ----------
    empty_roots : list of str
        Names of the roots that are treated as not mounted.
    """

    def __init__(
        self, scan: LibraryScan, roots: Mapping[str, Path], *, may_be_empty: bool = False
    ) -> None:
        found = {entry.file_key.partition("/")[0] for entry in scan.files}
        readable = {name: path for name, path in roots.items() if name not in scan.unreachable}
        empty = [name for name in readable if encoded_root(name) not in found]
        self.empty_roots = [] if may_be_empty else empty
        self._roots = {
            name: path.resolve() for name, path in readable.items() if name not in self.empty_roots
        }
        self._unread = scan.unread

    def is_gone(self, file_key: str) -> bool:
        """Return whether a file that was not found has left the library."""
        try:
            root_name, relative = decode_key(file_key)
        except FileKeyError:
            return False
        if root_name not in self._roots:
            return False
        path = self._roots[root_name] / os.fsdecode(relative)
        return not any(path.is_relative_to(unread) for unread in self._unread)


@dataclass(frozen=True)
class InventoryChanges:
    """How a scan differs from the inventory.

    Parameters
    ----------
    gone : int
        Files that have left the library since.
    back : int
        Files that had left it and are back unchanged.
    moved : int
        Gone files of which a new one has the size and the modification time.
    new_or_changed : dict of str to str
        Files that are new, or differ from their last known content: by key, a text that differs
        from one change of the file to the next.
    known : set of str
        The keys of all files ever identified.
    """

    gone: int
    back: int
    moved: int
    new_or_changed: dict[str, str]
    known: set[str]


def update_inventory(
    scan: LibraryScan, missing: MissingFiles, landing: Landing
) -> InventoryChanges:
    """Mark files that have left the library as gone, and those that are back as present.

    Parameters
    ----------
    scan : LibraryScan
        The files found.
    missing : MissingFiles
        Which of the other files are gone.
    landing : Landing
        Where the inventory is.
    """
    present = {entry.file_key: entry for entry in scan.files}
    new_or_changed = {key: f"{entry.size} {entry.mtime_ns}" for key, entry in present.items()}
    gone, back, known = [], [], set()
    for row in landing.latest(FILES.landing_name):
        key = row["file_key"]
        known.add(key)
        entry = present.get(key)
        if entry is None:
            if not row["gone"] and missing.is_gone(key):
                gone.append({**row, "gone": True})
        elif row["size"] is None or _is_unchanged(entry, row):
            del new_or_changed[key]
            if row["gone"]:
                back.append({**row, "gone": False})
        else:
            new_or_changed[key] += f" after {row['seen_at']:%Y-%m-%dT%H:%M:%S.%f%z}"
    if gone or back:
        now = datetime.now(UTC)
        landing.append(FILES.landing_name, [{**row, "seen_at": now} for row in (*gone, *back)])
    new = {(e.size, e.mtime_ns) for key, e in present.items() if key not in known}
    moved = sum((row["size"], row["mtime_ns"]) in new for row in gone)
    return InventoryChanges(len(gone), len(back), moved, new_or_changed, known)


def _is_unchanged(entry: FileEntry, row: Row) -> bool:
    return (entry.size, entry.mtime_ns) == (row["size"], row["mtime_ns"])
