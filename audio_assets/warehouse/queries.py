"""Query the warehouse: any SQL, and its status."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
from duckdb import DuckDBPyConnection

from audio_assets.warehouse.database import reading

# The database is open already. `enable_external_access` alone lets it be opened again, to write.
_SANDBOX = """
SET temp_directory = '';
SET enable_external_access = false;
SET disabled_filesystems = 'LocalFileSystem';
SET autoinstall_known_extensions = false;
SET autoload_known_extensions = false;
SET lock_configuration = true
"""

_DAMAGE = (
    duckdb.IOException,
    duckdb.SerializationException,
    duckdb.InternalException,
    duckdb.FatalException,
)


class QueryError(Exception):
    """A query failed; the message explains why to the user."""


@dataclass(frozen=True)
class Result:
    """What a query returned.

    Parameters
    ----------
    columns : list of str
        Names of the columns.
    rows : list of tuple
        The rows, as Python objects; times of day have a time zone.
    """

    columns: list[str]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Status:
    """Status of the present version of the database.

    Parameters
    ----------
    version : int
        Its number.
    published_at : datetime
        When it was published.
    files, gone : int
        Files in the library, and files that have left it.
    runs : Result
        The latest runs, newest first: figures of ``robustness.runs``.
    degraded : Result
        Number of degraded cells by feature set, and how many of them are computed again.
    missing : Result
        Number of files with missing cells by reason, most first, and the feature_sets.
    """

    version: int
    published_at: datetime
    files: int
    gone: int
    runs: Result
    degraded: Result
    missing: Result


def query(warehouse_path: Path, sql: str, parameters: Sequence[object] = ()) -> Result:
    """Run a query on the database, see `sandbox`.

    Parameters
    ----------
    warehouse_path : Path
        The database file.
    sql : str
        Any statements that only read.
    parameters : sequence, optional
        Values in place of each ``?`` of a single statement.

    Raises
    ------
    QueryError
        If there is no database yet, it cannot be read, or the SQL is wrong or not allowed.
    """
    with sandbox(warehouse_path) as connection:
        if not connection.extract_statements(sql):
            raise QueryError("There is no SQL to run.")
        return _result(connection, sql, parameters)


@contextmanager
def sandbox(warehouse_path: Path) -> Iterator[DuckDBPyConnection]:
    """Open the database for SQL of any origin, without blocking publication.

    It reaches the tables of the database and what it makes in memory: no other file, no network,
    no extension, and no way to write to the database.

    Raises
    ------
    QueryError
        If there is no database yet, or DuckDB raises an error.
    """
    with _opened(warehouse_path) as connection:
        connection.execute(_SANDBOX)
        yield connection


def status(warehouse_path: Path, runs: int = 5) -> Status:
    """Return the status, all from one version of the database.

    Parameters
    ----------
    warehouse_path : Path
        The database file.
    runs : int
        Number of runs to return.

    Raises
    ------
    QueryError
        If there is no database yet, or it cannot be opened.
    """
    with _opened(warehouse_path) as connection:
        try:
            [(version, published_at, files, gone)] = connection.execute(
                "SELECT version, published_at, "
                "(SELECT count(*) FROM library.files WHERE NOT gone), "
                "(SELECT count(*) FROM library.files WHERE gone) FROM publishing.version"
            ).fetchall()
        except (duckdb.CatalogException, ValueError) as error:
            raise _damaged(warehouse_path, error) from error
        return Status(
            version=version,
            published_at=published_at,
            files=files,
            gone=gone,
            runs=_result(
                connection,
                "SELECT started_at AS started, status, files, cells_done AS done, "
                "cells_reused AS reused, cells_failed AS failed, "
                "cells_quarantined AS quarantined, cells_skipped AS skipped, success_rate, "
                f"retries FROM robustness.runs ORDER BY started_at DESC LIMIT {runs:d}",
            ),
            degraded=_result(
                connection,
                "SELECT feature_set, count(*) AS cells, count(*) FILTER (NOT final) AS "
                "computed_again FROM features.degraded GROUP BY feature_set ORDER BY feature_set",
            ),
            missing=_result(
                connection,
                "SELECT reason, count(DISTINCT file_key) AS files, "
                "string_agg(DISTINCT feature_set, ', ' ORDER BY feature_set) AS feature_sets "
                "FROM features.missing GROUP BY reason ORDER BY files DESC, reason",
            ),
        )


def _result(connection: DuckDBPyConnection, sql: str, parameters: Sequence[object] = ()) -> Result:
    connection.execute(sql, parameters)
    return Result([column[0] for column in connection.description or ()], connection.fetchall())


@contextmanager
def _opened(warehouse_path: Path) -> Iterator[DuckDBPyConnection]:
    if not warehouse_path.exists():
        raise QueryError(
            f"There is no database at {warehouse_path} yet: `audio-assets analyze` makes it, or "
            "`audio-assets publish`, from what an interrupted run has finished."
        )
    try:
        with reading(warehouse_path) as connection:
            yield connection
    except duckdb.Error as error:
        # A checksum that is wrong is a plain Error.
        if type(error) is duckdb.Error or isinstance(error, _DAMAGE):
            raise _damaged(warehouse_path, error) from error
        raise QueryError(str(error)) from error


def _damaged(warehouse_path: Path, error: Exception) -> QueryError:
    return QueryError(
        f"{warehouse_path} cannot be read; `audio-assets publish --rebuild` makes it anew from the "
        f"landing. {error}"
    )
