"""The files of the library as an external asset, which the sensor observes."""

from collections.abc import Mapping

import dagster as dg

from audio_assets.warehouse.schema import FILES

LIBRARY_FILES = dg.AssetKey([FILES.schema, FILES.name])

library_files = dg.AssetSpec(
    LIBRARY_FILES,
    group_name=FILES.schema,
    description="The audio files below the library's roots. The sensor discover_files, and the "
    "commands scan and analyze, observe what is new, changed, moved or gone",
    kinds={"file"},
    owners=["team:audio-features"],
    metadata={"dagster/table_name": f"{FILES.schema}.{FILES.name}"},
)


def in_words(counts: Mapping[str, int]) -> str:
    """Return one line that says what a scan found."""
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)


def files_observation(summary: str, counts: Mapping[str, int]) -> dg.AssetObservation:
    """Return the observation of what a scan found."""
    return dg.AssetObservation(LIBRARY_FILES, description=summary, metadata=dict(counts))
