"""What the values of a whole table tell."""

from collections.abc import Callable

import duckdb
import numpy as np
import pytest

from audio_assets.defs.distributions import findings
from audio_assets.features import FEATURE_SETS
from audio_assets.warehouse.schema import feature_table

FILES = 400


@pytest.fixture
def table() -> Callable[..., list[str]]:
    """Return what is found in a table of the rhythm or loudness of made-up files."""

    def found(name: str, column: str, values: np.ndarray, **of: list[str]) -> list[str]:
        feature_set = FEATURE_SETS[name]
        with duckdb.connect() as connection:
            columns = ", ".join(f'"{c.name}" {c.type}' for c in feature_table(feature_set).columns)
            connection.execute(f"CREATE SCHEMA features; CREATE TABLE features.{name} ({columns})")
            roots = of.get("roots", ["a"] * FILES)
            versions = of.get("versions", ["1"] * FILES)
            connection.executemany(
                f"INSERT INTO features.{name} (file_key, extractor, code_version, {column}) "
                "VALUES (?, 'essentia', ?, ?)",
                [
                    (f"{root}/{number}", version, value)
                    for number, (root, version, value) in enumerate(
                        zip(roots, versions, values.tolist(), strict=True)
                    )
                ],
            )
            return [text for text in findings(connection, feature_set) if "NULL in all" not in text]

    return found


def tempi() -> np.ndarray:
    return np.random.default_rng(0).lognormal(np.log(118), 0.22, FILES)


def loudness() -> np.ndarray:
    return np.random.default_rng(0).normal(-11, 3, FILES)


def in_turn(*values: str) -> list[str]:
    return [values[number % len(values)] for number in range(FILES)]


@pytest.mark.parametrize("parts", ["versions", "roots"])
def test_a_random_split_is_no_finding(table: Callable[..., list[str]], parts: str) -> None:
    for values, name, column in (
        (tempi(), "rhythm", "bpm"),
        (loudness(), "loudness", "integrated_lufs"),
    ):
        assert table(name, column, values, **{parts: in_turn("1", "2")}) == []


def test_half_the_tempo_is_found(table: Callable[..., list[str]]) -> None:
    values = tempi()
    values[1::2] /= 2
    found = table("rhythm", "bpm", values, versions=in_turn("1", "2"))
    assert found[0].startswith("bpm of code version 1 differs from the others: distance 0.9")
    assert found[0].endswith("200 and 200 files")


def test_a_gain_is_found(table: Callable[..., list[str]]) -> None:
    values = loudness()
    values[1::2] += 6
    found = table("loudness", "integrated_lufs", values, versions=in_turn("1", "2"))
    assert found
    assert "integrated_lufs" in found[0]


def test_a_constant_column_is_found(table: Callable[..., list[str]]) -> None:
    assert table("rhythm", "bpm", np.full(FILES, 120.0)) == [
        "bpm is 120 in all 400 rows that have it"
    ]
