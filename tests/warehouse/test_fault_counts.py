"""The robustness tables count exactly the faults that were injected."""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from audio_assets.extraction.cells import CellOutcome
from audio_assets.extraction.engine import Engine
from audio_assets.extraction.scratch import Scratch
from audio_assets.library.scan import Library
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.publisher import Publisher
from audio_assets.warehouse.schema import warehouse_tables
from robustness.circuit_breaker import get_circuit_breaker
from robustness.quarantine import Quarantine
from robustness.smart_retry import DeferredError
from robustness.state import get_state_store
from robustness.worker_pool import WorkerPool
from tests import faults
from tests.conftest import write_tone
from tests.extraction.test_engine import learn_short_timeout
from tests.warehouse.rows import queried

HANGING = faults.feature_set("hanging", faults.hang)
CRASHING = faults.feature_set("crashing", faults.segfault)
DEADLY = faults.feature_set("deadly", faults.segfault, faults.segfault)
GUARDED = faults.feature_set("guarded", faults.sound)
SETS = (HANGING, CRASHING, DEADLY, GUARDED)

Outcomes = dict[tuple[str, str], CellOutcome]


@pytest.fixture
def faulty(tmp_path: Path, own_state: None) -> tuple[Path, Outcomes]:
    """A published run: three good files, one that extractors fail on, one that is not audio."""
    root = tmp_path / "music"
    root.mkdir()
    for number, name in enumerate(("a.wav", "b.wav", "c.wav", "bad.wav")):
        write_tone(root / name, 220.0 * (number + 1))
    (root / "text.wav").write_text("not audio at all\n" * 100)
    learn_short_timeout(HANGING.name)
    get_circuit_breaker("feature:guarded").force_open()
    landing = Landing(str(tmp_path / "landing"), warehouse_tables(SETS))
    outcomes: Outcomes = {}
    with (
        Scratch(tmp_path / "scratch", "run", 1024) as scratch,
        WorkerPool(
            2,
            preload=("audio_assets.extraction.worker", "pandas", "tests.faults"),
            memory_high=None,
        ) as pool,
    ):
        engine = Engine("run", Library({"music": root}), landing, pool, scratch)
        engine.begin(SETS, [f"music/{path.name}" for path in sorted(root.iterdir())])
        for feature_set in SETS:
            with suppress(DeferredError):
                for outcome in engine.drive(feature_set.name):
                    name = outcome.file_key.removeprefix("music/")
                    outcomes[outcome.feature_set, name] = outcome
    warehouse = tmp_path / "warehouse.duckdb"
    Publisher(landing, warehouse, SETS, get_state_store()).publish()
    return warehouse, outcomes


def rows(warehouse: Path, sql: str) -> list[dict[str, Any]]:
    return queried(warehouse, sql).to_dict("records")


def test_tables_count_what_was_injected(faulty: tuple[Path, Outcomes]) -> None:
    warehouse, outcomes = faulty
    deadly = outcomes["deadly", "bad.wav"].attempts
    assert deadly > 1

    [run] = rows(warehouse, "FROM robustness.runs")
    assert (run["files"], run["cells_done"], run["cells_failed"]) == (5, 4 + 4 + 3, 0)
    assert (run["cells_quarantined"], run["cells_skipped"], run["cells_reused"]) == (5, 4, 0)
    assert run["success_rate"] == 1
    assert (run["retries"], run["recovered_cells"]) == (2 + 1 + (deadly - 1), 2)

    ended = Counter(
        (row["feature_set"], row["outcome"]) for row in rows(warehouse, "FROM robustness.attempts")
    )
    assert ended == {
        ("hanging", "succeeded"): 4,
        ("hanging", "failed"): 2 + 1,
        ("crashing", "succeeded"): 4,
        ("crashing", "failed"): 1,
        ("crashing", "quarantined"): 1,
        ("deadly", "succeeded"): 3,
        ("deadly", "failed"): deadly,
        ("deadly", "quarantined"): 2,
        ("guarded", "deferred"): 4,
        ("guarded", "quarantined"): 1,
        ("hanging", "quarantined"): 1,
    }

    stats = {row["feature_set"]: row for row in rows(warehouse, "FROM robustness.feature_stats")}
    assert {name: row["attempts"] for name, row in stats.items()} == {
        "hanging": 7,
        "crashing": 5,
        "deadly": 3 + deadly,
    }
    assert stats["hanging"]["success_rate"] == pytest.approx(4 / 7)
    assert [stats[name]["retries"] for name in ("hanging", "crashing")] == [2, 1]

    errors = rows(warehouse, "FROM robustness.errors")
    assert sum(row["count"] for row in errors) == 3 + 1 + deadly
    assert sum(row["recovered"] for row in errors) == 2 + 1
    [timeouts] = [row for row in errors if row["error_type"] == "timeout"]
    assert (timeouts["count"], timeouts["recovered"]) == (2, 2)
    assert timeouts["example_file"] == "music/bad.wav"
    assert set(timeouts["recovery_strategies"]) == {"increase_timeout", "audio_fallback"}

    timed_out = {
        r["feature_set"]: r["timed_out"] for r in rows(warehouse, "FROM robustness.timeouts")
    }
    assert timed_out == {"hanging": 2, "crashing": 0, "deadly": 0}
    retried = rows(warehouse, "FROM robustness.retries")
    assert sum(row["attempts"] for row in retried) == run["retries"]


def test_state_is_published_as_it_is(faulty: tuple[Path, Outcomes]) -> None:
    warehouse, _ = faulty
    quarantined = {
        (r["feature_set"], r["file_key"]) for r in rows(warehouse, "FROM robustness.quarantine")
    }
    assert quarantined == {(cell.feature_set, cell.file_key) for cell in Quarantine().list()}
    assert {(feature_set.name, "music/text.wav") for feature_set in SETS} <= quarantined

    breakers = {row["name"]: row for row in rows(warehouse, "FROM robustness.circuit_breakers")}
    # A file that kills its extractor again and again counts once.
    for name in ("hanging", "crashing", "deadly"):
        assert breakers[f"feature:{name}"]["failure_count"] == 1
    assert breakers["feature:guarded"]["forced"] == "open"
    assert breakers["audio_processing"]["ignored_count"] == 1
    [opened] = rows(warehouse, "FROM robustness.breaker_transitions")
    assert (opened["name"], opened["to_state"]) == ("feature:guarded", "FORCED_OPEN")
