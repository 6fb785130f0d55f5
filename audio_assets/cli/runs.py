"""The commands that work on the library and on Dagster's runs."""

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audio_assets.cli.completion import root_names
from audio_assets.cli.doctor import try_home_and_landing
from audio_assets.cli.endings import ExitCode, UserError
from audio_assets.cli.printing import console, print_table
from audio_assets.library.text import counted

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from audio_assets.library.scan import LibraryScan
    from audio_assets.warehouse.landing import Landing

ROWS_SHOWN = 25
"""Most rows of a table that `analyze` prints."""


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
    from audio_assets.library.roots import library_roots
    from audio_assets.settings import get_settings

    try_home_and_landing()  # a run would wait for a place that may never be there
    settings = get_settings()
    sample = settings.dagster_home / "sample_library"
    try:
        known = library_roots().values()
    except ValueError as error:
        raise UserError(str(error)) from None
    if library is None and all(root == sample.resolve() for root in known):
        with console.status("making a sample library"):
            from audio_assets.cli.sample_library import make_sample_library

            make_sample_library(sample)
        library = str(sample)
    roots, found = _scan(library)

    from audio_assets.warehouse import open_landing, publish
    from audio_assets.warehouse.backlog import find_backlog

    landing = open_landing()
    with _open_instance() as instance:
        _register(instance, found, roots, landing)
        _reconcile(instance, landing)
        if force:
            todo = [entry.file_key for entry in found.files]
        else:
            todo = find_backlog(found.files, landing).todo
        if todo:
            from audio_assets.extraction import fork_server

            fork_server.start()  # it imports beside what follows

            from audio_assets.cli.analyze import run_batches  # all that a run needs

            gc.freeze()  # what is imported stays
            gc.set_threshold(50_000)
            run_batches(instance, todo, console, force=force)
        else:
            console.print("Nothing to compute: every cell is finished or quarantined.")
            publish()
    raise typer.Exit(_show_results(settings.warehouse, list(roots)))


def scan(
    library: Annotated[
        str | None, typer.Argument(help="As for `analyze`.", show_default=False)
    ] = None,
) -> None:
    """Register a library's files as partitions, for backfills in Dagster."""
    try_home_and_landing()
    roots, found = _scan(library)

    from audio_assets.warehouse import open_landing

    with _open_instance() as instance:
        console.print(_register(instance, found, roots, open_landing()))


def _register(
    instance: "DagsterInstance",
    found: "LibraryScan",
    roots: Mapping[str, Path],
    landing: "Landing",
) -> str:
    """Register the files found, tell Dagster, and return what was found in words."""
    from audio_assets.defs.library_files import files_observation, in_words
    from audio_assets.defs.registration import register
    from audio_assets.warehouse.arrow import leave_out_pandas

    leave_out_pandas()
    registered = register(instance, found, roots, landing)
    summary = in_words(registered.counts)
    if registered.to_remove:
        summary += f"; {counted(registered.to_remove, 'partition')} to remove when no run is active"
    instance.report_runless_asset_event(files_observation(summary, registered.counts))
    return summary


def forget(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of the directory: the first part of its file keys.",
            autocompletion=root_names,
        ),
    ],
) -> None:
    """Remove a directory given to `analyze` or `scan` from the library; its results stay."""
    from audio_assets.defs.registration import forget, is_busy
    from audio_assets.warehouse import open_landing, publish

    with _open_instance() as instance:
        if is_busy(instance):
            raise UserError(
                "Active runs may need its files: try again when they have ended.", ExitCode.FAILED
            )
        try:
            forgotten = forget(instance, name, open_landing())
        except ValueError as error:
            raise UserError(str(error)) from None
    publish()
    console.print(
        f"{name} is removed, with {counted(forgotten.removed, 'partition')}; its results stay."
    )


def _reconcile(instance: "DagsterInstance", landing: "Landing") -> int:
    from audio_assets.defs.history import reconcile
    from audio_assets.features import FEATURE_SETS

    with console.status("comparing Dagster's history with the results"):
        reported = reconcile(instance, landing, FEATURE_SETS.values())
    if reported:
        console.print(
            f"Reported to Dagster, which did not show it: {counted(reported, 'finished cell')}."
        )
    return reported


def reconcile() -> None:
    """Report finished cells to Dagster that it does not show; compute nothing."""
    from audio_assets.warehouse import open_landing

    with _open_instance() as instance:
        if not _reconcile(instance, open_landing()):
            console.print("Dagster shows every finished cell.")


def prune(
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
        f"{counted(pruned.runs, 'run')} deleted; {pruned.kept} kept, for why a partition failed or "
        f"for the latest figures; {counted(pruned.reported, 'cell')} reported anew."
    )


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
        raise UserError(f"{error.filename}: {error.strerror}: name a directory to read.") from None
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
    console.print(f"{counted(len(scan.files), 'audio file')} in {where}", highlight=False)
    for name, why in scan.unreachable.items():
        console.print(f"  {name} is unreachable: {why}", style="yellow")
    for left_out in scan.left_out:
        console.print(f"  left out: {left_out.file_key}: {left_out.reason}", style="dim")


def _show_results(warehouse: Path, names: Sequence[str]) -> ExitCode:
    """Show the tracks with values, and failed cells; return how the analysis ended."""
    from audio_assets.features import FEATURE_SETS
    from audio_assets.settings import CHECKOUT
    from audio_assets.warehouse.database import reading

    of_roots = "split_part(file_key, '/', 1) IN (SELECT unnest(?))"
    with reading(warehouse) as connection:
        tracks = connection.execute(
            "SELECT len(degraded) > 0, file_key, bpm, key || ' ' || scale, integrated_lufs, "
            f"danceability, top_tag FROM features.tracks WHERE {of_roots} ORDER BY file_key",
            [names],
        ).fetchall()
        failures = connection.execute(
            "SELECT file_key, reason, CASE WHEN count(*) = ? THEN 'all' ELSE "
            "string_agg(feature_set, ', ' ORDER BY feature_set) END, "
            "count(*) FILTER (outcome IS NULL OR outcome IN ('succeeded', 'reused')) "
            f"FROM features.missing WHERE {of_roots} GROUP BY ALL ORDER BY file_key",
            [len(FEATURE_SETS), names],
        ).fetchall()
    shown = [row for _, *row in tracks if any(value is not None for value in row[1:])]
    _print_first(("file", "bpm", "key", "LUFS", "danceability", "tag"), shown, "Tracks")
    empty, degraded = len(tracks) - len(shown), sum(is_degraded for is_degraded, *_ in tracks)
    if empty or degraded:
        console.print(
            f"  without these values: {empty} (silent, too short, or in features.missing); "
            f"degraded: {degraded} (in features.degraded)",
            style="dim",
        )
    if failures:
        failed = [row[:-1] for row in failures]
        _print_first(("file", "reason", "feature sets"), failed, "Failed cells")
    console.print(f"\nThe results are in {warehouse}. Try:")
    command = os.path.relpath(Path(sys.executable).with_name("audio-assets"))
    console.print(
        f'{command} query "SELECT file_key, bpm, key, scale FROM features.tracks '
        'ORDER BY danceability DESC LIMIT 10"',
        highlight=False,
    )
    opens = "make dev" if Path.cwd() == CHECKOUT else "dagster dev -m audio_assets.definitions"
    console.print(f"Next: `{opens}` opens Dagster on http://localhost:3000.")
    if any(untried for *_, untried in failures):
        return ExitCode.FAILED  # a run ended early
    return ExitCode.SOME_FILES_FAILED if failures else ExitCode.DONE


def _print_first(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str) -> None:
    print_table(columns, rows[:ROWS_SHOWN], title)
    if len(rows) > ROWS_SHOWN:
        console.print(f"  and {len(rows) - ROWS_SHOWN} more", style="dim")
