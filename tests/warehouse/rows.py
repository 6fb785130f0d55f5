"""Rows and feature sets that look like real ones."""

import random
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from audio_assets.features.base import Column, FeatureSet
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.publisher import Publisher
from audio_assets.warehouse.queries import query
from audio_assets.warehouse.schema import ROW_ID, warehouse_tables

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
AWKWARD_KEYS = [
    "a'b; DROP TABLE features.rhythm; --",
    "line\nbreak",
    'quote" \\ %20 #1',
    "émoji 🎵 ",
    "${x} ? $1",
]


def _not_called(*_: object) -> Any:
    raise AssertionError("publishing extracts nothing")


def feature_set(name: str, columns: Sequence[Column], headline: str | None = None) -> FeatureSet:
    return FeatureSet(
        name=name,
        description=f"What {name} is.",
        columns=columns,
        licence="none",
        citation="none",
        extract=_not_called,
        extract_alternative=_not_called,
        combine=_not_called,
        headline=headline or columns[0].name,
        plotted=(),
    )


RHYTHM = feature_set(
    "rhythm",
    [Column("bpm", "DOUBLE", "Tempo", "1/min"), Column("beats", "DOUBLE[]", "Beats", "s")],
)
MFCC = feature_set(
    "mfcc",
    [Column("mean", "FLOAT[3]", "Mean"), Column("tags", "MAP(VARCHAR, FLOAT)", "Tags")],
)
SETS = (RHYTHM, MFCC)


def queried(warehouse: Path, sql: str) -> pd.DataFrame:
    """Run a query as `audio-assets query` does."""
    result = query(warehouse, sql)
    return pd.DataFrame(result.rows, columns=result.columns)


def landing_of(root: Path, feature_sets: Sequence[FeatureSet] = SETS) -> Landing:
    return Landing(str(root / "landing"), warehouse_tables(feature_sets))


def publisher_of(
    root: Path, feature_sets: Sequence[FeatureSet] = SETS, state_store: Any = None
) -> Publisher:
    return Publisher(
        landing_of(root, feature_sets), root / "warehouse.duckdb", feature_sets, state_store
    )


def all_rows(
    landing: Landing, table: str, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    return [
        row
        for part in landing.parts(table)
        for row in landing.read_part(table, part, columns).to_pylist(maps_as_pydicts="strict")
    ]


def write_foreign_parts(landing: Landing, root: Path) -> list[str]:
    """Put parts that are not of the table among those of ``features/rhythm``; return their names.

    Each can be read, but for one thing that does not fit.
    """
    folder = root / "landing/features/rhythm"
    rows = landing.prepare("features/rhythm", [rhythm("foreign")]).rows
    ids, keys, bpm = map(rows.column_names.index, (ROW_ID, "file_key", "bpm"))
    kinds = {
        "no row_id": rows.drop_columns([ROW_ID]),
        "row_id a text": rows.set_column(ids, ROW_ID, [["1"]]),
        "row_id NULL": rows.set_column(ids, ROW_ID, pa.nulls(1, pa.uuid())),
        "no key": rows.drop_columns(["file_key"]),
        "key a number": rows.set_column(keys, "file_key", [[1]]),
        "key NULL": rows.set_column(keys, "file_key", pa.nulls(1, pa.string())),
        "other columns": pa.table({"a": [1], "b": ["x"]}),
        "no columns": pa.table({}),
        "a column twice": rows.append_column("bpm", [[1.0]]),
        "a column that is a text": rows.set_column(bpm, "bpm", [["120"]]),
        "a column that is a struct": rows.set_column(bpm, "bpm", [[{"a": 1}]]),
        "a name of another kind": rows,
        "a name of version 4": rows,
        "a name of the far future": rows,
        "a merged part without sources": rows,
        "a merged part with odd sources": rows.replace_schema_metadata({"supersedes": "[1]"}),
    }
    names = []
    for kind, table in kinds.items():
        stem = landing.prepare("features/rhythm", [rhythm("a")]).name.removesuffix(".parquet")
        match kind.split():
            case ["a", "name", *_, "kind"]:
                stem = "zzz"
            case ["a", "name", *_, "4"]:
                stem = str(uuid.uuid4())
            case ["a", "name", *_]:
                stem = "ffffffff-ffff-7fff-bfff-ffffffffffff"
            case ["a", "merged", *_]:
                stem += ".merged"
        pq.write_table(table, folder / f"{stem}.parquet")
        names.append(f"{stem}.parquet")
    return names


def common(key: str, run_id: str = "run 1", at: int = 0) -> dict[str, Any]:
    return {
        "file_key": key,
        "content_hash": f"hash of {key}",
        "extractor": "essentia",
        "computed_at": START + timedelta(seconds=at),
        "run_id": run_id,
        "code_version": "1",
        **dict.fromkeys(("complete_share", "degraded", "degraded_since", "retry_after")),
    }


def rhythm(key: str, bpm: float = 120.0, run_id: str = "run 1", at: int = 0) -> dict[str, Any]:
    return common(key, run_id, at) | {"bpm": bpm, "beats": [0.5, 1.0, 1.5]}


def mfcc(key: str, run_id: str = "run 1", at: int = 0) -> dict[str, Any]:
    return common(key, run_id, at) | {"mean": [1.0, 2.0, 3.0], "tags": {"rock": 0.5}}


def file(key: str, at: int = 0, **values: Any) -> dict[str, Any]:
    return {
        "file_key": key,
        "path": f"/music/{key}",
        "size": 1000,
        "mtime_ns": 1,
        "content_hash": f"hash of {key}",
        "duration_s": 200.0,
        "seen_at": START + timedelta(seconds=at),
        "gone": False,
    } | values


def attempt(
    key: str, feature_set: str = "rhythm", outcome: str = "succeeded", at: float = 0, **values: Any
) -> dict[str, Any]:
    failed = {"error_type": "timeout", "severity": "medium", "message": "took too long"}
    return (
        {
            "run_id": "run 1",
            "file_key": key,
            "feature_set": feature_set,
            "attempt": 1,
            "outcome": outcome,
            "extractor": "essentia",
            "timeout_s": 20.0,
            "timeout_source": "base",
            "duration_s": 10.0,
            "audio_s": 200.0,
            "peak_memory_mib": 300.0,
            "breaker_state": "CLOSED",
            "started_at": START + timedelta(seconds=at),
            "content_hash": f"hash of {key}",
        }
        | (failed if outcome == "failed" else {})
        | values
    )


def value_of(column: Column, rng: random.Random) -> Any:
    """Make up a value of a column's type."""
    kind = column.type
    if kind.endswith("]"):
        size = int(kind[kind.index("[") + 1 : -1] or 400)
        inner = Column(column.name, kind[: kind.index("[")], "")
        return [value_of(inner, rng) for _ in range(size)]
    if kind.startswith("MAP"):
        return {f"tag {number}": rng.random() for number in range(50)}
    match kind:
        case "DOUBLE" | "FLOAT":
            return rng.random()
        case "TIMESTAMP" | "TIMESTAMPTZ":
            return START
        case "VARCHAR" if column.name == "tags":
            return '{"mood": "calm"}'
        case "VARCHAR":
            return f"{column.name} {rng.randrange(100)}"
        case _:
            return rng.randrange(1000)


def made_up(feature_set: FeatureSet, key: str, rng: random.Random, at: int = 0) -> dict[str, Any]:
    return {column.name: value_of(column, rng) for column in feature_set.columns} | common(
        key, at=at
    )
