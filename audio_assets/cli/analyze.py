"""`audio-assets analyze`: runs over batches of files, in this process."""

import os
import signal
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import datetime, timedelta
from threading import Event

import dagster as dg

# Not public: how Dagster itself runs what belongs to a code location. Its timeline shows no others.
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.definitions.repository_definition import SINGLETON_REPOSITORY_NAME
from dagster._core.execution.api import execute_run
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from audio_assets.definitions import defs
from audio_assets.defs.jobs import all_features, robustness_stats
from audio_assets.defs.machine_slot import runs_ahead
from audio_assets.defs.partitions import (
    ANALYZE,
    FORCE_TAG,
    PARTITIONS,
    REQUESTED_BY_TAG,
    batch_tags,
    batches,
)
from audio_assets.defs.run_records import record_ended_runs, record_run
from audio_assets.features import FEATURE_SETS
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish

POLL_S = 0.5

PUBLISH_S = 30.0
"""Least time from one publication to the next (s): each writes the whole database."""

LINE_S = 20.0
"""Time between two lines of progress where there is no terminal (s)."""

CELL_EVENTS = {
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.ASSET_OBSERVATION,
}
"""The events that end a cell; an observation says that it failed."""

NO_RETRIES = {"dagster/max_retries": "0"}
"""Dagster's daemon cannot retry a run that it did not launch."""

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}

_REPOSITORY = RemoteRepositoryOrigin(
    RegisteredCodeLocationOrigin("audio_assets"),  # the location_name of workspace.yaml
    SINGLETON_REPOSITORY_NAME,
)


def run_batches(
    instance: dg.DagsterInstance, file_keys: Sequence[str], console: Console, *, force: bool
) -> None:
    """Materialize every feature set of the files, in batches, and show the progress.

    Parameters
    ----------
    instance : DagsterInstance
        Records the runs and materializations.
    file_keys : sequence of str
        Registered files.
    console : rich.console.Console
        Where the progress is shown: a bar in a terminal, else lines.
    force : bool
        Compute finished and quarantined cells again.

    Raises
    ------
    KeyboardInterrupt
        If the command was interrupted, after the current run was canceled.
    """
    ranges = batches(
        file_keys, instance.get_dynamic_partitions(PARTITIONS), get_settings().batch_size
    )
    tags = {FORCE_TAG: "true"} if force else {}
    landing = open_landing()

    # Runs have a thread of their own: Dagster takes an interrupt of its thread for a failure.
    with (
        ThreadPoolExecutor(1, initializer=_block_interrupts) as thread,
        ThreadPoolExecutor(1, initializer=_block_interrupts) as publisher,
    ):
        with (
            _keeping_output(console),
            _Progress(console, files=len(file_keys)) as progress,
            _interruption() as interrupted,
        ):
            publication = publisher.submit(time.monotonic)
            for batch in ranges:
                run_id = str(uuid.uuid4())
                run = thread.submit(
                    _execute, instance, all_features.name, run_id, batch_tags(batch, ANALYZE) | tags
                )
                if publication.done() and time.monotonic() - publication.result() >= PUBLISH_S:
                    publication = publisher.submit(_publish, console)  # beside this run
                while not run.done():
                    wait([run], POLL_S)
                    if interrupted.is_set():
                        _cancel(instance, run_id)
                    progress.follow(instance, run_id)
                run.result()
                with _telling(console, "not recorded"):
                    record_run(instance, run_id, landing)
                if interrupted.is_set():
                    raise KeyboardInterrupt(
                        "What was finished is kept: the same command goes on from there, and "
                        "`audio-assets publish` puts it into the database."
                    )
        with _keeping_output(console), console.status("publishing the results"):
            _publish(console)  # first, as what is recorded is found in the database
            with _telling(console, "not recorded"):
                record_ended_runs(instance, get_settings().warehouse, landing)
            # Publish, and have Dagster show the figures and the checks of what is published.
            tags = {REQUESTED_BY_TAG: ANALYZE}
            run_id = str(uuid.uuid4())
            if not thread.submit(_execute, instance, robustness_stats.name, run_id, tags).result():
                publish()  # and raise what the run failed of


def _publish(console: Console) -> float:
    """Publish, and return when that ended (s, monotonic clock)."""
    with _telling(console, "not published"):
        publish()
    return time.monotonic()


@contextmanager
def _telling(console: Console, what: str) -> Iterator[None]:
    """Print an error, and go on: the next run does what failed."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - databases and object stores have their own
        console.print(f"{what}: {error}", style="yellow")


def _execute(
    instance: dg.DagsterInstance, job_name: str, run_id: str, tags: Mapping[str, str]
) -> bool:
    """Execute a run in this process, as one of the code location's; return whether it succeeded."""
    job = defs.resolve_job_def(job_name)
    run = instance.create_run_for_job(
        job,
        run_id=run_id,
        run_config=_QUIET,
        tags={**job.run_tags, **NO_RETRIES, **tags},
        remote_job_origin=RemoteJobOrigin(_REPOSITORY, job_name),
    )
    return execute_run(InMemoryJob(job), run, instance).success


def _cancel(instance: dg.DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is not None and run.status is dg.DagsterRunStatus.STARTED:
        instance.report_run_canceling(run)  # the running op notices it


def _block_interrupts() -> None:
    """Keep Ctrl-C from the processes that this thread starts, which would print tracebacks."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


@contextmanager
def _interruption() -> Iterator[Event]:
    """Yield what is set by Ctrl-C, or a request to terminate, in place of an exception."""
    interrupted = Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: interrupted.set()) for number in signals]
    try:
        yield interrupted
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _keeping_output(console: Console) -> Iterator[None]:
    """Let a console print while a step runs: Dagster then has standard output lead to a file."""
    output = sys.stdout
    duplicate = os.dup(output.fileno())
    try:
        with os.fdopen(duplicate, "w", encoding=output.encoding, errors=output.errors) as file:
            console.file = file
            yield
    finally:
        console.file = output


class _Progress:
    """The progress over all batches: a bar in a terminal, else a line from time to time."""

    def __init__(self, console: Console, files: int) -> None:
        self._console = console
        self._files = files
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task("", total=files * len(FEATURE_SETS))
        self._run_id = ""
        self._cursor: str | None = None
        self._cells: Mapping[str, set[dg.AssetKey]] = defaultdict(set)
        self._audio_s = 0.0
        self._failures = 0
        self._ahead: list[str] = []
        self._printed = self._started = time.monotonic()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._bar.disable:
            self._print()

    def follow(self, instance: dg.DagsterInstance, run_id: str) -> None:
        """Count the cells that a run has ended since, and show the progress."""
        if run_id != self._run_id:
            self._run_id, self._cursor = run_id, None
        try:
            has_more = True
            while has_more:
                connection = instance.get_records_for_run(run_id, self._cursor, of_type=CELL_EVENTS)
                self._cursor, has_more = connection.cursor, connection.has_more
                for record in connection.records:
                    self._count(record)
        except Exception:  # noqa: BLE001 - Dagster's storage is away; the run itself says so
            return
        self._show(runs_ahead(run_id))

    def _count(self, record: dg.EventLogRecord) -> None:
        event = record.asset_materialization or record.asset_observation
        if event is None or event.partition is None:
            return
        self._cells[event.partition].add(event.asset_key)
        self._bar.advance(self._task)
        self._failures += record.asset_materialization is None
        audio = event.metadata.get("audio_s")
        self._audio_s += (audio.value or 0.0) if isinstance(audio, dg.FloatMetadataValue) else 0.0

    def _show(self, ahead: list[str]) -> None:
        if ahead and not self._ahead:
            self._console.print(f"Waits until {' and '.join(ahead)} has ended.")
        self._ahead = ahead
        self._bar.update(self._task, description=self._text())
        if self._bar.disable and time.monotonic() - self._printed >= LINE_S and not ahead:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        self._console.print(self._text(), highlight=False)

    def _text(self) -> str:
        if self._ahead:
            return "waiting"
        [task] = self._bar.tasks
        files = sum(len(cells) == len(FEATURE_SETS) for cells in self._cells.values())
        speed = self._audio_s / len(FEATURE_SETS) / (time.monotonic() - self._started)
        parts = [f"{files}/{self._files} files", f"{self._failures} cells failed"]
        if task.time_remaining:
            end = datetime.now().astimezone() + timedelta(seconds=task.time_remaining)
            parts.append(f"ends about {end:%H:%M}" + (f" on {end:%d %b}" if _is_later(end) else ""))
        # A narrow terminal cuts what comes last.
        parts += [f"{task.completed:.0f}/{task.total:.0f} cells", f"{speed:.1f}x real time"]
        return " · ".join(parts)


def _is_later(end: datetime) -> bool:
    return end.date() != datetime.now().astimezone().date()
