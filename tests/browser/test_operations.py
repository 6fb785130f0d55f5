"""The operations page in a real browser."""

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect

from tests.conftest import make_home, serving
from tests.monitoring.test_service import landing
from tests.warehouse.rows import START, attempt

pytestmark = pytest.mark.timeout(600)

NAME = "music/<img src=x onerror=alert(1)>\x1b[31m.mp3"
MESSAGE = "<svg onload=alert(2)> " + "x" * 2**20


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One session of a browser; a script that a page managed to run fails the test."""
    dialogs: list[str] = []
    context = browser.new_context(viewport={"width": 1400, "height": 2000}, locale="en-GB")
    context.set_default_timeout(60_000)
    context.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    yield context
    context.close()
    assert not dialogs


def test_page_says_what_goes_on_and_what_it_does_not_know(
    context: BrowserContext, tmp_path: Path
) -> None:
    page, requested = context.new_page(), set()
    page.on("request", lambda request: requested.add(request.url.split("/")[2]))

    with serving(make_home(tmp_path / "empty")) as url:
        page.goto(url)
        expect(page.get_by_text("Nothing was landed yet")).to_have_count(1)
        expect(page.get_by_text("No worker has a task.")).to_be_visible()
        expect(page.get_by_text("Traceback")).to_have_count(0)
        hosts = {url.removeprefix("http://")}

    home = make_home(tmp_path / "broken")
    home.warehouse.write_bytes(b"of another program")
    locked = sqlite3.connect(home.path / "robustness.db", isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    at = (datetime.now(UTC) - START).total_seconds() - 60
    failed = attempt(NAME, "key", "failed", at=at, message=MESSAGE)
    landing(home).append("robustness/attempts", [attempt("good", at=at), failed])
    with serving(home) as url:
        page.goto(url)
        row = page.get_by_role("row").filter(has_text=r"<img src=x onerror=alert(1)>\x1b[31m.mp3")
        expect(row.first).to_contain_text("<svg onload=alert(2)>")
        expect(page.get_by_text("The database cannot be read").first).to_be_visible()
        expect(page.get_by_text("The state store cannot be used").first).to_be_visible()
        assert len(page.content()) < 2**20
        landing(home).append("robustness/attempts", [attempt("new", "mfcc", "failed", at=at + 30)])
        expect(page.get_by_role("row").filter(has_text="new").first).to_be_visible()
        expect(page.get_by_text("Traceback")).to_have_count(0)
        hosts.add(url.removeprefix("http://"))
    assert requested <= hosts | {""}
