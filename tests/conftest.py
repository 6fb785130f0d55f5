"""What tests of the whole product share: a project home of their own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent

# A shell's background jobs ignore SIGINT, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Home:
    """A Dagster home with nothing in it, and the command line working on it."""

    path: Path

    @property
    def warehouse(self) -> Path:
        return self.path / "warehouse.duckdb"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AUDIO_", "ROBUSTNESS_", "DAGSTER_"))
        }
        return kept | {"DAGSTER_HOME": str(self.path)} | dict(extra or {})

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


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Real recordings, where there are some."""
    directory = Path(os.environ.get("AUDIO_TEST_RECORDINGS", PROJECT.parent / "shared" / "audio"))
    if not directory.is_dir():
        pytest.skip(f"no recordings in {directory}")
    return directory
