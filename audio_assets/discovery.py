"""Keeping Dagster's partitions and the inventory in step with the library's directories."""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
from blake3 import blake3
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus

from audio_assets.assets import PARTITIONS
from audio_assets.backlog import Reach, batches, update_inventory
from audio_assets.library import FileEntry, Library, LibraryScan
from audio_assets.roots import forget_root, library_roots
from audio_assets.run_requests import ALL_FEATURES, UNFINISHED, batch_request, files_under_way
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing
from audio_assets.warehouse.landing import Landing
from robustness.quarantine import Quarantine

SENSOR = "discover_files"
INTERVAL_S = 60

SETTLING_S = 10.0
"""A file that was modified less than this ago may still be on its way into the library (s)."""

SCAN_S = 40.0
STILL_SCANNING_S = 2.0
"""How long a look waits for a scan that it began, and for one begun by an earlier look (s)."""

UNFINISHED_RUNS = 10
"""Runs requested by the sensor that may be queued or running at a time.

The daemon takes seconds to create one, as it announces each cell.
"""

_PARTITIONS_PER_CALL = 500  # SQLite limits variables per query
_RUN_KEYS_PER_QUERY = 100
_SENSOR_TAG = "dagster/sensor_name"
_RUN_KEY_TAG = "dagster/run_key"


@dataclass(frozen=True)
class Registration:
    """What registering a library came to.

    Parameters
    ----------
    added : int
        New partitions.
    gone, back : int
        Files marked as gone, and files that are back unchanged.
    removed : int
        Partitions removed, as their files are gone.
    to_remove : int
        Partitions of gone files that stay until no run or backfill is under way.
    new_or_changed : dict of str to str
        The files that are new or have changed, as in `backlog.InventoryChanges`.
    partition_keys : list of str
        All partitions now, in Dagster's order.
    """

    added: int
    gone: int
    back: int
    removed: int
    to_remove: int
    new_or_changed: dict[str, str]
    partition_keys: list[str]


def register(
    instance: dg.DagsterInstance,
    scan: LibraryScan,
    roots: Mapping[str, Path],
    landing: Landing,
    files: Sequence[FileEntry] | None = None,
    *,
    may_be_empty: bool = False,
) -> Registration:
    """Give each file a partition, mark files that are gone, and remove their partitions.

    Repeating it, or a part of it, does no harm. Rows and materializations of files that are gone
    stay; a file that is back has them again.

    Parameters
    ----------
    instance : DagsterInstance
        Where the partitions are.
    scan : LibraryScan
        What is there.
    roots : mapping of str to Path
        The roots that were scanned.
    landing : Landing
        Where the inventory is.
    files : sequence of FileEntry, optional
        Those of the files that get partitions; all by default.
    may_be_empty : bool
        Take a root without any file to be empty, rather than not mounted.
    """
    there = {entry.file_key for entry in scan.files}
    ready = there if files is None else {entry.file_key for entry in files}
    reach = Reach(scan, roots, may_be_empty=may_be_empty)
    changes = update_inventory(scan, reach, landing)
    known = instance.get_dynamic_partitions(PARTITIONS)
    added = sorted(ready.difference(known))
    add_partitions(instance, added)
    lost = {key for key in known if key not in there and reach.has_lost(key)}
    removed = lost if lost and not is_busy(instance) else set()
    for key in removed:
        instance.delete_dynamic_partition(PARTITIONS, key)
    return Registration(
        added=len(added),
        gone=changes.gone,
        back=changes.back,
        removed=len(removed),
        to_remove=len(lost) - len(removed),
        new_or_changed={k: v for k, v in changes.new_or_changed.items() if k in ready},
        partition_keys=[*(key for key in known if key not in removed), *added],
    )


def forget(instance: dg.DagsterInstance, root_name: str, landing: Landing) -> Registration:
    """Take a directory out of the library: all of its files are gone; what is known of them stays.

    Parameters
    ----------
    instance : DagsterInstance
        Where the partitions are; no run or backfill should be under way.
    root_name : str
        The directory's name.
    landing : Landing
        Where the inventory is.

    Raises
    ------
    ValueError
        If no directory is remembered by that name.
    """
    root = forget_root(root_name)
    return register(instance, LibraryScan(), {root_name: root}, landing, may_be_empty=True)


def add_partitions(instance: dg.DagsterInstance, file_keys: Sequence[str]) -> None:
    """Add partitions, which another process may be adding as well."""
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


def look(log: logging.Logger) -> tuple[dict[str, Path], LibraryScan, list[str]]:
    """Look at the library's directories.

    Parameters
    ----------
    log : logging.Logger
        Is warned of roots that are out of reach.

    Returns
    -------
    (dict of str to Path, LibraryScan, list of str)
        The roots, what is there, and which roots are out of reach, in words.

    Raises
    ------
    ValueError
        If no library is known, the settings name an impossible one, or a scan takes long.
    """
    roots = library_roots()
    if not roots:
        raise ValueError(
            "no library is known: set AUDIO_LIBRARY, or run `audio-assets scan DIRECTORY`"
        )
    scan = _scan_beside(roots)
    remarks = unusual(scan, roots)
    for remark in remarks:
        log.warning(remark)
    return roots, scan, remarks


def _scan_beside(roots: dict[str, Path]) -> LibraryScan:
    """Scan in a thread of its own: a share that does not answer holds a reader for ever.

    What takes longer than `SCAN_S` goes on, and a later look has its result.

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
        found = scan.result(wait)
    except TimeoutError:
        where = ", ".join(map(str, roots.values()))
        raise ValueError(
            f"still looking for files in {where}: it is slow, or does not answer"
        ) from None
    finally:
        if scan.done():
            _scans.pop(str(roots), None)
    return found


_scans: dict[str, "Future[LibraryScan]"] = {}


def _scan_into(scan: "Future[LibraryScan]", roots: dict[str, Path]) -> None:
    try:
        scan.set_result(Library(roots).scan(only_reachable=True))
    except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
        scan.set_exception(error)


def settled_files(scan: LibraryScan) -> list[FileEntry]:
    """Return the files that are not being written to any more, as far as one can tell."""
    now = time.time_ns()
    # A time in the future is a wrong clock's: no reason to wait for it.
    return [e for e in scan.files if not 0 <= now - e.mtime_ns < SETTLING_S * 1e9]


def is_busy(instance: dg.DagsterInstance) -> bool:
    """Tell whether a run or a backfill is under way, which a removed partition could break."""
    active = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]
    return bool(
        instance.get_runs(filters=dg.RunsFilter(statuses=UNFINISHED), limit=1)
        or instance.get_backfills(filters=BulkActionsFilter(statuses=active), limit=1)
    )


@dg.sensor(
    name=SENSOR,
    job_name=ALL_FEATURES,
    minimum_interval_seconds=INTERVAL_S,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=(
        "Registers new files, marks files that are gone, and requests runs of every feature set "
        "for files that are new or have changed"
    ),
)
def discover_files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Look at the library's directories once; nothing is read of files or tables if all is as was.

    The cursor holds a digest of what was found when there was last nothing left to request.
    """
    instance = context.instance
    unfinished = instance.get_runs_count(
        dg.RunsFilter(statuses=UNFINISHED, tags={_SENSOR_TAG: SENSOR})
    )
    if unfinished > UNFINISHED_RUNS // 2:
        return dg.SkipReason(f"{unfinished} runs requested here are under way")
    try:
        roots, scan, remarks = look(context.log)
    except ValueError as error:
        return dg.SkipReason(str(error))
    files = settled_files(scan)
    if len(files) < len(scan.files):
        remarks.append(f"{len(scan.files) - len(files)} files wait, as they were just written to")
    digest = _digest(files, scan)
    before = _Cursor.read(context.cursor)
    if before.digest == digest and not before.left and (not before.waits or is_busy(instance)):
        return dg.SkipReason("; ".join([f"{len(files)} files, none new or changed", *remarks]))

    registered = register(instance, scan, roots, open_landing(), files)
    changed = registered.new_or_changed
    under_way = files_under_way(instance, registered.partition_keys)
    barred = {cell.file_key for cell in Quarantine().list()}
    pending = _not_requested(
        instance,
        batches(
            changed.keys() - under_way,
            registered.partition_keys,
            get_settings().batch_size,
            passable={e.file_key for e in files} - changed.keys() - under_way - barred,
        ),
        changed,
    )
    requests = [
        batch_request(batch, SENSOR, run_key)
        for run_key, batch in islice(pending, UNFINISHED_RUNS - unfinished)
    ]
    left = next(pending, None) is not None
    summary = (
        f"{len(files)} files: {registered.added} partitions added, {registered.removed} removed; "
        f"{registered.gone} files gone, {registered.back} back; {len(requests)} runs requested"
        + (", more to come" if left else "")
    )
    context.log.info(summary)
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else "; ".join([summary, *remarks]),
        cursor=_Cursor(
            digest, left=left, waits=bool(registered.to_remove or changed.keys() & under_way)
        ).write(),
    )


def unusual(scan: LibraryScan, roots: Mapping[str, Path]) -> list[str]:
    """Say which roots are out of reach, whose files therefore are taken to be there."""
    return [
        *(f"root {name!r} is out of reach: {why}" for name, why in scan.unreachable.items()),
        *(
            f"root {name!r} ({roots[name]}) is empty; is it mounted?"
            for name in Reach(scan, roots).empty
        ),
    ]


@dataclass(frozen=True)
class _Cursor:
    """What the sensor remembers of its last look.

    Parameters
    ----------
    digest : str
        Of what was found.
    left : bool
        Whether there was more to request than may be under way at a time.
    waits : bool
        Whether something waits for the runs that are under way.
    """

    digest: str = ""
    left: bool = False
    waits: bool = False

    @classmethod
    def read(cls, text: str | None) -> "_Cursor":
        try:
            return cls(**json.loads(text or "{}"))
        except (ValueError, TypeError):
            return cls()

    def write(self) -> str:
        return json.dumps(asdict(self))


def _digest(files: Sequence[FileEntry], scan: LibraryScan) -> str:
    hasher = blake3()
    for entry in files:
        hasher.update(f"{entry.file_key}\0{entry.size}\0{entry.mtime_ns}\n".encode())
    hasher.update(repr((sorted(scan.unreachable), sorted(scan.unread))).encode())
    return hasher.hexdigest()


def _not_requested(
    instance: dg.DagsterInstance, ranges: Sequence[list[str]], changed: Mapping[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield, with their run keys, the batches whose changes this sensor has not requested yet."""
    keyed = [(_run_key(batch, changed), batch) for batch in ranges]
    for start in range(0, len(keyed), _RUN_KEYS_PER_QUERY):
        some = keyed[start : start + _RUN_KEYS_PER_QUERY]
        tags = {_SENSOR_TAG: SENSOR, _RUN_KEY_TAG: [run_key for run_key, _ in some]}
        requested = {
            run.tags.get(_RUN_KEY_TAG) for run in instance.get_runs(dg.RunsFilter(tags=tags))
        }
        yield from (pair for pair in some if pair[0] not in requested)


def _run_key(batch: Sequence[str], changed: Mapping[str, str]) -> str:
    hasher = blake3()
    for key in batch:
        if key in changed:
            hasher.update(f"{key}\0{changed[key]}\n".encode())
    return hasher.hexdigest(length=16)
