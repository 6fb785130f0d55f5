"""The command line `audio-assets`."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from pandas import DataFrame

    from audio_assets.library import LibraryScan

app = typer.Typer(
    help="Audio features of whole music libraries: Dagster extracts, DuckDB answers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

TRACKS_SHOWN = 25
FAILURES_SHOWN = 25


class UserError(typer.Exit):
    """Ends the command with a message instead of a traceback.

    Parameters
    ----------
    message : str
        What was wrong and what to do.
    """

    def __init__(self, message: str) -> None:
        console.print(f"[red]{escape(message)}[/red]", highlight=False)
        super().__init__(2)


@app.callback()
def _prepare() -> None:
    """Give Dagster a home before anything of it is imported."""
    from audio_assets.settings import get_settings

    home = get_settings().dagster_home.expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["DAGSTER_HOME"] = str(home)
    get_settings.cache_clear()


@app.command()
def analyze(
    library: Annotated[
        str | None,
        typer.Argument(
            help="Directory of the library (or NAME=DIRECTORY, several separated by ':'). "
            "Without it AUDIO_LIBRARY, and without that a sample library made for the purpose.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compute again what is done and unchanged.")
    ] = False,
) -> None:
    """Extract every feature set of a library, through Dagster, and show what came of it."""
    import dagster as dg

    from audio_assets.analysis import register_files, run_batches
    from audio_assets.backlog import find_backlog, update_inventory
    from audio_assets.sample_library import make_sample_library
    from audio_assets.settings import get_settings
    from audio_assets.warehouse import open_landing, publish

    settings = get_settings()
    if library is None and settings.audio_library is None:
        directory = settings.dagster_home / "sample_library"
        with console.status("making a sample library"):
            make_sample_library(directory)
        library = str(directory)
    roots, scan = _scan(library)
    landing = open_landing()
    update_inventory(scan, roots, landing)
    files = [entry.file_key for entry in scan.files]
    todo = files if force else find_backlog(scan, landing)
    with dg.DagsterInstance.get() as instance:
        register_files(instance, files)
        if todo:
            run_batches(instance, todo, console, force=force)
        else:
            console.print("Nothing to compute: every file is as it was when it was analysed.")
    publish()
    unexplained = _show_results(settings.warehouse, list(roots))
    raise typer.Exit(1 if unexplained else 0)


@app.command("scan")
def scan_command(
    library: Annotated[
        str | None, typer.Argument(help="As for analyze.", show_default=False)
    ] = None,
) -> None:
    """Register a library's files as partitions, to launch backfills of in Dagster."""
    import dagster as dg

    from audio_assets.analysis import register_files
    from audio_assets.backlog import update_inventory
    from audio_assets.warehouse import open_landing

    roots, found = _scan(library)
    gone, _ = update_inventory(found, roots, open_landing())
    with dg.DagsterInstance.get() as instance:
        added = register_files(instance, [entry.file_key for entry in found.files])
    console.print(f"{added} new partitions; {gone} files have left the library.")


@app.command("publish")
def publish_command() -> None:
    """Bring the database up to what has landed."""
    from audio_assets.warehouse import publish

    result = publish()
    news = f"{sum(result.rows.values())} rows" if result.published else "nothing new"
    console.print(f"Version {result.version}: {news}, in {result.seconds:.1f} s.")


@app.command("status")
def status_command() -> None:
    """Show the latest runs, open breakers, quarantine and what is missing."""
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.queries import QueryError, status

    try:
        now = status(get_settings().warehouse)
    except QueryError as error:
        raise UserError(str(error)) from None
    console.print(
        f"Version {now.version} of {now.published_at:%Y-%m-%d %H:%M}: "
        f"{now.files} files, {now.gone} gone",
        highlight=False,
    )
    runs = now.runs[["run_id", "files", "cells_done", "cells_failed", "success_rate", "retries"]]
    for title, frame in (
        ("Latest runs", runs),
        ("Open breakers", now.open_breakers),
        ("Quarantine", now.quarantine),
        ("Missing", now.missing),
    ):
        if len(frame):
            console.print(_frame_table(frame, title))


quarantine_app = typer.Typer(help="Cells that failed by their files' own fault.")
app.add_typer(quarantine_app, name="quarantine")


@quarantine_app.command("list")
def quarantine_list() -> None:
    """Show what is in quarantine, and why."""
    from robustness.quarantine import Quarantine

    table = Table(_file_column(), "feature set", "error", "reason", "attempts")
    for cell in Quarantine().list():
        table.add_row(
            escape(cell.file_key),
            cell.feature_set,
            cell.error_type,
            escape(cell.reason),
            str(cell.attempts),
        )
    console.print(table if table.row_count else "Nothing is in quarantine.")


@quarantine_app.command("release")
def quarantine_release(
    pattern: Annotated[str, typer.Argument(help="File key, pattern (*, ?) or content hash.")],
    feature_set: Annotated[
        str | None, typer.Option(help="Only this feature set.", show_default=False)
    ] = None,
) -> None:
    """Let cells out, so that the next run tries them again."""
    from robustness.quarantine import Quarantine

    console.print(f"{Quarantine().release(pattern, feature_set)} cells let out.")


breakers_app = typer.Typer(help="Circuit breakers.")
app.add_typer(breakers_app, name="breakers")


@breakers_app.command("list")
def breakers_list() -> None:
    """Show every breaker's state."""
    from robustness.circuit_breaker import all_circuit_breakers

    table = Table("breaker", "state", "failures", "successes", "last error")
    for name, breaker in sorted(all_circuit_breakers().items()):
        stats = breaker.get_stats()
        table.add_row(
            name,
            stats["state"],
            str(stats["failure_count"]),
            str(stats["success_count"]),
            escape(stats["last_error"] or ""),
        )
    console.print(table)


@breakers_app.command("reset")
def breakers_reset(name: Annotated[str, typer.Argument(help="Name of the breaker.")]) -> None:
    """Close a breaker and forget its failures."""
    from robustness.circuit_breaker import all_circuit_breakers

    breakers = all_circuit_breakers()
    if name not in breakers:
        raise UserError(f"There is no breaker {name!r}; there are {', '.join(sorted(breakers))}.")
    breakers[name].reset()
    console.print(f"{name} is closed.")


def _scan(library: str | None) -> tuple[dict[str, Path], "LibraryScan"]:
    from audio_assets.library import Library
    from audio_assets.roots import library_roots, remember_roots

    try:
        roots = remember_roots(library) if library else library_roots()
        with console.status("looking for audio files"):
            scan = Library(roots).scan()
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    _show_scan(roots, scan)
    if not scan.files:
        raise UserError("There is no audio file in it.")
    return roots, scan


def _show_scan(roots: Mapping[str, Path], scan: "LibraryScan") -> None:
    where = ", ".join(str(root) for root in roots.values())
    console.print(f"{len(scan.files)} audio files in {escape(where)}", highlight=False)
    for left_out in scan.left_out:
        console.print(f"  left out: {escape(left_out.file_key)}: {left_out.reason}", style="dim")


def _show_results(warehouse: Path, root_names: Sequence[str]) -> int:
    """Show a library's tracks and what failed; return how many cells failed not by the file."""
    from audio_assets.warehouse.publisher import reading

    of_roots = "split_part(file_key, '/', 1) IN (SELECT unnest(?))"
    with reading(warehouse) as connection:
        tracks = connection.execute(
            "SELECT file_key, bpm, key.key || ' ' || key.scale, "
            "integrated_lufs, danceability, top_tag "
            "FROM features.tracks LEFT JOIN features.key USING (file_key) "
            f"WHERE NOT gone AND {of_roots} ORDER BY file_key",
            [root_names],
        ).fetchall()
        failures = connection.execute(
            "SELECT missing.file_key, missing.reason, list(feature_set ORDER BY feature_set), "
            "count(*) FILTER (quarantine.reason IS NULL) "
            "FROM features.missing LEFT JOIN library.files USING (file_key) "
            "LEFT JOIN robustness.quarantine USING (content_hash, feature_set) "
            f"WHERE {of_roots.replace('file_key', 'missing.file_key')} "
            "GROUP BY ALL ORDER BY missing.file_key",
            [root_names],
        ).fetchall()
    table = Table(_file_column(), "bpm", "key", "LUFS", "danceability", "tag", title="Tracks")
    for row in tracks[:TRACKS_SHOWN]:
        table.add_row(*map(_shown, row))
    _print_table(table, len(tracks))
    if failures:
        table = Table(_file_column(), "reason", "feature sets", title="What could not be had")
        for file_key, reason, feature_sets, _ in failures[:FAILURES_SHOWN]:
            table.add_row(escape(file_key), escape(reason), ", ".join(feature_sets))
        _print_table(table, len(failures))
    console.print(f"\nThe results are in [bold]{escape(str(warehouse))}[/bold]. Try:")
    command = os.path.relpath(Path(sys.executable).with_name("audio-assets"))
    console.print(
        f'{escape(command)} query "SELECT file_key, bpm, key FROM features.tracks '
        'ORDER BY danceability DESC LIMIT 10"',
        highlight=False,
        soft_wrap=True,
    )
    console.print("Next: [bold]make dev[/bold] opens Dagster on http://localhost:3000.")
    return sum(unexplained for *_, unexplained in failures)


def _file_column() -> Column:
    return Column("file", overflow="fold", ratio=1)


def _print_table(table: Table, rows: int) -> None:
    console.print(table)
    if rows > table.row_count:
        console.print(f"  and {rows - table.row_count} more", style="dim")


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.1f}"
        case _:
            return escape(str(value))


@app.command("query")
def query_command(
    sql: Annotated[str, typer.Argument(help="Any SQL that only reads.")],
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:
    """Run a query on the results, while runs and publishing go on."""
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.queries import QueryError, query

    try:
        frame = query(get_settings().warehouse, sql)
    except QueryError as error:
        raise UserError(str(error)) from None
    if csv:
        typer.echo(frame.to_csv(index=False), nl=False)
        return
    console.print(_frame_table(frame))


def _frame_table(frame: "DataFrame", title: str | None = None) -> Table:
    table = Table(*(Column(str(name), overflow="fold") for name in frame.columns), title=title)
    for row in frame.itertuples(index=False):
        table.add_row(*(escape(str(value)) for value in row))
    return table
