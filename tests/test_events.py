"""What Dagster is told of a cell."""

import shlex

import dagster as dg
import pytest

from audio_assets.events import failure, materialization, observation
from audio_assets.extraction.cells import CellOutcome, CellStatus
from audio_assets.features import get_feature_set
from robustness.error_classifier import ErrorClassifier, ErrorType

KEY = dg.AssetKey(["features", "musicnn"])
FILE = "music/it's <b>bold</b>; rm -rf.mp3"


def failed(error: Exception | None = None) -> CellOutcome:
    attempts = (
        {"attempt": 1, "outcome": "failed", "recovery_strategy": "increase_timeout"},
        {"attempt": 2, "outcome": "failed", "timeout_s": 7.123456, "message": "![x](http://x)"},
    )
    return CellOutcome(
        FILE,
        "musicnn",
        CellStatus.FAILED,
        error=ErrorClassifier().classify_error(error or TimeoutError("too slow"), {}),
        history=attempts,
        recoveries=("increase_timeout",),
    )


def test_failed_cell_tells_reason_attempts_and_remedy() -> None:
    event = observation(KEY, failed())
    assert event.partition == FILE
    assert event.metadata["error_type"].value == "timeout"
    assert event.metadata["reason"].value == "too slow"
    assert event.metadata["recoveries"].value == "increase_timeout"
    table = event.metadata["attempts"]
    assert isinstance(table, dg.TableMetadataValue)
    first, second = (record.data for record in table.records)
    assert first["recovery_strategy"] == "increase_timeout"
    assert (second["timeout_s"], second["message"]) == (7.12, "![x](http://x)")


@pytest.mark.parametrize("error_type", ErrorType)
def test_remedy_can_be_typed_whatever_the_name(error_type: ErrorType) -> None:
    error = RuntimeError("no")
    error.error_type = error_type  # type: ignore[attr-defined]
    remedy = observation(KEY, failed(error)).metadata["what_to_do"].value
    assert isinstance(remedy, str)
    command = remedy[remedy.index("audio-assets quarantine") :].split(", then")[0]
    assert shlex.split(command) == ["audio-assets", "quarantine", "release", FILE]


def test_failed_step_names_files_but_not_all_of_many() -> None:
    told = failure([failed()] * 7, 20)
    assert told.description is not None
    assert told.description.startswith("7 of 20 files failed")
    assert told.description.count(FILE) == 5
    assert told.description.endswith("and 2 more")
    table = told.metadata["failed_files"]
    assert isinstance(table, dg.TableMetadataValue)
    assert len(table.records) == 7


def test_finished_cell_shows_its_numbers_and_a_picture() -> None:
    row = {
        "msd_tags": {"rock": 0.5, "jazz": 0.1},
        "top_tags": ["rock", "jazz"],
        "top_tag": "rock",
        "patches": 3,
        **dict.fromkeys(("content_hash", "code_version", "extractor"), "x"),
    }
    done = CellOutcome(FILE, "musicnn", CellStatus.MATERIALIZED, row=row, audio_s=9.0)
    event = materialization(KEY, get_feature_set("musicnn"), done)
    assert event.metadata["top_tag"].value == "rock"
    assert event.metadata["patches"].value == 3
    picture = event.metadata["picture"]
    assert isinstance(picture, dg.MarkdownMetadataValue)
    assert picture.value is not None
    assert "jazz" in picture.value
