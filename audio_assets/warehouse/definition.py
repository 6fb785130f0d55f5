"""The tables and views of the database: create them, migrate them, comment them."""

import hashlib
from collections.abc import Iterable

from duckdb import DuckDBPyConnection

from audio_assets.features.base import Column, FeatureSet
from audio_assets.warehouse import rollups
from audio_assets.warehouse.ingest import PARTS, TABLES, VERSION
from audio_assets.warehouse.schema import ATTEMPTS, RUNS, Table, literal, quoted, warehouse_tables
from audio_assets.warehouse.views import views


class Definition:
    """What the tables and views of a version look like.

    Parameters
    ----------
    feature_sets : iterable of FeatureSet
        The feature sets of this program.

    Attributes
    ----------
    digest : str
        Changes with anything that tables, views or statistics are made from.
    """

    def __init__(self, feature_sets: Iterable[FeatureSet]) -> None:
        feature_sets = tuple(feature_sets)
        self._tables = warehouse_tables(feature_sets)
        self._views = views(feature_sets)
        made_from = repr((self._tables, rollups.ROLLUP_SQL, self._views, VERSION, PARTS, TABLES))
        self.digest = hashlib.sha256(made_from.encode()).hexdigest()

    def apply(self, connection: DuckDBPyConnection) -> None:
        """Create the tables and views, or migrate those of another definition in place."""
        # A column cannot be altered while a view depends on it.
        present = "SELECT view_name FROM duckdb_views() WHERE schema_name = 'features'"
        for (name,) in connection.execute(present).fetchall():
            connection.execute(f"DROP VIEW features.{quoted(name)}")
        for table in self._tables:
            connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(table.schema)}")
            if _migrate(connection, table):
                # Parts may hold values of columns that the table did not have.
                connection.execute(
                    "DELETE FROM publishing.parts WHERE landing_table = ?", [table.landing_name]
                )
        for table in (*self._tables, VERSION, PARTS, TABLES):
            _comment(connection, "TABLE", table.sql_name, table.description, table.all_columns)
        for view in self._views:
            connection.execute(f"CREATE VIEW {view.sql_name} AS {view.select}")
            _comment(connection, "VIEW", view.sql_name, view.description, view.columns)
        connection.execute(
            f"INSERT INTO touched SELECT run_id FROM {RUNS.sql_name} "
            f"UNION SELECT run_id FROM {ATTEMPTS.sql_name}"
        )


def _migrate(connection: DuckDBPyConnection, table: Table) -> bool:
    """Create a table, or change its columns; return whether it had others."""
    wanted = {column.name: column.type for column in table.all_columns}
    columns = ", ".join(f"{quoted(name)} {kind}" for name, kind in wanted.items())
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table.sql_name} ({columns})")
    connection.execute(f"CREATE OR REPLACE TEMP TABLE template ({columns})")
    present = _column_types(connection, table.sql_name)
    right = _column_types(connection, "template")
    if present == right:
        return False
    alter = f"ALTER TABLE {table.sql_name}"
    for name in right.keys() - present.keys():
        connection.execute(f"{alter} ADD COLUMN {quoted(name)} {wanted[name]}")
    for name in present.keys() - right.keys():
        connection.execute(f"{alter} DROP COLUMN {quoted(name)}")
    for name in right.keys() & present.keys():
        if right[name] != present[name]:
            column, kind = quoted(name), wanted[name]
            connection.execute(
                f"{alter} ALTER COLUMN {column} TYPE {kind} USING TRY_CAST({column} AS {kind})"
            )
    return True


def _column_types(connection: DuckDBPyConnection, table: str) -> dict[str, str]:
    return {row[0]: row[1] for row in connection.execute(f"DESCRIBE {table}").fetchall()}


def _comment(
    connection: DuckDBPyConnection,
    kind: str,
    name: str,
    description: str,
    columns: Iterable[Column],
) -> None:
    """Comment a table or view with its description, its columns by `Column.comment`."""
    connection.execute(f"COMMENT ON {kind} {name} IS {literal(description)}")
    for column in columns:
        connection.execute(
            f"COMMENT ON COLUMN {name}.{quoted(column.name)} IS {literal(column.comment)}"
        )
