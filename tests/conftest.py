"""What tests of the whole product share: a project home of their own."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_assets import settings
from robustness import adaptive_timeout, circuit_breaker
from robustness.adaptive_timeout import get_timeout_manager
from robustness.error_classifier import get_error_classifier
from robustness.settings import get_settings
from robustness.smart_retry import get_retry_manager
from robustness.state import reset_state_store

PROJECT = Path(__file__).parent.parent

# A shell's background jobs ignore SIGINT, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Home:
    """A Dagster home with nothing in it, and the command line working on it.

    `variables` are set in the environment of what works on it.
    """

    path: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def warehouse(self) -> Path:
        return self.path / "warehouse.duckdb"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AUDIO_", "ROBUSTNESS_", "DAGSTER_"))
        }
        return kept | {"DAGSTER_HOME": str(self.path)} | {**self.variables, **(extra or {})}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line."""
        return subprocess.Popen(
            [sys.executable, "-m", "audio_assets", *arguments],
            env=self.environment({"COLUMNS": "200"}),
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line to its end."""
        with self.start(*arguments) as process:
            output, errors = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def make_home(directory: Path) -> Home:
    """Make a home with the project's own dagster.yaml."""
    home = directory / "dagster_home"
    home.mkdir(parents=True)
    shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", home)
    return Home(home)


@contextmanager
def serving(home: Home, *arguments: str, **variables: str) -> Iterator[str]:
    """Serve a home at a port of its own, and return the address."""
    home = Home(home.path, {**home.variables, **variables})
    with home.start("serve", "--port", "0", *arguments) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+:\d+", line)
        assert address, line + process.stdout.read()
        try:
            yield address[0]
        finally:
            process.terminate()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


def write_tone(path: Path, frequency: float, seconds: float = 1.0) -> None:
    """Write a sine tone, in the format that the extension names."""
    t = np.arange(int(44100 * seconds)) / 44100
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * frequency * t), 44100)


@pytest.fixture(scope="session")
def new_fork_server() -> None:
    """Have the next pool start a fork server with its own preload.

    There is one per process, and that of earlier tests has nothing of what extraction imports:
    each new worker would spend seconds of its deadline on that.
    """
    forkserver._forkserver._stop()


@pytest.fixture
def own_state(
    new_fork_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A robustness state of the test's own, short timeouts and a large retry budget."""
    monkeypatch.setenv("ROBUSTNESS_STATE_URL", f"sqlite:///{tmp_path / 'state.db'}")
    monkeypatch.setenv("ROBUSTNESS_TIMEOUT_FLOOR", "4")
    monkeypatch.setenv("ROBUSTNESS_RETRY_BUDGET_RATIO", "10")
    # The load of whatever runs beside the tests lengthens deadlines as well.
    monkeypatch.setattr(adaptive_timeout, "_load_per_core", lambda: 0.0)
    forget_state()
    yield
    monkeypatch.undo()
    forget_state()


def forget_state() -> None:
    """Make every manager of this process read its settings and state anew."""
    settings.get_settings.cache_clear()
    get_settings.cache_clear()
    for manager in (get_timeout_manager, get_error_classifier, get_retry_manager):
        manager.cache_clear()
    circuit_breaker._registry.clear()
    reset_state_store()


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Real recordings, where there are some."""
    directory = Path(os.environ.get("AUDIO_TEST_RECORDINGS", PROJECT.parent / "shared" / "audio"))
    if not directory.is_dir():
        pytest.skip(f"no recordings in {directory}")
    return directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of the whole product: they take minutes, and mostly wait."""
    whole = {PROJECT / "tests", PROJECT / "tests" / "browser", PROJECT / "tests" / "benchmarks"}
    items.sort(key=lambda item: item.path.parent not in whole)
