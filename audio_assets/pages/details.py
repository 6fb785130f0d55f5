"""What the database knows of one track."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from duckdb import DuckDBPyConnection

from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import FeatureSet, Row
from audio_assets.library.text import four_digits
from audio_assets.pages.tracks import TEXT_LENGTH, read_frame, shown
from audio_assets.warehouse.queries import sandbox
from audio_assets.warehouse.schema import feature_table, quoted

_MOST = 500
"""Rows of a table that are shown."""


@dataclass(frozen=True, eq=False)
class Details:
    """A track.

    Parameters
    ----------
    path : str
        Where the file was last seen.
    values : DataFrame
        Each number and text of its feature sets: ``feature_set``, ``name``, ``value``, ``what``.
    tags : DataFrame
        The other tags of the file: ``tag``, ``value``.
    pictures : dict of str to str
        SVG that a feature set draws, by its name.
    beats : list of float
        Times of the beats (s).
    attempts : DataFrame
        The attempts at its cells, latest first.
    missing, degraded : DataFrame
        Its cells that are missing or degraded, and why.
    """

    path: str
    values: pd.DataFrame
    tags: pd.DataFrame
    pictures: Mapping[str, str]
    beats: list[float]
    attempts: pd.DataFrame
    missing: pd.DataFrame
    degraded: pd.DataFrame


def details(warehouse: Path, file_key: str) -> Details | None:
    """Return what is known of a track; None if no file of that key is known.

    Raises
    ------
    QueryError
        If there is no database, or it cannot be read.
    """
    with sandbox(warehouse) as connection:
        files = connection.execute(
            f"SELECT left(path, {TEXT_LENGTH + 1}) FROM library.files WHERE file_key = ?",
            [file_key],
        ).fetchall()
        if not files:
            return None
        rows = {
            name: row
            for name, feature_set in FEATURE_SETS.items()
            if (row := _row(connection, feature_set, file_key))
        }
        attempts = _rows(
            connection,
            "robustness.attempts",
            "feature_set, attempt, outcome, error_type, message, recovery_strategy, extractor, "
            "duration_s, timeout_s, started_at",
            file_key,
            "row_id DESC",
        )
        missing = _rows(
            connection, "features.missing", "feature_set, reason, since", file_key, "feature_set"
        )
        degraded = _rows(
            connection, "features.degraded", "feature_set, reason, since", file_key, "feature_set"
        )
    pictures = {name: svg for name, row in rows.items() if (svg := FEATURE_SETS[name].draw(row))}
    return Details(
        shown(files[0][0] or ""),
        _values(rows),
        _tags(rows.get("metadata", {}).get("tags")),
        pictures,
        rows.get("rhythm", {}).get("beats") or [],
        attempts,
        missing,
        degraded,
    )


def _row(connection: DuckDBPyConnection, feature_set: FeatureSet, file_key: str) -> Row | None:
    """Return a feature set's row of a track; None also if the database lacks it or a column."""
    table = feature_table(feature_set)
    present = connection.execute(
        "SELECT column_name FROM duckdb_columns() "
        "WHERE (database_name, schema_name, table_name) = ('warehouse', ?, ?)",
        [table.schema, table.name],
    ).fetchall()
    names = [column.name for column in feature_set.columns]
    if not {(name,) for name in names} <= set(present):
        return None
    rows = connection.execute(
        f"SELECT {', '.join(map(quoted, names))} FROM {table.sql_name} WHERE file_key = ?",
        [file_key],
    ).fetchall()
    return dict(zip(names, rows[0], strict=True)) if rows else None


def _rows(
    connection: DuckDBPyConnection, table: str, columns: str, file_key: str, order: str
) -> pd.DataFrame:
    return read_frame(
        connection,
        f"SELECT {columns} FROM {table} WHERE file_key = ? ORDER BY {order} LIMIT {_MOST}",
        [file_key],
    )


def _values(rows: Mapping[str, Row]) -> pd.DataFrame:
    found = [
        (name, column.name, _text(value), column.comment)
        for name, row in rows.items()
        for column in FEATURE_SETS[name].columns
        if isinstance(value := row[column.name], str | int | float) and column.name != "tags"
    ]
    return pd.DataFrame(found, columns=["feature_set", "name", "value", "what"])


def _text(value: str | float) -> str:
    return shown(value) if isinstance(value, str) else four_digits(value)


def _tags(tags: str | None) -> pd.DataFrame:
    """Return the tags of a file from the JSON of ``features.metadata``."""
    found: dict[str, Any] = json.loads(tags or "{}")
    rows = [
        (shown(name), shown(", ".join(value) if isinstance(value, list) else str(value)))
        for name, value in list(found.items())[:_MOST]
    ]
    return pd.DataFrame(rows, columns=["tag", "value"])
