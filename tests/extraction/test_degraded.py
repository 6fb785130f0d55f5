"""Rows that may differ from the best ones: they say so, and are made good where they can be."""

from datetime import timedelta
from pathlib import Path

import pytest

from audio_assets.extraction import results
from audio_assets.extraction.cells import CellStatus
from audio_assets.features.base import FeatureSet, Row
from robustness.settings import get_settings
from tests import faults
from tests.conftest import write_tone
from tests.extraction.test_engine import all_attempts, engine, latest, library

__all__ = ["library"]

pytestmark = pytest.mark.usefixtures("own_state")


@pytest.fixture(autouse=True)
def due_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "SHORTEST_RETRY", timedelta(0))
    monkeypatch.setattr(results, "LONGEST_RETRY", timedelta(0))


def rows_of(tmp_path: Path, feature_set: FeatureSet) -> dict[str, Row]:
    return {row["file_key"].removeprefix("music/"): row for row in latest(tmp_path, feature_set)}


def analyse(root: Path, tmp_path: Path, feature_set: FeatureSet) -> set[CellStatus]:
    keys = [f"music/{path.name}" for path in sorted(root.iterdir())]
    with engine(root, tmp_path, feature_set) as shared:
        shared.begin([feature_set], keys)
        return {outcome.status for outcome in shared.drive(feature_set.name, hold_s=200.0)}


def attempts_of(file_key: str, tmp_path: Path, feature_set: FeatureSet) -> list[Row]:
    rows = all_attempts(tmp_path, feature_set)
    return [row for row in rows if row["file_key"] == file_key and row["attempt"]]


def test_partial_audio_is_final(library: Path, tmp_path: Path) -> None:
    write_tone(library / "cut.wav", 440.0, seconds=8.0)
    content = (library / "cut.wav").read_bytes()
    (library / "cut.wav").write_bytes(content[: len(content) // 2])
    plain = faults.feature_set("plain", faults.sound)
    analyse(library, tmp_path, plain)
    rows = rows_of(tmp_path, plain)
    cut = rows["cut.wav"]
    assert cut["complete_share"] == pytest.approx(0.5, abs=0.01)
    assert cut["degraded"] == "analysed in part: breaks off after 4.0 s of the 8.0 s that it states"
    assert cut["degraded_since"] is not None
    assert cut["retry_after"] is None
    whole = rows["a.wav"]
    assert whole["complete_share"] == 1.0
    assert (whole["degraded"], whole["degraded_since"], whole["retry_after"]) == (None,) * 3


def test_what_a_passing_fault_degraded_is_made_good(library: Path, tmp_path: Path) -> None:
    plain = faults.feature_set("plain", faults.in_burst)
    (tmp_path / "traces").mkdir()
    burst = tmp_path / "traces" / "burst"
    burst.touch()
    analyse(library, tmp_path, plain)
    during = rows_of(tmp_path, plain)
    assert {row["extractor"] for row in during.values()} == {"alternative"}
    assert {row["degraded"] for row in during.values()} == {
        "primary failed: the library is in a bad mood"
    }
    assert all(row["retry_after"] for row in during.values())

    burst.unlink()
    analyse(library, tmp_path, plain)
    after = rows_of(tmp_path, plain)
    assert {row["extractor"] for row in after.values()} == {"primary"}
    assert not any(row["degraded"] or row["retry_after"] for row in after.values())
    assert analyse(library, tmp_path, plain) == {CellStatus.REUSED}


def test_what_the_file_degraded_is_final(library: Path, tmp_path: Path) -> None:
    crashing = faults.feature_set("plain", faults.segfault)
    analyse(library, tmp_path, crashing)
    bad = rows_of(tmp_path, crashing)["bad.wav"]
    assert bad["extractor"] == "alternative"
    if bad["retry_after"]:  # it was the first one: no other file had succeeded yet
        analyse(library, tmp_path, crashing)
        bad = rows_of(tmp_path, crashing)["bad.wav"]
    assert bad["degraded"]
    assert bad["retry_after"] is None


def test_a_degraded_row_stays_if_it_cannot_be_made_good(library: Path, tmp_path: Path) -> None:
    plain = faults.feature_set("plain", faults.in_burst, faults.in_burst_too)
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "burst").touch()
    analyse(library, tmp_path, plain)
    before = rows_of(tmp_path, plain)
    (tmp_path / "traces" / "burst of both").touch()
    with engine(library, tmp_path, plain) as shared:
        shared.begin([plain], [f"music/{name}" for name in before])
        outcomes = list(shared.drive("plain", hold_s=200.0))
        assert {outcome.status for outcome in outcomes} == {CellStatus.REUSED}
        assert shared.retry is not None
        assert shared.retry[1] == ["plain"]
    after = rows_of(tmp_path, plain)
    for name, row in before.items():
        assert after[name]["value"] == row["value"]
        assert after[name]["computed_at"] == row["computed_at"]
        assert after[name]["degraded_since"] == row["degraded_since"]
        assert after[name]["retry_after"] > row["retry_after"]


def test_what_hangs_is_tried_again_with_more_time_and_only_then(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = faults.feature_set("plain", faults.hang, faults.hang)
    monkeypatch.setenv("TIMEOUT_BASE_DELAY", "1")

    def tries(longest: str) -> int:
        """Return how often the bad file is tried in a run with that longest timeout (s)."""
        monkeypatch.setenv("TIMEOUT_MAX_DELAY", longest)
        get_settings.cache_clear()
        before = len(attempts_of("music/bad.wav", tmp_path, hanging))
        analyse(library, tmp_path, hanging)
        return len(attempts_of("music/bad.wav", tmp_path, hanging)) - before

    assert tries("5") > 0
    assert tries("5") == 0
    assert tries("4") == 0
    assert tries("5.5") > 0
    assert tries("5.5") == 0
