"""Results: rows are written to the landing, and published from it as a DuckDB database."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audio_assets.warehouse.landing import Landing
    from audio_assets.warehouse.publisher import PublishResult

# Queries and workers import this package, too: what takes long is imported where needed.


def open_landing() -> "Landing":
    """Return the landing of the settings."""
    from audio_assets.settings import get_settings

    return _landing_at(get_settings().landing)


@cache
def _landing_at(url: str) -> "Landing":
    """Return a landing; it remembers what it has read."""
    from audio_assets.features import FEATURE_SETS
    from audio_assets.warehouse.landing import Landing
    from audio_assets.warehouse.schema import warehouse_tables

    return Landing(url, warehouse_tables(FEATURE_SETS.values()))


def publish(*, rebuild: bool = False) -> "PublishResult":
    """Publish the landing to the database of the settings; see `Publisher.publish`."""
    from audio_assets.features import FEATURE_SETS
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.publisher import Publisher
    from robustness.state import get_state_store

    settings = get_settings()
    publisher = Publisher(
        open_landing(), settings.warehouse, FEATURE_SETS.values(), get_state_store()
    )
    return publisher.publish(rebuild=rebuild)
