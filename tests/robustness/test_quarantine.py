import time
from types import SimpleNamespace

import pytest

from robustness.quarantine import Quarantine
from robustness.state import StateStore
from tests.robustness.shared_state import run_in_processes


@pytest.fixture
def quarantine(url: str) -> Quarantine:
    return Quarantine(StateStore(url))


def add(
    quarantine: Quarantine, content_hash: str, feature_set: str, file_key: str = "a.mp3"
) -> None:
    quarantine.add(
        content_hash,
        feature_set,
        file_key=file_key,
        error_type="corrupt_file",
        reason="breaks off after 3 s of 200 s",
        attempts=2,
    )


def test_cell_is_known_by_its_content(quarantine: Quarantine) -> None:
    before = time.time()
    add(quarantine, "h1", "key")
    cell = quarantine.check("h1", "key")
    assert cell is not None
    assert cell.file_key == "a.mp3"
    assert cell.reason == "breaks off after 3 s of 200 s"
    assert cell.error_type == "corrupt_file"
    assert cell.attempts == 2
    assert before <= cell.first_failed_at == cell.last_failed_at <= time.time()
    assert quarantine.check("h1", "rhythm") is None
    assert quarantine.check("changed", "key") is None


def test_failing_again_keeps_the_first_time_and_adds_attempts(quarantine: Quarantine) -> None:
    add(quarantine, "h1", "key")
    first = quarantine.check("h1", "key")
    quarantine.add(
        "h1", "key", file_key="moved.mp3", error_type="unsupported_format", reason="no audio"
    )
    again = quarantine.check("h1", "key")
    assert first is not None
    assert again is not None
    assert again.first_failed_at == first.first_failed_at
    assert again.last_failed_at > first.last_failed_at
    assert again.attempts == 3
    assert (again.file_key, again.error_type, again.reason) == (
        "moved.mp3",
        "unsupported_format",
        "no audio",
    )


def test_many_contents_at_once(quarantine: Quarantine) -> None:
    add(quarantine, "h7", "key")
    add(quarantine, "h1200", "key")
    add(quarantine, "h8", "rhythm")
    found = quarantine.check_many({f"h{number}" for number in range(1500)}, "key")
    assert set(found) == {"h7", "h1200"}
    assert found["h7"].feature_set == "key"
    assert quarantine.check_many([], "key") == {}


@pytest.mark.parametrize(
    ("pattern", "feature_set", "released"),
    [
        ("h1", None, {("h1", "key"), ("h1", "rhythm")}),
        ("h1", "key", {("h1", "key")}),
        ("rock/*", None, {("h1", "key"), ("h1", "rhythm"), ("h2", "key")}),
        ("rock/[live] b.mp3", None, {("h2", "key")}),
        ("*.mp3", "mfcc", set()),
        ("*", None, {("h1", "key"), ("h1", "rhythm"), ("h2", "key"), ("h3", "key")}),
    ],
)
def test_release(
    quarantine: Quarantine,
    pattern: str,
    feature_set: str | None,
    released: set[tuple[str, str]],
) -> None:
    add(quarantine, "h1", "key", "rock/a.mp3")
    add(quarantine, "h1", "rhythm", "rock/a.mp3")
    add(quarantine, "h2", "key", "rock/[live] b.mp3")
    add(quarantine, "h3", "key", "jazz/c.mp3")
    cells = {(cell.content_hash, cell.feature_set) for cell in quarantine.list()}
    assert quarantine.release(pattern, feature_set) == len(released)
    assert {(c.content_hash, c.feature_set) for c in quarantine.list()} == cells - released


def test_processes_that_quarantine_one_cell_at_once(url: str) -> None:
    run_in_processes(6, lambda: add(Quarantine(StateStore(url)), "h1", "key"))
    cell = Quarantine(StateStore(url)).check("h1", "key")
    assert cell is not None
    assert cell.attempts == 12


def test_cell_is_barred_for_the_version_of_the_code_it_failed_with(
    quarantine: Quarantine,
) -> None:
    add(quarantine, "every version", "key")
    quarantine.add(
        "one version",
        "key",
        file_key="b.mp3",
        error_type="timeout",
        reason="hangs",
        code_version="1",
    )
    hashes = ["every version", "one version"]
    assert quarantine.check_many(hashes, "key", "1").keys() == set(hashes)
    assert quarantine.check_many(hashes, "key", "2").keys() == {"every version"}
    assert quarantine.check_many(hashes, "key").keys() == set(hashes)
    assert quarantine.check("one version", "key", "2") is None


def test_cell_is_tried_again_under_better_conditions_and_only_then(quarantine: Quarantine) -> None:
    quarantine.add(
        "h1",
        "key",
        file_key="a.mp3",
        error_type="timeout",
        reason="too slow",
        conditions={"timeout": 600.0, "essentia": "1"},
    )
    for worse in ({"timeout": 600.0, "essentia": "1"}, {"timeout": 300.0}, {"memory": 9e9}, None):
        assert quarantine.check("h1", "key", conditions=worse)
    for better in ({"timeout": 601.0, "essentia": "1"}, {"essentia": "2"}):
        assert quarantine.check("h1", "key", conditions=better) is None
    # What its content made fail stays.
    add(quarantine, "h2", "key")
    assert quarantine.check("h2", "key", conditions={"timeout": 1e9})


def test_parole_comes_after_growing_intervals(
    quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, day = time.time(), 86400.0
    now = [start]
    monkeypatch.setattr("robustness.quarantine.time", SimpleNamespace(time=lambda: now[0]))

    def fail() -> None:
        quarantine.add(
            "h1", "key", file_key="a", error_type="timeout", reason="slow", conditions={"av": "1"}
        )

    def is_held(days: float) -> bool:
        now[0] = start + days * day
        return quarantine.check("h1", "key", conditions={"av": "1"}) is not None

    add(quarantine, "h2", "key")
    fail()
    assert is_held(6.9)
    assert not is_held(7.1)
    fail()
    assert is_held(14.1)
    assert not is_held(14.3)
    fail()
    assert is_held(28.5)
    assert not is_held(28.7)
    assert quarantine.check("h1", "key")
    assert quarantine.check("h2", "key", conditions={"av": "1"})
    never = SimpleNamespace(parole_days=0.0)
    monkeypatch.setattr("robustness.quarantine.get_settings", lambda: never)
    assert is_held(1000)
