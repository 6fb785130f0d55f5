"""What `audio-assets top` shows: the overview of the operations page, in a terminal."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import SegmentLines
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
    "findings": ("Findings", ("severity", "what", "since")),
    "throughput": ("Throughput", ("time", "cells/s", "of usual", "audio s/s", "audio of usual")),
    "workers": ("Workers", ("host", "feature set", "file", "for s", "timeout s", "MiB")),
    "runs": ("Runs", ("run", "host", "files", "of", "waits for")),
    "failing": ("Failing, the latest first", ("file", "feature sets", "error", "last")),
    "errors": ("Errors of the last day", ("error", "attempts")),
    "breakers": ("Breakers open or set by hand", ("breaker", "state", "by hand", "why")),
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
        Live(console=console, screen=True, auto_refresh=False) as shown,
    ):
        while True:
            shown.update(_fitting(_drawn(watched.overview()), console), refresh=True)
            time.sleep(INTERVAL_S)


def _fitting(drawn: RenderableType, console: Console) -> RenderableType:
    """Return as many lines as the terminal has; the last says how many are left out."""
    lines = console.render_lines(drawn, pad=False)
    kept = console.height - 1
    if len(lines) <= console.height:
        return drawn
    more = Text(f"… {len(lines) - kept} more lines: `audio-assets top --once` prints them", "dim")
    return Group(SegmentLines(lines[:kept], new_lines=True), more)


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
    if interval:
        yield Text(interval, "dim")
    for reason in overview.unknown:
        yield Text(reason, "yellow")


def _tables(overview: Overview) -> Iterator[RenderableType]:
    for name, (title, columns) in TABLES.items():
        part = overview.parts[name]
        if name == "errors":
            part = _by_type(part)
        if part.rows:
            yield Text(f"\n{title}", "italic")
            yield _table(part, columns)


def _table(part: Part, columns: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    chosen = [part.columns.index(column) for column in columns]
    for i, column in zip(chosen, columns, strict=True):
        are_numbers = isinstance(part.rows[0][i], int | float)
        are_texts = any(isinstance(row[i], str) for row in part.rows)
        # Rich takes the width that it lacks from columns that may be wrapped.
        table.add_column(
            _line(column), justify="right" if are_numbers else "left", no_wrap=not are_texts
        )
    for row in part.rows[:ROWS]:
        table.add_row(*(_line(as_text(row[i])) for i in chosen))
    return table


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _by_type(part: Part) -> Part:
    """Return the errors of the last day, each type once."""
    counts: Counter[str] = Counter()
    for _, error, attempts in part.rows:
        counts[error] += attempts
    return Part(("error", "attempts"), tuple(counts.most_common()))
