"""Write results for programs that do not open the database: Parquet, playlists and JAMS."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Row
from audio_assets.library import text
from audio_assets.library.files import replacing
from audio_assets.library.text import printable
from audio_assets.warehouse.queries import QueryError, query, sandbox

JAMS_VERSION = "0.3.5"
"""Of the schema: https://github.com/marl/jams."""

_NAME_BYTES = 255
"""Longest name of a file or directory that Linux allows."""

_RESULTS_AT_ONCE, _ENTRIES_AT_ONCE = 500, 20_000
"""Tracks whose results, or titles, are in memory at a time."""

_LONE = re.compile("[\ud800-\udfff]")
"""What stands for a byte that is not UTF-8."""


def write_csv(
    warehouse: Path,
    sql: str,
    output: Path,
    parameters: Sequence[object] = (),
    *,
    raw: bool = False,
) -> int:
    """Write what a query returns to a CSV file, and return the number of rows.

    Parameters
    ----------
    warehouse : Path
        The database file.
    sql : str
        A query.
    output : Path
        The file.
    parameters : sequence, optional
        As of `queries.query`.
    raw : bool
        As of `text.write_csv`.

    Raises
    ------
    QueryError
        As `queries.query`.
    OSError
        If the file cannot be written.
    """
    result = query(warehouse, sql, parameters)
    with replacing(output) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        text.write_csv(file, result.columns, result.rows, raw=raw)
    return len(result.rows)


def write_parquet(
    warehouse: Path, sql: str, output: Path, parameters: Sequence[object] = ()
) -> int:
    """Write what a query returns to a Parquet file, and return the number of rows.

    Parameters
    ----------
    warehouse, sql, output, parameters
        As of `write_csv`.

    Raises
    ------
    QueryError
        As `queries.query`, and if Parquet has no type for a column.
    OSError
        If the file cannot be written.
    """
    from pyarrow import ArrowException, parquet

    with sandbox(warehouse) as connection:
        result = connection.sql(sql, params=list(parameters))
        if result is None:
            raise QueryError("There is no SQL to run.")
        rows = result.to_arrow_table()
    with replacing(output) as partial:
        try:
            parquet.write_table(rows, partial, compression="zstd")
        except ArrowException as error:
            raise QueryError(f"Parquet has no such type, cast it to VARCHAR: {error}") from error
    return int(rows.num_rows)


def write_playlist(
    warehouse: Path,
    sql: str,
    output: Path,
    path_of: Callable[[str], Path],
    parameters: Sequence[object] = (),
) -> tuple[int, int]:
    """Write an M3U8 playlist of the tracks that a query returns, in its order.

    A path that a line of a playlist cannot hold is written as a ``file:`` URI.

    Parameters
    ----------
    warehouse : Path
        The database file.
    sql : str
        A query with a column ``file_key``.
    output : Path
        The playlist.
    path_of : callable
        Takes a file key, and returns the file's path.
    parameters : sequence, optional
        As of `queries.query`.

    Returns
    -------
    (int, int)
        Number of tracks written, and of those left out as their files are gone or not analysed.

    Raises
    ------
    QueryError
        As `queries.query`, and if there is no column ``file_key``.
    OSError
        If the file cannot be written.
    """
    keys = _file_keys(warehouse, sql, parameters)
    lines = ["#EXTM3U"]
    for row in _rows_of(warehouse, keys, _ENTRIES, _ENTRIES_AT_ONCE):
        path = path_of(row["file_key"])
        shown = " - ".join(filter(None, (row["artist"], row["title"]))) or path.name
        lines += [
            f"#EXTINF:{row['duration_s']:.0f},{' '.join(printable(shown).split())}",
            _line(path),
        ]
    with replacing(output) as partial:
        partial.write_text("\n".join(lines) + "\n", "utf-8")
    written = len(lines) // 2
    return written, len(keys) - written


def write_jams(warehouse: Path, sql: str, directory: Path) -> tuple[int, int]:
    """Write a JAMS file for each track that a query returns: ``<directory>/<file key>.jams``.

    Parameters
    ----------
    warehouse, sql
        As for `write_playlist`.
    directory : Path
        Where to write; it is made if it does not exist.

    Returns
    -------
    (int, int)
        As of `write_playlist`.

    Raises
    ------
    QueryError
        As `write_playlist`.
    OSError
        If a file cannot be written.
    """
    keys = _file_keys(warehouse, sql)
    written = 0
    for row in _rows_of(warehouse, keys, _TRACKS, _RESULTS_AT_ONCE):
        path = directory / _jams_name(row.pop("file_key"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(jams(**row)))
        written += 1
    return written, len(keys) - written


def jams(of_metadata: Row, of_rhythm: Row, of_key: Row, of_musicnn: Row) -> dict[str, Any]:
    """Return a track in the JSON Annotated Music Specification (Humphrey et al., ISMIR 2014).

    Parameters
    ----------
    of_metadata : dict
        A row of ``features.metadata`` with a duration.
    of_rhythm, of_key, of_musicnn : dict
        Rows of these feature sets; where there is none, all its values are None.

    Returns
    -------
    dict
        Annotations of the namespaces ``tempo``, ``beat``, ``key_mode`` and ``tag_open``; those
        without a value are left out. Times are in s.
    """
    duration = of_metadata["duration_s"]

    def observed(value: object, confidence: float | None, time: float | None = None) -> Row:
        return {
            "time": time or 0.0,
            "duration": duration if time is None else 0.0,
            "value": value,
            "confidence": confidence,
        }

    def annotation(namespace: str, row: Row, data: list[Row], **more: object) -> Row:
        described = {
            "annotation_tools": row["extractor"],
            "version": row["code_version"],
            "data_source": "program",
        }
        return {
            "namespace": namespace,
            "annotation_metadata": described,
            "data": data,
            "sandbox": _known({"degraded": row["degraded"], **more}),
            "time": 0.0,
            "duration": duration,
        }

    annotations = []
    if of_rhythm["bpm"] is not None:
        # Of several tempi the confidence is the share, as in MIREX.
        data = [observed(of_rhythm["bpm"], 1.0)]
        names = ("bpm_confidence", "bpm_second", "beat_confidence")
        more = {name: of_rhythm[name] for name in names}
        annotations.append(annotation("tempo", of_rhythm, data, **more))
    if of_rhythm["beats"]:
        data = [observed(None, None, time) for time in of_rhythm["beats"]]
        annotations.append(annotation("beat", of_rhythm, data))
    if of_key["key"] is not None:
        key = f"{of_key['key']}:{of_key['scale']}"
        data = [observed(key, of_key["strength"])]
        annotations.append(annotation("key_mode", of_key, data))
    for model in ("msd", "mtt"):
        if tags := of_musicnn[f"{model}_tags"]:
            data = [observed(tag, activation) for tag, activation in tags.items()]
            annotations.append(annotation("tag_open", of_musicnn, data, model=f"{model}_musicnn"))
    identifiers = {
        "file_key": of_metadata["file_key"],
        "content_hash": of_metadata["content_hash"],
        "musicbrainz_recording": of_metadata["musicbrainz_recording_id"],
    }
    described = {
        "title": of_metadata["title"],
        "artist": of_metadata["artist"],
        "release": of_metadata["album"],
        "duration": duration,
        "identifiers": _known(identifiers),
        "jams_version": JAMS_VERSION,
    }
    return {"file_metadata": _known(described), "annotations": annotations, "sandbox": {}}


_ENTRIES = (
    "SELECT file_key, title, artist, duration_s FROM warehouse.features.tracks "
    "WHERE duration_s IS NOT NULL AND file_key IN (SELECT unnest(?))"
)
_TRACKS = """
SELECT file_key, of_metadata, of_rhythm, of_key, of_musicnn
FROM warehouse.library.files AS files
JOIN warehouse.features.metadata AS of_metadata USING (file_key)
LEFT JOIN warehouse.features.rhythm AS of_rhythm USING (file_key)
LEFT JOIN warehouse.features.key AS of_key USING (file_key)
LEFT JOIN warehouse.features.musicnn AS of_musicnn USING (file_key)
WHERE NOT coalesce(gone, false) AND of_metadata.duration_s IS NOT NULL
    AND file_key IN (SELECT unnest(?))
"""
_UNREAD = """
SELECT file_key FROM warehouse.features.missing WHERE feature_set IN (SELECT unnest(?))
GROUP BY file_key HAVING count(*) = ?
"""
"""Files of whose audio there is no row. Of a damaged one, too, the header may state a duration."""


def _file_keys(warehouse: Path, sql: str, parameters: Sequence[object] = ()) -> list[str]:
    """Return the file keys that a query returns, each once, in its order."""
    result = query(warehouse, sql, parameters)
    if "file_key" not in result.columns:
        raise QueryError(
            "A playlist or JAMS files need a query with the column file_key, such as "
            '"FROM features.tracks WHERE bpm > 120".'
        )
    place = result.columns.index("file_key")
    return list(dict.fromkeys(str(row[place]) for row in result.rows if row[place] is not None))


def _rows_of(warehouse: Path, keys: Sequence[str], sql: str, at_once: int) -> Iterator[Row]:
    """Yield what a query says of files, in their order; nothing of those gone or unread."""
    names = [name for name, feature_set in FEATURE_SETS.items() if feature_set.reads_pcm]
    unread = {key for (key,) in query(warehouse, _UNREAD, [names, len(names)]).rows}
    for start in range(0, len(keys), at_once):
        some = keys[start : start + at_once]
        result = query(warehouse, sql, [some])
        rows = {
            row[0]: dict(zip(result.columns, row, strict=True))
            for row in result.rows
            if row[0] not in unread
        }
        yield from (rows[key] for key in some if key in rows)


def _line(path: Path) -> str:
    """Return a path as a line of a playlist: as it is, or, where it cannot be, as a URI."""
    line = str(path)
    is_line = line.splitlines() == [line.strip()] and not _LONE.search(line)
    return line if is_line else path.as_uri()


def _jams_name(file_key: str) -> str:
    name = f"{file_key}.jams"
    if all(len(part.encode()) <= _NAME_BYTES for part in name.split("/")):
        return name
    return f"{blake3(file_key.encode()).hexdigest()}.jams"


def _known(values: Row) -> Row:
    return {name: value for name, value in values.items() if value is not None}
