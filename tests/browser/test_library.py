"""The library page in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.conftest import Home, make_home, serving, write_tone
from tests.pages.generated import generate

pytestmark = pytest.mark.timeout(600)

COUNT = 5000
SOUND_S = 3


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with no database yet, and the file of one track."""
    folder = tmp_path / "music" / "artist 1" / "2 album"
    folder.mkdir(parents=True)
    write_tone(folder / "07.mp3", 440, SOUND_S)
    home = make_home(tmp_path)
    return Home(home.path, {"AUDIO_LIBRARY": f"music={tmp_path / 'music'}"})


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page; a script that anything on it managed to run fails the test."""
    dialogs: list[str] = []
    context = browser.new_context(viewport={"width": 1400, "height": 1200}, locale="en-GB")
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    yield page
    context.close()
    assert not dialogs


def test_page_shows_plays_and_saves_tracks(page: Page, home: Home) -> None:
    requested: set[str] = set()
    page.on("request", lambda request: requested.add(request.url.split("/")[2]))
    with serving(home) as url:
        page.goto(f"{url}/operations/")
        page.get_by_role("link", name="Library").click()
        expect(page.get_by_text("There is no database")).to_be_visible()
        expect(page.get_by_role("link", name="Operations")).to_be_visible()

        generate(home.path, COUNT)
        page.reload()
        expect(page.get_by_text(f"{COUNT:,} tracks · version 1")).to_be_visible()
        expect(page.locator("canvas").first).to_be_visible()
        expect(page.get_by_role("link", name="Operations")).to_be_visible()
        expect(
            page.get_by_role("cell", name=r"<img src=x onerror=alert(1)>\x1b[31m")
        ).to_be_visible()
        assert len(page.content()) < 2**20

        page.get_by_placeholder("title, artist").fill("artist 1/2 album")
        expect(page.get_by_text("Tracks to save: 10", exact=True)).to_be_visible()
        row = page.get_by_role("row").filter(has_text="track 127")
        row.get_by_role("checkbox").click()
        expect(page.get_by_text("Tracks to save: 1", exact=True)).to_be_visible()

        audio = page.locator("audio")
        expect(audio).to_be_visible()
        assert page.url.endswith("track=music%2Fartist+1%2F2+album%2F07.mp3")
        page.wait_for_function("document.querySelector('audio').duration > 0")
        assert audio.evaluate("audio => audio.duration") == pytest.approx(SOUND_S, abs=0.2)
        expect(page.get_by_role("tab", name="Neighbours")).to_be_visible()

        with page.expect_download() as download:
            page.get_by_text("M3U8", exact=True).click()
        lines = Path(download.value.path()).read_text("utf-8").splitlines()
        assert lines[2:] == [f"{home.path.parent}/music/artist 1/2 album/07.mp3"]
        expect(page.get_by_text("Traceback")).to_have_count(0)
        assert requested <= {url.removeprefix("http://"), ""}
