"""What goes on, and when all will be done, from generated rows."""

import io
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from audio_assets.cli import top
from audio_assets.features import FEATURE_SETS
from audio_assets.monitoring.estimate import Attempts, Left, estimate
from audio_assets.monitoring.health import open_store
from audio_assets.monitoring.landed import LandedRows
from audio_assets.monitoring.overview import COLUMNS, LONGEST, Observer, _Source
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish
from robustness.activity import report_activity
from robustness.circuit_breaker import get_circuit_breaker
from tests.conftest import forget_state
from tests.warehouse.rows import START, attempt, file

WORKERS = 3
SETS = {"chroma": 0.02, "rhythm": 0.05, "musicnn": 0.1}
"""Time of a worker per audio (s/s)."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    forget_state()
    yield tmp_path
    monkeypatch.undo()
    forget_state()


@pytest.fixture
def watched(home: Path) -> Observer:
    return Observer(open_store(), LandedRows(open_landing()))


def land(*rows: dict) -> None:
    open_landing().append("robustness/attempts", list(rows))


def ago(seconds: float) -> float:
    """Return what `attempt` takes for so long ago."""
    return (datetime.now(UTC) - START).total_seconds() - seconds


def simulated(seed: int, share: float) -> tuple[Left, Attempts, float, float]:
    """Return what is left after a share of a library was computed, and the time that takes."""
    rng = np.random.default_rng(seed)
    audio_s = rng.lognormal(5, 0.7, 300)
    free, jobs = [0.0] * WORKERS, []
    for seconds in audio_s:
        for name, cost in SETS.items():
            worker = int(np.argmin(free))
            began, free[worker] = (
                free[worker],
                free[worker] + cost * seconds * rng.lognormal(0, 0.3),
            )
            jobs.append((name, began, free[worker], seconds))
    done_files = int(share * len(audio_s))
    names, began, ended, audio = zip(*jobs[: done_files * len(SETS)], strict=True)
    until = float(min(sorted(ended)[-WORKERS:]))
    seen = audio_s[:done_files]
    left = Left(
        dict.fromkeys(SETS, 0.0),
        unseen=len(audio_s) - done_files,
        mean_s=float(seen.mean()),
        deviation_s=float(seen.std(ddof=1)),
        seen=done_files,
    )
    done = Attempts(names, *map(np.array, (began, ended, audio)))
    return left, done, until, max(free) - until


def test_interval_of_the_end_covers_the_true_one() -> None:
    covered = 0
    for seed in range(20):
        for share in (0.1, 0.25, 0.5):
            left, done, until, rest_s = simulated(seed, share)
            found = estimate(left, done, 0.0, until, {})
            assert found is not None
            covered += found.seconds.low <= rest_s <= found.seconds.high
            assert found.seconds.high < 2.5 * found.seconds.low
    assert 0.8 <= covered / 60 <= 0.99


def test_end_is_that_of_what_is_left_and_not_of_the_mix_before() -> None:
    _, done, until, _ = simulated(1, 0.5)
    cheap, dear = (
        estimate(Left({name: 10_000.0}), done, 0.0, until, {}) for name in ("chroma", "musicnn")
    )
    assert cheap is not None
    assert dear is not None
    assert 3 < dear.seconds.middle / cheap.seconds.middle < 8
    other = estimate(Left({"other": 10_000.0}), done, 0.0, until, {"other": SETS["musicnn"]})
    assert other is not None
    assert other.seconds.middle == pytest.approx(dear.seconds.middle, rel=0.2)
    nothing = estimate(Left({"chroma": 0.0}), done, 0.0, until, {})
    assert nothing is not None
    assert nothing.seconds.high == 0
    few = Attempts(done.feature_set[:5], done.began[:5], done.ended[:5], done.audio_s[:5])
    assert estimate(Left({"chroma": 1.0}), few, 0.0, until, {}) is None


def test_overview_has_the_slow_the_failing_and_the_workers(watched: Observer) -> None:
    bad, long = "music/\x1b[2J<b>.mp3", "music/" + "a" * 2**20
    land(
        *(attempt(f"{n}", at=ago(90 - n), duration_s=1.0 + n) for n in range(5)),
        attempt(bad, "key", "failed", at=ago(20), message="why\nnot" * 1000, error_type="memory"),
        attempt(long, "key", at=ago(20), duration_s=19.0),
        attempt("mended", "key", "failed", at=ago(20)),
        attempt("mended", "key", at=ago(10), attempt=2),
        attempt("text", "mfcc", "failed", at=ago(5), error_type="unsupported_format"),
        *(
            attempt(
                "text", name, "quarantined", at=ago(4), attempt=0, error_type="unsupported_format"
            )
            for name in FEATURE_SETS
        ),
    )
    worker = {
        "pid": 7,
        "file_key": long,
        "operation": "key",
        "stage": "extract",
        "seconds": 9.0,
        "timeout_s": 20.0,
        "idle_s": 0.0,
        "memory_mib": 300.0,
    }
    figures = dict.fromkeys(("files", "files_finished", "cells", "cells_finished"), 4)
    report_activity("run 1", {**figures, "waits_for": None, "workers": [worker]}, watched.store)
    get_circuit_breaker("feature:key").force_open()
    parts = watched.overview().parts
    assert not [name for name, part in parts.items() if part.unknown and name != "findings"]
    assert [row[1] for row in parts["throughput"].rows] == [7, 7, 7]
    assert len(parts["history"].rows) == 60
    [slowest, *_] = parts["slowest"].rows
    assert (slowest[2], len(slowest[0])) == (19.0, LONGEST)
    quarantined, failing = parts["failing"].rows
    assert quarantined[:3] == ("text", "all", "unsupported_format")
    assert failing[:3] == (r"music/\x1b[2J<b>.mp3", "key", "memory")
    assert "\n" not in failing[3]
    errors = sorted(row[1:] for row in parts["errors"].rows)
    assert errors == [("memory", 1), ("timeout", 1), ("unsupported_format", 1)]
    [busy] = parts["workers"].rows
    assert busy[1:4] == (7, "key", "extract")
    assert parts["breakers"].rows[0][:3] == ("feature:key", "OPEN", "open")
    by_set = {row[0]: row for row in parts["timeouts"].rows}
    assert by_set["rhythm"][1:4] == (5, 20.0, 3.0)
    assert by_set["key"][-1] == 1

    text = drawn(watched)
    assert max(map(len, text)) <= 80
    assert "\x1b" not in "".join(text)
    assert r"\x1b[2J<b>" in "".join(text)
    at = text.index("Slowest of the last day")
    assert text[at + 1].split() == ["file", "feature", "set", "s", "s", "of", "audio"]
    assert text[at + 3].split()[-3:] == ["key", "19", "200"]
    screen = drawn(watched, height=24)
    assert screen[:23] == text[:23]
    assert screen[23:] == [f"… {len(text) - 23} more lines: `audio-assets top --once` prints them"]


def drawn(watched: Observer, height: int | None = None) -> list[str]:
    """Return the lines of `audio-assets top`: in a terminal of a height, or of `--once`."""
    console = Console(file=io.StringIO(), width=80, height=height, record=True)
    shown = top._drawn(watched.overview())
    console.print(shown if height is None else top._fitting(shown, console))
    return console.export_text().splitlines()


def test_throughput_is_compared_where_work_went_on(watched: Observer) -> None:
    def of_usual() -> list[str | None]:
        time.sleep(1.1)
        return [row[3] for row in watched.overview().parts["throughput"].rows]

    land(*(attempt(f"{n}", at=ago(7000 - n), duration_s=1.0) for n in range(25)))
    now, *longer = of_usual()
    assert now
    assert longer == [None, None]
    land(*(attempt(f"again {n}", at=ago(3500 - 60 * n)) for n in range(58)))
    assert of_usual()[1]


def test_what_is_left_is_the_backlog_without_what_has_ended_since(watched: Observer) -> None:
    landing = open_landing()
    landing.append("library/files", [file(f"{n}", duration_s=100.0) for n in range(10)])
    land(attempt("0", "key", "failed", at=ago(100), error_type="corrupt_file"))
    publish()
    cells = 10 * len(FEATURE_SETS) - 1  # what failed waits for its file
    assert watched.overview().cells_left == cells
    land(*(attempt(f"{n}", "rhythm", at=ago(60 - n), duration_s=2.0) for n in range(3)))
    time.sleep(1.1)
    overview = watched.overview()
    assert (overview.cells_left, overview.end) == (cells - 3, None)
    assert "Too little" in (overview.end_unknown or "")
    land(*(attempt(f"{n}", "mfcc", at=ago(90 - 3 * n), duration_s=2.0) for n in range(10)))
    land(*(attempt(f"{n}", "chroma", at=ago(90 - 3 * n), duration_s=2.0) for n in range(10)))
    time.sleep(1.1)
    end = watched.overview().end
    assert end is not None
    assert 0 < end.seconds.low < end.seconds.middle < end.seconds.high
    assert end.speeds["mfcc"].middle == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    ("fault", "lost", "why"),
    [
        ("landing", {"throughput", "slowest", "failing", "errors", "timeouts"}, "is away"),
        ("state", {"runs", "workers", "breakers", "transitions"}, "cannot be used"),
        ("database", set(), "The database cannot be read"),
    ],
)
def test_each_part_says_what_it_does_not_know(
    home: Path, watched: Observer, fault: str, lost: set[str], why: str
) -> None:
    land(attempt("a", at=ago(60)))
    if fault == "landing":
        (home / "landing").rename(home / "away")
    elif fault == "state":
        locked = sqlite3.connect(home / "robustness.db", isolation_level=None)
        locked.execute("BEGIN EXCLUSIVE")
    else:
        get_settings().warehouse.write_bytes(b"of another program")
    overview = watched.overview()
    unknown = {name: part.unknown for name, part in overview.parts.items() if part.unknown}
    assert lost <= unknown.keys()
    assert len(set(overview.unknown)) == len(overview.unknown)
    assert "".join(drawn(watched)).count(why) == 1
    assert unknown.keys() - lost <= {"findings", "history", "memory"}
    assert why in f"{[unknown[name] for name in lost]}{overview.end_unknown}"
    assert overview.parts.keys() == COLUMNS.keys()


def test_a_source_that_hangs_is_not_waited_for() -> None:
    released = threading.Event()
    source = _Source("The disk", lambda: released.wait(60))
    for _ in range(2):
        source.begin()
        assert "The disk is being read" in str(source.ask(time.monotonic() + 0.01))
    released.set()
    source.begin()
    assert source.ask(time.monotonic() + 60) is True
