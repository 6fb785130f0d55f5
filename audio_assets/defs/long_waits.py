"""Long waits: a run of which every open cell is deferred ends, and is requested again when due.

A run that waits holds a slot of the pool. So if nothing can be computed for more than
`LONGEST_WAIT_S`, its steps fail, its tags say what is to be continued and when, and the sensor
`resume_deferred` requests a run of the rest. A run that nobody would continue waits in place.
"""

import time
from datetime import UTC, datetime, timedelta

import dagster as dg

from audio_assets.defs.partitions import (
    ANALYZE,
    FINISHED,
    FORCE_TAG,
    RANGE_END_TAG,
    RANGE_START_TAG,
    REQUESTED_BY_TAG,
    RESULT_TAG,
    asset_key,
    partition_range,
)
from audio_assets.extraction.engine import Engine, RunResult
from audio_assets.library.text import counted
from robustness.settings import get_settings

LONGEST_WAIT_S = 60.0
"""Longest time for which a run waits with no cell to compute (s)."""

DEGRADED_TAG = "audio_assets/degraded"
RETRY_AT_TAG = "audio_assets/retry_at"
WAITING_SINCE_TAG = "audio_assets/waiting_since"
WAITING_FOR_TAG = "audio_assets/waiting_for"
WAITING_SETS_TAG = "audio_assets/waiting_feature_sets"

_HEARTBEAT_S = 180.0
_MESSAGE_CHARACTERS = 200


def result_tags(engine: Engine) -> dict[str, str]:
    """Return the tags of a run that ends: its result, and when degraded rows are due again."""
    result = engine.result
    tags = {RESULT_TAG: result.value}
    if result is RunResult.DEFERRED or not engine.retry:
        return tags
    retry_at, feature_sets = engine.retry
    return tags | {
        DEGRADED_TAG: "true",
        RETRY_AT_TAG: retry_at.isoformat(timespec="seconds"),
        WAITING_SETS_TAG: ",".join(feature_sets),
    }


def waited_before_s(run: dg.DagsterRun) -> float:
    """Return how long the cells of a resumed run have been deferred before it (s)."""
    since = run.tags.get(WAITING_SINCE_TAG)
    return (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds() if since else 0.0


def end_long_wait(instance: dg.DagsterInstance, run: dg.DagsterRun, engine: Engine) -> None:
    """Fail a step if its run has nothing to compute for a long time.

    Raises
    ------
    dagster.Failure
        The failure, which is not retried as a step.
    """
    wait = engine.wait
    if wait is None or wait.seconds <= LONGEST_WAIT_S or not _is_resumed(instance, run):
        return
    now = datetime.now(UTC)
    retry_at = now + timedelta(seconds=wait.seconds)
    instance.add_run_tags(
        run.run_id,
        {
            RETRY_AT_TAG: retry_at.isoformat(timespec="seconds"),
            WAITING_SINCE_TAG: (now - timedelta(seconds=wait.waited_s)).isoformat(
                timespec="seconds"
            ),
            WAITING_FOR_TAG: wait.reason[:_MESSAGE_CHARACTERS],
            WAITING_SETS_TAG: ",".join(wait.feature_sets),
        },
    )
    engine.end_deferred()
    raise dg.Failure(
        description=f"Deferred until {retry_at:%H:%M:%S} UTC: {counted(wait.cells, 'cell')} "
        f"({wait.reason}). The run ends, so that others can go on; resume_deferred requests "
        "these cells then",
        allow_retries=False,
    )


def _is_resumed(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Return whether a run of the daemon can continue a run's cells."""
    if (
        run.tags.get(REQUESTED_BY_TAG) == ANALYZE
        or FORCE_TAG in run.tags
        or not partition_range(run)
    ):
        return False
    # Not public: what Dagster's page of daemons shows.
    heartbeat = instance.get_daemon_heartbeats().get("SENSOR")
    return heartbeat is not None and time.time() - heartbeat.timestamp < _HEARTBEAT_S


def resumptions(instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    """Return the requests of runs that continue those whose wait is over.

    They compute deferred cells, and degraded rows that are due again.
    """
    now = datetime.now(UTC)
    oldest = now - timedelta(days=1, seconds=get_settings().retry_total_seconds)
    ended = [
        run
        for tags in ({RESULT_TAG: RunResult.DEFERRED.value}, {DEGRADED_TAG: "true"})
        for run in instance.get_runs(
            dg.RunsFilter(statuses=FINISHED, tags=tags, updated_after=oldest)
        )
    ]
    requests = []
    for run in ended:
        if (span := partition_range(run)) and datetime.fromisoformat(run.tags[RETRY_AT_TAG]) <= now:
            tags = {
                RANGE_START_TAG: span[0],
                RANGE_END_TAG: span[1],
                REQUESTED_BY_TAG: f"run {run.run_id}",
            }
            if since := run.tags.get(WAITING_SINCE_TAG):
                tags[WAITING_SINCE_TAG] = since
            names = run.tags[WAITING_SETS_TAG].split(",")
            requests.append(
                dg.RunRequest(
                    run_key=run.run_id, tags=tags, asset_selection=[asset_key(n) for n in names]
                )
            )
    return requests
