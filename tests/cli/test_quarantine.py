"""The quarantine from the command line: a record per file, and wrong names are refused."""

import json
import re

import pytest

from audio_assets.cli import quarantine
from audio_assets.cli.completion import feature_set_names
from audio_assets.cli.endings import ExitCode, UserError
from robustness.quarantine import Quarantine


@pytest.fixture(autouse=True)
def cells(own_state: None) -> None:
    for number, name in enumerate(feature_set_names("")):
        add("music/text.mp3", name, "the file is text", attempts=number == 0)
    for name in ("key", "rhythm"):
        add("music/odd.wav", name, "crashed")
    add("music/odd.wav", "loudness", "timed out")


def add(file_key: str, feature_set: str, reason: str, attempts: int = 2) -> None:
    Quarantine().add(
        file_key,
        feature_set,
        file_key=file_key,
        error_type="corrupt_file",
        reason=reason,
        attempts=attempts,
    )


def test_a_row_per_file_and_reason_and_for_programs_per_cell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quarantine.show()
    shown = [re.split("  +", line)[:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert shown == [
        ["music/odd.wav", "key, rhythm", "crashed", "4"],
        ["music/odd.wav", "loudness", "timed out", "2"],
        ["music/text.mp3", "all", "the file is text", "1"],
    ]
    quarantine.show(as_json=True)
    cells = json.loads(capsys.readouterr().out)
    assert [cell["feature set"] for cell in cells[:3]] == ["key", "loudness", "rhythm"]
    assert len(cells) == 3 + len(feature_set_names(""))


@pytest.mark.parametrize(
    ("pattern", "feature_set", "said"),
    [
        ("music/odd.wav", "key", "1 cell released."),
        ("music/odd*", None, "3 cells released."),
    ],
)
def test_release_says_how_many(
    pattern: str, feature_set: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quarantine.release(pattern, feature_set)
    assert capsys.readouterr().out == f"{said}\n"


@pytest.mark.parametrize(
    ("pattern", "feature_set", "said"),
    [
        ("odd", None, "'odd' matches no quarantined cell."),
        ("music/odd.wav", "mfcc", "'music/odd.wav' matches no quarantined cell of mfcc."),
        ("music/odd.wav", "rythm", "There is no feature set 'rythm'. Known feature sets: chroma"),
        ("\x1b[31m", None, r"'\x1b[31m' matches no quarantined cell."),
    ],
)
def test_release_refuses_what_matches_nothing(
    pattern: str, feature_set: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Quarantine().list()
    with pytest.raises(UserError) as refused:
        quarantine.release(pattern, feature_set)
    assert refused.value.exit_code == ExitCode.USAGE
    assert capsys.readouterr().out.startswith(said)
    assert Quarantine().list() == before
