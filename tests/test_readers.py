"""Who reads while a library is analysed neither disturbs nor is disturbed."""

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import duckdb
import pytest

from audio_assets.features import FEATURE_SETS
from tests.conftest import Home
from tests.test_kills import add_files, differences, publishing
from tests.warehouse.rows import queried

context = multiprocessing.get_context("spawn")

COUNTS = ", ".join(f"(SELECT count(*) FROM features.{name}) AS {name}" for name in FEATURE_SETS)
DONE = ", ".join(
    f"(SELECT count(DISTINCT file_key) FROM robustness.attempts WHERE feature_set = '{name}' "
    "AND outcome IN ('succeeded', 'reused') AND file_key NOT IN "
    f"(SELECT file_key FROM features.{name})) AS {name}_lost"
    for name in FEATURE_SETS
)
QUESTION = f"SELECT (SELECT version FROM publishing.version) AS version, {COUNTS}, {DONE}"
"""Rows of the nine tables, and cells said to be done without one: all of one version."""


def hold(warehouse: Path, told: Connection) -> None:
    """Hold the database open from start to end, and ask again and again."""
    with duckdb.connect(str(warehouse), read_only=True) as connection:
        while not told.poll(0.5):
            told.send(connection.execute(QUESTION).df().iloc[0].to_dict())
    told.recv()


def ask(warehouse: Path, told: Connection) -> None:
    """Open, ask and close again and again."""
    while not told.poll(0.2):
        told.send(queried(warehouse, QUESTION).iloc[0].to_dict())
    told.recv()


class Reader:
    """A process that reads, and its answers."""

    def __init__(self, task: object, warehouse: Path) -> None:
        self._told, other = context.Pipe()
        self._process = context.Process(target=task, args=(warehouse, other), daemon=True)
        self._process.start()
        other.close()
        self.answers: list[dict[str, int]] = [self._told.recv()]

    def listen(self) -> None:
        while self._told.poll():
            self.answers.append(self._told.recv())

    def stop(self) -> list[dict[str, int]]:
        self._told.send("stop")
        try:
            while True:
                self.answers.append(self._told.recv())
        except EOFError:
            self._process.join()
        assert self._process.exitcode == 0, "a query failed"
        return self.answers


def read_while_analysing(home: Home, library: Path) -> tuple[list[dict[str, int]], ...]:
    """Analyse a library beside a publisher; return what the holder and the asker were told."""
    with publishing(home):
        holder, asker = Reader(hold, home.warehouse), Reader(ask, home.warehouse)
        run = home.start("analyze", str(library))
        while run.poll() is None:
            holder.listen()
            asker.listen()
            time.sleep(0.2)
        output, errors = run.communicate()
        assert run.returncode == 0, output + errors
        # What the run landed last is there with the next version, which the asker sees.
        done = home.cli("publish")
        assert done.returncode == 0, done.stdout + done.stderr
        time.sleep(1.0)
    return holder.stop(), asker.stop()


def assert_consistent(held: list[dict[str, int]], asked: list[dict[str, int]]) -> None:
    assert len({tuple(answer.items()) for answer in held}) == 1
    for version in {answer["version"] for answer in asked}:
        assert len({tuple(a.items()) for a in asked if a["version"] == version}) == 1
    versions = [answer["version"] for answer in asked]
    assert versions == sorted(versions)
    assert versions[0] < versions[-1]
    for answer in (*held, *asked):
        assert not {name: lost for name, lost in answer.items() if name.endswith("_lost") and lost}
    print(
        f"held version {held[0]['version']} for {len(held)} answers; {len(asked)} times opened and "
        f"asked, {len(set(versions))} versions seen"
    )


@pytest.mark.timeout(600)
def test_readers_and_runs_do_not_disturb_each_other(home: Home, tmp_path: Path) -> None:
    library = tmp_path / "music"
    add_files(library, random.Random(2))
    assert home.cli("analyze", str(library)).returncode == 0
    add_files(library, random.Random(3), count=3)
    held, asked = read_while_analysing(home, library)
    assert_consistent(held, asked)
    assert {held[0][name] for name in FEATURE_SETS} == {2}
    assert {asked[-1][name] for name in FEATURE_SETS} == {5}
    assert differences(home, library) == []
