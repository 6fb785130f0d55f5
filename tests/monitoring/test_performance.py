"""What got slower is found, and what did not is left alone."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audio_assets.monitoring.landed import LandedRows
from audio_assets.monitoring.metrics import ProductCollector
from audio_assets.monitoring.overview import Observer
from audio_assets.monitoring.performance import DECODING, Trend, baselines, trends
from audio_assets.warehouse.landing import Landing
from robustness.state import StateStore
from tests.conftest import forget_state
from tests.warehouse.rows import attempt, landing_of

LENGTHS = (15.0, 31.0, 60.0, 180.0, 220.0, 300.0, 450.0)
SIGMA = 0.15


class History:
    """The attempts of runs; each takes a constant time, and some per second of audio."""

    def __init__(self, root: Path) -> None:
        self._landing: Landing = landing_of(root)
        self._rng = np.random.default_rng(1)
        self._cells = 0
        self._runs = 0
        self.rows = LandedRows(self._landing)

    def run(self, cells: int, *, workers: int = 2, **factors: float) -> None:
        """Write a run of so many cells of each feature set, by factors of the usual time."""
        self._runs += 1
        run_id = f"run {self._runs}"
        run = {"run_id": run_id, "started_at": datetime.now(UTC), "host": "a", "workers": workers}
        self._landing.append("robustness/runs", [run])
        self._landing.append(
            "robustness/attempts",
            [row for _ in range(cells) for row in self._file(run_id, factors)],
        )

    def _file(self, run_id: str, factors: dict[str, float]) -> Iterator[dict[str, Any]]:
        self._cells += 1
        length = float(self._rng.choice(LENGTHS))
        taken = {
            name: (0.2 + 0.01 * length) * factors.get(name, 1.0) * noise
            for name, noise in zip(
                ("rhythm", "key", DECODING, "core_wait"),
                np.exp(SIGMA * self._rng.standard_normal(4)),
                strict=True,
            )
        }
        waited = taken["core_wait"] if "core_wait" in factors else 0.0
        for name in ("rhythm", "key"):
            decode_s = taken[DECODING] if name == "key" else None
            yield attempt(
                f"{self._cells}",
                name,
                run_id=run_id,
                audio_s=length,
                started_at=datetime.now(UTC) + timedelta(seconds=self._cells),
                duration_s=taken[name] + waited + (decode_s or 0.0),
                core_wait_s=waited,
                decode_s=decode_s,
                decoder="av mp3 44100 2",
                code_version="1",
            )

    def trends(self) -> dict[str, Trend]:
        with self.rows.up_to_date() as connection:
            return {trend.feature_set: trend for trend in trends(connection)}

    def slower(self) -> set[str]:
        return {name for name, trend in self.trends().items() if trend.is_slower}


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path)


def test_unchanged_runs_raise_nothing(history: History) -> None:
    history.run(200)
    for _ in range(4):
        history.run(100)
        history.run(100, workers=8, rhythm=1.6, key=1.6, decoding=1.6)
        history.run(20, core_wait=5.0)
        assert history.slower() == set()
    assert {trend.feature_set for trend in history.trends().values()} == {"rhythm", "key", DECODING}
    with history.rows.up_to_date() as connection:
        known = {(b.feature_set, b.workers): b for b in baselines(connection)}
    usual = known["rhythm", 2]
    assert usual.rate == pytest.approx(0.012, rel=0.2)
    assert (usual.decoder, usual.host, usual.memory_mib) == ("av mp3 44100 2", "a", 300)
    assert known["rhythm", 8].rate == pytest.approx(1.6 * usual.rate, rel=0.2)


def test_a_slowdown_by_a_third_is_found_within_200_cells_and_then_over(history: History) -> None:
    history.run(300)
    history.run(200, rhythm=1.3)
    found = history.trends()
    assert {name for name, trend in found.items() if trend.is_slower} == {"rhythm"}
    assert found["rhythm"].slowdown == pytest.approx(1.3, rel=0.07)
    history.run(200)
    assert history.slower() == set()
    history.run(200, decoding=1.3)
    assert history.slower() == {DECODING}


def test_the_metrics_say_so(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    forget_state()
    history.run(300)
    history.run(100, key=2.0)
    collector = ProductCollector(Observer(StateStore(None), history.rows))
    samples = {
        (sample.name, sample.labels["feature_set"]): sample.value
        for metric in collector.collect()
        for sample in metric.samples
        if sample.labels.get("host") == "a"
    }
    slower = "audio_assets_slower"
    assert {name for name, value in samples.items() if value == 1} == {(slower, "key")}
    assert samples["audio_assets_time_to_baseline_ratio", "rhythm"] == pytest.approx(1, rel=0.1)
    forget_state()


def test_of_few_cells_nothing_is_said(history: History) -> None:
    assert history.trends() == {}
    history.run(10)
    history.run(10, rhythm=3.0)
    assert history.slower() == set()
