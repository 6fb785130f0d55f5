"""The documents say what the code does."""

import importlib.util
import logging
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from audio_assets.cli.app import app
from robustness.adaptive_timeout import get_timeout_manager
from robustness.circuit_breaker import get_circuit_breaker
from robustness.error_classifier import ErrorType, RecoveryStrategy
from robustness.log_context import LOGGER_NAMES
from robustness.state import get_state_store
from tests.conftest import PROJECT, forget_state

DOCS = PROJECT / "docs"
ROBUSTNESS = (DOCS / "robustness.md").read_text("utf-8")


@pytest.fixture
def fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """State in a home of this test's own."""
    monkeypatch.delenv("ROBUSTNESS_STATE_URL", raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    forget_state()
    levels = {name: logging.getLogger(name).level for name in LOGGER_NAMES}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    monkeypatch.undo()
    forget_state()


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = path.read_text("utf-8")
    assert generate.render(text) == text, "run: .venv/bin/python docs/generate.py"


def first_column(heading: str) -> list[str]:
    """Return the names in the first column of the table under a head."""
    table = ROBUSTNESS.partition(f"\n{heading}\n")[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)


def test_each_error_type_and_recovery_is_explained() -> None:
    assert first_column("| type | what it means | what to do |") == list(ErrorType.__members__)
    strategies = first_column("| strategy | what the next attempt does |")
    assert sorted(strategies) == sorted(RecoveryStrategy)


@pytest.mark.usefixtures("fresh_process")
def test_examples_run(capfd: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", ROBUSTNESS, flags=re.MULTILINE | re.DOTALL)
    assert len(examples) == 7
    for example in examples:
        exec(compile(example, "docs/robustness.md", "exec"), {"__name__": "example"})
    assert not get_state_store().degraded
    assert get_circuit_breaker("catalogue").get_stats()["success_count"] == 1
    assert get_timeout_manager().get_performance_stats("thumbnails")["samples"] == 1
    assert capfd.readouterr().out == ""


DOCUMENTS = (PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))


def calls(program: str) -> list[list[str]]:
    """Return the arguments of a program wherever the documents call it."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        # Of a block, a command may have several lines within quotes.
        found += re.findall(
            rf"^(?:\.venv/bin/)?{program}\b((?:\"[^\"]*\"|[^\n])*)", "".join(blocks), re.MULTILINE
        )
        found += re.findall(rf"`(?:\.venv/bin/)?{program} ([^`]+)`", text)
    return [shlex.split(arguments, comments=True) for arguments in found]


@pytest.mark.usefixtures("fresh_process")
def test_each_command_in_the_documents_is_one() -> None:
    found = calls("audio-assets")
    assert len(found) > 30
    umask = os.umask(0o077)
    for arguments in found:
        done = CliRunner().invoke(app, [*arguments, "--help"])
        assert done.exit_code == 0, (arguments, done.output)
    os.umask(umask)


@pytest.mark.parametrize(
    ("program", "only_tried"),
    [("make", ["make", "--dry-run"]), ("uv sync", [".venv/bin/uv", "sync", "--dry-run"])],
)
def test_each_target_and_extra_in_the_documents_is_there(
    program: str, only_tried: list[str]
) -> None:
    found = calls(program)
    assert found
    lock = (PROJECT / "uv.lock").read_bytes()
    for arguments in found:
        done = subprocess.run(
            [*only_tried, *arguments], cwd=PROJECT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (PROJECT / "uv.lock").read_bytes() == lock
