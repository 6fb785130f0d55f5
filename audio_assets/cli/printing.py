"""The one place that prints: text from files is shown as it is, and tables fit where they go.

A terminal gets a table, or one record per block where a table would cut words. Anything else gets
aligned columns of any width, CSV or JSON.
"""

import io
import json
import logging
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from audio_assets.library.text import four_digits, masked, plain, printable, write_csv

AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: a list of objects.")]
TablesAsCsv = Annotated[
    bool,
    typer.Option("--csv", help="Print CSV: the tables one after another, an empty line apart."),
]
TablesAsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON: an object with a list for each table.")
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="In CSV, leave control characters and formulas of spreadsheets as they are."
    ),
]

Rows = Sequence[Sequence[object]]

_GAP = "  "
_WORDS = re.compile(r"[^\s/]*[\s/]*")


class _Console(Console):
    """Shows every string as it is: what it prints may come from a file."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(masked(printable(text)), **options)


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(printable(super().format(record)))


console = _Console(markup=False, emoji=False, soft_wrap=True)
"""Leaves it to the terminal to break lines."""


def set_up_output() -> None:
    """Print any character, whatever the locale lacks, and log as `console` prints."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if logging.lastResort:
        logging.lastResort.setFormatter(_LogFormatter())


def print_table(
    columns: Sequence[str],
    rows: Rows,
    title: str | None = None,
    *,
    as_csv: bool = False,
    as_json: bool = False,
    raw: bool = False,
) -> None:
    """Print a table to a terminal, as aligned columns elsewhere, or as CSV or JSON.

    Parameters
    ----------
    columns : sequence of str
        Names of the columns.
    rows : sequence of sequence
        A value per column: a number, text, time, list, dict or None.
    title : str, optional
        Shown above a table.
    as_csv, as_json : bool
        Print that instead.
    raw : bool
        In CSV, leave control characters and formulas of spreadsheets as they are.
    """
    if as_json:
        print_json(records(columns, rows))
    elif as_csv:
        write_csv(sys.stdout, columns, rows, raw=raw)
    else:
        cells = [[_cell(value) for value in row] for row in rows]
        if not console.is_terminal:
            _print_aligned(columns, cells, title)
        else:
            _print_to_terminal([_one_line(name) for name in columns], cells, title)


def _print_to_terminal(columns: list[str], cells: list[list[str]], title: str | None) -> None:
    by_column = list(zip(columns, *cells, strict=True))
    # Words stay whole, also those of a name, and the parts of a path.
    narrowest = [
        max(cell_len(word.rstrip()) for word in _WORDS.findall(" ".join(texts)))
        for texts in by_column
    ]
    spare = console.width - sum(narrowest) - 3 * (len(columns) - 1)
    if spare < 0:
        _print_records(columns, cells, title)
        return
    wanted = [
        max(map(cell_len, texts)) - least for texts, least in zip(by_column, narrowest, strict=True)
    ]
    widths = list(narrowest)
    for shared, i in enumerate(sorted(range(len(columns)), key=wanted.__getitem__)):
        more = min(wanted[i], spare // (len(columns) - shared))
        widths[i] += more
        spare -= more
    if title:
        console.print(f"\n{title}", style="italic")
    table = Table(
        *(Column(Text(name), width=w) for name, w in zip(columns, widths, strict=True)),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for row in cells:
        table.add_row(*map(_wrapped, row, widths))
    console.print(table, soft_wrap=False)


def _wrapped(text: str, width: int) -> Text:
    lines = [""]
    for word in _WORDS.findall(text):
        if cell_len(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return Text("\n".join(map(str.rstrip, lines)))


def records(columns: Sequence[str], rows: Rows) -> list[dict[str, object]]:
    """Return the rows of a table as dicts."""
    return [dict(zip(columns, row, strict=True)) for row in rows]


def print_json(value: object) -> None:
    """Print a value as JSON, in ASCII, so that a terminal obeys nothing in it."""
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


def shown_time(time: datetime) -> str:
    """Return a time in the local time zone, with its name."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _print_aligned(columns: Sequence[str], cells: list[list[str]], title: str | None) -> None:
    lines = [[_one_line(name) for name in columns], *cells]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    if title:
        print(f"\n{title}")
    for line in lines:
        padded = (
            text + " " * (width - cell_len(text)) for text, width in zip(line, widths, strict=True)
        )
        print(_GAP.join(padded).rstrip())


def _print_records(columns: list[str], cells: list[list[str]], title: str | None) -> None:
    if title:
        console.print(f"\n{title}", style="italic")
    for number, row in enumerate(cells, 1):
        record = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
        for name, value in zip(columns, row, strict=True):
            record.add_row(Text(name, "bold"), Text(value))
        console.print(f"-- {number} " + "-" * 20, style="dim", highlight=False)
        console.print(record, soft_wrap=False)


def _cell(value: object) -> str:
    return _one_line(_text(value))


def _one_line(text: str) -> str:
    return masked(printable(text)).replace("\n", "\\n").replace("\t", "\\t")


def _text(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float() | Decimal():
            return four_digits(float(value))
        case datetime() if value.tzinfo:
            return shown_time(value)
        case list() | tuple():
            return f"[{', '.join(map(_text, value))}]"
        case dict():
            return f"{{{', '.join(f'{_text(k)}: {_text(v)}' for k, v in value.items())}}}"
        case _:
            return str(value)
