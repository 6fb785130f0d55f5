"""The feature assets: the feature sets of a run, and the progress that is logged."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dagster as dg
import pytest

from audio_assets.defs import assets
from audio_assets.defs.assets import _feature_sets_of, _Progress
from audio_assets.defs.partitions import RESULT_TAG, asset_key
from audio_assets.extraction.engine import Engine, Progress, RunResult
from audio_assets.features import FEATURE_SETS
from audio_assets.settings import get_settings
from tests.defs.test_history import run_all
from tests.defs.test_sensors import fresh_home, instance, put, root

__all__ = ["fresh_home", "instance", "root"]

NOTHING = Progress(
    files=10, cells=20, files_finished=0, cells_finished=0, cells_computed=0, audio_s=0.0
)


def context(selected: list[str], steps: list[str] | None = None) -> dg.AssetExecutionContext:
    layer = SimpleNamespace(selected_asset_keys={asset_key(name) for name in selected})
    stub: Any = SimpleNamespace(
        job_def=SimpleNamespace(asset_layer=layer),
        run=SimpleNamespace(step_keys_to_execute=steps),
    )
    return cast("dg.AssetExecutionContext", stub)


def test_engine_gets_the_feature_sets_of_the_executed_steps() -> None:
    everything = list(FEATURE_SETS)
    assert _feature_sets_of(context(everything)) == list(FEATURE_SETS.values())
    assert [s.name for s in _feature_sets_of(context(["rhythm", "key"]))] == ["key", "rhythm"]
    again = _feature_sets_of(context(everything, steps=["mfcc"]))
    assert [s.name for s in again] == ["mfcc"]


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        # Cells finished earlier do not enter the estimate.
        (replace(NOTHING, files_finished=3, cells_finished=8), "3 of 10 files, 8 of 20 cells"),
        (
            replace(NOTHING, files_finished=3, cells_finished=12, cells_computed=4, audio_s=80.0),
            "3 of 10 files, 12 of 20 cells, 4 s of audio per second, about 40 s left",
        ),
    ],
)
def test_progress_estimates_the_rest_from_computed_cells(
    now: Progress, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    clock = iter((0.0, 5.0, 20.0))
    monkeypatch.setattr(assets, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    engine = SimpleNamespace(progress=NOTHING)
    log = SimpleNamespace(info=logged.append)
    progress = _Progress(cast("dg.DagsterLogManager", log), cast("Engine", engine))
    engine.progress = now
    progress.show()
    assert logged == []  # too soon
    progress.show()
    assert logged == [wanted]


def test_a_landing_that_cannot_be_used_ends_the_run_at_once(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIO_LANDING", "nosuchstore://user:hunter2@host/landing")
    get_settings.cache_clear()
    put(root / "good.wav")
    run = instance.get_run_by_id(run_all(root, instance))
    assert run is not None
    events = instance.all_logs(run.run_id)
    failed = [e.get_dagster_event().step_failure_data for e in events if _is(e, "STEP_FAILURE")]
    assert len(failed) == len(FEATURE_SETS)
    for failure in failed:
        assert failure.error is not None
        assert "user:***@host/landing cannot be used" in failure.error.message
        assert failure.error.stack == []
    assert not [e for e in events if _is(e, "STEP_UP_FOR_RETRY")]
    assert run.tags[RESULT_TAG] == RunResult.INCOMPLETE.value
    assert run.job_snapshot_id
    stored = [*events, run, instance.get_job_snapshot(run.job_snapshot_id)]
    assert "hunter2" not in str(stored)


def _is(event: dg.EventLogEntry, kind: str) -> bool:
    return event.is_dagster_event and event.get_dagster_event().event_type_value == kind
