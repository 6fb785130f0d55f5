"""The landing and the publisher under kill -9, rivals and readers: real processes all."""

import multiprocessing
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from audio_assets.warehouse.database import reading
from tests.warehouse import processes
from tests.warehouse.processes import CONSISTENT, Task
from tests.warehouse.rows import all_rows, attempt, landing_of, mfcc, publisher_of, rhythm

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([processes.__name__])


class Running:
    """A process and its reports."""

    def __init__(self, task: Task, *arguments: object) -> None:
        self._receiver: Connection
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=task, args=(*arguments, sender), daemon=True)
        self._process.start()
        sender.close()
        self.reported: list[Any] = []

    def listen(self, seconds: float = 0.0) -> list[Any]:
        """Receive reports, for a time or as long as there are some."""
        try:
            while self._receiver.poll(seconds):
                self.reported.append(self._receiver.recv())
                seconds = 0.0
        except EOFError:
            assert self._process.exitcode in (None, -signal.SIGKILL)
        return self.reported

    def kill(self) -> list[Any]:
        assert self._process.is_alive(), "the process failed by itself"
        self._process.kill()
        self._process.join()
        try:
            while True:
                self.reported.append(self._receiver.recv())
        except (EOFError, OSError):
            return self.reported


@contextmanager
def running(task: Task, *arguments: object) -> Iterator[Running]:
    process = Running(task, *arguments)
    try:
        yield process
    finally:
        process._process.kill()


def published(root: Path, sql: str) -> list[Any]:
    with reading(root / "warehouse.duckdb") as connection:
        return connection.execute(sql).fetchall()


def test_killed_writers_lose_and_duplicate_no_reported_row(tmp_path: Path) -> None:
    rng = random.Random(3)
    reported: set[tuple[str, str]] = set()
    landing = landing_of(tmp_path)
    for number in range(6):
        with running(processes.write, tmp_path, f"writer {number}") as writer:
            writer.listen(30.0)
            writer.listen(rng.uniform(0.0, 0.15))
            reported |= set(writer.kill())
        for table in ("features/rhythm", "features/mfcc", "robustness/attempts"):
            landing.compact(table)
    for table in ("features/rhythm", "features/mfcc", "robustness/attempts"):
        keys = [row["file_key"] for row in all_rows(landing, table, ["file_key"])]
        assert len(keys) == len(set(keys))
        assert {key for name, key in reported if name == table} <= set(keys)


def test_killed_publishers_leave_whole_versions_and_readers_never_notice(tmp_path: Path) -> None:
    rng = random.Random(4)
    landing, publisher = landing_of(tmp_path), publisher_of(tmp_path)
    landing.append("features/rhythm", [rhythm("held")])
    landing.append("features/mfcc", [mfcc("held")])
    landing.append("robustness/attempts", [attempt("held")])
    publisher.publish()
    with (
        running(processes.hold, tmp_path) as holder,
        running(processes.ask, tmp_path) as asker,
    ):
        for number in range(4):
            with (
                running(processes.write, tmp_path, f"writer {number}") as writer,
                running(processes.publish, tmp_path) as one,
                running(processes.publish, tmp_path) as other,
            ):
                one.listen(30.0)
                for process in rng.sample([writer, one, other], 3):
                    process.listen(rng.uniform(0.0, 0.2))
                    process.kill()
            asker.listen(30.0)
            holder.listen()
        answers, held = asker.kill(), holder.kill()
    publisher.publish()

    assert len({str(rows) for rows in held}) == 1
    assert [row[0] for row in held[0]] == ["held"]
    assert len({answer["version"] for answer in answers}) > 1
    versions = [answer["version"] for answer in answers]
    assert versions == sorted(versions)
    for answer in answers:
        assert answer["rows"] == answer["files"]
        assert (answer["lies"], answer["off"]) == (0, 0)

    for table in ("features/rhythm", "features/mfcc", "robustness/attempts"):
        written = [row["file_key"] for row in all_rows(landing, table, ["file_key"])]
        assert len(written) == len(set(written)) > 8
        rows = [
            key for (key,) in published(tmp_path, f"SELECT file_key FROM {table.replace('/', '.')}")
        ]
        assert sorted(rows) == sorted(written)
    [(rows, files, lies, off, _)] = published(tmp_path, CONSISTENT)
    assert (rows, lies, off) == (files, 0, 0)
    leftovers = {path.name for path in tmp_path.iterdir()}
    assert leftovers <= {
        "landing",
        "warehouse.duckdb",
        ".warehouse.duckdb.previous",
        ".warehouse.duckdb.lock",
    }
