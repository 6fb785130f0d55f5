"""Ingest the landing's parts into a version of the database, each part once.

A version records the parts it holds in ``publishing.parts``, and in ``publishing.tables`` how many
of their rows are in force, with a digest of these. The runs whose attempts or record are new are
collected in the temporary table ``touched``.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from duckdb import DuckDBPyConnection

from audio_assets.features.base import Column
from audio_assets.warehouse.database import recorded_parts
from audio_assets.warehouse.landing import CorruptPartError, Landing, PartVanishedError
from audio_assets.warehouse.schema import ATTEMPTS, ROW_ID, RUNS, Table, quoted

logger = logging.getLogger(__name__)

VERSION = Table(
    "publishing",
    "version",
    "One row: the version of the database",
    (),
    key=(),
    computed=(
        Column("version", "BIGINT", "Number of the version, from 1"),
        Column("published_at", "TIMESTAMPTZ", "When it was published"),
        Column("definition", "VARCHAR", "Hash of what its tables and views are made from"),
    ),
)

PARTS = Table(
    "publishing",
    "parts",
    "One row per part of the landing that this version holds",
    (),
    key=(),
    computed=(
        Column("landing_table", "VARCHAR", "The table, by its directory in the landing"),
        Column("part", "VARCHAR", "Name of the part"),
        Column("damaged", "BOOLEAN", "Whether it cannot be read; its rows are left out"),
    ),
)


TABLES = Table(
    "publishing",
    "tables",
    "One row per table of the landing: what this version must hold of it",
    (),
    key=("landing_table",),
    computed=(
        Column("landing_table", "VARCHAR", "The table, by its directory in the landing"),
        Column("row_count", "BIGINT", "Number of its rows"),
        Column("digest", "UHUGEINT", "Hash of its rows"),
    ),
)


def _creation(table: Table) -> str:
    columns = [f"{column.name} {column.type}" for column in table.all_columns]
    if table.key:
        columns.append(f"PRIMARY KEY ({', '.join(table.key)})")
    return f"CREATE TABLE IF NOT EXISTS {table.sql_name} ({', '.join(columns)});"


TABLES_SQL = f"""
CREATE SCHEMA IF NOT EXISTS publishing;
{_creation(VERSION)}
{_creation(PARTS)}
{_creation(TABLES)}
CREATE TEMP TABLE touched (run_id VARCHAR)
"""
"""The tables that ingesting needs."""

_DIGEST = f"coalesce(bit_xor(md5_number({ROW_ID}::VARCHAR)), 0)"
"""Of a set of rows, whatever their order; adding a row and removing it are the same operation."""


class LedgerError(Exception):
    """A table does not hold the rows that were ingested."""


@dataclass
class Ingested:
    """The parts of a table that were ingested.

    Parameters
    ----------
    live : sequence of str
        All parts that hold the table's rows.
    read : list of str
        Those read now.
    damaged : list of str
        Those that cannot be read.
    rows : int
        Number of rows read.
    """

    live: Sequence[str]
    read: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    rows: int = 0


def check_ledger(connection: DuckDBPyConnection, *, digests: bool) -> None:
    """Compare the tables of a version with what was ingested into them.

    Parameters
    ----------
    connection : DuckDBPyConnection
        The version.
    digests : bool
        Compare which rows they hold, and not just how many.

    Raises
    ------
    LedgerError
        If rows were lost, added or replaced.
    duckdb.Error
        If a version of an earlier program has no such records, or it is damaged.
    """
    for landing_table, *recorded in connection.execute("FROM publishing.tables").fetchall():
        name = ".".join(map(quoted, landing_table.split("/")))
        (found,) = connection.execute(
            f"SELECT count({ROW_ID}), {_DIGEST if digests else 'NULL'} FROM {name}"
        ).fetchall()
        if list(found) != (recorded if digests else [recorded[0], None]):
            raise LedgerError(
                f"{landing_table} has {found[0]} rows, and not the {recorded[0]} ingested"
            )


def ingest(connection: DuckDBPyConnection, landing: Landing, table: Table) -> Ingested:
    """Ingest the parts of a table that the version does not hold yet."""
    while True:
        try:
            ingested = _stage(connection, landing, table)
            break
        except PartVanishedError:
            logger.info("%s was compacted meanwhile; reading it again", table.landing_name)
    if ingested.rows:
        _merge(connection, table)
    _record(connection, table, ingested)
    return ingested


def _stage(connection: DuckDBPyConnection, landing: Landing, table: Table) -> Ingested:
    """Collect the new parts' rows in the temporary table ``staged``."""
    names = [column.name for column in table.columns]
    columns = ", ".join(f"{quoted(c.name)} {c.type}" for c in table.columns)
    connection.execute(f"CREATE OR REPLACE TEMP TABLE staged ({columns}, {ROW_ID} UUID)")
    recorded = recorded_parts(connection, table)
    ingested = Ingested(live=landing.parts(table.landing_name))
    for part in ingested.live:
        if recorded.get(part) is False:
            continue
        try:
            sources = landing.supersedes(table.landing_name, part)
            if not sources or any(recorded.get(source) is not False for source in sources):
                rows = landing.read_part(table.landing_name, part, names)
                connection.register("part_rows", rows)
                connection.execute("INSERT INTO staged BY NAME FROM part_rows")
                connection.unregister("part_rows")
                ingested.rows += rows.num_rows
            ingested.read.append(part)
        except CorruptPartError:
            logger.exception("rows are missing from %s", table.sql_name)
            ingested.damaged.append(part)
    return ingested


def _merge(connection: DuckDBPyConnection, table: Table) -> None:
    """Move the latest row of each key from ``staged`` to its table."""
    key = ", ".join(map(quoted, table.key))
    same = " AND ".join(f"present.{quoted(k)} = staged.{quoted(k)}" for k in table.key)
    connection.execute(f"""
        CREATE OR REPLACE TEMP TABLE staged AS FROM staged
        QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY {ROW_ID} DESC) = 1
    """)
    connection.execute(
        f"DELETE FROM staged USING {table.sql_name} AS present "
        f"WHERE {same} AND present.{ROW_ID} > staged.{ROW_ID}"
    )
    connection.execute(
        f"""
        INSERT INTO publishing.tables
        SELECT ?, sum(change), {_DIGEST} FROM (
            SELECT 1 AS change, {ROW_ID} FROM staged
            UNION ALL
            SELECT -1, {ROW_ID} FROM {table.sql_name} SEMI JOIN staged USING ({key})
            WHERE {ROW_ID} IS NOT NULL
        )
        ON CONFLICT DO UPDATE SET
            row_count = row_count + excluded.row_count, digest = xor(digest, excluded.digest)
        """,
        [table.landing_name],
    )
    connection.execute(f"DELETE FROM {table.sql_name} AS present USING staged WHERE {same}")
    connection.execute(f"INSERT INTO {table.sql_name} BY NAME FROM staged")
    if table in (ATTEMPTS, RUNS):
        connection.execute("INSERT INTO touched SELECT DISTINCT run_id FROM staged")


def _record(connection: DuckDBPyConnection, table: Table, ingested: Ingested) -> None:
    """Record the parts that a version holds, and forget those that no longer exist."""
    connection.execute(
        "DELETE FROM publishing.parts WHERE landing_table = ? "
        "AND (list_contains(?, part) OR NOT list_contains(?, part))",
        [table.landing_name, [*ingested.read, *ingested.damaged], list(ingested.live)],
    )
    for damaged, parts in ((False, ingested.read), (True, ingested.damaged)):
        connection.execute(
            "INSERT INTO publishing.parts SELECT ?, unnest(?::VARCHAR[]), ?",
            [table.landing_name, parts, damaged],
        )
