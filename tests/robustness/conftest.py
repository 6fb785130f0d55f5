"""State stores of both kinds, for all tests of the robustness layer."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustness.state import StateStore
from tests.robustness.postgres import PostgresServer, find_programs, running_server


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """End what a test's breakers and stores would still do in the background.

    A later test that forks would copy the locks which such a thread holds at that moment.
    """
    yield
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()
            thread.join()
        elif thread.name == "robustness-state":
            thread.join(30)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server, where its programs are installed."""
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    with running_server(programs) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    with postgres.empty_database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'robustness.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def store() -> Iterator[StateStore]:
    """A state store in the memory of this process."""
    store = StateStore()
    yield store
    store.close()
