"""Chosen tracks as a file, by the code of `audio-assets export`."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from audio_assets.library.roots import library_roots
from audio_assets.library.scan import Library
from audio_assets.warehouse import exports

Ending = Literal["csv", "parquet", "m3u8"]

_CHOSEN = """
SELECT tracks.* FROM (SELECT unnest($1) AS file_key, generate_subscripts($1, 1) AS place)
JOIN features.tracks AS tracks USING (file_key) ORDER BY place
"""


def saved(warehouse: Path, file_keys: Sequence[str], ending: Ending) -> bytes:
    """Return the rows of ``features.tracks`` of tracks, or a playlist of them, in their order.

    Tracks that have left the library since are left out.

    Parameters
    ----------
    warehouse : Path
        The database file.
    file_keys : sequence of str
        The tracks.
    ending : {'csv', 'parquet', 'm3u8'}
        The format.

    Raises
    ------
    QueryError
        If the database cannot be read.
    ValueError
        If the library's roots are not valid.
    OSError
        If there is no space for a temporary file.
    """
    keys = [list(file_keys)]
    with TemporaryDirectory() as directory:
        output = Path(directory) / f"tracks.{ending}"
        match ending:
            case "csv":
                exports.write_csv(warehouse, _CHOSEN, output, keys)
            case "parquet":
                exports.write_parquet(warehouse, _CHOSEN, output, keys)
            case "m3u8":
                path_of = Library(library_roots()).path_of
                exports.write_playlist(warehouse, _CHOSEN, output, path_of, keys)
        return output.read_bytes()
