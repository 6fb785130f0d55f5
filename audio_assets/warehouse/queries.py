"""Asking the warehouse: any SQL, and how things stand."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
import pandas as pd
from duckdb import DuckDBPyConnection

from audio_assets.warehouse.publisher import reading


class QueryError(Exception):
    """A query has no answer; the message says why, for a user to read."""


@dataclass
class Status:
    """How things stand in the version of the database that is in place.

    Parameters
    ----------
    version : int
        Its number.
    published_at : datetime
        When it was made.
    files, gone : int
        Files in the library, and files that have left it.
    runs : pandas.DataFrame
        The latest runs, newest first, as in ``robustness.runs``.
    missing : pandas.DataFrame
        Cells that are not there by feature_set and reason, with their number, most first.
    """

    version: int
    published_at: datetime
    files: int
    gone: int
    runs: pd.DataFrame
    missing: pd.DataFrame


def query(warehouse_path: Path, sql: str) -> pd.DataFrame:
    """Run a query on the database, without keeping anyone from publishing the next version.

    Parameters
    ----------
    warehouse_path : Path
        The database file.
    sql : str
        Any statements that only read.

    Raises
    ------
    QueryError
        If there is no database yet, it cannot be opened, or the SQL is wrong.
    """
    with _opened(warehouse_path) as connection:
        if not connection.extract_statements(sql):
            raise QueryError("There is no SQL to run.")
        return connection.execute(sql).df()


def status(warehouse_path: Path, runs: int = 5) -> Status:
    """Return how things stand, all from one version of the database.

    Parameters
    ----------
    warehouse_path : Path
        The database file.
    runs : int
        Number of runs to name.

    Raises
    ------
    QueryError
        If there is no database yet, or it cannot be opened.
    """
    with _opened(warehouse_path) as connection:
        version, published_at, files, gone = connection.execute(
            "SELECT version, published_at, "
            "(SELECT count(*) FROM library.files WHERE NOT gone), "
            "(SELECT count(*) FROM library.files WHERE gone) FROM publishing.version"
        ).fetchall()[0]
        return Status(
            version=version,
            published_at=published_at,
            files=files,
            gone=gone,
            runs=connection.execute(
                "SELECT * FROM robustness.runs ORDER BY started_at DESC LIMIT ?", [runs]
            ).df(),
            missing=connection.execute(
                "SELECT feature_set, reason, count(*) AS cells FROM features.missing "
                "GROUP BY ALL ORDER BY cells DESC, feature_set, reason"
            ).df(),
        )


@contextmanager
def _opened(warehouse_path: Path) -> Iterator[DuckDBPyConnection]:
    if not warehouse_path.exists():
        raise QueryError(f"There is no database at {warehouse_path} yet: nothing was published.")
    try:
        with reading(warehouse_path) as connection:
            yield connection
    except duckdb.Error as error:
        raise QueryError(str(error)) from error
