"""Takes the README's pictures from the real UI: `make screenshots`."""

import os
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from audio_assets.cli.endings import ExitCode
from audio_assets.cli.sample_library import make_sample_library
from tests.browser.conftest import find_chromium, launch
from tests.conftest import PROJECT, make_home
from tests.dagster_dev import Deployment, running

IMAGES = PROJECT / "docs" / "images"


def main() -> None:
    expect.set_options(timeout=60_000)
    with tempfile.TemporaryDirectory() as directory:
        home = make_home(Path(directory))
        library = home.path / "sample_library"
        tracks = make_sample_library(library)
        assert home.cli("analyze", str(library)).returncode == ExitCode.SOME_FILES_FAILED
        with (
            running(home, library, Path(directory) / "dagster_dev.log") as deployment,
            sync_playwright() as driver,
        ):
            executable = find_chromium()
            assert executable, "no browser: install chromium, or name one in CHROMIUM"
            browser = launch(driver, executable)
            page = browser.new_page(
                base_url=deployment.url, viewport={"width": 1280, "height": 800}, locale="en-GB"
            )
            page.set_default_timeout(60_000)
            faulty = [tracks[-1].path]  # the text file
            take_pictures(page, deployment, [os.fspath(p.relative_to(library)) for p in faulty])
            browser.close()


def take_pictures(page: Page, deployment: Deployment, faulty: list[str]) -> None:
    page.goto("/locations/audio_assets/asset-groups/features/lineage")
    expect(page.get_by_text("% filled").first).to_be_visible()
    save(page, "assets")

    page.goto("/assets/features/musicnn?view=partitions")
    expect(page.get_by_text(f"Failed ({len(faulty)})")).to_be_visible()
    page.locator("[data-tooltip]").filter(has=page.get_by_title("sample_library")).first.click()
    expect(page.get_by_alt_text("musicnn")).to_be_visible()
    save(page, "partitions")

    page.goto("/assets/features/chroma?view=checks")
    expect(page.get_by_role("link", name=deployment.key(faulty[0]))).to_be_visible()
    save(page, "failed")


def save(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=IMAGES / f"{name}.png", animations="disabled")


if __name__ == "__main__":
    main()
