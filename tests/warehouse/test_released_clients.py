"""The released command line of DuckDB, older than the library, reads the database."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from audio_assets.warehouse import database
from audio_assets.warehouse.database import reading
from tests.warehouse.rows import file, landing_of, publisher_of, rhythm
from tests.warehouse.test_queries import warehouse  # noqa: F401 - a fixture


def shell(path: Path, sql: str) -> list[dict[str, Any]]:
    program = Path(sys.executable).with_name("duckdb")
    done = subprocess.run(
        [program, "-readonly", "-json", path, sql], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout or "[]"))


def test_it_reads_every_table_and_view(warehouse: Path) -> None:  # noqa: F811
    assert shell(warehouse, "SELECT version() < 'v2' AS older") == [{"older": True}]
    names = shell(
        warehouse,
        "SELECT table_schema || '.' || table_name AS name FROM information_schema.tables "
        "WHERE table_schema <> 'information_schema' ORDER BY ALL",
    )
    assert len(names) > 20
    with reading(warehouse) as connection:
        for name in (row["name"] for row in names):
            expected = connection.sql(f"FROM {name}").fetchall()
            assert len(shell(warehouse, f"FROM {name}")) == len(expected), name


def test_a_database_in_newer_storage_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landing_of(tmp_path).append("library/files", [file("a")])
    landing_of(tmp_path).append("features/rhythm", [rhythm("a")])
    with monkeypatch.context() as newer:
        newer.setattr(database, "STORAGE_VERSION", "v2.0.0")
        publisher_of(tmp_path).publish()
        path = tmp_path / "warehouse.duckdb"
        with pytest.raises(AssertionError, match="newer version of DuckDB"):
            shell(path, "FROM features.rhythm")
    assert publisher_of(tmp_path).publish().start == "landing"
    assert [row["bpm"] for row in shell(path, "FROM features.rhythm")] == [120.0]
    assert not publisher_of(tmp_path).publish().published
