"""Rows on their way to the landing."""

from pathlib import Path

import pytest

from audio_assets.extraction.cells import CellOutcome, CellStatus
from audio_assets.extraction.outbox import Outbox
from robustness.smart_retry import get_retry_manager
from tests.warehouse.rows import attempt, landing_of


@pytest.mark.usefixtures("own_state")
def test_saved_rows_are_no_retries_to_learn_from(tmp_path: Path) -> None:
    outbox = Outbox(landing_of(tmp_path))
    outbox.add("robustness/attempts", attempt("a"))
    assert list(outbox.flush()) == []
    assert outbox.error is None
    assert list((tmp_path / "landing").rglob("*.parquet"))
    assert get_retry_manager().get_retry_stats() == {}


def test_outcomes_may_come_and_go_while_one_is_reported(tmp_path: Path) -> None:
    outbox = Outbox(landing_of(tmp_path))
    for key in ("a", "b", "c"):
        outbox.report(CellOutcome(key, "rhythm", CellStatus.FAILED))
    reports = outbox.flush()
    assert next(reports).file_key == "a"
    outbox.withdraw("a")  # the file was replaced just after it was reported
    outbox.withdraw("b")
    outbox.report(CellOutcome("a", "rhythm", CellStatus.FAILED))
    assert [outcome.file_key for outcome in reports] == ["c"]
    assert [outcome.file_key for outcome in outbox.flush()] == ["a"]
    assert outbox.is_empty
