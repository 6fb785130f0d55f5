"""Partitions, one per file; batches of them, and run tags."""

from collections.abc import Collection, Sequence

import dagster as dg

from audio_assets.monitoring.dagster_storage import PARTITIONS as PARTITIONS

audio_files = dg.DynamicPartitionsDefinition(name=PARTITIONS)
"""One partition per file; the key is ``<root name>/<path below the root>``."""

POOL = "audio_extraction"
"""Concurrency pool of the ops that use the whole machine."""

FORCE_TAG = "audio_assets/force"
"""Run tag: compute finished and quarantined cells again."""

RETRY_QUARANTINED_TAG = "audio_assets/retry_quarantined"
"""Run tag: first release the run's cells from quarantine."""

RESULT_TAG = "audio_assets/result"
"""Run tag, set when the run ends: see `audio_assets.extraction.engine.RunResult`."""

REQUESTED_BY_TAG = "audio_assets/requested_by"
ANALYZE = "audio-assets analyze"
"""Value of `REQUESTED_BY_TAG` for runs in the process of the command."""

FILES_TAG = "audio_assets/files"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
PARTITION_TAG = "dagster/partition"

UNFINISHED = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)

FINISHED = (
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
)

_MAX_PASSED = 20
"""Finished files in a row that a range may include: reporting them costs less than another run."""


def asset_key(feature_set: str) -> dg.AssetKey:
    """Return the asset key of a feature set."""
    return dg.AssetKey(["features", feature_set])


def batch_tags(batch: Sequence[str], requested_by: str) -> dict[str, str]:
    """Return the tags of a run over a batch of files.

    Parameters
    ----------
    batch : sequence of str
        Consecutive partition keys.
    requested_by : str
        Name of the sensor, schedule or command.
    """
    return {
        RANGE_START_TAG: batch[0],
        RANGE_END_TAG: batch[-1],
        FILES_TAG: str(len(batch)),
        REQUESTED_BY_TAG: requested_by,
    }


def batch_request(
    batch: Sequence[str], requested_by: str, run_key: str | None = None
) -> dg.RunRequest:
    """Return the request of a run over a batch of files, with less priority than manual runs."""
    tags = batch_tags(batch, requested_by) | {"dagster/priority": "-1"}
    return dg.RunRequest(run_key=run_key, tags=tags)


def partition_range(run: dg.DagsterRun) -> tuple[str, str] | None:
    """Return the first and the last partition that a run covers."""
    first = run.tags.get(RANGE_START_TAG, run.tags.get(PARTITION_TAG))
    last = run.tags.get(RANGE_END_TAG, first)
    return (first, last) if first is not None and last is not None else None


def files_under_way(instance: dg.DagsterInstance, partition_keys: Sequence[str]) -> set[str]:
    """Return the files of the runs that are queued or running.

    Parameters
    ----------
    instance : DagsterInstance
        Where the runs are.
    partition_keys : sequence of str
        All partitions, in Dagster's order.
    """
    runs = instance.get_runs(filters=dg.RunsFilter(statuses=UNFINISHED))
    ranges = {ends for run in runs if (ends := partition_range(run))}
    position = {key: number for number, key in enumerate(partition_keys)} if ranges else {}
    covered: set[str] = set()
    for first, last in ranges:
        if first in position and last in position:
            covered.update(partition_keys[position[first] : position[last] + 1])
    return covered


def batches(
    file_keys: Collection[str],
    partition_keys: Sequence[str],
    batch_size: int,
    passable: Collection[str] = frozenset(),
) -> list[list[str]]:
    """Group files into ranges of consecutive partitions, as a run takes a range.

    Parameters
    ----------
    file_keys : collection of str
        Files to compute.
    partition_keys : sequence of str
        All partitions, in Dagster's order.
    batch_size : int
        Most partitions of a range.
    passable : collection of str
        Finished files that a range may include.

    Returns
    -------
    list of list of str
        The partition keys of each range, which begins and ends with a file to compute.
    """
    todo, passable = set(file_keys), set(passable)
    ranges: list[list[str]] = []
    passed: list[str] | None = None  # finished files after the range's end; None: no range
    for key in partition_keys:
        if key in todo:
            if passed is None or len(ranges[-1]) + len(passed) >= batch_size:
                ranges.append([])
                passed = []
            ranges[-1] += [*passed, key]
            passed = []
        elif passed is not None and key in passable and len(passed) < _MAX_PASSED:
            passed.append(key)
        else:
            passed = None
    return ranges
