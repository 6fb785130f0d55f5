"""Runs over batches of files: what they are called, which files they cover."""

from collections.abc import Sequence

import dagster as dg

from audio_assets.assets import asset_key
from audio_assets.features import FEATURE_SETS

ALL_FEATURES = "all_features"

REQUESTED_BY_TAG = "audio_assets/requested_by"
FILES_TAG = "audio_assets/files"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
_PARTITION_TAG = "dagster/partition"

UNFINISHED = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)


def batch_tags(batch: Sequence[str], requested_by: str) -> dict[str, str]:
    """Return the tags of a run over a batch of files.

    Parameters
    ----------
    batch : sequence of str
        Consecutive partition keys.
    requested_by : str
        What asked for the run.
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
    """Return the request of a run over a batch of files, which yields to runs launched by hand."""
    tags = batch_tags(batch, requested_by) | {"dagster/priority": "-1"}
    return dg.RunRequest(run_key=run_key, tags=tags)


def materialized_files(instance: dg.DagsterInstance) -> dict[str, set[str]]:
    """Return the files whose cells Dagster knows to be done, by feature set."""
    return {name: instance.get_materialized_partitions(asset_key(name)) for name in FEATURE_SETS}


def files_under_way(instance: dg.DagsterInstance, partition_keys: Sequence[str]) -> set[str]:
    """Return the files that runs cover which are queued or running.

    Parameters
    ----------
    instance : DagsterInstance
        Where the runs are.
    partition_keys : sequence of str
        All partitions, in Dagster's order.
    """
    ranges = set()
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=UNFINISHED)):
        first = run.tags.get(RANGE_START_TAG, run.tags.get(_PARTITION_TAG))
        last = run.tags.get(RANGE_END_TAG, first)
        if first is not None and last is not None:
            ranges.add((first, last))
    position = {key: number for number, key in enumerate(partition_keys)} if ranges else {}
    covered: set[str] = set()
    for first, last in ranges:
        if first in position and last in position:
            covered.update(partition_keys[position[first] : position[last] + 1])
    return covered
