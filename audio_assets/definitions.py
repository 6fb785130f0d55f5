"""What Dagster loads: assets, jobs, sensors, resources."""

import dagster as dg

from audio_assets.assets import feature_assets
from audio_assets.automation import publishing_sensors
from audio_assets.resources import extraction_resource

all_features = dg.define_asset_job(
    "all_features",
    selection=dg.AssetSelection.groups("features"),
    description="Every feature set of a batch of files",
)

defs = dg.Definitions(
    assets=feature_assets,
    jobs=[all_features],
    sensors=publishing_sensors,
    resources={"extraction": extraction_resource()},
    executor=dg.in_process_executor,
)
