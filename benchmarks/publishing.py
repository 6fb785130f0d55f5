"""What publishing 100 more tracks costs, by the number of tracks that are there already.

The rows are made from real ones: those of the landing that the settings name are repeated with
every number changed by up to 1 %.

    python -m benchmarks.publishing 10000 100000
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from audio_assets.features import FEATURE_SETS
from audio_assets.warehouse import open_landing
from audio_assets.warehouse.database import reading
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.publisher import Publisher, PublishResult
from audio_assets.warehouse.schema import ATTEMPTS, FILES, feature_table, warehouse_tables

ADDED = 100
ROUNDS = 6
ROWS_PER_PART = 1000
SETS = tuple(FEATURE_SETS.values())


def varied(value: Any, rng: random.Random) -> Any:
    """Return a value with its floating-point numbers changed a little."""
    match value:
        case float():
            return value * rng.uniform(0.99, 1.01)
        case list():
            return [varied(item, rng) for item in value]
        case dict():
            return {name: varied(item, rng) for name, item in value.items()}
        case _:
            return value


def land(landing: Landing, real: dict[str, list[dict[str, Any]]], numbers: Sequence[int]) -> None:
    """Land all rows of some tracks."""
    rng = random.Random(numbers[0])
    now = datetime.now(UTC)
    keys = [f"library/artist {n // 100}/album {n // 10 % 10}/{n % 10:02}.flac" for n in numbers]
    for table, rows in real.items():
        landing.append(
            table,
            [varied(rng.choice(rows), rng) | {"file_key": k, "computed_at": now} for k in keys],
        )
    landing.append(
        FILES.landing_name,
        [{"file_key": key, "path": f"/music/{key}", "seen_at": now, "gone": False} for key in keys],
    )
    landing.append(
        ATTEMPTS.landing_name,
        [
            {
                "run_id": f"run {numbers[0] // ROWS_PER_PART}",
                "file_key": key,
                "feature_set": feature_set.name,
                "attempt": 1,
                "outcome": "succeeded",
                "duration_s": rng.uniform(0.1, 5.0),
                "timeout_s": 20.0,
                "audio_s": rng.uniform(100.0, 300.0),
                "started_at": now,
            }
            for key in keys
            for feature_set in SETS
        ],
    )


def describe(name: str, results: Sequence[PublishResult]) -> None:
    """Print the times of some publications."""
    times = [result.seconds for result in results]
    print(f"  from {name:8}: median {statistics.median(times):.2f} s, worst {max(times):.2f} s")


def main(sizes: Sequence[int]) -> None:
    """Measure each size in a folder of its own."""
    real = {
        table.landing_name: open_landing().latest(table.landing_name)
        for table in map(feature_table, SETS)
    }
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            landing = Landing(f"{folder}/landing", warehouse_tables(SETS))
            path = Path(folder) / "warehouse.duckdb"
            publisher = Publisher(landing, path, SETS)
            for start in range(0, size, ROWS_PER_PART):
                land(landing, real, range(start, min(start + ROWS_PER_PART, size)))
            whole = publisher.publish()
            print(
                f"{size} tracks, {path.stat().st_size / 2**20:.0f} MiB: "
                f"from nothing {whole.seconds:.1f} s"
            )
            by_start: dict[str, list[PublishResult]] = {"previous": [], "copy": []}
            for number in range(2 * ROUNDS + 1):
                first = size + number * ADDED
                land(landing, real, range(first, first + ADDED))
                if number > ROUNDS:
                    (Path(folder) / ".warehouse.duckdb.previous").unlink()
                result = publisher.publish()
                by_start[result.start].append(result)
            for name, results in by_start.items():
                describe(name, results)
            for view in ("tracks", "missing"):
                begun = time.perf_counter()
                with reading(path) as connection:
                    rows = connection.execute(f"FROM features.{view}").fetchall()
                print(f"  features.{view}: {len(rows)} rows in {time.perf_counter() - begun:.2f} s")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [10_000, 100_000])
