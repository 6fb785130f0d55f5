"""Each benchmark's command works, on the tiniest library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tempo_calibration import confidence_scores
from tests.conftest import PROJECT


def command(module: str, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LIBRARY"}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults(results: Path) -> None:
    command("faults", "--quick", "--systems", "product", "--results", str(results))
    found = json.loads((results / "faults.json").read_text())["systems"]["product"]
    assert found["success_rate"] == 1
    assert set(found["faults_by_kind"]) == {"io_error", "flaky", "segfault"}
    assert found["worker_peak_mib"] > 0


@pytest.mark.slow
def test_damage(results: Path) -> None:
    command("damage", "--quick", "--results", str(results))
    systems = json.loads((results / "damage.json").read_text())["systems"]
    assert systems["product"]["cells_had"] == systems["product"]["cells_possible"]
    assert systems["essentia_loop"]["cells_had"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)  # runs of whole systems, one after the other
@pytest.mark.parametrize("part", ["compare", "samples", "orchestration", "layer"])
def test_speed(results: Path, part: str) -> None:
    if part == "layer":
        pytest.importorskip("pybreaker", reason="the dependency group bench is not installed")
    command("speed", "--quick", "--parts", part, "--results", str(results))
    found = json.loads((results / f"speed-{part}.json").read_text())
    if part == "compare":
        project = found["without_musicnn"]["project"]
        assert set(project["parts_cpu_s"]) >= {"decode", "metadata", "rhythm"}
        assert 0 < project["main_cpu_s"] < project["cpu_s"]
        source = found["without_musicnn"]["source"]
        assert (source["sample_rate"], source["channels"]) == (44100, 2)
        name = "44.1 kHz stereo, without MusiCNN: MusicExtractor over project, CPU"
        assert found["ratios"][name] > 0


@pytest.mark.slow
def test_drift(results: Path) -> None:
    command("drift", "--quick", "--results", str(results))
    found = json.loads((results / "drift.json").read_text())
    assert (len(found["quiet_evidence"]), found["found_after_cells"]) == (2, {})


@pytest.mark.slow
def test_tempo_calibration(results: Path) -> None:
    command("tempo_calibration", "--quick", "--results", str(results))
    found = json.loads((results / "tempo-calibration.json").read_text())
    assert sum(kind["sounds"] for kind in found["kinds"]) == found["sounds"] > 0
    assert sum(size for *_, size in found["reliability"]) == found["sounds"]


def test_scores_of_probabilities() -> None:
    assert confidence_scores([(True, 1.0), (False, 0.0)]) == {
        "brier": 0,
        "calibration_error": 0,
        "auc": 1,
    }
    scores = confidence_scores([(True, 0.3), (False, 0.3), (False, 0.9)])
    assert scores["brier"] == pytest.approx((0.49 + 0.09 + 0.81) / 3)
    assert scores["calibration_error"] == pytest.approx((2 * 0.2 + 0.9) / 3)
    assert scores["auc"] == 0.25
    assert confidence_scores([]) == {"brier": None, "calibration_error": None, "auc": None}


@pytest.mark.slow
def test_report_of_all_results(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the dependency group bench is not installed")
    if len(list(results.iterdir())) < 6:
        pytest.skip("the commands before this one have not all run")
    command("report", "--results", str(results), "--docs", str(tmp_path))
    page = (tmp_path / "benchmarks.md").read_text()
    title = "44.1 kHz stereo, without MusiCNN"
    assert f"| {title} |" in page
    assert f"| {title}: project over bare, CPU |" in page
    for picture in ("faults", "speed", "orchestration"):
        assert f"images/benchmark-{picture}.svg" in page
        assert (tmp_path / "images" / f"benchmark-{picture}.svg").stat().st_size > 0
