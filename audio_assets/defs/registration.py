"""Registration: updates partitions and the inventory to the files of the library."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus

from audio_assets.defs.partitions import PARTITIONS, UNFINISHED
from audio_assets.library.file_keys import FileKeyError, decode_key
from audio_assets.library.roots import forget_root, library_roots
from audio_assets.library.scan import FileEntry, Library, LibraryScan
from audio_assets.warehouse.inventory import MissingFiles, update_inventory
from audio_assets.warehouse.landing import Landing

STABLE_S = 10.0
"""A file modified less than this ago may still be written to (s)."""

SCAN_S = 40.0
"""How long `scan_roots` waits for a scan that it starts (s)."""

STILL_SCANNING_S = 2.0
"""How long `scan_roots` waits for a scan that an earlier call started (s)."""

_PARTITIONS_PER_CALL = 500  # SQLite limits variables per query


@dataclass(frozen=True)
class Registration:
    """The result of registering a library.

    Parameters
    ----------
    added : int
        New partitions.
    changed, moved, gone, back : int
        Files whose content has changed, files that were moved or renamed, files marked as gone
        (the moved ones too), and files that are back unchanged.
    removed : int
        Partitions of gone files, or of no file at all, that were removed.
    to_remove : int
        Those that stay until no run or backfill is active.
    new_or_changed : dict of str to str
        The files that are new or have changed, as in `warehouse.inventory.InventoryChanges`.
    partition_keys : list of str
        All partitions now, in Dagster's order.
    """

    added: int
    changed: int
    moved: int
    gone: int
    back: int
    removed: int
    to_remove: int
    new_or_changed: dict[str, str]
    partition_keys: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """Files there are, and those found to be new, changed, moved, gone or back."""
        return {
            "files": len(self.partition_keys) - self.to_remove,
            "added": self.added,
            "changed": self.changed,
            "moved": self.moved,
            "gone": self.gone,
            "back": self.back,
            "partitions_removed": self.removed,
        }


def register(
    instance: dg.DagsterInstance,
    scan: LibraryScan,
    roots: Mapping[str, Path],
    landing: Landing,
    files: Sequence[FileEntry] | None = None,
    *,
    may_be_empty: bool = False,
) -> Registration:
    """Add a partition per file, mark gone files in the inventory, and remove their partitions.

    It can be repeated, also after an interruption. Rows and materializations of gone files stay,
    and count again when the file is back.

    Parameters
    ----------
    instance : DagsterInstance
        Where the partitions are.
    scan : LibraryScan
        The files found.
    roots : mapping of str to Path
        The roots that were scanned.
    landing : Landing
        Where the inventory is.
    files : sequence of FileEntry, optional
        The files that get partitions; all by default.
    may_be_empty : bool
        Take a root without files as empty rather than as not mounted.
    """
    found = {entry.file_key for entry in scan.files}
    ready = found if files is None else {entry.file_key for entry in files}
    missing = MissingFiles(scan, roots, may_be_empty=may_be_empty)
    changes = update_inventory(scan, missing, landing)
    known = instance.get_dynamic_partitions(PARTITIONS)
    added = sorted(ready.difference(known))
    add_partitions(instance, added)
    names = {*library_roots(), *roots}
    gone = {
        key
        for key in known
        if key not in found
        # A partition that somebody added by hand may name no file of any root.
        and (missing.is_gone(key) or (key not in changes.known and _root_of(key) not in names))
    }
    removed = gone if gone and not is_busy(instance) else set()
    for key in removed:
        instance.delete_dynamic_partition(PARTITIONS, key)
    return Registration(
        added=len(added),
        changed=len(changes.new_or_changed.keys() & changes.known),
        moved=changes.moved,
        gone=changes.gone,
        back=changes.back,
        removed=len(removed),
        to_remove=len(gone) - len(removed),
        new_or_changed={k: v for k, v in changes.new_or_changed.items() if k in ready},
        partition_keys=[*(key for key in known if key not in removed), *added],
    )


def _root_of(file_key: str) -> str | None:
    try:
        return decode_key(file_key)[0]
    except FileKeyError:
        return None


def forget(instance: dg.DagsterInstance, root_name: str, landing: Landing) -> Registration:
    """Remove a root from the library: its files are marked as gone, their results stay.

    Parameters
    ----------
    instance : DagsterInstance
        Where the partitions are; no run or backfill should be active.
    root_name : str
        The root's name.
    landing : Landing
        Where the inventory is.

    Raises
    ------
    ValueError
        If no root of that name is remembered.
    """
    root = forget_root(root_name)
    return register(instance, LibraryScan(), {root_name: root}, landing, may_be_empty=True)


def add_partitions(instance: dg.DagsterInstance, file_keys: Sequence[str]) -> None:
    """Add partitions; another process may add the same ones at the same time."""
    new = list(file_keys)
    while new:
        some = new[:_PARTITIONS_PER_CALL]
        try:
            instance.add_dynamic_partitions(PARTITIONS, some)
        except sa.exc.IntegrityError:
            known = set(instance.get_dynamic_partitions(PARTITIONS))
            new = [key for key in new if key not in known]
        else:
            del new[:_PARTITIONS_PER_CALL]


def scan_roots(log: logging.Logger) -> tuple[dict[str, Path], LibraryScan, list[str]]:
    """Scan the library's roots.

    Parameters
    ----------
    log : logging.Logger
        Where the warnings go.

    Returns
    -------
    (dict of str to Path, LibraryScan, list of str)
        The roots, the files found, and warnings about unreachable roots.

    Raises
    ------
    ValueError
        If no root is known, the settings are wrong, or the scan takes too long.
    """
    roots = library_roots()
    if not roots:
        raise ValueError(
            "no library is known: set AUDIO_LIBRARY, or run `audio-assets scan DIRECTORY`"
        )
    scan = _scan_in_thread(roots)
    warnings = _root_warnings(scan, roots)
    for warning in warnings:
        log.warning(warning)
    return roots, scan, warnings


def _scan_in_thread(roots: dict[str, Path]) -> LibraryScan:
    """Scan in a thread, as a network share that does not answer blocks its reader for ever.

    A scan that takes longer than `SCAN_S` continues, and a later call returns its result.

    Raises
    ------
    ValueError
        If there is no result yet.
    """
    scan, wait = _scans.get(str(roots)), STILL_SCANNING_S
    if scan is None:
        scan, wait = Future(), SCAN_S
        _scans[str(roots)] = scan
        threading.Thread(target=_scan_into, args=(scan, roots), name="scan", daemon=True).start()
    try:
        return scan.result(wait)
    except TimeoutError:
        where = ", ".join(map(str, roots.values()))
        raise ValueError(f"still scanning {where}: it is slow, or does not answer") from None
    finally:
        if scan.done():
            _scans.pop(str(roots), None)


_scans: dict[str, "Future[LibraryScan]"] = {}


def _scan_into(scan: "Future[LibraryScan]", roots: dict[str, Path]) -> None:
    try:
        scan.set_result(Library(roots).scan(only_reachable=True))
    except Exception as error:  # noqa: BLE001 - the caller of result() gets it
        scan.set_exception(error)


def stable_files(scan: LibraryScan) -> list[FileEntry]:
    """Return the files that were not modified during the last `STABLE_S` seconds."""
    now = time.time_ns()
    # A modification time in the future comes from a wrong clock and does not count.
    return [e for e in scan.files if not 0 <= now - e.mtime_ns < STABLE_S * 1e9]


def is_busy(instance: dg.DagsterInstance) -> bool:
    """Return whether a run or backfill is active, which a removed partition could break."""
    active = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]
    return bool(
        instance.get_runs(filters=dg.RunsFilter(statuses=UNFINISHED), limit=1)
        or instance.get_backfills(filters=BulkActionsFilter(statuses=active), limit=1)
    )


def _root_warnings(scan: LibraryScan, roots: Mapping[str, Path]) -> list[str]:
    """Return a warning for each unreachable or empty root; its files are not marked as gone."""
    return [
        *(f"root {name!r} is unreachable: {why}" for name, why in scan.unreachable.items()),
        *(
            f"root {name!r} ({roots[name]}) is empty: is it mounted?"
            for name in MissingFiles(scan, roots).empty_roots
        ),
    ]
