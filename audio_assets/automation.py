"""What happens by itself while Dagster's daemon runs."""

import dagster as dg

from audio_assets.robustness_assets import JOB, robustness_stats
from audio_assets.runs import computes_features, record_ended_runs, record_run
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish
from audio_assets.warehouse.publisher import PublishResult

ABOUT_TAG = "audio_assets/about_run"
"""Run tag of a `robustness_stats` run: the run whose end asked for it."""

WHILE_RUNNING_S = 60


def _publishing_sensor(status: dg.DagsterRunStatus) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name=f"publish_after_{status.value.lower()}",
        run_status=status,
        request_job=robustness_stats,
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=5,
        description="Publishes what a run has landed to DuckDB when the run ends, and has "
        "robustness_stats tell its figures",
    )
    def publish_results(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
        run, instance = context.dagster_run, context.instance
        if not computes_features(run, context.repository_def):
            return dg.SkipReason(f"run {run.run_id} computed no features")
        record_run(instance, run.run_id, open_landing())
        published = _told(publish())
        if _stats_are_waiting(instance):
            return dg.SkipReason(f"{published}; the {JOB} run that waits tells this run too")
        return dg.RunRequest(
            run_key=run.run_id, tags={ABOUT_TAG: run.run_id, "dagster/priority": "10"}
        )

    return publish_results


def _stats_are_waiting(instance: dg.DagsterInstance) -> bool:
    """Tell whether a run is still to read the database, and so has all that is published by now."""
    waiting = dg.RunsFilter(
        job_name=JOB, statuses=[dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING]
    )
    return instance.get_runs_count(waiting) > 0


def _told(result: PublishResult) -> str:
    return f"{'published' if result.published else 'nothing newer than'} version {result.version}"


@dg.sensor(
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=WHILE_RUNNING_S,
    description="Publishes what runs that go on have landed to DuckDB, every minute",
)
def publish_while_running(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Publish what has landed since; it costs a listing where nothing has.

    Dagster offers a run's end once: where it could not be landed then, it is landed here.
    """
    published = _told(publish())  # first, as it makes a damaged database anew
    record_ended_runs(context.instance, get_settings().warehouse, open_landing())
    return dg.SkipReason(published)


publishing_sensors = [
    *(
        _publishing_sensor(status)
        for status in (
            dg.DagsterRunStatus.SUCCESS,
            dg.DagsterRunStatus.FAILURE,
            dg.DagsterRunStatus.CANCELED,
        )
    ),
    publish_while_running,
]
"""They are on by default: without them the database would lag behind what the UI shows."""
