"""A browser that looks at what `make dev` runs."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import mutagen
import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, Dialog, Page, Playwright, expect, sync_playwright

from tests.conftest import make_home
from tests.dagster_dev import Deployment, running

SAMPLE_RATE = 22050

SOUND = (
    "good.wav",
    "<img src=x onerror=alert(1)>.wav",
    "o'clock \"; DROP TABLE x; -- %_ ночь.flac",
)
FAULTY = ("text.mp3", "<svg onload=alert(2)> [x](javascript:alert(3)) `|`.mp3")
TITLE = "<img src=x onerror=alert(4)>'; DROP TABLE y; --"


def clicks(seconds: float, seed: int = 0) -> np.ndarray:
    """Return a tone with two noise bursts per second."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(seed).normal(size=len(t))
    return 0.2 * np.sin(2 * np.pi * 440 * t) + 0.1 * noise * (t % 0.5 < 0.05)


def make_library(directory: Path) -> None:
    directory.mkdir()
    for seed, name in enumerate(SOUND):
        soundfile.write(directory / name, clicks(5, seed), SAMPLE_RATE)
    tagged = mutagen.File(directory / SOUND[2])
    tagged["title"] = TITLE
    tagged.save()
    for seed, name in enumerate(FAULTY):
        (directory / name).write_text(f"{seed} this is no music\n" * 100, "utf-8")


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("browser")
    home = make_home(directory)
    library = directory / "library"
    make_library(library)
    done = home.cli("scan", str(library))
    assert done.returncode == 0, done.stdout + done.stderr
    with running(home, library, directory / "dagster_dev.log") as deployment:
        yield deployment


@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    """Drive browsers; its event loop runs until this ends, which other tests could not bear."""
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="package")
def browser(playwright: Playwright) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no browser: install chromium, or name one in CHROMIUM")
    expect.set_options(timeout=60_000)
    browser = launch(playwright, executable)
    yield browser
    browser.close()


def find_chromium() -> str | None:
    """Return the system's Chromium: `CHROMIUM`, or the one on the path."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium")


def launch(driver: Playwright, executable: str) -> Browser:
    return driver.chromium.launch(
        executable_path=executable,
        args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
    )


@pytest.fixture
def page(browser: Browser, deployment: Deployment) -> Iterator[Page]:
    """A page of the UI; a script that anything on it managed to run fails the test."""
    dialogs: list[str] = []

    def note(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    context = browser.new_context(
        base_url=deployment.url, viewport={"width": 1400, "height": 1000}, locale="en-GB"
    )
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.on("dialog", note)
    yield page
    context.close()
    assert not dialogs
