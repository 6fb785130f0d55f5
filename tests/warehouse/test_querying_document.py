"""Runs the examples of docs/querying.md as they are written."""

import re
import shutil
from pathlib import Path

import duckdb
import pytest

from tests.warehouse.test_queries import warehouse  # noqa: F401 - a fixture

DOCUMENT = Path(__file__).parents[2] / "docs" / "querying.md"
PLACE = "dagster_home/warehouse.duckdb"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def _in_place(
    warehouse: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A working directory in which the database is where the document has it."""
    home = tmp_path / "dagster_home"
    home.mkdir()
    shutil.copy(warehouse, home)
    shutil.copytree(warehouse.parent / "landing", home / "landing")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_in_place")
def test_python_blocks_run_in_order() -> None:
    names: dict[str, object] = {}
    found = blocks("python")
    assert len(found) == 4
    for block in found:
        exec(block, names)
    assert len(names["tracks"]) == 22  # type: ignore[arg-type]
    assert len(names["mfcc"].iloc[0]) == 13  # type: ignore[attr-defined]
    assert len(names["embeddings"][0]) == 200  # type: ignore[index]


@pytest.mark.usefixtures("_in_place")
def test_every_sql_statement_runs() -> None:
    found = [statement for block in blocks("sql") for statement in block.strip().split(";\n")]
    assert len(found) == 17
    for statement in found:
        with duckdb.connect() as session:
            if "ATTACH" not in statement and "warehouse." not in statement:
                session.execute(f"ATTACH '{PLACE}' AS warehouse (READ_ONLY); USE warehouse")
            elif "ATTACH" not in statement:
                session.execute(f"ATTACH '{PLACE}' AS warehouse (READ_ONLY)")
            rows = session.execute(statement).fetchall()
            empty = ("ATTACH", "quarantine", "broken")
            assert rows or any(word in statement for word in empty), statement
