"""The command line `audio-assets`."""

import io
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from audio_assets.cli.doctor import CheckError, check_settings, try_home_and_landing
from audio_assets.library.text import csv_text, masked, printable

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from pandas import DataFrame

    from audio_assets.library.scan import LibraryScan
    from audio_assets.warehouse.landing import Landing
    from robustness.circuit_breaker import CircuitBreaker

app = typer.Typer(
    help="Audio features of whole music libraries: extraction by Dagster, results in DuckDB.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class _Console(Console):
    """Shows every string as it is: what it prints may come from a file."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(masked(printable(text)), **options)


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(printable(super().format(record)))


console = _Console(markup=False, emoji=False)

ROWS_SHOWN = 25
"""Most rows of a table that `analyze` prints."""


class UserError(typer.Exit):
    """Ends the command with a message and status 2.

    Parameters
    ----------
    message : str
        What was wrong and what to do.
    """

    def __init__(self, message: str) -> None:
        console.print(message, style="red", highlight=False)
        super().__init__(2)


def main() -> None:
    """Run the command line; a known error is printed in one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale may lack characters
    if logging.lastResort:
        logging.lastResort.setFormatter(_LogFormatter())
    try:
        app()
    except CheckError as error:
        console.print(f"{error}: {error.advice}.", style="red", highlight=False)
        sys.exit(1)
    except Exception as error:
        from robustness.error_classifier import ErrorType, get_error_classifier

        info = get_error_classifier().classify(error)
        if info.error_type is ErrorType.UNKNOWN:
            raise  # a defect: the traceback is what to report
        of_database = getattr(error, "orig", None)  # without SQLAlchemy's statement
        reason = f"A database failed: {of_database}" if of_database else info.reason
        console.print(reason, style="red", highlight=False)
        console.print("`audio-assets doctor` says what to do.")
        sys.exit(1)


@app.callback()
def _prepare(context: typer.Context) -> None:
    """Set DAGSTER_HOME before Dagster is imported, and make it a safe place."""
    from audio_assets.settings import PROJECT_DAGSTER_HOME, get_settings, prepare_home

    os.environ["DAGSTER_HOME"] = os.environ.get("DAGSTER_HOME") or str(PROJECT_DAGSTER_HOME)
    try:
        check_settings()
        os.environ["DAGSTER_HOME"] = str(prepare_home())
        get_settings.cache_clear()
    except (CheckError, OSError) as error:
        if context.invoked_subcommand != "doctor":  # it reports this itself
            raise UserError(f"{error}. `audio-assets doctor` says what to do.") from None


@app.command("prepare", hidden=True)
def prepare_command() -> None:
    """Prepare Dagster's home, as every command does."""


@app.command()
def analyze(
    library: Annotated[
        str | None,
        typer.Argument(
            help="Directory of the library, or NAME=DIRECTORY; several are separated by ':'. "
            "Default: the known directories or, if there are none, a sample library.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compute finished and quarantined cells again.")
    ] = False,
) -> None:
    """Compute every feature set of a library with Dagster, and show the results."""
    try_home_and_landing()  # a run would wait for a place that may never be there

    from audio_assets.cli.analyze import run_batches
    from audio_assets.cli.sample_library import make_sample_library
    from audio_assets.defs.registration import register
    from audio_assets.library.roots import library_roots
    from audio_assets.settings import get_settings
    from audio_assets.warehouse import open_landing, publish
    from audio_assets.warehouse.backlog import find_backlog

    settings = get_settings()
    sample = settings.dagster_home / "sample_library"
    try:
        known = library_roots().values()
    except ValueError as error:
        raise UserError(str(error)) from None
    if library is None and all(root == sample.resolve() for root in known):
        with console.status("making a sample library"):
            make_sample_library(sample)
        library = str(sample)
    roots, scan = _scan(library)
    landing = open_landing()
    with _open_instance() as instance:
        register(instance, scan, roots, landing)
        _reconcile(instance, landing)
        if force:
            todo = [entry.file_key for entry in scan.files]
        else:
            todo = find_backlog(scan.files, landing).todo
        if todo:
            try:
                run_batches(instance, todo, console, force=force)
            except KeyboardInterrupt:
                console.print(
                    "Interrupted. Finished cells are kept: run the command again to continue."
                )
                raise typer.Exit(130) from None
        else:
            console.print("Nothing to compute: every cell is finished or quarantined.")
    publish()
    unexplained = _show_results(settings.warehouse, list(roots))
    raise typer.Exit(1 if unexplained else 0)


@app.command("scan")
def scan_command(
    library: Annotated[
        str | None, typer.Argument(help="As for `analyze`.", show_default=False)
    ] = None,
) -> None:
    """Register a library's files as partitions, for backfills in Dagster."""
    from audio_assets.defs.registration import register
    from audio_assets.warehouse import open_landing

    try_home_and_landing()
    roots, found = _scan(library)
    with _open_instance() as instance:
        registered = register(instance, found, roots, open_landing())
    console.print(
        f"{registered.added} partitions added; {registered.gone} files gone, "
        f"{registered.removed} partitions removed."
    )
    if registered.to_remove:
        console.print(
            f"{registered.to_remove} partitions of gone files stay until no run is active."
        )


@app.command("forget")
def forget_command(
    name: Annotated[
        str, typer.Argument(help="Name of the directory: the first part of its file keys.")
    ],
) -> None:
    """Remove a directory given to `analyze` or `scan` from the library; its results stay."""
    from audio_assets.defs.registration import forget, is_busy
    from audio_assets.warehouse import open_landing, publish

    with _open_instance() as instance:
        if is_busy(instance):
            raise UserError("Active runs may need its files: try again when they have ended.")
        try:
            forgotten = forget(instance, name, open_landing())
        except ValueError as error:
            raise UserError(str(error)) from None
    publish()
    console.print(f"{name} and its {forgotten.removed} partitions are removed; its results stay.")


def _reconcile(instance: "DagsterInstance", landing: "Landing") -> int:
    from audio_assets.defs.history import reconcile
    from audio_assets.features import FEATURE_SETS

    with console.status("comparing Dagster's history with the results"):
        reported = reconcile(instance, landing, FEATURE_SETS.values())
    if reported:
        console.print(f"{reported} finished cells that Dagster did not show are reported to it.")
    return reported


@app.command("reconcile")
def reconcile_command() -> None:
    """Report finished cells to Dagster that it does not show; compute nothing."""
    from audio_assets.warehouse import open_landing

    with _open_instance() as instance:
        if not _reconcile(instance, open_landing()):
            console.print("Dagster shows every finished cell.")


history_app = typer.Typer(help="Dagster's runs and events.", no_args_is_help=True)
app.add_typer(history_app, name="history")


@history_app.command("prune")
def history_prune(
    keep: Annotated[str, typer.Option(help="Age of what is kept, in days, as in 30d.")] = "30d",
) -> None:
    """Delete old runs, their events and logs; every partition keeps its status."""
    from audio_assets.defs.history import prune
    from audio_assets.warehouse import open_landing

    days = keep.removesuffix("d")
    if not days.isdecimal():
        raise UserError(f"--keep {keep}: give a number of days, as in 30d.")
    before = datetime.now(UTC) - timedelta(days=int(days))
    with _open_instance() as instance, console.status("deleting old runs"):
        pruned = prune(instance, open_landing(), before)
    console.print(
        f"{pruned.runs} runs deleted; {pruned.kept} kept, as they show why a partition failed or "
        f"have the latest figures; {pruned.reported} cells reported anew."
    )


@app.command("publish")
def publish_command(
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make the database anew from the landing.")
    ] = False,
) -> None:
    """Publish the results of runs to the database; one that was changed or damaged is made anew."""
    from audio_assets.warehouse import publish

    result = publish(rebuild=rebuild)
    news = f"{sum(result.rows.values())} rows" if result.published else "nothing new"
    console.print(f"Version {result.version}: {news}, in {result.seconds:.1f} s.")


@app.command("status")
def status_command() -> None:
    """Show the latest runs, open breakers, the quarantine and missing cells."""
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.queries import QueryError, status
    from robustness.circuit_breaker import all_circuit_breakers
    from robustness.quarantine import Quarantine

    try:
        now = status(get_settings().warehouse)
    except QueryError as error:
        raise UserError(str(error)) from None
    # Breakers and the quarantine as they are now, not as published.
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
    counts = [f"cells_{n}" for n in ("done", "reused", "failed", "quarantined", "skipped")]
    runs = now.runs[["started_at", "status", "files", *counts, "success_rate", "retries"]]
    runs = runs.assign(started_at=runs["started_at"].dt.strftime("%Y-%m-%d %H:%M"))
    runs = runs.rename(columns=lambda name: name.removeprefix("cells_").removesuffix("_at"))
    cells = Counter((cell.feature_set, cell.error_type) for cell in Quarantine().list())
    quarantined = [(*names, number) for names, number in sorted(cells.items())]
    for table in (
        _frame_table(runs, "Latest runs"),
        _breakers_table(breakers, "Breakers open or set by hand"),
        _table(("feature_set", "error_type", "cells"), quarantined, "Quarantine"),
    ):
        if table.row_count:
            console.print(table)
    if not now.missing.empty:
        missing = list(now.missing.itertuples(index=False))
        _print_first(list(now.missing.columns), missing, "Missing cells")


quarantine_app = typer.Typer(help="Cells that failed because of their file.")
app.add_typer(quarantine_app, name="quarantine")

breakers_app = typer.Typer(help="Circuit breakers.")
app.add_typer(breakers_app, name="breakers")


@quarantine_app.callback()
@breakers_app.callback()
def _require_state() -> None:
    """End the command if the state that all processes share cannot be read."""
    from robustness.state import get_state_store

    store = get_state_store()
    store.query(lambda connection: None)
    if store.degraded:
        raise CheckError(f"the state store {store.url} cannot be read", "check that it is there")


@quarantine_app.command("list")
def quarantine_list() -> None:
    """Show the quarantined cells, and why they failed."""
    from robustness.quarantine import Quarantine

    table = _table(
        ("file", "feature set", "error", "reason", "attempts"),
        (
            (cell.file_key, cell.feature_set, cell.error_type, cell.reason, cell.attempts)
            for cell in Quarantine().list()
        ),
    )
    console.print(table if table.row_count else "No cell is quarantined.")


@quarantine_app.command("release")
def quarantine_release(
    pattern: Annotated[str, typer.Argument(help="File key, pattern (*, ?) or content hash.")],
    feature_set: Annotated[
        str | None, typer.Option(help="Only this feature set.", show_default=False)
    ] = None,
) -> None:
    """Release cells, so that the next run tries them again."""
    from robustness.quarantine import Quarantine

    console.print(f"{Quarantine().release(pattern, feature_set)} cells released.")


@breakers_app.command("list")
def breakers_list() -> None:
    """Show every breaker's state."""
    from robustness.circuit_breaker import all_circuit_breakers

    console.print(_breakers_table(all_circuit_breakers().values()))


def _breakers_table(breakers: Iterable["CircuitBreaker"], title: str | None = None) -> Table:
    columns = ("breaker", "state", "by hand", "failures", "successes", "last error")
    shown = ("state", "forced", "failure_count", "success_count", "last_error")
    stats = ((breaker.name, breaker.get_stats()) for breaker in breakers)
    return _table(columns, ((name, *map(values.get, shown)) for name, values in stats), title)


@breakers_app.command("reset")
def breakers_reset(name: Annotated[str, typer.Argument(help="Name of the breaker.")]) -> None:
    """Close a breaker and forget its failures."""
    _breaker(name).reset()
    console.print(f"{name} is closed.")


@breakers_app.command("force-open")
def breakers_force_open(name: Annotated[str, typer.Argument(help="Name of the breaker.")]) -> None:
    """Have a breaker refuse all calls until it is reset."""
    _breaker(name).force_open()
    console.print(f"{name} refuses all calls until `breakers reset {name}`.")


@breakers_app.command("disable")
def breakers_disable(name: Annotated[str, typer.Argument(help="Name of the breaker.")]) -> None:
    """Have a breaker allow all calls until it is reset."""
    _breaker(name).disable()
    console.print(f"{name} allows all calls until `breakers reset {name}`.")


def _breaker(name: str) -> "CircuitBreaker":
    from robustness.circuit_breaker import all_circuit_breakers

    breakers = all_circuit_breakers()
    if name not in breakers:
        known = ", ".join(breakers) or "none yet"
        raise UserError(f"There is no breaker {name!r}. Known breakers: {known}.")
    return breakers[name]


@app.command("doctor")
def doctor_command() -> None:
    """Check the installation, and say what to fix."""
    from audio_assets.cli.doctor import Verdict, diagnose

    styles = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "red"}
    table = Table("", "check", Column("found", overflow="fold"), Column("to do", overflow="fold"))
    failed = 0
    with console.status("checking the installation"):
        for finding in diagnose():
            failed += finding.verdict is Verdict.FAILED
            table.add_row(
                Text(finding.verdict, styles[finding.verdict]),
                finding.check,
                finding.found,
                finding.advice,
            )
    console.print(table)
    raise typer.Exit(1 if failed else 0)


def _open_instance() -> "DagsterInstance":
    """Open Dagster's instance, and end the runs whose process was killed.

    Only one process at a time may create the databases of a new instance.
    """
    import dagster as dg
    from filelock import FileLock

    from audio_assets.defs.partitions import PARTITIONS
    from audio_assets.defs.run_liveness import end_dead_runs
    from audio_assets.settings import get_settings

    with FileLock(get_settings().dagster_home / ".instance.lock"):
        instance = dg.DagsterInstance.get()
        instance.get_runs(limit=1)
        instance.get_dynamic_partitions(PARTITIONS)
    if ended := end_dead_runs(instance):
        console.print(
            f"Found killed runs and ended them: {len(ended)}. What they computed is kept; "
            "the rest is computed now or by the next run."
        )
    return instance


def _scan(library: str | None) -> tuple[dict[str, Path], "LibraryScan"]:
    from audio_assets.library.roots import library_roots, name_roots, remember_roots
    from audio_assets.library.scan import Library

    try:
        roots = name_roots(library) if library else library_roots()
        if not roots:
            raise UserError("No library is known: name a directory, or set AUDIO_LIBRARY.")
        with console.status("scanning for audio files"):
            scan = Library(roots).scan(only_reachable=library is None)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    _show_scan(roots, scan)
    if not scan.files:
        raise UserError("The library has no audio files.")
    if library:
        remember_roots(roots)
    return roots, scan


def _show_scan(roots: Mapping[str, Path], scan: "LibraryScan") -> None:
    where = ", ".join(str(root) for root in roots.values())
    console.print(f"{len(scan.files)} audio files in {where}", highlight=False)
    for name, why in scan.unreachable.items():
        console.print(f"  {name} is unreachable: {why}", style="yellow")
    for left_out in scan.left_out:
        console.print(f"  left out: {left_out.file_key}: {left_out.reason}", style="dim")


def _show_results(warehouse: Path, root_names: Sequence[str]) -> int:
    """Show tracks and failed cells; return how many failed cells are not quarantined."""
    from audio_assets.warehouse.database import reading

    of_roots = "split_part(file_key, '/', 1) IN (SELECT unnest(?))"
    with reading(warehouse) as connection:
        tracks = connection.execute(
            "SELECT file_key, round(bpm, 1), key.key || ' ' || key.scale, "
            "round(integrated_lufs, 1), round(danceability, 1), top_tag "
            "FROM features.tracks LEFT JOIN features.key USING (file_key) "
            f"WHERE NOT gone AND {of_roots} ORDER BY file_key",
            [root_names],
        ).fetchall()
        failures = connection.execute(
            "SELECT file_key, reason, string_agg(feature_set, ', ' ORDER BY feature_set), "
            "count(*) FILTER (outcome IS DISTINCT FROM 'quarantined') "
            f"FROM features.missing WHERE {of_roots} GROUP BY ALL ORDER BY file_key",
            [root_names],
        ).fetchall()
    columns = ("file", "bpm", "key", "LUFS", "danceability", "tag")
    _print_first(columns, tracks, "Tracks")
    if failures:
        failed = [row[:-1] for row in failures]
        _print_first(("file", "reason", "feature sets"), failed, "Failed cells")
    console.print(f"\nThe results are in {warehouse}. Try:")
    command = os.path.relpath(Path(sys.executable).with_name("audio-assets"))
    console.print(
        f'{command} query "SELECT file_key, bpm, key FROM features.tracks '
        'ORDER BY danceability DESC LIMIT 10"',
        highlight=False,
        soft_wrap=True,
    )
    console.print("Next: `make dev` opens Dagster on http://localhost:3000.")
    return sum(unexplained for *_, unexplained in failures)


def _print_first(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str) -> None:
    console.print(_table(columns, rows[:ROWS_SHOWN], title))
    if len(rows) > ROWS_SHOWN:
        console.print(f"  and {len(rows) - ROWS_SHOWN} more", style="dim")


@app.command("query")
def query_command(
    sql: Annotated[
        str | None,
        typer.Argument(help="SQL, of one or more statements.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Read the SQL from a file.", exists=True, dir_okay=False),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="In CSV, leave control characters and formulas of spreadsheets as they are.",
        ),
    ] = False,
) -> None:
    """Query the results, also during runs and publishing.

    It reads the database's tables. It cannot write, open other files, connect or load extensions.
    """
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
        frame = frame.map(_csv_value)
        if not raw:
            frame = frame.map(_safe).rename(columns=_safe)
        sys.stdout.write(frame.to_csv(index=False))  # click's echo would remove escape sequences
        return
    console.print(_frame_table(frame))


def _csv_value(value: object) -> object:
    """Return a value for a CSV file: lists, arrays and maps as JSON."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return json.dumps(plain, default=str) if isinstance(plain, list | dict) else value


def _safe(value: object) -> object:
    return csv_text(value) if isinstance(value, str) else value


def _frame_table(frame: "DataFrame", title: str | None = None) -> Table:
    return _table(frame.columns, frame.itertuples(index=False), title)


def _table(
    columns: Iterable[str], rows: Iterable[Iterable[object]], title: str | None = None
) -> Table:
    table = Table(*(Column(str(name), overflow="fold") for name in columns), title=title)
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case float():
            return "" if value != value else f"{value:.6g}"  # NaN stands for NULL
        case _:
            return "" if str(value) in ("<NA>", "NaT") else str(value)
