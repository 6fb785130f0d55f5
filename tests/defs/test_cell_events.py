"""The Dagster events of cells."""

import shlex
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import pytest
from markdown_it import MarkdownIt

from audio_assets.defs.cell_events import failure, materialization, observation
from audio_assets.extraction.cells import CellOutcome, CellStatus
from audio_assets.features import FEATURE_SETS
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


def test_failed_cell_has_reason_attempts_and_advice() -> None:
    event = observation(KEY, failed())
    assert event.partition == FILE
    assert event.metadata["error_type"].value == "timeout"
    assert event.metadata["reason"].value == "too slow"
    assert event.metadata["recoveries"].value == "increase_timeout"
    table = event.metadata["attempts"]
    assert isinstance(table, dg.TableMetadataValue)
    first, second = (record.data for record in table.records)
    assert first["recovery_strategy"] == "increase_timeout"
    assert (second["timeout_s"], second["message"]) == (7.123, "![x](http://x)")


def test_markup_in_a_message_is_shown_as_text() -> None:
    event = observation(KEY, failed(ValueError("![x](http://x) <img src=y> \x1b[31m `z`")))
    assert event.description is not None
    shown = MarkdownIt("commonmark").render(event.description)
    assert "<img" not in shown
    assert "failed: ![x](http://x) &lt;img src=y&gt; \\x1b[31m `z`" in shown
    reason = event.metadata["reason"].value
    assert reason == "![x](http://x) <img src=y> \\x1b[31m `z`"


@pytest.mark.parametrize("error_type", ErrorType)
def test_command_in_the_advice_quotes_the_file(error_type: ErrorType) -> None:
    error = RuntimeError("no")
    error.error_type = error_type  # type: ignore[attr-defined]
    advice = observation(KEY, failed(error)).metadata["what_to_do"].value
    assert isinstance(advice, str)
    command = advice[advice.index("audio-assets quarantine") :].split(", then")[0]
    assert shlex.split(command) == ["audio-assets", "quarantine", "release", FILE]
    assert "the job retry_failed" in advice


def test_link_opens_the_retry_job_for_the_file() -> None:
    link = observation(KEY, failed()).metadata["retry"].value
    address = urlsplit(str(link))
    assert address.path == "/guess/retry_failed/playground/setup"
    tag = {"tags[0][key]": ["dagster/partition"], "tags[0][value]": [FILE]}
    assert parse_qs(address.query) == tag


def test_failed_step_names_some_files_and_no_code() -> None:
    step = failure([failed()] * 7, 20)
    assert step.description is not None
    assert step.description.startswith("7 of 20 files failed")
    assert step.description.count(FILE) == 5
    assert step.description.endswith("and 2 more")
    assert not step.allow_retries


def test_computed_cell_has_values_and_a_picture() -> None:
    row = {
        "msd_tags": {"rock": 0.5, "jazz": 0.1},
        "top_tags": ["rock", "jazz"],
        "top_tag": "rock",
        "patches": 3,
        **dict.fromkeys(("content_hash", "code_version", "extractor", "degraded"), "x"),
    }
    done = CellOutcome(FILE, "musicnn", CellStatus.MATERIALIZED, row=row, audio_s=9.0)
    event = materialization(KEY, FEATURE_SETS["musicnn"], done)
    assert event.metadata["top_tag"].value == "rock"
    assert event.metadata["patches"].value == 3
    assert event.metadata["audio_s"].value == 9.0
    reused = replace(done, status=CellStatus.REUSED, audio_s=0.0)
    assert "audio_s" not in materialization(KEY, FEATURE_SETS["musicnn"], reused).metadata
    assert event.metadata["degraded"].value == "x"
    picture = event.metadata["picture"]
    assert isinstance(picture, dg.MarkdownMetadataValue)
    assert picture.value is not None
    assert "jazz" in picture.value
