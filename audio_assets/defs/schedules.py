"""Schedules: `nightly`, which requests runs for the backlog, and the pruning of old history."""

import dagster as dg

from audio_assets.defs.jobs import all_features, prune_history
from audio_assets.defs.partitions import (
    batch_request,
    batches,
    files_under_way,
)
from audio_assets.defs.registration import register, scan_roots, stable_files
from audio_assets.library.text import counted
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing
from audio_assets.warehouse.backlog import find_backlog

NIGHTLY = "nightly"

RUNS_PER_NIGHT = 100
"""Most runs that one tick requests: the daemon takes seconds to create one."""


@dg.schedule(
    name=NIGHTLY,
    job_name=all_features.name,
    cron_schedule="0 2 * * *",
    execution_timezone=get_settings().timezone,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Materializes cells that are missing, failed or from an older version of the code, "
    "except quarantined ones",
)
def nightly(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
    """Request runs for the library's backlog."""
    try:
        roots, scan, warnings = scan_roots(context.log)
    except ValueError as error:
        return dg.SkipReason(str(error))
    landing = open_landing()
    files = stable_files(scan)
    keys = register(context.instance, scan, roots, landing, files).partition_keys
    backlog = find_backlog(files, landing)
    under_way = files_under_way(context.instance, keys)
    todo = set(backlog.todo) - under_way
    if not todo:
        reason = f"{counted(len(scan.files), 'file')}, and nothing to compute"
        if under_way:
            reason += f" except the {counted(len(under_way), 'file')} of active runs"
        return dg.SkipReason("; ".join([reason, *warnings]))
    ranges = batches(todo, keys, get_settings().batch_size, passable=backlog.done - under_way)
    context.log.info(
        f"{counted(len(todo), 'file')} to compute, in {counted(len(ranges), 'run')}"
        + (
            f"; the first {RUNS_PER_NIGHT} are requested now"
            if len(ranges) > RUNS_PER_NIGHT
            else ""
        )
    )
    return [
        batch_request(batch, NIGHTLY, run_key=str(number))
        for number, batch in enumerate(ranges[:RUNS_PER_NIGHT], 1)
    ]


prune_history_daily = dg.ScheduleDefinition(
    name="prune_history_daily",
    job=prune_history,
    cron_schedule="0 4 * * *",
    execution_timezone=get_settings().timezone,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Deletes Dagster's history that is older than a month",
)

schedules = [nightly, prune_history_daily]
"""Off by default."""
