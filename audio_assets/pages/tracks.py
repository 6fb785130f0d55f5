"""The library in memory, as its page shows it: read once per version of the database.

All texts come from files. They are cut to `TEXT_LENGTH` by the database, so that none is read
whole, and printable.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from duckdb import DuckDBPyConnection
from numpy.typing import NDArray

from audio_assets.library.text import printable
from audio_assets.warehouse.queries import QueryError, sandbox
from audio_assets.warehouse.schema import quoted

TEXT_LENGTH = 200
"""Characters of a text that are shown."""

PLACE = ("map_x", "map_y")
"""Columns of a track's place on the map."""

_NUMBERS = frozenset(
    ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE", "UBIGINT", "HUGEINT")
)
_WHOLE = {pa.int8(): pd.Int64Dtype(), pa.int16(): pd.Int64Dtype()}
_WHOLE |= {pa.int32(): pd.Int64Dtype(), pa.int64(): pd.Int64Dtype()}
_EXACT = ("file_key", "content_hash")
"""Texts that are short and printable by themselves, and by which tracks are looked up."""

_SEARCHED = ("title", "artist", "album", "file_key")
_COMPONENTS = 10


@dataclass(frozen=True, eq=False)
class Tracks:
    """The tracks of one version of the database.

    Parameters
    ----------
    version : int
        Its number.
    published_at : datetime
        When it was published.
    frame : DataFrame
        A row per file that is in the library, by file key: the numbers and texts of
        ``features.tracks``, why cells are missing, the folder, and the place on the map (`PLACE`),
        NULL without an embedding.
    descriptions : dict of str to str
        What each column is, with range and unit.
    heard : ndarray of int, shape (n,)
        The rows of `frame` that have an embedding.
    embeddings : ndarray of float32, shape (n, 200)
        These, of length 1.
    components : ndarray of float32, shape (n, 10 or fewer)
        These on their principal axes.
    """

    version: int
    published_at: datetime
    frame: pd.DataFrame
    descriptions: Mapping[str, str]
    heard: NDArray[np.intp]
    embeddings: NDArray[np.float32]
    components: NDArray[np.float32]

    @property
    def numbers(self) -> list[str]:
        """Names of the columns of numbers, without the place on the map."""
        return [
            name
            for name in self.frame.columns
            if name not in PLACE and pd.api.types.is_numeric_dtype(self.frame[name])
        ]

    @property
    def texts(self) -> list[str]:
        """Names of the columns of texts by which tracks can be grouped."""
        own = {*_EXACT, *PLACE, *self.numbers}
        return [name for name in self.frame.columns if name not in own]

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each file key."""
        return {key: row for row, key in enumerate(self.frame["file_key"])}

    def matching(
        self, text: str, chosen: Mapping[str, Sequence[Any]] | None = None
    ) -> pd.DataFrame:
        """Return the tracks that pass all filters.

        Parameters
        ----------
        text : str
            What the title, artist, album or file key contains, in any case.
        chosen : mapping of str to sequence, optional
            By column: the least and the greatest number, or the texts; no text lets all pass.
        """
        kept = pd.Series(True, index=self.frame.index)
        if text:
            found = [
                self.frame[name].str.contains(text, case=False, regex=False, na=False)
                for name in _SEARCHED
                if name in self.frame
            ]
            kept &= np.logical_or.reduce(found)
        for name, values in (chosen or {}).items():
            if name in self.numbers:
                kept &= self.frame[name].between(*values).fillna(value=False).astype(bool)
            elif values:
                kept &= self.frame[name].isin(values)
        return self.frame[kept]


def present_tracks(warehouse: Path) -> Tracks:
    """Return the tracks of the present version; all sessions share them.

    Raises
    ------
    QueryError
        If there is no database yet, or it cannot be read.
    """
    with _loading:
        with sandbox(warehouse) as connection:
            [version] = connection.execute("FROM publishing.version").fetchall()
        return _load(warehouse, version)


_loading = threading.Lock()


@lru_cache(maxsize=1)
def _load(warehouse: Path, version: tuple[Any, ...]) -> Tracks:
    with sandbox(warehouse) as connection:
        [(number, published_at)] = connection.execute(
            "SELECT version, published_at FROM publishing.version"
        ).fetchall()
        columns = connection.execute(
            "SELECT column_name, data_type, comment FROM duckdb_columns() "
            "WHERE (database_name, schema_name, table_name) = ('warehouse', 'features', 'tracks')"
        ).fetchall()
        types = {name: kind for name, kind, _ in columns}
        if "file_key" not in types:
            raise QueryError(f"{warehouse} has no tracks: it is of another version.")
        selected = ", ".join(filter(None, (_selected(name, kind) for name, kind in types.items())))
        frame = read_frame(
            connection,
            f"SELECT {selected}, array_to_string(string_split(file_key, '/')[:-2][:2], '/') "
            "AS folder, missing FROM features.tracks LEFT JOIN (SELECT file_key, "
            f"left(string_agg(DISTINCT reason, '; '), {TEXT_LENGTH + 1}) AS missing "
            "FROM features.missing GROUP BY file_key) USING (file_key) ORDER BY tracks.file_key",
        )
        heard, embeddings = _embeddings(connection)
    frame.insert(1, "missing", frame.pop("missing"))  # where a row without values shows it
    components = _principal(embeddings)
    for place, values in zip(PLACE, components.T[:2], strict=True):
        frame[place] = np.nan
        frame.loc[heard, place] = values
    return Tracks(
        number,
        published_at,
        frame,
        {name: comment or name for name, _, comment in columns if name in frame},
        heard,
        embeddings,
        components,
    )


def _selected(name: str, kind: str) -> str | None:
    """Return the SQL of a column of numbers or texts; None for another, and for the path."""
    sql = quoted(name)
    if name == "path":
        return None
    if name in _EXACT or kind in _NUMBERS:
        return f"tracks.{sql}"
    if kind == "VARCHAR[]":
        sql = f"array_to_string({sql}, ', ')"
    elif kind != "VARCHAR":
        return None
    return f"left({sql}, {TEXT_LENGTH + 1}) AS {quoted(name)}"


def read_frame(
    connection: DuckDBPyConnection, sql: str, parameters: Sequence[object] = ()
) -> pd.DataFrame:
    """Return what a query returns, whole numbers as such, and texts as `shown`."""
    rows = connection.sql(sql, params=list(parameters)).to_arrow_table()
    for place, column in enumerate(rows.schema):
        if column.name not in _EXACT and pa.types.is_string(column.type):
            # Most texts are there many times.
            texts = rows[place].combine_chunks().dictionary_encode()
            lines = pa.array(map(shown, texts.dictionary.to_pylist()), pa.string())
            rows = rows.set_column(place, column.name, lines.take(texts.indices))
    frame: pd.DataFrame = rows.to_pandas(types_mapper=_WHOLE.get)
    return frame


def shown(text: str) -> str:
    """Return a text in one line of up to `TEXT_LENGTH` characters without controls."""
    # What the database has cut is longer by one.
    line = " ".join(printable(text[: TEXT_LENGTH + 1]).split())
    return line if len(line) <= TEXT_LENGTH else f"{line[: TEXT_LENGTH - 1]}…"


def _embeddings(
    connection: DuckDBPyConnection,
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the places of the tracks with an embedding, by file key, and these of length 1."""
    found = connection.execute(
        "SELECT 1 FROM duckdb_columns() WHERE (database_name, schema_name, table_name, "
        "column_name) = ('warehouse', 'features', 'musicnn', 'embedding')"
    ).fetchall()
    if not found:
        return np.empty(0, np.intp), np.empty((0, 0), np.float32)
    rows = connection.sql(
        "SELECT place - 1 AS place, embedding FROM (SELECT file_key, "
        "row_number() OVER (ORDER BY file_key) AS place FROM features.tracks) "
        "JOIN features.musicnn USING (file_key) WHERE embedding IS NOT NULL ORDER BY place"
    ).to_arrow_table()
    places = rows["place"].to_numpy()
    values = rows["embedding"].combine_chunks().flatten().to_numpy()
    vectors = values.reshape(len(places), -1) if len(places) else np.empty((0, 0), np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return places.astype(np.intp), vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def _principal(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors on their principal axes, the widest first; at least two columns."""
    from sklearn.decomposition import PCA

    if len(vectors) < 2:
        return np.zeros((len(vectors), 2), np.float32)
    axes = PCA(min(_COMPONENTS, *vectors.shape), svd_solver="covariance_eigh").fit(vectors)
    components: NDArray[np.float32] = axes.transform(vectors).astype(np.float32)
    return components
