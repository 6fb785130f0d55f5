"""The route that serves audio: no path of a request, and nothing out of the library."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

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


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=[Route("/audio/{content_hash}", audio)]))


def test_a_file_of_the_inventory_is_served(library: Path, client: TestClient) -> None:
    whole = client.get("/audio/good")
    assert (whole.status_code, whole.content) == (200, SOUND)
    assert whole.headers["content-type"] == "audio/mpeg"
    assert whole.headers["accept-ranges"] == "bytes"
    part = client.get("/audio/good", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, SOUND[100:200])
    assert client.get("/audio/good", headers={"Range": "bytes=99999-"}).status_code == 416


def test_no_file_is_shown_as_a_page(library: Path, client: TestClient) -> None:
    headers = client.get("/audio/page").headers
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
def test_nothing_else_is(library: Path, client: TestClient, asked: str) -> None:
    assert client.get(f"/audio/{asked}").status_code == 404


def test_a_link_within_the_root_and_a_copy_are_served(library: Path, client: TestClient) -> None:
    (library / "link.mp3").unlink()
    (library / "link.mp3").symlink_to("good.mp3")
    assert client.get("/audio/link").content == SOUND
    (library.parent / "warehouse.duckdb").write_bytes(b"damaged" * 1000)
    assert client.get("/audio/good").status_code == 503
