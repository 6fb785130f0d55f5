"""The landing in an object store: S3's protocol over HTTP, spoken by s3fs."""

import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
import requests
import s3fs
from moto.server import ThreadedMotoServer

from audio_assets.features import FEATURE_SETS
from audio_assets.warehouse.landing import Landing, LandingError
from audio_assets.warehouse.schema import warehouse_tables
from robustness.error_classifier import get_error_classifier
from tests.conftest import Home, write_tone
from tests.warehouse.rows import all_rows

TABLE = "features/rhythm"


class ObjectStore:
    """A store in this process that can go away and come back; what it holds stays."""

    def __init__(self) -> None:
        bucket = f"library-{uuid.uuid4()}"  # what a server holds, the next one in the process has
        self.landing = f"s3://{bucket}/landing"
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def go_away(self) -> None:
        self._server.stop()

    def come_back(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    store = ObjectStore()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(store.landing.removesuffix("/landing"))
    yield store
    store.go_away()
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def refused_credentials(store: ObjectStore) -> Iterator[None]:
    moto = f"http://127.0.0.1:{store.port}/moto-api/reset-auth"
    requests.post(moto, data="0", timeout=10)
    try:
        yield
    finally:
        requests.post(moto, data="inf", timeout=10)


def missing(home: Home) -> list[tuple[str, ...]]:
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        return connection.execute("FROM features.missing").fetchall()


def test_parts_are_read_and_compacted(store: ObjectStore) -> None:
    landing = Landing(store.landing, warehouse_tables(FEATURE_SETS.values()))
    assert landing.parts(TABLE) == []
    for number in range(20):
        landing.append(TABLE, [{"file_key": f"file {number:02}", "bpm": 120.0}])
    assert landing.compact(TABLE)
    assert len(landing.parts(TABLE)) < 20
    assert sorted(row["file_key"] for row in all_rows(landing, TABLE)) == [
        f"file {number:02}" for number in range(20)
    ]
    assert len(landing.latest(TABLE)) == 20


def test_a_landing_that_only_a_person_can_correct_is_named(store: ObjectStore) -> None:
    def refusal(url: str) -> str:
        landing = Landing(url, warehouse_tables(FEATURE_SETS.values()))
        with pytest.raises(LandingError) as refused:
            landing.append(TABLE, [{"file_key": "a", "bpm": 120.0}])
        assert not get_error_classifier().classify(refused.value).retryable
        return str(refused.value)

    assert "bucket does not exist; correct" in refusal("s3://no-such-bucket/landing")
    with refused_credentials(store):
        assert "Access Key Id" in refusal(store.landing)


def test_a_library_is_analysed_while_the_store_goes_away(
    store: ObjectStore, home: Home, tmp_path: Path
) -> None:
    home = replace(home, variables={"AUDIO_LANDING": store.landing})
    library = tmp_path / "music"
    library.mkdir()
    for number in range(6):
        write_tone(library / f"{number}.wav", 200 + 50 * number, seconds=10)
    run = home.start("analyze", str(library))
    while not s3fs.S3FileSystem().exists(f"{store.landing}/features/loudness"):
        assert run.poll() is None
        time.sleep(0.2)
    store.go_away()
    time.sleep(12)
    store.come_back()
    output, errors = run.communicate()
    assert run.returncode == 0, output + errors
    assert missing(home) == []
    done = home.cli("analyze", str(library))
    assert "Nothing to compute" in done.stdout, done.stdout + done.stderr


def fails_at_once(home: Home, library: Path) -> str:
    write_tone(library / "a.wav", 440)
    started = time.monotonic()
    done = home.cli("analyze", str(library))
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "cells" not in done.stdout  # no run was started
    return " ".join(done.stdout.split())


def test_a_bucket_that_does_not_exist_ends_the_command(
    store: ObjectStore, home: Home, tmp_path: Path
) -> None:
    home = replace(home, variables={"AUDIO_LANDING": "s3://no-such-bucket/landing"})
    assert "bucket does not exist: set AUDIO_LANDING" in fails_at_once(home, tmp_path)


def test_refused_credentials_end_the_command(
    store: ObjectStore, home: Home, tmp_path: Path
) -> None:
    home = replace(home, variables={"AUDIO_LANDING": store.landing})
    with refused_credentials(store):
        assert "set AUDIO_LANDING" in fails_at_once(home, tmp_path)


def test_a_store_that_is_away_is_named(store: ObjectStore, home: Home, tmp_path: Path) -> None:
    home = replace(home, variables={"AUDIO_LANDING": store.landing})
    write_tone(tmp_path / "a.wav", 440)
    store.go_away()
    done: subprocess.CompletedProcess[str] = home.cli("analyze", str(tmp_path))
    store.come_back()
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "127.0.0.1" in done.stdout
