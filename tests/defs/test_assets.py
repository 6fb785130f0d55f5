"""The feature assets: the feature sets of a run, and the progress that is logged."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import dagster as dg
import pytest

from audio_assets.defs import assets
from audio_assets.defs.assets import _feature_sets_of, _Progress
from audio_assets.defs.partitions import asset_key
from audio_assets.extraction.engine import Engine, Progress
from audio_assets.features import FEATURE_SETS

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
