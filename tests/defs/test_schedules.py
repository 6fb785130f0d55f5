"""The nightly schedule and the jobs by purpose."""

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from audio_assets.definitions import defs
from audio_assets.defs import schedules
from audio_assets.defs.assets import POOL
from audio_assets.defs.partitions import RETRY_QUARANTINED_TAG, asset_key
from audio_assets.defs.schedules import nightly
from audio_assets.features import FEATURE_SETS
from audio_assets.library.scan import Library
from audio_assets.settings import AudioAssetsSettings
from audio_assets.warehouse import open_landing
from audio_assets.warehouse.schema import FILES, feature_table
from robustness.error_classifier import ErrorType
from robustness.quarantine import Quarantine
from tests.defs.test_sensors import (
    attempts,
    execute,
    fresh_home,
    identify,
    instance,
    partitions,
    put,
    root,
    statuses,
)

__all__ = ["fresh_home", "instance", "root"]


def tick(instance: dg.DagsterInstance) -> list[tuple[str, str]] | str:
    """Evaluate the schedule; return the ranges it requests, or why it requests none."""
    context = dg.build_schedule_context(
        instance, scheduled_execution_time=datetime.now(UTC), repository_def=None
    )
    result = nightly(context)
    if isinstance(result, dg.SkipReason):
        return str(result.skip_message)
    assert isinstance(result, list)
    start, end = (f"dagster/asset_partition_range_{side}" for side in ("start", "end"))
    assert len({request.run_key for request in result}) == len(result)
    return [(request.tags[start], request.tags[end]) for request in result]


def compute(
    instance: dg.DagsterInstance,
    *names: str,
    but: tuple[str, str] | None = None,
    code_version: str = "",
) -> None:
    """Write rows of cells and report them to Dagster, as a run does."""
    landing = open_landing()
    known = {row["file_key"]: row["content_hash"] for row in landing.latest(FILES.landing_name)}
    for feature_set in FEATURE_SETS.values():
        rows = [
            {
                "file_key": f"music/{name}.wav",
                "content_hash": known[f"music/{name}.wav"],
                "code_version": code_version or feature_set.code_version,
                "computed_at": datetime.now(UTC) + timedelta(seconds=1),
            }
            for name in names
            if but != (name, feature_set.name)
        ]
        if rows:
            landing.append(feature_table(feature_set).landing_name, rows)
        for row in rows:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(asset_key(feature_set.name), partition=str(row["file_key"]))
            )


def test_missing_failed_and_outdated_cells_are_requested(
    root: Path, instance: dg.DagsterInstance
) -> None:
    for name in "abcdef":
        put(root / f"{name}.wav", 100.0 * ord(name))
    identify()
    compute(instance, "a", "c", "d", "f")
    compute(instance, "b", but=("b", "rhythm"))
    assert tick(instance) == [("music/b.wav", "music/e.wav")]  # c and d are passed over
    compute(instance, "b", "e")
    assert tick(instance) == "6 files, and nothing to compute"
    compute(instance, "f", code_version="older")
    assert tick(instance) == [("music/f.wav", "music/f.wav")]
    assert len(partitions(instance)) == 6


def test_quarantined_cells_are_not_requested(root: Path, instance: dg.DagsterInstance) -> None:
    for name in "abc":
        put(root / f"{name}.wav", 100.0 * ord(name))
    identify()
    compute(instance, "a", "c")
    compute(instance, "b", but=("b", "rhythm"))
    (content_hash,) = (
        row["content_hash"]
        for row in open_landing().latest(FILES.landing_name)
        if row["file_key"] == "music/b.wav"
    )
    Quarantine().add(
        content_hash,
        "rhythm",
        file_key="music/b.wav",
        error_type=ErrorType.CORRUPT_FILE.value,
        reason="bad",
    )
    assert tick(instance) == "3 files, and nothing to compute"
    compute(instance, "a", "c", code_version="older")
    # One run over both would include the quarantined file between them, and fail.
    assert tick(instance) == [("music/a.wav", "music/a.wav"), ("music/c.wav", "music/c.wav")]


def test_runs_per_night_are_limited_and_skip_files_of_active_runs(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "RUNS_PER_NIGHT", 2)
    for number in range(12):
        put(root / f"{number:02}.wav")
    first = tick(instance)
    assert first == [("music/00.wav", "music/03.wav"), ("music/04.wav", "music/07.wav")]
    tags = {
        "dagster/asset_partition_range_start": "music/00.wav",
        "dagster/asset_partition_range_end": "music/10.wav",
    }
    instance.add_run(dg.DagsterRun(job_name="all_features", run_id=str(uuid.uuid4()), tags=tags))
    assert tick(instance) == [("music/11.wav", "music/11.wav")]


def test_an_unreachable_root_is_named(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.rmdir()
    reason = tick(instance)
    assert isinstance(reason, str)
    assert "'music' is unreachable" in reason


def test_unknown_time_zone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUDIO_ASSETS_TIMEZONE", "Europe/Berlin")
    assert AudioAssetsSettings().timezone == "Europe/Berlin"
    monkeypatch.setenv("AUDIO_ASSETS_TIMEZONE", "Middle-earth/Shire")
    with pytest.raises(ValueError, match="time zone"):
        AudioAssetsSettings()


def test_jobs_by_purpose() -> None:
    everything = {f"features__{name}" for name in FEATURE_SETS}
    ops = {
        name: {node.name for node in defs.resolve_job_def(name).nodes}
        for name in ("all_features", "fast_features", "retry_failed")
    }
    assert len(ops["all_features"]) == len(everything)
    assert ops["all_features"] - ops["fast_features"] == {"musicnn"}
    assert ops["retry_failed"] == ops["all_features"]
    for job in ops:
        pools = {node.definition.pool for node in defs.resolve_job_def(job).nodes}
        assert pools == {POOL}


def test_retry_failed_also_tries_quarantined_cells(
    root: Path, instance: dg.DagsterInstance
) -> None:
    put(root / "good.wav")
    put(root / "judged too early.wav", 500.0)
    files = Library({"music": root}).scan().files
    instance.add_dynamic_partitions("audio_files", [entry.file_key for entry in files])
    identify()
    for row in open_landing().latest(FILES.landing_name):
        if row["file_key"] != "music/good.wav":
            Quarantine().add(
                row["content_hash"],
                "key",
                file_key="another name.wav",
                error_type=ErrorType.CORRUPT_FILE.value,
                reason="it was a full moon",
            )
    range_tags = {
        "dagster/asset_partition_range_start": files[0].file_key,
        "dagster/asset_partition_range_end": files[-1].file_key,
    }

    def launch(job: str) -> None:
        tags = {**defs.resolve_job_def(job).tags, **range_tags}
        run = instance.add_run(dg.DagsterRun(job_name=job, run_id=str(uuid.uuid4()), tags=tags))
        execute(instance, run)

    launch("fast_features")
    assert statuses(instance)["music/judged too early.wav"] == {"MATERIALIZED", "FAILED"}
    assert statuses(instance)["music/good.wav"] == {"MATERIALIZED"}
    before = len(attempts())
    assert RETRY_QUARANTINED_TAG in defs.resolve_job_def("retry_failed").tags
    launch("retry_failed")
    assert set().union(*statuses(instance).values()) == {"MATERIALIZED"}
    assert Quarantine().list() == []
    tried = {(r["file_key"], r["feature_set"]) for r in attempts()[before:] if r["attempt"]}
    assert tried == {
        ("music/good.wav", "musicnn"),
        ("music/judged too early.wav", "musicnn"),
        ("music/judged too early.wav", "key"),
    }
