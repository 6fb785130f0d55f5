"""`audio-assets export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from audio_assets.cli.endings import ExitCode, UserError
from audio_assets.cli.printing import Raw, console
from audio_assets.cli.results import Sql, SqlFile, given_sql

TRACKS = "FROM features.tracks ORDER BY file_key"


class Format(StrEnum):
    """Formats of an export; all but JAMS are named by the ending of the file."""

    PARQUET = "parquet"
    CSV = "csv"
    M3U8 = "m3u8"
    JAMS = "jams"


def export(
    output: Annotated[
        Path,
        typer.Argument(
            help="The file to write, replaced if it exists; of JAMS, the directory for a file per "
            "track."
        ),
    ],
    sql: Sql = None,
    file: SqlFile = None,
    as_format: Annotated[
        Format | None,
        typer.Option("--format", help="Default: as the file's name ends.", show_default=False),
    ] = None,
    raw: Raw = False,
) -> None:
    """Write all tracks, or what SQL asks for, to files for other programs."""
    from audio_assets.library.roots import library_roots
    from audio_assets.library.scan import Library
    from audio_assets.settings import get_settings
    from audio_assets.warehouse import exports
    from audio_assets.warehouse.queries import QueryError

    warehouse = get_settings().warehouse
    question = TRACKS if sql is None and file is None else given_sql(sql, file)
    what, left_out = "rows", 0
    try:
        match as_format or _format_of(output):
            case Format.PARQUET:
                written = exports.write_parquet(warehouse, question, output)
            case Format.CSV:
                written = exports.write_csv(warehouse, question, output, raw=raw)
            case Format.M3U8:
                what, path_of = "tracks", Library(library_roots()).path_of
                written, left_out = exports.write_playlist(warehouse, question, output, path_of)
            case Format.JAMS:
                what = "tracks"
                written, left_out = exports.write_jams(warehouse, question, output)
    except (QueryError, ValueError) as error:
        raise UserError(str(error)) from None
    except OSError as error:
        reason = f"{output} cannot be written: {error.strerror or error}."
        raise UserError(reason, ExitCode.FAILED) from None
    console.print(f"{written} {what} are in {output}.", highlight=False)
    if left_out:
        console.print(
            f"{left_out} are left out: gone, or not analysed; features.missing says why.",
            style="yellow",
        )


def _format_of(output: Path) -> Format:
    try:
        return Format(output.suffix.removeprefix(".").lower())
    except ValueError:
        names = ", ".join(Format)
        raise UserError(f"{output}: its ending names no format; give --format ({names}).") from None
