"""The worked examples of docs/extending.md, to the letter, and packages with worse feature sets."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pytest
import requests
import soundfile

from audio_assets.cli.endings import ExitCode
from robustness.error_classifier import ErrorClassifier, ErrorSeverity, ErrorType
from robustness.error_rules import rules_from_pyproject
from tests.conftest import PROJECT, Home, make_home

SAMPLE_RATE = 22050

PACKAGE, RULE = re.findall(
    r"^```toml\n(.*?)^```", (PROJECT / "docs" / "extending.md").read_text("utf-8"), re.M | re.S
)
(MODULE,) = re.findall(
    r"^```python\n(.*?)^```", (PROJECT / "docs" / "extending.md").read_text("utf-8"), re.M | re.S
)

VERDICT = """
from audio_assets.features.base import Column, FeatureSet

def extract(audio):
    if audio.source is None:
        return {"readable": False, "finding": audio.decode_error.error_type.value}
    return {"readable": True, "finding": audio.source.codec}

def combine(rows, durations):
    return rows[0]

FEATURE_SET = FeatureSet(
    name="verdict", description="What decoding found.",
    columns=(
        Column("readable", "BOOLEAN", "Whether it can be decoded"),
        Column("finding", "VARCHAR", "Codec, or the kind of the error"),
    ),
    licence="none", citation="none",
    extract=extract, extract_alternative=extract, combine=combine,
    headline="readable", extractor="verdict", reads="decoding", position=1,
)
"""


def changed(changes: str) -> str:
    """Return a module whose feature set differs from VERDICT's."""
    return (
        "from dataclasses import replace\n"
        "from audio_assets.features.base import Column\n"
        "from other_feature_sets.verdict import FEATURE_SET\n"
        f"FEATURE_SET = replace(FEATURE_SET, {changes})\n"
    )


BROKEN = {
    "unimportable": ("import no_such_library\n", "No module named 'no_such_library'"),
    "exiting": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "another_type": ("FEATURE_SET = {'name': 'another_type'}\n", "is not a FeatureSet"),
    "without_set": ("", "has no attribute 'FEATURE_SET'"),
    "usurper": (changed("name='rhythm'"), "there is another feature set 'rhythm'"),
    "bad_name": (changed("name='drop table'"), "'drop table' cannot be the name"),
    "reserved_name": (changed("name='tracks'"), "'tracks' cannot be the name"),
    "bad_column": (
        changed("columns=(Column('a b', 'DOUBLE', ''),)"),
        "'a b' cannot be the name of a column",
    ),
    "bad_type": (
        changed("name='bad_type', headline='a', columns=(Column('a', 'DUBLE', ''),)"),
        "DUBLE",
    ),
    "bad_length": (changed("name='x', shortest_s=float('nan')"), "shortest_s must be 0 s or more"),
    "local_function": (changed("name='x', extract=lambda audio: {}"), "pickle"),
}
"""Modules of another package, and why their feature sets are left out."""


@dataclass(frozen=True)
class Installation:
    """A home in which `analyze` ran with packages installed beside the project."""

    home: Home
    environment: Mapping[str, str]
    said: str

    def python(self, code: str) -> str:
        return run([sys.executable, "-c", code], self.environment).stdout

    def query(self, sql: str) -> list[tuple[object, ...]]:
        with duckdb.connect(str(self.home.warehouse), read_only=True) as connection:
            return connection.execute(sql).fetchall()


def run(
    command: list[str], environment: Mapping[str, str], expected: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done


def install(project: Path, target: Path) -> None:
    """Install a package for real, but where only those see it whose PYTHONPATH says so."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "make installs uv"
    python = ["--python", sys.executable]
    command = [uv, "pip", "install", "--no-deps", *python, "--target", str(target), str(project)]
    subprocess.run(command, check=True, capture_output=True)


def write_package(directory: Path, pyproject: str, modules: Mapping[str, str]) -> Path:
    (name,) = re.findall(r'^name = "(.*)"', pyproject, re.M)
    source = directory / name / "src" / name.replace("-", "_")
    source.mkdir(parents=True)
    (directory / name / "pyproject.toml").write_text(pyproject)
    for module, text in {"__init__": "", **modules}.items():
        (source / f"{module}.py").write_text(text)
    return directory / name


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Both packages, and two files: one has pauses, the other is no audio."""
    directory = tmp_path_factory.mktemp("extending")
    modules = {"verdict": VERDICT} | {name: module for name, (module, _) in BROKEN.items()}
    declared = "".join(f'{name} = "other_feature_sets.{name}:FEATURE_SET"\n' for name in modules)
    others = PACKAGE.replace("audio-assets-silence", "other-feature-sets")
    others = re.sub(r"^silence = .*\n", declared, others, flags=re.M)
    for project in (
        write_package(directory, PACKAGE, {"__init__": MODULE}),
        write_package(directory, others, modules),
    ):
        install(project, directory / "site")

    library = directory / "music"
    library.mkdir()
    t = np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * 440 * t) * ((t < 1) | (t >= 2)) * ((t < 3) | (t >= 3.2))
    soundfile.write(library / "pauses.wav", tone, SAMPLE_RATE)
    (library / "text.wav").write_text("not audio at all\n" * 100)

    home = make_home(directory)
    path = os.pathsep.join([str(directory / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = home.environment({"PYTHONPATH": path, "COLUMNS": "300"})
    analyze = [sys.executable, "-m", "audio_assets", "analyze", str(library)]
    done = run(analyze, environment, ExitCode.SOME_FILES_FAILED)
    return Installation(home, environment, done.stdout + done.stderr)


def test_documented_feature_set_is_extracted(installation: Installation) -> None:
    [row] = installation.query(
        "SELECT silent_share, passages, longest_s, extractor FROM features.silence"
    )
    assert row == (pytest.approx(0.3, abs=0.03), 1, pytest.approx(1.0, abs=0.1), "numpy")
    [headline] = installation.query(
        "SELECT silent_share FROM features.tracks WHERE file_key LIKE '%pauses%'"
    )
    assert headline == row[:1]
    [reason] = installation.query(
        "SELECT error_type FROM features.missing WHERE feature_set = 'silence'"
    )
    assert reason == ("unsupported_format",)


def test_feature_set_gets_what_decoding_found_in_good_files_and_bad(
    installation: Installation,
) -> None:
    rows = installation.query("SELECT file_key, readable, finding FROM features.verdict ORDER BY 1")
    assert rows == [
        ("music/pauses.wav", True, "pcm_s16le"),
        ("music/text.wav", False, "unsupported_format"),
    ]


def test_it_is_an_asset_with_checks_and_a_row_in_the_documents(installation: Installation) -> None:
    said = installation.python(
        """
import importlib.util, json
import dagster as dg
from audio_assets.definitions import defs
from audio_assets.features import FEATURE_SETS

with dg.DagsterInstance.get() as instance:
    keys = [key for key in defs.resolve_asset_graph().get_all_asset_keys()]
    files = sorted(instance.get_materialized_partitions(dg.AssetKey(["features", "silence"])))
    result = defs.resolve_job_def("robustness_stats").execute_in_process(
        instance=instance, raise_on_error=False
    )
    checks = {
        f"{e.asset_key.path[-1]} {e.check_name}": e.passed
        for e in result.get_asset_check_evaluations()
    }
spec = importlib.util.spec_from_file_location("generate", "docs/generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)
print(json.dumps({
    "order": list(FEATURE_SETS),
    "assets": ["/".join(key.path) for key in keys],
    "files": files,
    "checks": checks,
    "documents": generate.feature_sets(),
}))
"""
    )
    found = json.loads(said.splitlines()[-1])
    assert found["order"][0] == "loudness"
    # Whatever positions they ask for.
    assert found["order"][-3:] == ["silence", "verdict", "metadata"]
    assert {"features/silence", "features/verdict"} < set(found["assets"])
    assert found["files"] == ["music/pauses.wav"]
    for name in ("silence", "verdict"):
        for check in ("finite", "complete", "fresh"):
            assert found["checks"][f"{name} {check}"]
    assert "| `silence` | Passages whose level, of frames of 50 ms" in found["documents"]
    assert "BSD-3-Clause (NumPy), ISC (librosa)" in found["documents"]


def test_broken_ones_are_named_and_left_out(installation: Installation) -> None:
    doctor = run(
        [sys.executable, "-m", "audio_assets.cli.doctor", "feature sets"], installation.environment
    ).stdout
    for name, (_, reason) in BROKEN.items():
        for said in (installation.said, doctor):
            lines = [line for line in said.splitlines() if f"'{name}' of the package" in line]
            assert lines
            assert all("package other-feature-sets is left out" in line for line in lines)
            assert all(reason in line for line in lines)
    assert installation.query("SELECT bpm FROM features.rhythm")  # the built-in one


def test_package_may_import_its_feature_set_before_all_others(installation: Installation) -> None:
    said = installation.python(
        "import audio_assets_silence; from audio_assets.features import FEATURE_SETS;"
        "print(FEATURE_SETS['silence'] is audio_assets_silence.FEATURE_SET)"
    )
    assert said == "True\n"


HIDE_OWN = """
import importlib.metadata
found = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **group: [
    entry_point for entry_point in found(**group) if entry_point.dist.name != "audio-assets"
] if group else found()
"""


def test_project_that_is_not_installed_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDE_OWN + "import audio_assets.definitions"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "install it again (make run, or pip install -e .)" in done.stderr.splitlines()[-1]


def test_documented_rule_is_understood(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(RULE)
    response = requests.Response()
    response.status_code = 503
    classifier = ErrorClassifier(rules_from_pyproject(tmp_path))
    error = classifier.classify_error(requests.HTTPError("overloaded", response=response), {})
    assert (error.error_type, error.severity) == (ErrorType.NETWORK, ErrorSeverity.LOW)
