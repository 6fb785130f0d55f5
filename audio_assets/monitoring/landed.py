"""What runs have landed, kept in memory and brought up to date by the parts that are new.

It is ahead of the published database by as much as that lags, and has the same rows: both are
ingested in the same way.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import duckdb
from duckdb import DuckDBPyConnection

from audio_assets.warehouse.ingest import TABLES_SQL, ingest
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import (
    ATTEMPTS,
    BREAKER_TRANSITIONS,
    RUNS,
    Table,
    quoted,
)

_NOT_NEEDED = ("severity", "exception_type", "content_hash", "timeout_base_s")

TABLES = (
    replace(ATTEMPTS, columns=tuple(c for c in ATTEMPTS.columns if c.name not in _NOT_NEEDED)),
    RUNS,
    BREAKER_TRANSITIONS,
)
"""The tables that are kept; texts that nothing counts are left out."""


class LandedRows:
    """The rows of `TABLES` in the landing.

    Parameters
    ----------
    landing : Landing
        Where they are.
    """

    def __init__(self, landing: Landing) -> None:
        self._landing = landing
        self._connection = duckdb.connect()
        self._lock = threading.Lock()
        self._connection.execute("SET TimeZone = 'UTC'; SET threads = 1")  # runs need the cores
        self._connection.execute(TABLES_SQL)
        for table in TABLES:
            self._connection.execute(_created(table))

    @contextmanager
    def up_to_date(self) -> Iterator[DuckDBPyConnection]:
        """Read the parts that are new, and give the tables; one thread at a time.

        Raises
        ------
        OSError
            If the landing cannot be reached. Object stores raise other classes as well.
        LandingError
            If it does not exist, or refuses access.
        """
        with self._lock:
            self._connection.begin()
            try:
                for table in TABLES:
                    ingest(self._connection, self._landing, table)
                self._connection.commit()
            except BaseException:
                self._connection.rollback()
                raise
            yield self._connection


def _created(table: Table) -> str:
    columns = ", ".join(f"{quoted(column.name)} {column.type}" for column in table.all_columns)
    return f"CREATE SCHEMA IF NOT EXISTS {table.schema}; CREATE TABLE {table.sql_name} ({columns})"
