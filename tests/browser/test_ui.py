"""What people do in Dagster's UI, done in a real browser."""

import re
import urllib.parse

import duckdb
import numpy as np
import psutil
import pytest
import soundfile
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.conftest import FAULTY, SAMPLE_RATE, SOUND, TITLE, clicks
from tests.dagster_dev import PATIENCE_S, Deployment, wait_until

pytestmark = pytest.mark.timeout(600)

LONG_S = 1800
"""Duration of a file whose rhythm takes longer than a test would wait (s)."""

PATIENCE_MS = PATIENCE_S * 1000
LAUNCHED = ("chroma", "metadata")


@pytest.fixture(scope="module")
def backfilled(browser: Browser, deployment: Deployment) -> Deployment:
    """The deployment after a backfill of two feature sets, launched by clicking."""
    page = browser.new_page(base_url=deployment.url)
    open_graph(page)
    first, *others = LAUNCHED
    page.get_by_role("button", name=first).first.click()
    for name in others:
        page.get_by_role("button", name=name).first.click(modifiers=["Shift"])
    page.get_by_role("button", name="Materialize selected").click()
    dialog = dialog_of(page)
    dialog.get_by_role("button", name="All", exact=True).click()
    launch(page, dialog, "Launch backfill")
    page.goto("/runs")
    expect(page.get_by_text("5 partitions")).to_be_visible(timeout=PATIENCE_MS)
    expect(page.get_by_text("Failure", exact=True)).to_be_visible(timeout=PATIENCE_MS)
    page.close()
    return deployment


def open_graph(page: Page) -> None:
    """Open the asset graph and unfold the feature sets in the list beside it."""
    page.goto("/asset-groups")
    group = page.get_by_role("button", name="asset_group features")
    group.locator("xpath=preceding::*[@role='button' or self::button][1]").click()


def launch(page: Page, dialog: Locator, button: str) -> None:
    """Press a dialog's button; what the dialog still loads would move it away from a click."""
    page.wait_for_load_state("networkidle")
    dialog.get_by_role("button", name=button).press("Enter")
    expect(dialog).to_be_hidden()


def dialog_of(page: Page) -> Locator:
    """Return the open dialog; menus and selections that pop up from it have its role too."""
    return page.locator("[role=dialog]:not(.dagster-popover)")


def open_partitions(page: Page, feature_set: str, file_key: str | None = None) -> None:
    chosen = "" if file_key is None else f"&partition={urllib.parse.quote(file_key, safe='')}"
    page.goto(f"/assets/features/{feature_set}?view=partitions{chosen}")


def partition(page: Page, key: str) -> Locator:
    return page.locator("[data-tooltip]").filter(has=page.get_by_title(key, exact=True)).first


def state_of(page: Page, key: str) -> str:
    """Return the colour of a partition's dot in the list."""
    dot = partition(page, key).locator("xpath=following-sibling::div").first
    style = dot.get_attribute("style") or ""
    found = re.search(r"--color-accent-(\w+)", style)
    assert found, style
    return found[1]


def test_graph_shows_every_feature_set(page: Page) -> None:
    from audio_assets.features import FEATURE_SETS

    open_graph(page)
    for name in FEATURE_SETS:
        expect(page.get_by_role("button", name=name).first).to_be_visible()


@pytest.mark.parametrize("feature_set", LAUNCHED)
def test_backfill_shows_the_bad_files_red_and_the_others_green(
    page: Page, backfilled: Deployment, feature_set: str
) -> None:
    open_partitions(page, feature_set)
    expect(page.get_by_text(f"Failed ({len(FAULTY)})")).to_be_visible()
    expect(page.get_by_text(f"Materialized ({len(SOUND)})")).to_be_visible()
    for names, colour in ((SOUND, "green"), (FAULTY, "red")):
        for name in names:
            assert state_of(page, backfilled.key(name)) == colour


def test_two_clicks_from_the_catalog_say_why_a_file_failed(
    page: Page, backfilled: Deployment
) -> None:
    page.goto("/assets")
    page.get_by_role("link", name=re.compile("features.*chroma")).click()
    page.get_by_role("tab", name="Checks").click()
    for name in FAULTY:
        expect(page.get_by_role("link", name=backfilled.key(name), exact=True)).to_be_visible()
    expect(page.get_by_text("the file is text").first).to_be_visible()


def test_failed_partition_says_what_to_do_and_leads_to_the_retry(
    page: Page, backfilled: Deployment
) -> None:
    key = backfilled.key("text.mp3")
    page.goto("/assets/features/chroma?view=checks")
    page.get_by_role("link", name=key, exact=True).click()
    for text in ("the file is text", "unsupported_format", "low", "quarantine release"):
        expect(page.get_by_text(text).first).to_be_visible()
    for label in ("reason", "error_type", "severity", "what_to_do", "recoveries", "attempts"):
        expect(page.get_by_role("cell", name=label, exact=True).first).to_be_visible()
    link = page.get_by_role("link", name="/guess/retry_failed").first.get_attribute("href")
    assert link
    page.goto(link)
    expect(page.get_by_text(f"partition: {key}")).to_be_visible()
    expect(page.get_by_text("audio_assets/retry_quarantined: true")).to_be_visible()
    expect(page.get_by_role("button", name="Launch Run")).to_be_enabled()


def test_list_of_runs_tells_failed_files_from_failed_runs(
    page: Page, backfilled: Deployment
) -> None:
    page.goto("/runs")
    page.get_by_text("Show runs within backfills").click()
    tag = page.get_by_text("audio_assets/result: bad_files").first
    expect(tag).to_be_visible()
    run = tag.locator("xpath=ancestor::*[.//a[normalize-space()='View']][1]")
    run.get_by_role("link", name="View", exact=True).click()
    expect(page.get_by_text(re.compile("text.mp3: holds no audio")).first).to_be_visible()
    expect(page.get_by_text("Stack Trace")).to_have_count(0)


def test_names_and_tags_are_inert(page: Page, backfilled: Deployment) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    for name in (*SOUND, *FAULTY):
        key = backfilled.key(name)
        open_partitions(page, "metadata", key)
        expect(page.get_by_title(key, exact=True)).to_have_count(2)  # in the list, as the heading
        page.get_by_role("button", name="View all historical events").click()
        dialog = dialog_of(page)
        dialog.get_by_role("cell", name=key).click()
        expect(dialog.get_by_role("cell", name="attempts", exact=True).first).to_be_visible()
    # The step's failure in the run's log names the files.
    open_partitions(page, "metadata", backfilled.key(FAULTY[0]))
    page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    for name in FAULTY:
        expect(page.get_by_text(backfilled.key(name)).first).to_be_visible()
    assert all(url.startswith((backfilled.url, "data:", "blob:")) for url in requested)

    assert backfilled.home.cli("publish").returncode == 0
    with duckdb.connect(str(backfilled.home.warehouse), read_only=True) as connection:
        titles = dict(
            connection.execute("SELECT file_key, title FROM features.metadata").fetchall()
        )
    assert titles == {backfilled.key(name): TITLE if name == SOUND[2] else None for name in SOUND}


@pytest.mark.parametrize(
    ("name", "at_first"), [("nightly", False), ("publish_after_canceled", True)]
)
def test_switch_turns_automation_on_and_off(
    page: Page, deployment: Deployment, name: str, at_first: bool
) -> None:
    row = page.locator("[data-index]").filter(has=page.get_by_role("link", name=name))
    # The first box selects the row; the second comes when the state is known.
    boxes, knob = row.get_by_role("checkbox"), row.locator("label").nth(1)

    def state() -> bool:
        page.goto("/automation")
        expect(boxes).to_have_count(2)
        expect(boxes.nth(1)).to_be_enabled()
        return boxes.nth(1).is_checked()

    assert state() == at_first
    for on in (not at_first, at_first):
        for _ in range(3):  # Dagster's daemon may end a tick at that moment and write over it
            knob.click()
            expect(boxes.nth(1)).to_be_checked(checked=on)
            expect(boxes.nth(1)).to_be_enabled()
            if (found := state()) == on:
                break
        assert found == on


def test_terminated_run_leaves_no_worker(page: Page, deployment: Deployment) -> None:
    name = "long.flac"
    soundfile.write(deployment.library / name, np.tile(clicks(10), LONG_S // 10), SAMPLE_RATE)
    assert deployment.home.cli("scan").returncode == 0

    page.goto("/assets/features/rhythm")
    page.get_by_role("button", name="Materialize").first.click()
    dialog = dialog_of(page)
    dialog.get_by_text("Select a partition").click()
    page.get_by_title(deployment.key(name)).click()
    page.keyboard.press("Escape")
    launch(page, dialog, "Launch 1 run")

    # The file is decoded: a worker is at its rhythm.
    scratch = deployment.home.path / "scratch"
    wait_until(lambda: list(scratch.rglob("*.npy")), "decoding")
    family = run_processes(deployment)
    assert len(family) > 1

    page.goto("/runs")
    page.get_by_role("link", name="View", exact=True).first.click()
    page.get_by_role("button", name="Terminate").click()
    dialog.get_by_role("button", name="Terminate 1 run").click()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    page.goto("/runs")
    expect(page.get_by_text("Canceled").first).to_be_visible(timeout=PATIENCE_MS)


def run_processes(deployment: Deployment) -> list[psutil.Process]:
    """Return the processes of the run that goes on: its own and all below it."""
    found = []
    for process in deployment.process.children(recursive=True):
        try:
            if any("spawn_main" in argument for argument in process.cmdline()):
                found += [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return found
