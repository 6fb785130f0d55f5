"""What the values of a whole table tell: columns that are constant, or differ between its parts."""

from collections.abc import Iterator, Sequence

import numpy as np
from duckdb import DuckDBPyConnection
from scipy.stats import ks_2samp

from audio_assets.features.base import Column, FeatureSet
from audio_assets.warehouse.schema import feature_table, quoted

LEAST_ROWS = 30
"""Smaller parts of a table are not compared."""

LEAST_DISTANCE = 0.5
"""Largest distance between the distribution functions of two parts (0 to 1) that is no finding."""

SIGNIFICANCE = 0.001
"""Chance of a finding in a table of which no column differs."""

_PARTS = {
    "code version": "code_version",
    "extractor": "extractor",
    "library root": "split_part(file_key, '/', 1)",
}
_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE")


def findings(connection: DuckDBPyConnection, feature_set: FeatureSet) -> list[str]:
    """Return what is odd about the numbers of a table.

    A column is odd if all its values are equal or all are NULL. Parts of the table, by code
    version, extractor and library root, are compared by the two-sample Kolmogorov-Smirnov test,
    each with all others. A difference counts if it is large, not only significant: large tables
    differ a little anywhere.

    Parameters
    ----------
    connection : DuckDBPyConnection
        The warehouse.
    feature_set : FeatureSet
        Which table.

    Returns
    -------
    list of str
        A sentence each.
    """
    columns = [column for column in feature_set.columns if column.type in _NUMBERS]
    table = feature_table(feature_set).sql_name
    found = list(_constant(connection, table, columns))
    compared = []
    for kind, part in _PARTS.items():
        counts = connection.execute(
            f"SELECT {part} AS part, count(*) FROM {table} GROUP BY part ORDER BY part"
        ).fetchall()
        if len(counts) > 1:
            compared += [(kind, part, value) for value, count in counts if count >= LEAST_ROWS]
    for kind, part, value in compared:
        for column in columns:
            name = quoted(column.name)
            halves = [
                np.array(
                    connection.execute(
                        f"SELECT {name} FROM {table} WHERE {name} IS NOT NULL AND {part} {test} ?",
                        [value],
                    ).fetchall(),
                    np.float64,
                ).ravel()
                for test in ("=", "<>")
            ]
            if min(map(len, halves)) < LEAST_ROWS:
                continue
            distance, chance = ks_2samp(halves[0], halves[1], method="asymp")
            if distance > LEAST_DISTANCE and chance < SIGNIFICANCE / len(compared) / len(columns):
                found.append(
                    f"{column.name} of {kind} {value} differs from the others: distance "
                    f"{distance:.2f}, {len(halves[0])} and {len(halves[1])} files"
                )
    return found


def _constant(
    connection: DuckDBPyConnection, table: str, columns: Sequence[Column]
) -> Iterator[str]:
    for column in columns:
        name = quoted(column.name)
        [(rows, known, least, greatest)] = connection.execute(
            f"SELECT count(*), count({name}), min({name}), max({name}) FROM {table}"
        ).fetchall()
        if rows < LEAST_ROWS:
            continue
        if not known:
            yield f"{column.name} is NULL in all {rows} rows"
        elif known >= LEAST_ROWS and least == greatest:
            yield f"{column.name} is {least:g} in all {known} rows that have it"
