"""The audio that the library page plays: files of the inventory, and nothing else."""

import mimetypes
import os
from collections.abc import Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from audio_assets.library.file_keys import FileKeyError
from audio_assets.library.roots import library_roots
from audio_assets.library.scan import Library
from audio_assets.settings import get_settings
from audio_assets.warehouse.queries import QueryError, query

_FILES = "SELECT file_key FROM warehouse.library.files WHERE content_hash = ? AND NOT gone"


def audio(request: Request) -> Response:
    """Answer with the file of a content hash, or a part of it; Starlette calls it in a thread.

    The request names no path: a content of the inventory is looked up, and its file must really
    be below its library root.
    """
    try:
        path = next(_paths(request.path_params["content_hash"]), None)
    except (QueryError, ValueError) as error:
        return PlainTextResponse(f"{error}\n", 503)
    if path is None:
        return PlainTextResponse("no file of the library has this content now\n", 404)
    kind = mimetypes.guess_type(path.name)[0] or ""
    # A file is never shown as a page, whatever its name ends in.
    is_media = kind.startswith(("audio/", "video/"))
    return FileResponse(
        path,
        media_type=kind if is_media else "application/octet-stream",
        headers={"X-Content-Type-Options": "nosniff"},
    )


def _paths(content_hash: str) -> Iterator[Path]:
    """Yield the files with a content that are there, without symbolic links.

    Raises
    ------
    QueryError
        If the database cannot be read.
    ValueError
        If the library's roots are not valid.
    """
    found = query(get_settings().warehouse, _FILES, [content_hash]).rows
    roots = library_roots() if found else {}
    for (file_key,) in found if roots else ():
        try:
            path = Path(os.path.realpath(Library(roots).checked_path_of(file_key)))
        except FileKeyError:
            continue
        if path.is_file():
            yield path
