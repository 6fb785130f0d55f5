"""The robustness tables as assets: what they tell of runs, what the checks find, who asks."""

import os
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from audio_assets import automation
from audio_assets.assets import asset_key
from audio_assets.automation import ABOUT_TAG, publishing_sensors
from audio_assets.definitions import defs
from audio_assets.features import FEATURE_SETS
from audio_assets.robustness_assets import FIGURES, JOB, table_key
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish
from audio_assets.warehouse.landing import _row_ids
from robustness.state import reset_state_store
from tests.warehouse.rows import START, attempt, made_up

KEYS = [f"music/{number}.flac" for number in range(4)]
RHYTHM = asset_key("rhythm")


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """A home of its own, with its landing, database and state; Dagster's events in memory."""
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


def land_run(run_id: str, done: int, failed: int) -> None:
    """Land a run of the rhythm of some files, of which the last ones failed."""
    keys = [f"music/{number}.flac" for number in range(done + failed)]
    landing = open_landing()
    landing.append(
        "robustness/attempts",
        [attempt(key, run_id=run_id, timeout_s=20.0, duration_s=10.0) for key in keys[:done]]
        + [attempt(key, outcome="failed", run_id=run_id) for key in keys[done:]],
    )
    now = datetime.now(UTC)
    landing.append(
        "robustness/runs",
        [{"run_id": run_id, "job_name": "all_features", "started_at": START, "ended_at": now,
          "status": "failure" if failed else "success", "recorded_at": now}],
    )  # fmt: skip


def land_rows(keys: list[str], run_id: str = "run 1", **values: object) -> None:
    rows = [made_up(FEATURE_SETS["rhythm"], key, random.Random(1)) for key in keys]
    open_landing().append("features/rhythm", [row | {"run_id": run_id} | values for row in rows])


def tell(instance: dg.DagsterInstance, keys: list[str]) -> None:
    for key in keys:
        instance.report_runless_asset_event(dg.AssetMaterialization(RHYTHM, partition=key))


def run_stats(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return defs.resolve_job_def(JOB).execute_in_process(instance=instance)


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
    land_run("run 1", done=3, failed=1)
    result = run_stats(instance)
    told = {event.asset_key for event in result.get_asset_materialization_events()}
    assert told == {table_key(table) for table in FIGURES}
    runs = figures(result, "runs")
    assert (runs["dagster/row_count"], runs["cells_done"], runs["cells_failed"]) == (1, 3, 1)
    assert runs["success_rate"] == pytest.approx(0.75)
    assert figures(result, "errors")["most_frequent"] == "timeout"
    assert figures(result, "feature_stats")["mean_timeout_efficiency"] == pytest.approx(0.5)
    assert figures(result, "timeouts")["timed_out"] == 1
    assert figures(result, "attempts")["dagster/row_count"] == 4


def test_nothing_to_tell_is_told(instance: dg.DagsterInstance) -> None:
    assert figures(run_stats(instance), "runs")["dagster/row_count"] == 0


def test_each_run_is_told_once_and_the_newest_again_by_hand(instance: dg.DagsterInstance) -> None:
    land_run("run 1", done=1, failed=0)
    assert figures(run_stats(instance), "runs")["run_ids"] == "run 1"
    land_run("run 2", done=2, failed=0)
    land_run("run 3", done=3, failed=1)
    both = figures(run_stats(instance), "runs")
    assert both["run_ids"] == "run 2, run 3"
    assert (both["cells_done"], both["success_rate"]) == (5, pytest.approx(5 / 6))
    assert figures(run_stats(instance), "runs")["run_ids"] == "run 3"


def test_low_success_rate_warns_and_names_files(instance: dg.DagsterInstance) -> None:
    land_run("run 1", done=100, failed=0)
    assert checks(run_stats(instance))["runs", "success_rate"].passed
    land_run("run 2", done=9, failed=1)
    found = checks(run_stats(instance))["runs", "success_rate"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.WARN
    assert found.metadata["failed: music/9.flac"].value == "took too long"


def test_sound_tables_pass(instance: dg.DagsterInstance) -> None:
    land_rows(KEYS)
    tell(instance, KEYS)
    found = checks(run_stats(instance))
    assert len(found) == 1 + 3 * len(FEATURE_SETS)
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
    land_rows(KEYS[:3])
    land_rows(KEYS[3:], **{column: value})
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


def test_materialized_file_without_a_row_is_an_error(instance: dg.DagsterInstance) -> None:
    land_rows(KEYS[:3])
    tell(instance, KEYS)
    found = checks(run_stats(instance))["rhythm", "complete"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.ERROR
    assert found.metadata["files_without_row"].value == KEYS[3]


def test_row_that_dagster_was_not_told_of_warns(instance: dg.DagsterInstance) -> None:
    land_rows(KEYS)
    tell(instance, KEYS[:3])
    found = checks(run_stats(instance))["rhythm", "complete"]
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.WARN
    assert found.metadata["files_not_materialized"].value == KEYS[3]


def test_rows_of_a_run_that_goes_on_are_no_fault(instance: dg.DagsterInstance) -> None:
    job = defs.resolve_job_def("all_features")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    land_rows(KEYS, run_id=run.run_id)
    tell(instance, KEYS[:3])
    assert checks(run_stats(instance))["rhythm", "complete"].passed


def test_what_landed_long_ago_must_be_published(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    land_rows(KEYS)
    tell(instance, KEYS)
    old = _row_ids.next()
    [part] = open_landing().parts("features/rhythm")
    folder = get_settings().dagster_home / "landing" / "features" / "rhythm"
    check = defs.resolve_implicit_global_asset_job_def().get_subset(
        asset_check_selection={
            dg.AssetCheckKey(RHYTHM, name) for name in ("fresh", "complete", "finite")
        }
    )
    just_landed = checks(check.execute_in_process(instance=instance))
    assert just_landed["rhythm", "fresh"].passed
    assert just_landed["rhythm", "complete"].passed
    earlier = f"{old.int - (3600_000 << 80):032x}"
    (folder / part).rename(folder / f"{earlier}.parquet")
    late = checks(check.execute_in_process(instance=instance))["rhythm", "fresh"]
    assert not late.passed
    assert late.severity is dg.AssetCheckSeverity.WARN
    publish()
    assert checks(check.execute_in_process(instance=instance))["rhythm", "fresh"].passed


def tick(
    instance: dg.DagsterInstance, run: dg.DagsterRun, ended: dg.DagsterEventType
) -> dg.RunRequest | dg.SkipReason:
    [sensor] = [s for s in publishing_sensors if s.name == "publish_after_success"]
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


def test_the_end_of_a_run_publishes_and_asks_for_its_figures(
    instance: dg.DagsterInstance,
) -> None:
    land_rows(KEYS)
    run = run_of(instance, "all_features", dg.DagsterRunStatus.SUCCESS)
    request = tick(instance, run, dg.DagsterEventType.RUN_SUCCESS)
    assert isinstance(request, dg.RunRequest)
    assert (request.run_key, request.tags[ABOUT_TAG]) == (run.run_id, run.run_id)
    assert figures(run_stats(instance), "runs")["run_ids"] == run.run_id


def test_the_figures_ask_for_no_figures_of_themselves(instance: dg.DagsterInstance) -> None:
    run = run_of(instance, JOB, dg.DagsterRunStatus.SUCCESS)
    assert isinstance(tick(instance, run, dg.DagsterEventType.RUN_SUCCESS), dg.SkipReason)
    assert figures(run_stats(instance), "runs")["dagster/row_count"] == 0


def test_one_waiting_run_tells_of_all_that_end_meanwhile(instance: dg.DagsterInstance) -> None:
    run_of(instance, JOB, dg.DagsterRunStatus.STARTING)
    runs = [run_of(instance, "all_features", dg.DagsterRunStatus.SUCCESS) for _ in range(2)]
    for run in runs:
        skipped = tick(instance, run, dg.DagsterEventType.RUN_SUCCESS)
        assert isinstance(skipped, dg.SkipReason)
    told = str(figures(run_stats(instance), "runs")["run_ids"])
    assert set(told.split(", ")) == {run.run_id for run in runs}


def test_what_lands_while_a_run_goes_on_is_published(instance: dg.DagsterInstance) -> None:
    land_rows(KEYS[:1])
    with dg.build_sensor_context(instance) as context:
        first = automation.publish_while_running(context)
        again = automation.publish_while_running(context)
    assert isinstance(first, dg.SkipReason)
    assert isinstance(again, dg.SkipReason)
    assert "published version 1" in str(first.skip_message)
    assert "nothing newer than version 1" in str(again.skip_message)
