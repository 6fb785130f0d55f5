"""What the values of a whole table tell: columns that are constant, or differ between its parts."""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from duckdb import DuckDBPyConnection
from numpy.typing import NDArray

from audio_assets.features.base import Column, FeatureSet
from audio_assets.warehouse.schema import feature_table, quoted

LEAST_ROWS = 30
"""Smaller tables are not judged, and smaller parts of a table not compared."""

MOST_ROWS = 5000
"""A part of a table is judged by a sample of as many rows of each version, extractor and root."""

MOST_NULL = 0.5
"""Largest share of NULL that is no finding."""

LEAST_DISTANCE = 0.5
"""Largest distance between the distribution functions of two parts (0 to 1) that is no finding."""

SIGNIFICANCE = 0.001
"""Chance of a finding in a table of which no column differs."""

_PARTS = {
    "code version": "code_version",
    "extractor": "extractor",
    "library root": "split_part(file_key, '/', 1)",
}

_Values = NDArray[np.float64]


def findings(connection: DuckDBPyConnection, feature_set: FeatureSet) -> list[str]:
    """Return what is odd about the measured values of a table.

    A column is odd if it is constant or mostly NULL. Parts of the table, by code version, extractor
    and library root, are compared by the two-sample Kolmogorov-Smirnov test, each with all others;
    NULL counts as less than any number. A difference counts if it is large, not only significant:
    large tables differ a little anywhere. The level of significance is divided by the number of
    tests (Bonferroni).

    Parameters
    ----------
    connection : DuckDBPyConnection
        The warehouse.
    feature_set : FeatureSet
        Which table. Its columns of type ``FLOAT`` and ``DOUBLE``, and of arrays of these each
        element, are judged.

    Returns
    -------
    list of str
        A sentence each.
    """
    columns = {column.name: sql for column in feature_set.columns if (sql := _elements(column))}
    rows = _sample(connection, feature_table(feature_set).sql_name, columns)
    values = {
        name: np.stack([np.ma.filled(rows[sql], -np.inf) for sql in elements], 1).astype(np.float64)
        for name, elements in columns.items()
    }
    found = [odd for name, column in values.items() if (odd := _odd(name, column))]
    parts = [(f"{kind} {part}", inside) for kind, part, inside in _parts(rows)]
    tests = len(parts) * sum(map(len, columns.values()))
    for part, inside in parts:
        for name, column in values.items():
            if difference := _difference(column[inside], column[~inside], SIGNIFICANCE / tests):
                element, said = difference
                label = f"{name}[{element + 1}]" if column.shape[1] > 1 else name
                found.append(f"{label} of {part} differs from the others: {said}")
    return found


def _elements(column: Column) -> list[str]:
    """Return the SQL of each number of a column, if it has a fixed number of measured ones."""
    match = re.fullmatch(r"(?:FLOAT|DOUBLE)(?:\[(\d+)\])?", column.type)
    if not match:
        return []
    if match[1] is None:
        return [quoted(column.name)]
    return [f"{quoted(column.name)}[{number + 1}]" for number in range(int(match[1]))]


def _sample(
    connection: DuckDBPyConnection, table: str, columns: Mapping[str, Sequence[str]]
) -> Mapping[str, np.ndarray]:
    """Return the parts that rows belong to, by `_PARTS`, and their numbers, by their SQL."""
    selected = _PARTS | {sql: sql for elements in columns.values() for sql in elements}
    rows: Mapping[str, np.ndarray] = connection.execute(  # type: ignore[assignment]
        f"""
        WITH sample AS (
            SELECT file_key FROM {table}
            QUALIFY row_number() OVER (
                PARTITION BY {", ".join(_PARTS.values())} ORDER BY hash(file_key)
            ) <= {MOST_ROWS}
        )
        SELECT {", ".join(f"{sql} AS {quoted(name)}" for name, sql in selected.items())}
        FROM {table} SEMI JOIN sample USING (file_key)
        """
    ).fetchnumpy()
    return rows


def _odd(name: str, column: _Values) -> str | None:
    known = column[np.isfinite(column).all(axis=1)]
    if len(column) < LEAST_ROWS:
        return None
    if len(known) < (1 - MOST_NULL) * len(column):
        return f"{name} is NULL in {1 - len(known) / len(column):.0%} of {len(column)} files"
    if (known == known[0]).all():
        return f"{name} is the same in all {len(known)} files that have it"
    return None


def _parts(rows: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Yield the kind, the name and the rows of each part that is compared with all others."""
    for kind in _PARTS:
        names, counts = np.unique(rows[kind].astype(str), return_counts=True)
        # Of two parts, the smaller one is compared with the other.
        compared = names[np.argsort(counts)][: 1 if len(names) == 2 else len(names)]
        for name in compared:
            inside = rows[kind] == name
            if LEAST_ROWS <= inside.sum() <= len(inside) - LEAST_ROWS:
                yield kind, name, inside


def _difference(part: _Values, others: _Values, significance: float) -> tuple[int, str] | None:
    """Return the element that differs most and how, if it differs much."""
    from scipy.stats import ks_2samp  # 0.7 s, which only this check needs

    tests = [ks_2samp(a, b, method="asymp") for a, b in zip(part.T, others.T, strict=True)]
    element = int(np.argmax([test.statistic for test in tests]))
    distance, chance = tests[element]
    if distance <= LEAST_DISTANCE or chance >= significance:
        return None
    medians = [np.median(values[:, element]) for values in (part, others)]
    here, elsewhere = (f"{m:.4g}" if np.isfinite(m) else "NULL" for m in medians)
    return element, (
        f"median {here} instead of {elsewhere}, distance {distance:.2f}, "
        f"{len(part)} and {len(others)} files"
    )
