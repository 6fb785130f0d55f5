"""Processes for tests of what many processes share."""

import gc
import multiprocessing
import os
import time
from collections.abc import Callable

import sqlalchemy as sa

from robustness.state import StateStore

processes = multiprocessing.get_context("fork")
"""Children start with all modules loaded, so that they race for the database at once."""

# What earlier tests left, with threads and libraries behind it that do not outlive a fork, is not
# for a child to free: its garbage collector crashed on it.
os.register_at_fork(after_in_child=gc.freeze)


def run_in_processes(count: int, function: Callable[..., None], *args: object) -> None:
    """Run a function in several processes at once; fail if it fails in any of them."""
    children = [processes.Process(target=function, args=args) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * count


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another process or thread brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def rows_of(store: StateStore, table: sa.Table) -> list[dict[str, object]]:
    """Return a table's rows in the order they were made."""
    query = sa.select(table)
    if "id" in table.c:
        query = query.order_by(table.c.id)
    return store.query(lambda c: [dict(row) for row in c.execute(query).mappings()])
