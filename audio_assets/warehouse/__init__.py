"""Results: rows are written to the landing, and published from it as a DuckDB database."""

from audio_assets.features import FEATURE_SETS
from audio_assets.settings import get_settings
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.publisher import Publisher, PublishResult
from audio_assets.warehouse.schema import warehouse_tables
from robustness.state import get_state_store


def open_landing() -> Landing:
    """Return the landing of the settings."""
    return Landing(get_settings().landing, warehouse_tables(FEATURE_SETS.values()))


def publish(*, rebuild: bool = False) -> PublishResult:
    """Publish the landing to the database of the settings; see `Publisher.publish`."""
    settings = get_settings()
    publisher = Publisher(
        open_landing(), settings.warehouse, FEATURE_SETS.values(), get_state_store()
    )
    return publisher.publish(rebuild=rebuild)
