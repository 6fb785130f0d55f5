"""The commands that read and publish the results."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from audio_assets.cli.breakers import COLUMNS as BREAKER_COLUMNS
from audio_assets.cli.breakers import breaker_rows
from audio_assets.cli.endings import ExitCode, UserError
from audio_assets.cli.printing import (
    AsCsv,
    AsJson,
    Raw,
    TablesAsCsv,
    TablesAsJson,
    console,
    print_json,
    print_table,
    records,
    shown_time,
)
from audio_assets.library.text import counted

Sql = Annotated[
    str | None,
    typer.Argument(
        help="SQL; of several statements, the last one's result is printed.", show_default=False
    ),
]
SqlFile = Annotated[
    Path | None, typer.Option(help="Read the SQL from a file.", exists=True, dir_okay=False)
]


def given_sql(sql: str | None, file: Path | None) -> str:
    """Return the SQL that a command was given, as an argument or in a file."""
    if sql is not None and file is None:
        return sql
    if file is None or sql is not None:
        raise UserError('Give either SQL, as in: query "FROM features.tracks", or --file.')
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from None


def query(
    sql: Sql = None,
    file: SqlFile = None,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
    raw: Raw = False,
) -> None:
    """Query the results, also during runs and publishing.

    It reads the database's tables. It cannot write, open other files, connect or load extensions.
    """
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.queries import QueryError, query

    question = given_sql(sql, file)
    try:
        result = query(get_settings().warehouse, question)
    except QueryError as error:
        raise UserError(str(error)) from None
    print_table(result.columns, result.rows, as_csv=as_csv, as_json=as_json, raw=raw)


def status(
    as_csv: TablesAsCsv = False,
    as_json: TablesAsJson = False,
) -> None:
    """Show the latest runs, open breakers, the quarantine, degraded and missing cells."""
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.queries import QueryError, status
    from robustness.circuit_breaker import all_circuit_breakers
    from robustness.quarantine import Quarantine

    try:
        now = status(get_settings().warehouse)
    except QueryError as error:
        raise UserError(str(error), ExitCode.FAILED) from None
    # Breakers and the quarantine as they are now, not as published.
    breakers = [
        breaker
        for breaker in all_circuit_breakers().values()
        if breaker.get_state() != "CLOSED" or breaker.get_stats()["forced"]
    ]
    cells = Counter((cell.feature_set, cell.error_type) for cell in Quarantine().list())
    quarantined = [(*names, number) for names, number in sorted(cells.items())]
    tables = {
        "Latest runs": (now.runs.columns, now.runs.rows),
        "Breakers open or set by hand": (BREAKER_COLUMNS, breaker_rows(breakers)),
        "Quarantine": (("feature_set", "error_type", "cells"), quarantined),
        "Degraded cells": (now.degraded.columns, now.degraded.rows),
        "Missing cells": (now.missing.columns, now.missing.rows),
    }
    if as_json:
        head = {
            "version": now.version,
            "published_at": now.published_at,
            "files": now.files,
            "gone": now.gone,
        }
        names = ("runs", "breakers", "quarantine", "degraded", "missing")
        lists = (records(*table) for table in tables.values())
        print_json(head | dict(zip(names, lists, strict=True)))
        return
    if not as_csv:
        console.print(
            f"Version {now.version} of {shown_time(now.published_at)}: "
            f"{counted(now.files, 'file')}, {now.gone} gone",
            highlight=False,
        )
    for number, (title, (columns, rows)) in enumerate(tables.items()):
        if as_csv and number:
            console.print()
        if rows or as_csv:
            print_table(columns, rows, title, as_csv=as_csv)


def publish(
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make the database anew from the landing.")
    ] = False,
) -> None:
    """Publish the results of runs to the database; one that was changed or damaged is made anew."""
    from audio_assets.warehouse import publish

    result = publish(rebuild=rebuild)
    news = counted(sum(result.rows.values()), "row") if result.published else "nothing new"
    console.print(f"Version {result.version}: {news}, in {result.seconds:.1f} s.")
