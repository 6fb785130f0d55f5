"""What a library still lacks, found without reading a file that has not changed."""

import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path

from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Row
from audio_assets.file_keys import decode_key
from audio_assets.library import FileEntry, LibraryScan
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import FILES, feature_table
from audio_assets.worker import Identity
from robustness.quarantine import Quarantine


def find_backlog(scan: LibraryScan, landing: Landing) -> list[str]:
    """Return the keys of files with a cell that is neither done nor quarantined.

    Parameters
    ----------
    scan : LibraryScan
        What is there.
    landing : Landing
        What is known and done.
    """
    identities = known_identities(landing)
    unchanged = {
        entry.file_key: identities[entry.file_key].content_hash
        for entry in scan.files
        if entry.file_key in identities and _is_same(entry, identities[entry.file_key])
    }
    settled: dict[str, set[str]] = defaultdict(set)
    for name, feature_set in FEATURE_SETS.items():
        columns = ("file_key", "content_hash", "code_version")
        for row in landing.latest(feature_table(feature_set).landing_name, columns=columns):
            if (
                row["code_version"] == feature_set.code_version
                and unchanged.get(row["file_key"]) == row["content_hash"]
            ):
                settled[row["file_key"]].add(name)
    barred = {(cell.content_hash, cell.feature_set) for cell in Quarantine().list()}
    return [
        entry.file_key
        for entry in scan.files
        if entry.file_key not in unchanged
        or any(
            name not in settled[entry.file_key] and (unchanged[entry.file_key], name) not in barred
            for name in FEATURE_SETS
        )
    ]


def known_identities(
    landing: Landing, file_keys: Collection[str] | None = None
) -> dict[str, Identity]:
    """Return what files were when last seen, by key.

    Parameters
    ----------
    landing : Landing
        Where the inventory is.
    file_keys : collection of str, optional
        Only these files.
    """
    where = None if file_keys is None else ("file_key", file_keys)
    return {
        row["file_key"]: Identity(
            row["content_hash"], row["size"], row["mtime_ns"], row["duration_s"]
        )
        for row in landing.latest(FILES.landing_name, where=where)
        if row["content_hash"] is not None
    }


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


def update_inventory(
    scan: LibraryScan, root_names: Collection[str], landing: Landing
) -> tuple[int, int]:
    """Mark files that have left the scanned roots as gone, and those that are back as there.

    Returns
    -------
    (int, int)
        How many are gone, and how many are back unchanged.
    """
    present = {entry.file_key: entry for entry in scan.files}
    gone, back = [], []
    for row in landing.latest(FILES.landing_name):
        entry = present.get(row["file_key"])
        if entry is None:
            if not row["gone"] and decode_key(row["file_key"])[0] in root_names:
                gone.append({**row, "gone": True})
        elif row["gone"] and (entry.size, entry.mtime_ns) == (row["size"], row["mtime_ns"]):
            back.append({**row, "gone": False})
    changes = [{**row, "seen_at": datetime.now(UTC)} for row in (*gone, *back)]
    if changes:
        landing.append(FILES.landing_name, changes)
    return len(gone), len(back)


def _is_same(entry: FileEntry, identity: Identity) -> bool:
    return (entry.size, entry.mtime_ns) == (identity.size, identity.mtime_ns)


def batches(
    file_keys: Sequence[str], partition_keys: Sequence[str], batch_size: int
) -> list[tuple[str, str]]:
    """Cut files into ranges of consecutive partitions, since a run takes a range.

    Parameters
    ----------
    file_keys : sequence of str
        Files to do.
    partition_keys : sequence of str
        All partitions, in Dagster's order.
    batch_size : int
        Files per range at most.

    Returns
    -------
    list of (str, str)
        First and last partition key of each range.
    """
    todo = set(file_keys)
    ranges: list[list[str]] = []
    previous_taken = False
    for key in partition_keys:
        if key in todo:
            if not previous_taken or len(ranges[-1]) == batch_size:
                ranges.append([])
            ranges[-1].append(key)
        previous_taken = key in todo
    return [(keys[0], keys[-1]) for keys in ranges]
