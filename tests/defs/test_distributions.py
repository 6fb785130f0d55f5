"""What the values of a whole table tell."""

import random
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from audio_assets.defs import distributions
from audio_assets.features import FEATURE_SETS
from audio_assets.warehouse.schema import feature_table
from tests.warehouse.rows import made_up

FILES = 400
PARTS = ("code_version", "extractor", "root")


def made_up_rows(name: str) -> list[dict[str, Any]]:
    """Make up rows of which every fourth is of another code version, extractor and root."""
    rng = random.Random(0)
    rows = []
    for number in range(FILES):
        other = number % 4 == 0
        row = made_up(FEATURE_SETS[name], f"{'ab'[other]}/{number}", rng)
        rows.append(row | {"code_version": "12"[other], "extractor": ("x", "y")[other]})
    return rows


def findings(name: str, rows: list[dict[str, Any]]) -> list[str]:
    table = feature_table(FEATURE_SETS[name])
    columns = ", ".join(f'"{column.name}" {column.type}' for column in table.columns)
    with duckdb.connect() as connection:
        connection.execute(f"CREATE SCHEMA features; CREATE TABLE {table.sql_name} ({columns})")
        values = pa.Table.from_pylist(rows)
        connection.register("made_up", values)
        connection.execute(f"INSERT INTO {table.sql_name} BY NAME FROM made_up")
        return distributions.findings(connection, FEATURE_SETS[name])


def of_one_part(rows: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """Return rows that differ in one thing only."""
    one = {"code_version": "1", "extractor": "x"}
    one.pop(part, None)
    return [
        row | one | ({} if part == "root" else {"file_key": f"a/{number}"})
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", ["rhythm", "loudness", "mfcc"])
def test_random_split_is_no_finding(name: str) -> None:
    assert findings(name, made_up_rows(name)) == []


@pytest.mark.parametrize(
    ("part", "said"),
    [("code_version", "code version 2"), ("extractor", "extractor y"), ("root", "library root b")],
)
def test_half_the_tempo_is_found(part: str, said: str) -> None:
    rows = of_one_part(made_up_rows("rhythm"), part)
    tempi = np.random.default_rng(0).lognormal(np.log(118), 0.22, FILES)
    for number, row in enumerate(rows):
        row["bpm"] = tempi[number] / (2 if number % 4 == 0 else 1)
    [found] = findings("rhythm", rows)
    assert found.startswith(f"bpm of {said} differs from the others: median 5")
    assert found.endswith("100 and 300 files")


def test_gain_is_found() -> None:
    rows = of_one_part(made_up_rows("loudness"), "code_version")
    levels = np.random.default_rng(0).normal(-11, 3.5, FILES)
    for number, row in enumerate(rows):
        row["integrated_lufs"] = levels[number] + (6 if number % 4 == 0 else 0)
    [found] = findings("loudness", rows)
    assert found.startswith("integrated_lufs of code version 2 differs")


def test_element_of_an_array_that_differs_is_named() -> None:
    rows = of_one_part(made_up_rows("mfcc"), "extractor")
    for row in rows[::4]:
        row["mean"][2] += 1
    [found] = findings("mfcc", rows)
    assert found.startswith("mean[3] of extractor y differs from the others")


def test_values_that_became_null_are_found() -> None:
    rows = of_one_part(made_up_rows("rhythm"), "code_version")
    for row in rows[: FILES * 3 // 4 : 4]:
        row["bpm"] = None
    [found] = findings("rhythm", rows)
    assert found.startswith("bpm of code version 2 differs from the others: median NULL instead of")


def test_constant_and_missing_columns_are_found() -> None:
    rows = made_up_rows("rhythm")
    for row in rows:
        row |= {"bpm": 120.0, "beat_confidence": None}
    assert findings("rhythm", rows) == [
        "bpm is the same in all 400 files that have it",
        "beat_confidence is NULL in 100% of 400 files",
    ]
    assert findings("rhythm", rows[:20]) == []
