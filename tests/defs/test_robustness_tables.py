"""The robustness tables as assets: figures of runs, asset checks, publishing sensors."""

import os
import random
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from audio_assets.definitions import defs
from audio_assets.defs import sensors
from audio_assets.defs.cell_events import retry_url
from audio_assets.defs.jobs import robustness_stats
from audio_assets.defs.partitions import asset_key
from audio_assets.defs.robustness_tables import FIGURES, VIEWS, table_key
from audio_assets.defs.sensors import ABOUT_TAG, default_sensors
from audio_assets.features import FEATURE_SETS
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish
from robustness.quarantine import Quarantine
from robustness.state import reset_state_store
from tests.warehouse.rows import START, attempt, made_up

KEYS = [f"music/{number}.flac" for number in range(4)]
RHYTHM = asset_key("rhythm")


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """A new home with landing, database and state; Dagster's events are in memory."""
    for name in [name for name in os.environ if name.startswith(("AUDIO_", "ROBUSTNESS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("ROBUSTNESS_STATE_URL", f"sqlite:///{tmp_path / 'state.db'}")
    forget()
    with dg.DagsterInstance.ephemeral() as found:
        yield found
    monkeypatch.undo()
    forget()


def forget() -> None:
    from robustness.settings import get_settings as get_robustness_settings

    get_settings.cache_clear()
    get_robustness_settings.cache_clear()
    reset_state_store()


def write_run(run_id: str, done: int, failed: int, quarantined: int = 0) -> None:
    """Write a run of the feature set rhythm, in which the last files failed."""
    keys = [f"music/{number}.flac" for number in range(done + failed)]
    landing = open_landing()
    landing.append(
        "robustness/attempts",
        [attempt(key, run_id=run_id, timeout_s=20.0, duration_s=10.0) for key in keys[:done]]
        + [attempt(key, outcome="failed", run_id=run_id) for key in keys[done:]]
        + [
            attempt(key, outcome="quarantined", run_id=run_id)
            for key in keys[len(keys) - quarantined :]
        ],
    )
    now = datetime.now(UTC)
    landing.append(
        "robustness/runs",
        [{"run_id": run_id, "job_name": "all_features", "started_at": START, "ended_at": now,
          "status": "failure" if failed else "success", "recorded_at": now}],
    )  # fmt: skip


def write_rows(keys: list[str], run_id: str = "run 1", **values: object) -> None:
    rows = [made_up(FEATURE_SETS["rhythm"], key, random.Random(1)) for key in keys]
    open_landing().append("features/rhythm", [row | {"run_id": run_id} | values for row in rows])


def materialize(instance: dg.DagsterInstance, keys: list[str]) -> None:
    for key in keys:
        instance.report_runless_asset_event(dg.AssetMaterialization(RHYTHM, partition=key))


def run_stats(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return defs.resolve_job_def(robustness_stats.name).execute_in_process(instance=instance)


def figures(result: dg.ExecuteInProcessResult, table: str) -> dict[str, object]:
    for event in result.get_asset_materialization_events():
        if event.asset_key == dg.AssetKey(["robustness", table]):
            metadata = event.materialization.metadata
            return {name: value.value for name, value in metadata.items()}
    raise AssertionError(f"{table} was not materialized")


def checks(result: dg.ExecuteInProcessResult) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    return {
        (evaluation.asset_key.path[-1], evaluation.check_name): evaluation
        for evaluation in result.get_asset_check_evaluations()
    }


def test_every_table_is_materialized_with_its_figures(instance: dg.DagsterInstance) -> None:
    write_run("run 1", done=3, failed=1)
    result = run_stats(instance)
    materialized = {event.asset_key for event in result.get_asset_materialization_events()}
    assert materialized == {
        *(table_key(table) for table in FIGURES),
        *(asset_key(name) for name in VIEWS),
    }
    runs = figures(result, "runs")
    assert (runs["dagster/row_count"], runs["cells_done"], runs["cells_failed"]) == (1, 3, 1)
    assert runs["success_rate"] == pytest.approx(0.75)
    assert figures(result, "errors")["most_frequent"] == "timeout"
    assert figures(result, "feature_stats")["mean_timeout_efficiency"] == pytest.approx(0.5)
    assert figures(result, "timeouts")["timed_out"] == 1
    assert figures(result, "attempts")["dagster/row_count"] == 4


def test_without_runs_the_tables_are_empty(instance: dg.DagsterInstance) -> None:
    assert figures(run_stats(instance), "runs")["dagster/row_count"] == 0


def test_each_run_is_reported_once_and_the_newest_again_if_asked(
    instance: dg.DagsterInstance,
) -> None:
    write_run("run 1", done=1, failed=0)
    assert figures(run_stats(instance), "runs")["run_ids"] == "run 1"
    write_run("run 2", done=2, failed=0)
    write_run("run 3", done=3, failed=1)
    both = figures(run_stats(instance), "runs")
    assert both["run_ids"] == "run 2, run 3"
    assert (both["cells_done"], both["success_rate"]) == (5, 0.8333)
    assert figures(run_stats(instance), "runs")["run_ids"] == "run 3"


def test_what_got_slower_warns(instance: dg.DagsterInstance) -> None:
    def write(cells: int, seconds: float) -> None:
        rows = [attempt(str(n), run_id="run", duration_s=seconds) for n in range(cells)]
        open_landing().append("robustness/attempts", rows)

    write(40, seconds=10.0)
    usual = checks(run_stats(instance))["runs", "speed"]
    assert usual.passed
    assert {"slower", "baselines"} == usual.metadata.keys()
    write(80, seconds=13.5)
    found = checks(run_stats(instance))["runs", "speed"]
    assert not found.passed
    assert found.description is not None
    assert "rhythm takes 1.35 times as long as before" in found.description


def test_low_success_rate_warns_and_names_files(instance: dg.DagsterInstance) -> None:
    write_run("run 1", done=100, failed=0)
    assert checks(run_stats(instance))["runs", "success_rate"].passed
    write_run("run 2", done=4, failed=1, quarantined=1)
    assert checks(run_stats(instance))["runs", "success_rate"].passed
    write_run("run 3", done=19, failed=1)
    found = checks(run_stats(instance))["runs", "success_rate"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.WARN
    assert found.metadata["failed: music/19.flac"].value == "took too long"


def test_failed_files_are_named_amber_if_only_they_are_at_fault(
    instance: dg.DagsterInstance,
) -> None:
    write_run("run 1", done=3, failed=1)
    write_rows(KEYS[:3])
    rows = [{"file_key": key, "content_hash": f"hash of {key}", "gone": False} for key in KEYS]
    open_landing().append("library/files", rows)
    found = checks(run_stats(instance))["rhythm", "analysed"]
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert "music/3.flac" in str(found.description)
    assert "took too long" in str(found.description)
    assert retry_url(KEYS[3]) in str(found.description)
    Quarantine().add(
        f"hash of {KEYS[3]}", "rhythm", file_key=KEYS[3], error_type="timeout", reason="too long"
    )
    found = checks(run_stats(instance))["rhythm", "analysed"]
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    write_rows(KEYS[3:], content_hash=f"hash of {KEYS[3]}")
    assert checks(run_stats(instance))["rhythm", "analysed"].passed


def test_a_run_of_features_has_no_skipped_step(instance: dg.DagsterInstance) -> None:
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={RHYTHM})
    checked = job.nodes_in_topological_order
    assert {node.name for node in checked} == {"rhythm", "published_tables"}
    assert not any(job.dependencies.values())


def test_complete_tables_pass(instance: dg.DagsterInstance) -> None:
    write_rows(KEYS)
    materialize(instance, KEYS)
    found = checks(run_stats(instance))
    assert len(found) == 6 * len(FEATURE_SETS) + 1  # metadata is not measured; runs have two
    assert all(evaluation.passed for evaluation in found.values())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("bpm", float("nan")),
        ("bpm", float("-inf")),
        ("beats", [1.0, float("nan")]),
        ("beats", [float("-inf"), 1.0]),
    ],
)
def test_nan_and_infinity_are_errors(
    instance: dg.DagsterInstance, column: str, value: object
) -> None:
    write_rows(KEYS[:3])
    write_rows(KEYS[3:], **{column: value})
    found = checks(run_stats(instance))["rhythm", "finite"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.ERROR
    assert found.metadata["files"].value == KEYS[3]
    assert column in str(found.description)


def test_nan_in_arrays_and_maps_is_found(instance: dg.DagsterInstance) -> None:
    row = made_up(FEATURE_SETS["musicnn"], KEYS[0], random.Random(1))
    row["embedding"] = [*row["embedding"][:-1], float("inf")]
    row["msd_tags"] = {"rock": float("nan"), "pop": 0.5}
    open_landing().append("features/musicnn", [row])
    found = checks(run_stats(instance))["musicnn", "finite"]
    assert not found.passed
    assert "msd_tags, embedding" in str(found.description)


def test_degraded_rows_warn(instance: dg.DagsterInstance) -> None:
    write_rows(KEYS[:2])
    write_rows(KEYS[2:3], degraded="the audio breaks off after 5.0 s")
    write_rows(KEYS[3:], degraded="essentia failed: no", retry_after=datetime.now(UTC))
    found = checks(run_stats(instance))["rhythm", "degraded"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.WARN
    assert found.description == "degraded: 2 of 4 rows; 1 to be computed again"


def test_constant_values_warn(instance: dg.DagsterInstance) -> None:
    write_rows([f"music/{number}.flac" for number in range(30)])
    found = checks(run_stats(instance))["rhythm", "distribution"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.WARN
    assert str(found.description).startswith("bpm is the same in all 30 files that have it; ")


def test_materialized_file_without_a_row_is_an_error(instance: dg.DagsterInstance) -> None:
    write_rows(KEYS[:3])
    materialize(instance, KEYS)
    found = checks(run_stats(instance))["rhythm", "complete"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.ERROR
    assert found.metadata["files_without_row"].value == KEYS[3]


def test_row_without_materialization_warns(instance: dg.DagsterInstance) -> None:
    write_rows(KEYS)
    materialize(instance, KEYS[:3])
    found = checks(run_stats(instance))["rhythm", "complete"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.WARN
    assert found.metadata["files_not_materialized"].value == KEYS[3]


def test_rows_of_an_active_run_pass(instance: dg.DagsterInstance) -> None:
    job = defs.resolve_job_def("all_features")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    write_rows(KEYS, run_id=run.run_id)
    materialize(instance, KEYS[:3])
    assert checks(run_stats(instance))["rhythm", "complete"].passed


def test_old_parts_must_be_published(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    write_rows(KEYS)
    materialize(instance, KEYS)
    [part] = open_landing().parts("features/rhythm")
    folder = get_settings().dagster_home / "landing" / "features" / "rhythm"
    check = defs.resolve_implicit_global_asset_job_def().get_subset(
        asset_check_selection={
            dg.AssetCheckKey(RHYTHM, name) for name in ("fresh", "complete", "finite")
        }
    )
    new = checks(check.execute_in_process(instance=instance))
    assert new["rhythm", "fresh"].passed
    assert new["rhythm", "complete"].passed
    an_hour_ago = int((time.time() - 3600) * 1000)
    earlier = uuid.UUID(int=an_hour_ago << 80 | 0x7 << 76 | 0b10 << 62)
    (folder / part).rename(folder / f"{earlier}.parquet")
    late = checks(check.execute_in_process(instance=instance))["rhythm", "fresh"]
    assert not late.passed
    assert late.severity is dg.AssetCheckSeverity.WARN
    publish()
    assert checks(check.execute_in_process(instance=instance))["rhythm", "fresh"].passed


def tick(
    instance: dg.DagsterInstance, run: dg.DagsterRun, ended: dg.DagsterEventType
) -> dg.RunRequest | dg.SkipReason:
    [sensor] = [s for s in default_sensors if s.name == "publish_after_success"]
    context = dg.build_run_status_sensor_context(
        sensor_name=sensor.name,
        dagster_event=dg.DagsterEvent(event_type_value=ended.value, job_name=run.job_name),
        dagster_instance=instance,
        dagster_run=run,
        repository_def=defs.get_repository_def(),
    )
    result = sensor(context)
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def run_of(instance: dg.DagsterInstance, job: str, status: dg.DagsterRunStatus) -> dg.DagsterRun:
    return instance.create_run_for_job(defs.resolve_job_def(job), status=status)


def test_end_of_a_run_publishes_and_requests_its_figures(
    instance: dg.DagsterInstance,
) -> None:
    write_rows(KEYS)
    run = run_of(instance, "all_features", dg.DagsterRunStatus.SUCCESS)
    request = tick(instance, run, dg.DagsterEventType.RUN_SUCCESS)
    assert isinstance(request, dg.RunRequest)
    assert (request.run_key, request.tags[ABOUT_TAG]) == (run.run_id, run.run_id)
    assert figures(run_stats(instance), "runs")["run_ids"] == run.run_id


def test_run_of_figures_requests_no_figures(instance: dg.DagsterInstance) -> None:
    run = run_of(instance, robustness_stats.name, dg.DagsterRunStatus.SUCCESS)
    assert isinstance(tick(instance, run, dg.DagsterEventType.RUN_SUCCESS), dg.SkipReason)
    assert figures(run_stats(instance), "runs")["dagster/row_count"] == 0


def test_one_queued_run_reports_all_runs_that_end_meanwhile(instance: dg.DagsterInstance) -> None:
    run_of(instance, robustness_stats.name, dg.DagsterRunStatus.STARTING)
    runs = [run_of(instance, "all_features", dg.DagsterRunStatus.SUCCESS) for _ in range(2)]
    for run in runs:
        skipped = tick(instance, run, dg.DagsterEventType.RUN_SUCCESS)
        assert isinstance(skipped, dg.SkipReason)
    reported = str(figures(run_stats(instance), "runs")["run_ids"])
    assert set(reported.split(", ")) == {run.run_id for run in runs}


def test_rows_of_an_active_run_are_published(instance: dg.DagsterInstance) -> None:
    write_rows(KEYS[:1])
    with dg.build_sensor_context(instance) as context:
        first = sensors.publish_while_running(context)
        again = sensors.publish_while_running(context)
    assert isinstance(first, dg.SkipReason)
    assert isinstance(again, dg.SkipReason)
    assert "published version 1" in str(first.skip_message)
    assert "nothing newer than version 1" in str(again.skip_message)
