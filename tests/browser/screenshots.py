"""Takes the documents' pictures from the real UI: `make screenshots`."""

import os
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from audio_assets.cli.endings import ExitCode
from audio_assets.cli.sample_library import make_sample_library
from tests.browser.conftest import find_chromium, launch
from tests.conftest import PROJECT, make_home, serving
from tests.dagster_dev import Deployment, running

IMAGES = PROJECT / "docs" / "images"


def main() -> None:
    expect.set_options(timeout=60_000)
    executable = find_chromium()
    assert executable, "no browser: install chromium, or name one in CHROMIUM"
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as driver:
        browser = launch(driver, executable)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, locale="en-GB")
        page.set_default_timeout(60_000)
        home = make_home(Path(directory))
        library = home.path / "sample_library"
        tracks = make_sample_library(library)
        with serving(home) as url, home.start("analyze", str(library)) as analysis:
            take_picture_of_work(page, url)
            analysis.communicate()
            assert analysis.returncode == ExitCode.SOME_FILES_FAILED
        with serving(home) as url:
            take_picture_of_library(page, url)
        with running(home, library, Path(directory) / "dagster_dev.log") as deployment:
            faulty = [tracks[-1].path]  # the text file
            take_pictures(page, deployment, [os.fspath(p.relative_to(library)) for p in faulty])
        browser.close()


def take_picture_of_work(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.get_by_role("cell", name="succeeded").nth(5)).to_be_visible(timeout=600_000)
    expect(page.get_by_role("cell", name="extract").first).to_be_visible()
    page.set_viewport_size({"width": 1280, "height": 1600})
    save(page, "operations")
    page.set_viewport_size({"width": 1280, "height": 800})


def take_picture_of_library(page: Page, url: str) -> None:
    page.set_viewport_size({"width": 1500, "height": 1150})
    page.goto(f"{url}/library/")
    page.get_by_label("Colour").select_option("artist")
    page.get_by_role("row").nth(1).get_by_role("checkbox").click()
    expect(page.get_by_role("tab", name="Neighbours")).to_be_visible()
    expect(page.locator("canvas").nth(1)).to_be_visible()
    save(page, "library")
    page.set_viewport_size({"width": 1280, "height": 800})


def take_pictures(page: Page, deployment: Deployment, faulty: list[str]) -> None:
    page.goto(f"{deployment.url}/locations/audio_assets/asset-groups/features/lineage")
    expect(page.get_by_text("% filled").first).to_be_visible()
    save(page, "assets")

    page.goto(f"{deployment.url}/assets/features/musicnn?view=partitions")
    expect(page.get_by_text(f"Failed ({len(faulty)})")).to_be_visible()
    page.locator("[data-tooltip]").filter(has=page.get_by_title("sample_library")).first.click()
    expect(page.get_by_alt_text("musicnn")).to_be_visible()
    save(page, "partitions")

    page.goto(f"{deployment.url}/assets/features/chroma?view=checks")
    expect(page.get_by_role("link", name=deployment.key(faulty[0]))).to_be_visible()
    save(page, "failed")


def save(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=IMAGES / f"{name}.png", animations="disabled")


if __name__ == "__main__":
    main()
