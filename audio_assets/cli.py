"""The command line `audio-assets`."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from pandas import DataFrame

    from audio_assets.library import LibraryScan
    from robustness.circuit_breaker import CircuitBreaker

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


def main() -> None:
    """Run the command line; what its surroundings fail of is told in a line."""
    try:
        app()
    except Exception as error:
        from robustness.error_classifier import ErrorType, get_error_classifier

        info = get_error_classifier().classify(error)
        if info.error_type is ErrorType.UNKNOWN:
            raise  # a defect: the traceback is what to report
        console.print(f"[red]{escape(info.reason)}[/red]", highlight=False)
        console.print("`audio-assets doctor` says what to do.")
        sys.exit(1)


@app.callback()
def _prepare(context: typer.Context) -> None:
    """Give Dagster a home before anything of it is imported."""
    from pydantic import ValidationError

    from audio_assets.settings import PROJECT_DAGSTER_HOME, get_settings

    os.environ["DAGSTER_HOME"] = os.environ.get("DAGSTER_HOME") or str(PROJECT_DAGSTER_HOME)
    if context.invoked_subcommand == "doctor":
        return  # it says itself what is wrong with the settings
    try:
        home = get_settings().dagster_home.expanduser().absolute()
        home.mkdir(parents=True, exist_ok=True)
    except (ValidationError, OSError) as error:
        raise UserError(f"{error}\n`audio-assets doctor` says what to do.") from None
    os.environ["DAGSTER_HOME"] = str(home)
    get_settings.cache_clear()


@app.command()
def analyze(
    library: Annotated[
        str | None,
        typer.Argument(
            help="Directory of the library (or NAME=DIRECTORY, several separated by ':'). "
            "Without it those known already, and where there is none, a sample library.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compute again what is done and unchanged.")
    ] = False,
) -> None:
    """Extract every feature set of a library, through Dagster, and show what came of it."""
    from audio_assets.analysis import run_batches
    from audio_assets.backlog import find_backlog
    from audio_assets.discovery import register
    from audio_assets.roots import library_roots
    from audio_assets.run_requests import materialized_files
    from audio_assets.sample_library import make_sample_library
    from audio_assets.settings import get_settings
    from audio_assets.warehouse import open_landing, publish

    settings = get_settings()
    sample = settings.dagster_home / "sample_library"
    if library is None and all(root == sample.resolve() for root in library_roots().values()):
        with console.status("making a sample library"):
            make_sample_library(sample)
        library = str(sample)
    roots, scan = _scan(library)
    landing = open_landing()
    with _open_instance() as instance:
        register(instance, scan, roots, landing)
        if force:
            todo = [entry.file_key for entry in scan.files]
        else:
            todo = find_backlog(scan.files, landing, materialized_files(instance)).todo
        if todo:
            try:
                run_batches(instance, todo, console, force=force)
            except KeyboardInterrupt:
                console.print("Interrupted. What is done is kept; run the command again to go on.")
                raise typer.Exit(130) from None
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
    from audio_assets.discovery import register
    from audio_assets.warehouse import open_landing

    roots, found = _scan(library)
    with _open_instance() as instance:
        registered = register(instance, found, roots, open_landing())
    console.print(
        f"{registered.added} new partitions; {registered.gone} files have left the library, "
        f"{registered.removed} partitions with them."
    )
    if registered.to_remove:
        console.print(
            f"{registered.to_remove} partitions of such files stay until no run is under way."
        )


@app.command("forget")
def forget_command(
    name: Annotated[str, typer.Argument(help="Name of the directory, as file keys begin.")],
) -> None:
    """Look no more for files in a directory given to analyze or scan; its results stay."""
    from audio_assets.discovery import forget, is_busy
    from audio_assets.warehouse import open_landing, publish

    with _open_instance() as instance:
        if is_busy(instance):
            raise UserError("Runs are under way that may need its files: try again after them.")
        try:
            forgotten = forget(instance, name, open_landing())
        except ValueError as error:
            raise UserError(str(error)) from None
    publish()
    console.print(f"{name} is forgotten, with {forgotten.removed} partitions; its results stay.")


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
    from robustness.circuit_breaker import all_circuit_breakers
    from robustness.quarantine import Quarantine

    try:
        now = status(get_settings().warehouse)
    except QueryError as error:
        raise UserError(str(error)) from None
    # What the state store holds is shown as it is now, not as it was published.
    breakers = [
        breaker
        for breaker in all_circuit_breakers().values()
        if breaker.get_state() != "CLOSED" or breaker.get_stats()["forced"]
    ]
    console.print(
        f"Version {now.version} of {now.published_at:%Y-%m-%d %H:%M}: "
        f"{now.files} files, {now.gone} gone",
        highlight=False,
    )
    counts = ["cells_done", "cells_reused", "cells_failed", "cells_skipped"]
    runs = now.runs[["started_at", "status", "files", *counts, "success_rate", "retries"]]
    runs = runs.assign(started_at=runs["started_at"].dt.strftime("%Y-%m-%d %H:%M"))
    runs = runs.rename(columns=lambda name: name.removeprefix("cells_").removesuffix("_at"))
    quarantined = Table("feature_set", "error_type", "cells", title="Quarantine")
    cells = Counter((cell.feature_set, cell.error_type) for cell in Quarantine().list())
    for (feature_set, error_type), number in sorted(cells.items()):
        quarantined.add_row(feature_set, error_type, str(number))
    for table in (
        _frame_table(runs, "Latest runs"),
        _breakers_table(breakers, "Breakers open, or set by hand"),
        quarantined,
        _frame_table(now.missing, "Missing"),
    ):
        if table.row_count:
            console.print(table)


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

    console.print(_breakers_table(all_circuit_breakers().values()))


def _breakers_table(breakers: Iterable["CircuitBreaker"], title: str | None = None) -> Table:
    columns = ("breaker", "state", "by hand", "failures", "successes", "last error")
    table = Table(*columns, title=title)
    for breaker in breakers:
        stats = breaker.get_stats()
        table.add_row(
            breaker.name,
            stats["state"],
            stats["forced"] or "",
            str(stats["failure_count"]),
            str(stats["success_count"]),
            escape(stats["last_error"] or ""),
        )
    return table


@breakers_app.command("reset")
def breakers_reset(name: Annotated[str, typer.Argument(help="Name of the breaker.")]) -> None:
    """Close a breaker and forget its failures."""
    _breaker(name).reset()
    console.print(f"{name} is closed.")


@breakers_app.command("force-open")
def breakers_force_open(name: Annotated[str, typer.Argument(help="Name of the breaker.")]) -> None:
    """Let nothing through, until it is reset."""
    _breaker(name).force_open()
    console.print(f"{name} lets nothing through until `breakers reset {name}`.")


@breakers_app.command("disable")
def breakers_disable(name: Annotated[str, typer.Argument(help="Name of the breaker.")]) -> None:
    """Let everything through, until it is reset."""
    _breaker(name).disable()
    console.print(f"{name} lets everything through until `breakers reset {name}`.")


def _breaker(name: str) -> "CircuitBreaker":
    from robustness.circuit_breaker import all_circuit_breakers

    breakers = all_circuit_breakers()
    if name not in breakers:
        known = f"there are {', '.join(breakers)}" if breakers else "there are none yet"
        raise UserError(f"There is no breaker {name!r}; {known}.")
    return breakers[name]


@app.command("doctor")
def doctor_command() -> None:
    """Try out all that the installation needs, and say what to fix."""
    from audio_assets.doctor import Verdict, diagnose

    styles = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "red"}
    table = Table("", "check", Column("found", overflow="fold"), Column("to do", overflow="fold"))
    failed = 0
    with console.status("trying things out"):
        for finding in diagnose():
            failed += finding.verdict is Verdict.FAILED
            table.add_row(
                f"[{styles[finding.verdict]}]{finding.verdict}[/]",
                escape(finding.check),
                escape(finding.found),
                escape(finding.advice),
            )
    console.print(table)
    raise typer.Exit(1 if failed else 0)


def _open_instance() -> "DagsterInstance":
    """Open Dagster's instance; where it is new, one process at a time makes its databases."""
    import dagster as dg
    from filelock import FileLock

    from audio_assets.assets import PARTITIONS
    from audio_assets.settings import get_settings

    with FileLock(get_settings().dagster_home / ".instance.lock"):
        instance = dg.DagsterInstance.get()
        instance.get_runs(limit=1)
        instance.get_dynamic_partitions(PARTITIONS)
    return instance


def _scan(library: str | None) -> tuple[dict[str, Path], "LibraryScan"]:
    from audio_assets.library import Library
    from audio_assets.roots import library_roots, name_roots, remember_roots

    try:
        roots = name_roots(library) if library else library_roots()
        if not roots:
            raise UserError("No library is known: name a directory, or set AUDIO_LIBRARY.")
        with console.status("looking for audio files"):
            scan = Library(roots).scan(only_reachable=library is None)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    _show_scan(roots, scan)
    if not scan.files:
        raise UserError("There is no audio file in it.")
    if library:
        remember_roots(roots)
    return roots, scan


def _show_scan(roots: Mapping[str, Path], scan: "LibraryScan") -> None:
    where = ", ".join(str(root) for root in roots.values())
    console.print(f"{len(scan.files)} audio files in {escape(where)}", highlight=False)
    for name, why in scan.unreachable.items():
        console.print(f"  {escape(name)} is out of reach: {escape(why)}", style="yellow")
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
    sql: Annotated[
        str | None, typer.Argument(help="SQL; it cannot change the database.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Read the SQL from a file.", exists=True, dir_okay=False),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:
    """Run a query on the results, while runs and publishing go on."""
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.queries import QueryError, query

    if (sql is None) == (file is None):
        raise UserError('Give either SQL, as in: query "FROM features.tracks", or --file.')
    try:
        question = sql if file is None else file.read_text("utf-8")
        frame = query(get_settings().warehouse, question or "")
    except (QueryError, UnicodeDecodeError) as error:
        raise UserError(str(error)) from None
    if csv:
        typer.echo(frame.map(_csv_value).to_csv(index=False), nl=False)
        return
    console.print(_frame_table(frame))


def _csv_value(value: object) -> object:
    """Return what a CSV file can hold: lists, arrays and maps as JSON."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return json.dumps(plain, default=str) if isinstance(plain, list | dict) else value


def _frame_table(frame: "DataFrame", title: str | None = None) -> Table:
    table = Table(*(Column(str(name), overflow="fold") for name in frame.columns), title=title)
    for row in frame.itertuples(index=False):
        table.add_row(*map(_cell, row))
    return table


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case float():
            return "" if value != value else f"{value:.6g}"  # NaN stands for NULL
        case _:
            return "" if str(value) in ("<NA>", "NaT") else escape(str(value))
