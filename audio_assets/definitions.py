"""The definitions that Dagster loads, collected from the modules of `audio_assets.defs`."""

import warnings

import dagster as dg

from audio_assets.defs.assets import feature_assets
from audio_assets.defs.checks import published_tables
from audio_assets.defs.executor import living_executor
from audio_assets.defs.jobs import jobs
from audio_assets.defs.library_files import library_files
from audio_assets.defs.resources import extraction_resource
from audio_assets.defs.robustness_tables import robustness_tables
from audio_assets.defs.schedules import schedules
from audio_assets.defs.sensors import default_sensors, discover_files
from audio_assets.settings import set_umask

set_umask()

with warnings.catch_warnings():
    warnings.simplefilter("ignore", dg.BetaWarning)  # the links to the source are new in Dagster
    assets = dg.with_source_code_references([library_files, *feature_assets, robustness_tables])

defs = dg.Definitions(
    assets=assets,
    asset_checks=[published_tables],
    jobs=jobs,
    schedules=schedules,
    sensors=[discover_files, *default_sensors],
    resources={"extraction": extraction_resource()},
    executor=living_executor,
)
