"""The names of parts: what they say, without reading the parts."""

import re
from datetime import UTC, datetime
from uuid import UUID

PART = ".parquet"
MERGED = ".merged.parquet"

# A UUID of version 7 from before the year 2527: greater ones would leave later parts no names.
NAME = re.compile(
    r"0[0-9a-f]{7}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}(\.merged)?\.parquet"
)


def written_at(part: str) -> datetime:
    """Return when a part was written, according to its name."""
    return datetime.fromtimestamp((UUID(part.split(".")[0]).int >> 80) / 1000, UTC)
