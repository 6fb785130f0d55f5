"""Jobs: all feature sets, the fast ones, failed cells, the robustness tables, old history."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from audio_assets.defs.checks import published_tables
from audio_assets.defs.history import prune
from audio_assets.defs.partitions import RETRY_QUARANTINED_TAG, asset_key
from audio_assets.defs.robustness_tables import robustness_tables
from audio_assets.warehouse import open_landing

# Checks run in the job robustness_stats, not in each batch.
_FEATURES = dg.AssetSelection.groups("features").without_checks()

all_features = dg.define_asset_job(
    "all_features",
    selection=_FEATURES,
    description="Computes every feature set of a batch of files",
)

fast_features = dg.define_asset_job(
    "fast_features",
    selection=_FEATURES - dg.AssetSelection.assets(asset_key("musicnn")),
    description="Computes every feature set except MusiCNN of a batch of files",
)

retry_failed = dg.define_asset_job(
    "retry_failed",
    selection=_FEATURES,
    tags={RETRY_QUARANTINED_TAG: "true"},
    description="Retries the failed cells of a batch of files, also quarantined ones; finished "
    "cells are not computed again",
)

robustness_stats = dg.define_asset_job(
    "robustness_stats",
    selection=dg.AssetSelection.assets(robustness_tables)
    | dg.AssetSelection.checks(published_tables),
    description="Reports the robustness figures of the runs that just ended, and runs the checks",
)

KEEP_DAYS = 30
"""History that the job `prune_history` keeps (days)."""


@dg.op(description="Deletes old runs, their events and logs; every partition keeps its status")
def delete_old_runs(context: dg.OpExecutionContext) -> None:
    """Delete what is older than `KEEP_DAYS`."""
    before = datetime.now(UTC) - timedelta(days=KEEP_DAYS)
    context.log.info(str(prune(context.instance, open_landing(), before)))


@dg.job(description=f"Deletes Dagster's history that is older than {KEEP_DAYS} days")
def prune_history() -> None:
    """Delete old history."""
    delete_old_runs()


jobs = (all_features, fast_features, retry_failed, robustness_stats, prune_history)
