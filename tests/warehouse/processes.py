"""Processes for the tests; each runs until it is killed."""

import itertools
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import duckdb

from tests.warehouse.rows import attempt, file, landing_of, mfcc, publisher_of, queried, rhythm

CONSISTENT = """
SELECT
    (SELECT count(*) FROM features.rhythm) AS rows,
    (SELECT count(DISTINCT file_key) FROM features.rhythm) AS files,
    (SELECT count(*) FROM robustness.attempts AS a WHERE outcome = 'succeeded'
        AND NOT EXISTS (FROM features.rhythm AS r WHERE r.file_key = a.file_key)) AS lies,
    (SELECT coalesce(sum(cells_done), 0) FROM robustness.runs)
        - (SELECT count(*) FROM robustness.attempts) AS off,
    (SELECT version FROM publishing.version) AS version
"""

KEYS_PER_PART = 20


def write(root: Path, name: str, reported: Connection) -> None:
    """Write cells one after the other and report the key of each once it is durable."""
    landing = landing_of(root)
    for number in itertools.count(step=KEYS_PER_PART):
        keys = [f"{name}/{number + offset}" for offset in range(KEYS_PER_PART)]
        # An attempt that succeeded without its row would be a lie, so it comes after the row.
        for table, rows in (
            ("features/mfcc", [mfcc(key, run_id=name) for key in keys]),
            ("features/rhythm", [rhythm(key, run_id=name) for key in keys]),
            ("library/files", [file(key) for key in keys]),
            ("robustness/attempts", [attempt(key, run_id=name) for key in keys]),
        ):
            landing.append(table, rows)
            for key in keys:
                reported.send((table, key))


def publish(root: Path, reported: Connection) -> None:
    """Publish again and again, reporting each version."""
    publisher = publisher_of(root)
    while True:
        reported.send(publisher.publish().version)


def ask(root: Path, reported: Connection) -> None:
    """Open, query and close the database again and again, reporting each answer."""
    while True:
        reported.send(queried(root / "warehouse.duckdb", CONSISTENT).iloc[0].to_dict())
        time.sleep(0.05)


def hold(root: Path, reported: Connection) -> None:
    """Hold one version open and report its rows, again and again."""
    with duckdb.connect(str(root / "warehouse.duckdb"), read_only=True) as connection:
        while True:
            rows = connection.execute("FROM features.rhythm ORDER BY file_key").fetchall()
            reported.send(rows)
            time.sleep(0.05)


Task = Callable[..., None]
