"""Jobs by purpose, and the schedule that takes up at night what a library still lacks."""

import dagster as dg

from audio_assets.assets import RETRY_QUARANTINED_TAG, asset_key
from audio_assets.backlog import batches, find_backlog
from audio_assets.discovery import look, register, settled_files
from audio_assets.run_requests import (
    ALL_FEATURES,
    batch_request,
    files_under_way,
    materialized_files,
)
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing

NIGHTLY = "nightly"

RUNS_PER_NIGHT = 100
"""Runs that one tick requests at most: the daemon takes seconds to create one."""

# Checks are evaluated by the job that reads the database, not by each batch.
_EVERYTHING = dg.AssetSelection.groups("features").without_checks()

all_features = dg.define_asset_job(
    ALL_FEATURES,
    selection=_EVERYTHING,
    description="Every feature set of a batch of files",
)

fast_features = dg.define_asset_job(
    "fast_features",
    selection=_EVERYTHING - dg.AssetSelection.assets(asset_key("musicnn")),
    description="Every feature set but MusiCNN, of a batch of files",
)

retry_failed = dg.define_asset_job(
    "retry_failed",
    selection=_EVERYTHING,
    tags={RETRY_QUARANTINED_TAG: "true"},
    description=(
        "Tries again what failed of a batch of files, also what is in quarantine; what is done "
        "is left as it is"
    ),
)

jobs = [all_features, fast_features, retry_failed]


@dg.schedule(
    name=NIGHTLY,
    job_name=ALL_FEATURES,
    cron_schedule="0 2 * * *",
    execution_timezone=get_settings().timezone,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description=(
        "Materializes what is missing, failed or made by an older version, but for what is in "
        "quarantine"
    ),
)
def nightly(
    context: dg.ScheduleEvaluationContext,
) -> list[dg.RunRequest] | dg.SkipReason:
    """Request runs for the library's backlog."""
    try:
        roots, scan, remarks = look(context.log)
    except ValueError as error:
        return dg.SkipReason(str(error))
    landing = open_landing()
    files = settled_files(scan)
    keys = register(context.instance, scan, roots, landing, files).partition_keys
    backlog = find_backlog(files, landing, materialized_files(context.instance))
    under_way = files_under_way(context.instance, keys)
    todo = set(backlog.todo) - under_way
    if not todo:
        reason = f"{len(scan.files)} files, and nothing to compute"
        if under_way:
            reason += f" but for the {len(under_way)} files that runs under way cover"
        return dg.SkipReason("; ".join([reason, *remarks]))
    ranges = batches(todo, keys, get_settings().batch_size, passable=backlog.done - under_way)
    context.log.info(
        f"{len(todo)} files with something to compute, in {len(ranges)} batches"
        + (f"; {RUNS_PER_NIGHT} tonight" if len(ranges) > RUNS_PER_NIGHT else "")
    )
    return [
        batch_request(batch, NIGHTLY, run_key=str(number))
        for number, batch in enumerate(ranges[:RUNS_PER_NIGHT], 1)
    ]
