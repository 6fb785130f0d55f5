"""What `audio-assets top` shows: the overview of the operations page, in a terminal."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from audio_assets.cli.printing import console
from audio_assets.monitoring.health import examine
from audio_assets.monitoring.overview import Overview, Part, as_text, observer
from audio_assets.monitoring.watcher import Watcher

INTERVAL_S = 2.0
ONCE_S = 60.0
"""How long to wait for a source where it is shown once (s)."""

ROWS = 10
"""Rows of a table."""

STYLES = {"well": "green", "degraded": "yellow", "broken": "red", "unknown": "dim"}

TABLES = {
    "findings": ("What is not well", ("severity", "what", "since")),
    "throughput": ("Throughput", ("time", "cells/s", "of usual", "audio s/s", "audio of usual")),
    "workers": ("Workers", ("host", "feature set", "file", "for s", "timeout s", "MiB")),
    "runs": ("Runs", ("run", "host", "files", "of", "waits for")),
    "failing": ("Failing, the latest first", ("file", "feature set", "error", "last")),
    "errors": ("Errors of the last day", ("error", "attempts")),
    "breakers": ("Breakers that are not closed", ("breaker", "state", "since", "why")),
    "transitions": ("Breakers in the last day", ("time", "breaker", "to", "why")),
    "slowest": ("Slowest of the last day", ("file", "feature set", "s", "s of audio")),
    "timeouts": (
        "Timeouts of the last day",
        ("feature set", "given s", "used s", "used, 95 %", "timed out"),
    ),
    "memory": ("Memory of workers", ("feature set", "MiB, 95 %", "MiB at most", "budget MiB")),
}
"""Title and columns of each part, in 80 columns."""


def show(*, live: bool) -> None:
    """Print an overview once, or live until Ctrl-C."""
    watched = observer()
    if not live:
        findings = examine(watched.store)
        watched.findings = lambda: findings
        console.print(_drawn(watched.overview(ONCE_S)), soft_wrap=False)
        return
    watcher = Watcher(watched.store)
    watched.findings = lambda: watcher.findings
    watcher.start()
    with (
        suppress(KeyboardInterrupt),
        Live(_drawn(watched.overview()), console=console, screen=True, auto_refresh=False) as shown,
    ):
        while True:
            time.sleep(INTERVAL_S)
            shown.update(_drawn(watched.overview()), refresh=True)


def _drawn(overview: Overview) -> Group:
    return Group(*_headline(overview), *_tables(overview))


def _headline(overview: Overview) -> Iterator[RenderableType]:
    end, interval = overview.end_shown
    left = "?" if overview.cells_left is None else f"{overview.cells_left:,}"
    yield Text.assemble(
        ("audio-assets ", "bold"),
        (overview.health, STYLES[overview.health]),
        f"   cells left {left}   all done {end}   at {overview.taken_at.astimezone():%H:%M:%S}",
    )
    yield Text(interval, "dim")


def _tables(overview: Overview) -> Iterator[RenderableType]:
    for name, (title, columns) in TABLES.items():
        part = overview.parts[name]
        if name == "errors":
            part = _by_type(part)
        if part.unknown:
            yield Text.assemble((f"\n{title}: ", "italic"), (part.unknown, "yellow"))
        elif part.rows:
            yield Text(f"\n{title}", "italic")
            yield _table(part, columns)


def _table(part: Part, columns: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    chosen = [part.columns.index(column) for column in columns]
    for i, column in zip(chosen, columns, strict=True):
        are_numbers = isinstance(part.rows[0][i], int | float)
        table.add_column(Text(column), justify="right" if are_numbers else "left", no_wrap=True)
    for row in part.rows[:ROWS]:
        table.add_row(*(Text(as_text(row[i])) for i in chosen))
    return table


def _by_type(part: Part) -> Part:
    """Return the errors of the last day, each type once."""
    counts: Counter[str] = Counter()
    for _, error, attempts in part.rows:
        counts[error] += attempts
    return Part(("error", "attempts"), tuple(counts.most_common()), part.unknown)
