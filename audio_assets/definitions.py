"""What Dagster loads: assets, jobs, schedules, sensors, resources."""

import dagster as dg

from audio_assets.assets import feature_assets
from audio_assets.automation import publishing_sensors
from audio_assets.discovery import discover_files
from audio_assets.jobs import jobs, nightly
from audio_assets.resources import extraction_resource
from audio_assets.robustness_assets import published_tables, robustness_stats, robustness_tables

defs = dg.Definitions(
    assets=[*feature_assets, robustness_tables],
    asset_checks=[published_tables],
    jobs=[*jobs, robustness_stats],
    schedules=[nightly],
    sensors=[discover_files, *publishing_sensors],
    resources={"extraction": extraction_resource()},
    executor=dg.in_process_executor,
)
