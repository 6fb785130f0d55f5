"""What a library still lacks, found without reading a file that has not changed."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from audio_assets.extraction.worker import Identity
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Row
from audio_assets.file_keys import FileKeyError, decode_key, encoded_root
from audio_assets.library import FileEntry, LibraryScan
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import FILES, feature_table
from robustness.quarantine import Quarantine

_PASSED_AT_MOST = 20
"""Done files in a row that a range takes in: to report them costs less than another run does."""


@dataclass(frozen=True)
class Backlog:
    """What a library still lacks.

    Parameters
    ----------
    todo : list of str
        Keys of files with a cell that is neither done nor quarantined.
    done : set of str
        Keys of files of which every cell is done.
    """

    todo: list[str]
    done: set[str]


def find_backlog(
    files: Sequence[FileEntry], landing: Landing, materialized: Mapping[str, Collection[str]]
) -> Backlog:
    """Find the files with a cell that is missing, failed, outdated or of a changed file.

    Parameters
    ----------
    files : sequence of FileEntry
        What is there.
    landing : Landing
        What is known and done.
    materialized : mapping of str to collection of str
        File keys by feature set that Dagster knows to be done: a run that was killed may have
        made a cell durable and not told.
    """
    unchanged = unchanged_contents(files, landing)
    barred = {
        (cell.content_hash, cell.feature_set, cell.code_version or FEATURE_SETS[name].code_version)
        for cell in Quarantine().list()
        if (name := cell.feature_set) in FEATURE_SETS
    }
    lacking: set[str] = set()
    not_done: set[str] = set()
    for name, feature_set in FEATURE_SETS.items():
        columns = ("file_key", "content_hash", "code_version")
        settled = {
            row["file_key"]
            for row in landing.latest(feature_table(feature_set).landing_name, columns=columns)
            if row["code_version"] == feature_set.code_version
            and unchanged.get(row["file_key"]) == row["content_hash"]
            and row["file_key"] in materialized[name]
        }
        missing = unchanged.keys() - settled
        not_done |= missing
        lacking |= {
            key for key in missing if (unchanged[key], name, feature_set.code_version) not in barred
        }
    return Backlog(
        todo=[e.file_key for e in files if e.file_key not in unchanged or e.file_key in lacking],
        done=unchanged.keys() - not_done,
    )


def unchanged_contents(files: Sequence[FileEntry], landing: Landing) -> dict[str, str]:
    """Return the content hashes, by key, of files that are as they were when last identified."""
    columns = ("file_key", "size", "mtime_ns", "content_hash")
    known = {
        row["file_key"]: row
        for row in landing.latest(FILES.landing_name, columns=columns)
        if row["content_hash"] is not None
    }
    return {
        entry.file_key: known[entry.file_key]["content_hash"]
        for entry in files
        if entry.file_key in known and _is_same(entry, known[entry.file_key])
    }


def known_identities(landing: Landing, file_keys: Collection[str]) -> dict[str, Identity]:
    """Return what files were when last seen, by key.

    Parameters
    ----------
    landing : Landing
        Where the inventory is.
    file_keys : collection of str
        The files.
    """
    return {
        row["file_key"]: Identity(
            row["content_hash"], row["size"], row["mtime_ns"], row["duration_s"]
        )
        for row in landing.latest(FILES.landing_name, where=("file_key", file_keys))
        if row["content_hash"] is not None
    }


def release_contents(content_hashes: Collection[str], feature_sets: Collection[str]) -> None:
    """Let the cells of some contents and feature sets out of quarantine."""
    quarantine = Quarantine()
    for feature_set in feature_sets:
        for content_hash in quarantine.check_many(content_hashes, feature_set):
            quarantine.release(content_hash, feature_set)


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


@dataclass(frozen=True)
class InventoryChanges:
    """How a library differs from its inventory.

    Parameters
    ----------
    gone : int
        Files that have left it since.
    back : int
        Files that had left it and are back unchanged.
    new_or_changed : dict of str to str
        The files that are new, or are not what they were when they were identified: by key,
        what tells this change from any other.
    """

    gone: int
    back: int
    new_or_changed: dict[str, str]


def update_inventory(scan: LibraryScan, reach: "Reach", landing: Landing) -> InventoryChanges:
    """Mark files that have left the library as gone, and those that are back as there.

    A file that is out of reach is not gone: one below a root or directory that cannot be read, or
    below a root in which no file is found at all, as it is where a disk is not mounted.

    Parameters
    ----------
    scan : LibraryScan
        What is there.
    reach : Reach
        Which of the other files are gone.
    landing : Landing
        Where the inventory is.
    """
    present = {entry.file_key: entry for entry in scan.files}
    gone, back = [], []
    new_or_changed = {key: _state(entry) for key, entry in present.items()}
    for row in landing.latest(FILES.landing_name):
        key, entry = row["file_key"], present.get(row["file_key"])
        if entry is None:
            if not row["gone"] and reach.has_lost(key):
                gone.append({**row, "gone": True})
        elif row["size"] is None or _is_same(entry, row):
            del new_or_changed[key]
            if row["gone"]:
                back.append({**row, "gone": False})
        else:
            new_or_changed[key] += f" after {row['seen_at']:%Y-%m-%dT%H:%M:%S.%f%z}"
    changes = [{**row, "seen_at": datetime.now(UTC)} for row in (*gone, *back)]
    if changes:
        landing.append(FILES.landing_name, changes)
    return InventoryChanges(len(gone), len(back), new_or_changed)


class Reach:
    """Which of the files that a scan has not found are gone, rather than out of reach.

    Parameters
    ----------
    scan : LibraryScan
        What was found.
    roots : mapping of str to Path
        The roots that were scanned.
    may_be_empty : bool
        Take a root without any file to be empty, rather than not mounted.
    """

    def __init__(
        self, scan: LibraryScan, roots: Mapping[str, Path], *, may_be_empty: bool = False
    ) -> None:
        found = {entry.file_key.partition("/")[0] for entry in scan.files}
        readable = {name: path for name, path in roots.items() if name not in scan.unreachable}
        unfound = [name for name in readable if encoded_root(name) not in found]
        self.empty = [] if may_be_empty else unfound
        self._roots = {name: p.resolve() for name, p in readable.items() if name not in self.empty}
        self._unread = scan.unread

    def has_lost(self, file_key: str) -> bool:
        """Tell whether a file that was not found has left the library."""
        try:
            root_name, relative = decode_key(file_key)
        except FileKeyError:
            return False
        if root_name not in self._roots:
            return False
        path = self._roots[root_name] / os.fsdecode(relative)
        return not any(path.is_relative_to(unread) for unread in self._unread)


def _state(entry: FileEntry) -> str:
    return f"{entry.size} {entry.mtime_ns}"


def _is_same(entry: FileEntry, row: Row) -> bool:
    return (entry.size, entry.mtime_ns) == (row["size"], row["mtime_ns"])


def batches(
    file_keys: Collection[str],
    partition_keys: Sequence[str],
    batch_size: int,
    passable: Collection[str] = frozenset(),
) -> list[list[str]]:
    """Cut files into ranges of consecutive partitions, since a run takes a range.

    Parameters
    ----------
    file_keys : collection of str
        Files to do.
    partition_keys : sequence of str
        All partitions, in Dagster's order.
    batch_size : int
        Partitions per range at most.
    passable : collection of str
        Other files that a range may take in: those that cost little since they are done.

    Returns
    -------
    list of list of str
        The partition keys of each range, which begins and ends with a file to do.
    """
    todo, passable = set(file_keys), set(passable)
    ranges: list[list[str]] = []
    passed: list[str] | None = None  # what lies between the range's end and here; None: no range
    for key in partition_keys:
        if key in todo:
            if passed is None or len(ranges[-1]) + len(passed) >= batch_size:
                ranges.append([])
                passed = []
            ranges[-1] += [*passed, key]
            passed = []
        elif passed is not None and key in passable and len(passed) < _PASSED_AT_MOST:
            passed.append(key)
        else:
            passed = None
    return ranges
