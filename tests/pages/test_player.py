"""The route that serves audio: no path of a request, and nothing out of the library."""

import os
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from threading import Thread
from urllib.parse import quote

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from audio_assets import settings
from audio_assets.features import FEATURE_SETS
from audio_assets.library.file_keys import encode_key
from audio_assets.pages.player import audio
from tests.warehouse.rows import file, landing_of, publisher_of

SOUND = bytes(range(256)) * 100
FILES = ("good.mp3", "page.html", "gone.mp3", "link.mp3", "folder.mp3", "pipe.mp3", "left.mp3")
OUT_OF_THE_ROOT = "music/../secret.mp3"
OTHER_ROOT = "elsewhere/good.mp3"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    tmp_path = tmp_path_factory.mktemp("player")
    root = tmp_path / "music"
    (root / "folder.mp3").mkdir(parents=True)
    for path in (
        *(root / n for n in ("good.mp3", "page.html", "left.mp3")),
        tmp_path / "secret.mp3",
    ):
        path.write_bytes(SOUND)
    (root / "link.mp3").symlink_to("../secret.mp3")
    os.mkfifo(root / "pipe.mp3")
    landing = landing_of(tmp_path, list(FEATURE_SETS.values()))
    keys = [encode_key("music", name.encode()) for name in FILES]
    landing.append(
        "library/files",
        [
            file(key, content_hash=Path(key).stem, gone=key.endswith("left.mp3"))
            for key in (*keys, OUT_OF_THE_ROOT)
        ]
        + [file(OTHER_ROOT, content_hash="other"), file("music/none", content_hash=None)],
    )
    publisher_of(tmp_path, list(FEATURE_SETS.values())).publish()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(tmp_path))
        patch.setenv("AUDIO_LIBRARY", f"music={root}")
        settings.get_settings.cache_clear()
        yield root
    settings.get_settings.cache_clear()


@pytest.fixture(scope="module")
def port(library: Path) -> Iterator[int]:
    app = Starlette(routes=[Route("/audio/{content_hash}", audio)])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def get(port: int, path: str, **headers: str) -> tuple[int, bytes, HTTPMessage]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def test_a_file_of_the_inventory_is_served(port: int) -> None:
    status, body, headers = get(port, "/audio/good")
    assert (status, body) == (200, SOUND)
    assert headers["content-type"] == "audio/mpeg"
    assert headers["accept-ranges"] == "bytes"
    assert get(port, "/audio/good", Range="bytes=100-199")[:2] == (206, SOUND[100:200])
    assert get(port, "/audio/good", Range="bytes=99999-")[0] == 416


def test_no_file_is_shown_as_a_page(port: int) -> None:
    headers = get(port, "/audio/page")[2]
    assert headers["content-type"] == "application/octet-stream"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "asked",
    [
        *("gone", "link", "folder", "pipe", "left", "secret", "other", "None", ""),
        *("good.mp3", "../secret.mp3", "..%2Fsecret.mp3", "%2Fetc%2Fpasswd", "good%00"),
        "' OR true --",
    ],
)
def test_nothing_else_is(port: int, asked: str) -> None:
    assert get(port, f"/audio/{quote(asked, safe='/.%')}")[0] == 404


def test_a_link_within_the_root_and_a_copy_are_served(library: Path, port: int) -> None:
    (library / "link.mp3").unlink()
    (library / "link.mp3").symlink_to("good.mp3")
    assert get(port, "/audio/link")[1] == SOUND
    (library.parent / "warehouse.duckdb").write_bytes(b"damaged" * 1000)
    assert get(port, "/audio/good")[0] == 503
