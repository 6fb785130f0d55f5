"""The worked example of docs/extending.md, to the letter, from the document to DuckDB."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest
import requests
import soundfile

from robustness.error_classifier import ErrorClassifier, ErrorSeverity, ErrorType
from robustness.error_rules import rules_from_pyproject
from tests.conftest import PROJECT, Home

SAMPLE_RATE = 22050


def test_documented_feature_set_is_extracted(home: Home, tmp_path: Path) -> None:
    document = (PROJECT / "docs" / "extending.md").read_text()
    (module,) = re.findall(r"^```python\n(.*?)^```", document, re.M | re.S)
    (registration,) = re.findall(r"^\+(.*\n)", document, re.M)
    project = tmp_path / "project"
    for package in ("audio_assets", "robustness"):
        shutil.copytree(PROJECT / package, project / package)
    features = project / "audio_assets" / "features"
    (features / "silence.py").write_text(module)
    registry = features / "__init__.py"
    before, after = registry.read_text().split("_MODULES = (\n")
    registry.write_text(f"{before}_MODULES = (\n{registration}{after}")

    library = tmp_path / "music"
    library.mkdir()
    t = np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * 440 * t) * ((t < 1) | (t >= 2)) * ((t < 3) | (t >= 3.2))
    soundfile.write(library / "pauses.wav", tone, SAMPLE_RATE)
    done = subprocess.run(
        [sys.executable, "-m", "audio_assets", "analyze", str(library)],
        env=home.environment({"PYTHONPATH": str(project)}),
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        row = connection.execute(
            "SELECT silent_share, passages, longest_s, extractor FROM features.silence"
        ).fetchone()
        headline = connection.execute("SELECT silent_share FROM features.tracks").fetchone()
    assert row is not None
    assert row[0] == pytest.approx(0.3, abs=0.03)
    assert row[1] == 1
    assert row[2] == pytest.approx(1.0, abs=0.1)
    assert row[3] == "numpy"
    assert headline == row[:1]


def test_documented_rule_is_understood(tmp_path: Path) -> None:
    (rule,) = re.findall(
        r"^```toml\n(.*?)^```", (PROJECT / "docs" / "extending.md").read_text(), re.M | re.S
    )
    (tmp_path / "pyproject.toml").write_text(rule)
    response = requests.Response()
    response.status_code = 503
    classifier = ErrorClassifier(rules_from_pyproject(tmp_path))
    error = classifier.classify_error(requests.HTTPError("overloaded", response=response), {})
    assert (error.error_type, error.severity) == (ErrorType.NETWORK, ErrorSeverity.LOW)
