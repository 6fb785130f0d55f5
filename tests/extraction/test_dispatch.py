"""Which stage a worker takes next."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from audio_assets.audio.pcm import SourceInfo
from audio_assets.extraction.cells import FileWork, StageState
from audio_assets.extraction.dispatch import Dispatcher
from audio_assets.extraction.recovery import AttemptOptions
from audio_assets.extraction.results import Attempt
from audio_assets.extraction.scratch import Scratch
from audio_assets.library.files import FileStamp, Identity
from audio_assets.library.scan import Library
from robustness.circuit_breaker import get_circuit_breaker
from robustness.worker_pool import TaskSource, WorkerPool, WorkerTask
from tests import faults

pytestmark = pytest.mark.usefixtures("own_state")

SETS = [faults.feature_set(name, faults.sound) for name in ("one", "two")]


class IdlePool:
    """Workers that take a task when the test says so."""

    size, given_up = 2, 0

    def __init__(self) -> None:
        self.tasks: dict[int, WorkerTask] = {}

    def draw_from(self, source: TaskSource) -> None:
        self._source = source

    def wake(self) -> None:
        pass

    def ask(self, pid: int) -> str | None:
        """Have a worker ask for a task; return what it got, as ``file: what``."""
        task = self._source(pid)
        if task is None:
            return None
        self.tasks[pid] = task
        function, *arguments = task.fn, *task.args
        if function.__name__ == "identify":
            return f"{str(arguments[1]).removeprefix('music/')}: identify"
        what = arguments[1].name if function.__name__ == "extract" else function.__name__
        return f"{arguments[0].path.name}: {what}"

    def end(self, pid: int, result: object = None) -> None:
        """Have a worker end its task."""
        self.tasks.pop(pid).future.set_result(result)


@pytest.fixture
def pool() -> IdlePool:
    return IdlePool()


@pytest.fixture
def dispatcher(pool: IdlePool, tmp_path: Path) -> Dispatcher:
    library = Library({"music": tmp_path})
    return Dispatcher(library, cast("WorkerPool", pool), Scratch(tmp_path, "run", 1))


def file(name: str, *, is_decoded: bool = True) -> FileWork:
    work = FileWork(f"music/{name}", SETS)
    work.identity = Identity(name, 1, 1, 1.0)
    work.stamp = FileStamp(1, 1, 1, 1, 1)
    work.identify.state = work.duration.state = StageState.DONE
    work.is_planned = True
    if is_decoded:
        work.decode.state = StageState.DONE
    return work


def conclude(dispatcher: Dispatcher, *, state: StageState = StageState.DONE) -> None:
    """Take in the next end as the engine does."""
    attempt = dispatcher.ends.get_nowait()
    assert isinstance(attempt, Attempt)
    attempt.stage.state = state


def asked(pool: IdlePool, pids: Sequence[int]) -> list[str | None]:
    return [pool.ask(pid) for pid in pids]


def test_a_worker_stays_with_its_file_and_then_helps(
    dispatcher: Dispatcher, pool: IdlePool
) -> None:
    dispatcher.place(file("a", is_decoded=False), file("b"))
    assert asked(pool, [1, 2]) == ["a: decode_file", "b: one"]
    pool.end(1, SourceInfo("pcm", "wav", 44100, 1, 1.0, "av", 0))
    assert pool.ask(1) == "a: one"
    pool.end(2)
    conclude(dispatcher)
    assert pool.ask(2) == "b: two"
    pool.end(2)
    assert pool.ask(2) == "a: two"  # what worker 1 would have done next
    pool.end(1)
    assert pool.ask(1) is None


def test_nobody_else_decodes_a_file_that_is_being_decoded(
    dispatcher: Dispatcher, pool: IdlePool
) -> None:
    dispatcher.place(file("a", is_decoded=False))
    assert asked(pool, [1, 2]) == ["a: decode_file", None]


def test_one_worker_identifies_ahead_of_the_others(dispatcher: Dispatcher, pool: IdlePool) -> None:
    new = [FileWork(f"music/{name}", SETS) for name in "cde"]
    dispatcher.place(file("a"), file("b"), *new)
    assert asked(pool, [1, 2, 3, 4]) == ["c: identify", "a: one", "b: one", "d: identify"]


def test_file_without_a_readable_header_comes_last(dispatcher: Dispatcher, pool: IdlePool) -> None:
    slow = file("slow")
    slow.duration.state = StageState.FAILED
    dispatcher.place(slow, file("a"), FileWork("music/new", SETS))
    assert asked(pool, [1, 2, 3]) == ["new: identify", "a: one", "slow: one"]


def test_what_runs_alone_waits_for_the_others_and_they_for_it(
    dispatcher: Dispatcher, pool: IdlePool
) -> None:
    large = file("large")
    large.cells["one"].options = AttemptOptions(alone=True)
    dispatcher.place(file("a"))
    assert pool.ask(1) == "a: one"
    dispatcher.place(large)
    assert pool.ask(2) is None
    pool.end(1)
    conclude(dispatcher)
    assert pool.ask(2) == "large: one"
    assert pool.ask(1) is None
    pool.end(2)
    conclude(dispatcher)
    assert asked(pool, [2, 1]) == ["large: two", "a: two"]


def test_open_breaker_stops_its_own_stages_alone(dispatcher: Dispatcher, pool: IdlePool) -> None:
    get_circuit_breaker("feature:one").force_open()
    first = file("a")
    dispatcher.place(first, file("b"))
    assert asked(pool, [1, 2]) == ["a: two", "b: two"]
    refused = [dispatcher.ends.get_nowait() for _ in range(dispatcher.ends.qsize())]
    assert [(stage.file.key, refusal.name) for stage, refusal in refused] == [  # type: ignore[misc]
        ("music/a", "feature:one"),
        ("music/b", "feature:one"),
    ]


def test_files_are_planned_together_when_none_is_left_for_a_worker(
    dispatcher: Dispatcher, pool: IdlePool
) -> None:
    planned, identified = file("a"), file("b")
    identified.is_planned = False
    dispatcher.place(planned, identified, FileWork("music/new", SETS))
    assert dispatcher.to_plan() == []
    assert asked(pool, [1, 2]) == ["new: identify", "a: one"]
    assert dispatcher.to_plan() == [identified]
