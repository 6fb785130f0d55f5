"""Feature sets that read what decoding found: they run last, whether it failed or not."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audio_assets.extraction.cells import CellOutcome, CellStatus
from audio_assets.extraction.engine import Engine
from audio_assets.extraction.scratch import Scratch
from audio_assets.features.base import Column, FeatureSet
from audio_assets.library.scan import Library
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import feature_table, warehouse_tables
from robustness.quarantine import Quarantine
from robustness.worker_pool import WorkerPool
from tests import faults
from tests.conftest import write_tone

pytestmark = pytest.mark.usefixtures("own_state")

SOUND = faults.feature_set("sound", faults.sound)
VERDICT = replace(
    faults.feature_set("verdict", faults.verdict),
    columns=(Column("verdict", "VARCHAR", "Codec, or the kind of the error"),),
    headline="verdict",
    plotted=(),
    reads="decoding",
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    directory = tmp_path / "music"
    directory.mkdir()
    write_tone(directory / "a.wav", 220.0)
    shutil.copy(directory / "a.wav", directory / "copy.wav")
    (directory / "noise.wav").write_text("not audio at all\n" * 100)
    return directory


@contextmanager
def engine(library: Path, tmp_path: Path) -> Iterator[Engine]:
    with (
        Scratch(tmp_path / "scratch", "run", 1024) as scratch,
        WorkerPool(
            2,
            preload=("audio_assets.extraction.worker", "pandas", "tests.faults"),
            memory_high=None,
        ) as pool,
    ):
        yield Engine("run", Library({"music": library}), landing(tmp_path), pool, scratch)


def landing(tmp_path: Path) -> Landing:
    return Landing(str(tmp_path / "landing"), warehouse_tables((SOUND, VERDICT)))


def run(library: Path, tmp_path: Path, *feature_sets: FeatureSet) -> list[CellOutcome]:
    with engine(library, tmp_path) as shared:
        shared.begin(feature_sets, [f"music/{path.name}" for path in sorted(library.iterdir())])
        outcomes = [o for each in feature_sets for o in shared.drive(each.name)]
        assert [path.name for path in (tmp_path / "scratch" / "run").iterdir()] == [".lock"]
    return outcomes


def verdicts(tmp_path: Path) -> dict[str, str]:
    rows = landing(tmp_path).latest(feature_table(VERDICT).landing_name)
    return {row["file_key"].removeprefix("music/"): row["verdict"] for row in rows}


def attempts(tmp_path: Path) -> list[dict[str, Any]]:
    return landing(tmp_path).latest("robustness/attempts")


def decoded(tmp_path: Path) -> list[tuple[str, str]]:
    """Return the cells whose attempts account for a successful decode."""
    rows = attempts(tmp_path)
    return sorted(
        (row["feature_set"], row["file_key"])
        for row in rows
        if row["decode_s"] and row["outcome"] == "succeeded"
    )


EXPECTED = {"a.wav": "pcm_s16le", "copy.wav": "pcm_s16le", "noise.wav": "unsupported_format"}


def test_it_gets_the_result_or_the_error_whatever_becomes_of_the_audio(
    library: Path, tmp_path: Path
) -> None:
    outcomes = run(library, tmp_path, SOUND, VERDICT)
    failed = {(o.feature_set, o.file_key) for o in outcomes if o.status is CellStatus.FAILED}
    assert failed == {("sound", "music/noise.wav")}
    assert verdicts(tmp_path) == EXPECTED
    made = {
        (row["feature_set"], row["file_key"], row["attempt"], row["outcome"])
        for row in attempts(tmp_path)
    }
    assert ("verdict", "music/noise.wav", 1, "succeeded") in made
    (quarantined,) = Quarantine().list()
    assert quarantined.feature_set == "sound"


def test_the_file_is_decoded_for_it_alone_if_need_be(library: Path, tmp_path: Path) -> None:
    run(library, tmp_path, VERDICT)
    assert verdicts(tmp_path) == EXPECTED
    assert decoded(tmp_path) == [("verdict", "music/a.wav"), ("verdict", "music/copy.wav")]
    run(library, tmp_path, SOUND, VERDICT)  # what is done is not decoded for again
    after = [feature_set for feature_set, _ in decoded(tmp_path)]
    assert after == ["sound", "verdict", "verdict"]
