"""What happens by itself while Dagster's daemon runs."""

import dagster as dg

from audio_assets.runs import record_run
from audio_assets.warehouse import open_landing, publish


def _publishing_sensor(status: dg.DagsterRunStatus) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name=f"publish_after_{status.value.lower()}",
        run_status=status,
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=5,
        description="Publishes what a run has landed to DuckDB when the run ends",
    )
    def publish_results(context: dg.RunStatusSensorContext) -> dg.SkipReason:
        run_id = context.dagster_run.run_id
        record_run(context.instance, run_id, open_landing())
        return dg.SkipReason(f"published version {publish().version} after run {run_id}")

    return publish_results


publishing_sensors = [
    _publishing_sensor(status)
    for status in (
        dg.DagsterRunStatus.SUCCESS,
        dg.DagsterRunStatus.FAILURE,
        dg.DagsterRunStatus.CANCELED,
    )
]
"""They are on by default: without them the database would lag behind what the UI shows."""
