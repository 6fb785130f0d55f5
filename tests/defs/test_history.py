"""Dagster's history can be thrown away: the landing says what is computed."""

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from audio_assets.defs.history import prune, reconcile
from audio_assets.defs.partitions import asset_key
from audio_assets.defs.sensors import reconcile_history
from audio_assets.features import FEATURE_SETS
from audio_assets.library.scan import Library
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing
from tests.defs.test_sensors import attempts, execute, fresh_home, instance, put, root, statuses

__all__ = ["fresh_home", "instance", "root"]

GOOD = "music/good.wav"


def run_all(root: Path, instance: dg.DagsterInstance) -> str:
    keys = [entry.file_key for entry in Library({"music": root}).scan().files]
    instance.add_dynamic_partitions("audio_files", keys)
    tags = {
        "dagster/asset_partition_range_start": keys[0],
        "dagster/asset_partition_range_end": keys[-1],
    }
    run_id = str(uuid.uuid4())
    run = dg.DagsterRun(job_name="all_features", run_id=run_id, tags=tags)
    execute(instance, instance.add_run(run))
    return run_id


def test_lost_history_is_reported_again_without_computing(
    root: Path, instance: dg.DagsterInstance
) -> None:
    put(root / "good.wav")
    run_id = run_all(root, instance)
    attempted = attempts()
    instance.delete_run(run_id)
    assert statuses(instance)[GOOD] == {"MISSING"}
    cursor = None
    for _ in FEATURE_SETS:
        with dg.build_sensor_context(instance=instance, cursor=cursor) as context:
            reconcile_history(context)
            cursor = context.cursor
    assert statuses(instance)[GOOD] == {"MATERIALIZED"}
    event = instance.get_latest_materialization_event(asset_key("key"))
    assert event is not None
    assert event.asset_materialization is not None
    assert {"picture", "key", "status"} <= set(event.asset_materialization.metadata)
    assert reconcile(instance, open_landing(), FEATURE_SETS.values()) == 0
    assert attempts() == attempted


@pytest.mark.parametrize("with_bad_file", [False, True])
def test_pruning_keeps_the_status_of_every_partition(
    root: Path, instance: dg.DagsterInstance, *, with_bad_file: bool
) -> None:
    put(root / "good.wav")
    if with_bad_file:
        (root / "text.wav").write_text("not audio at all\n" * 100)
    first, second = run_all(root, instance), run_all(root, instance)
    shown, landing = statuses(instance), open_landing()
    assert prune(instance, landing, datetime.now(UTC) - timedelta(days=1)).runs == 0

    pruned = prune(instance, landing, datetime.now(UTC))
    # The newer run shows why the bad file's partitions are red.
    kept = [second] if with_bad_file else []
    assert [run.run_id for run in instance.get_runs()] == kept
    assert (pruned.runs, pruned.kept) == (2 - len(kept), len(kept))
    assert pruned.reported == (0 if with_bad_file else len(FEATURE_SETS))
    shards = get_settings().dagster_home / "history" / "runs"
    assert not list(shards.glob(f"{first}.db*"))
    assert statuses(instance) == shown
