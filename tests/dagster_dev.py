"""Dagster's webserver and daemon, as `make dev` runs them."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import PROJECT, Home

PATIENCE_S = 240.0
"""How long to wait for what needs a daemon's tick, a run or a page on a busy machine (s)."""


@dataclass(frozen=True)
class Deployment:
    """A running `dagster dev`, its home and its library."""

    url: str
    home: Home
    library: Path
    process: psutil.Process

    def key(self, file_name: str) -> str:
        """Return a file's partition key."""
        from audio_assets.library.file_keys import encode_key

        return encode_key(self.library.name, os.fsencode(file_name))


def wait_until(condition: Callable[[], object], what: str, timeout: float = PATIENCE_S) -> None:
    """Wait for what no element of a page shows."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.5)


@contextmanager
def running(home: Home, library: Path, log: Path) -> Iterator[Deployment]:
    """Run what `make dev` runs, at a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        dev = psutil.Popen(
            [
                *(sys.executable, "-m", "dagster", "dev"),
                *("--workspace", "workspace.yaml", "--host", "127.0.0.1", "--port", str(port)),
            ],
            env=home.environment({"AUDIO_ASSETS_WORKERS": "2"}),
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(f"{url}/server_info") or not dev.is_running(), "dagster dev")
        assert dev.is_running(), log.read_text()
        yield Deployment(url, home, library, dev)
    finally:
        stop(dev)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def stop(process: psutil.Popen) -> None:
    """Stop a process as Ctrl-C does, and whatever it leaves behind."""
    if not process.is_running():
        return
    family = [process, *process.children(recursive=True)]
    process.send_signal(2)
    _, alive = psutil.wait_procs(family, timeout=20)
    for left in alive:
        left.kill()
    psutil.wait_procs(alive, timeout=10)
