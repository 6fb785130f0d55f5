"""Analysing a library from the command line, through Dagster on the project's own instance."""

import logging
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import dagster as dg
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from audio_assets.assets import FORCE_TAG, PARTITIONS
from audio_assets.backlog import batches
from audio_assets.definitions import defs
from audio_assets.features import FEATURE_SETS
from audio_assets.run_requests import ALL_FEATURES, batch_tags
from audio_assets.runs import record_ended_runs, record_run
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish

POLL_S = 1.0


def run_batches(
    instance: dg.DagsterInstance, file_keys: Sequence[str], console: Console, *, force: bool
) -> None:
    """Materialize every feature set of the files, in batches, with a progress bar.

    Parameters
    ----------
    instance : DagsterInstance
        Where runs and materializations are recorded.
    file_keys : sequence of str
        Registered files.
    console : rich.console.Console
        Where the progress bar goes.
    force : bool
        Compute also what is done and unchanged, or quarantined.

    Raises
    ------
    KeyboardInterrupt
        If the command was interrupted, when the batch under way has ended of it.
    """
    ranges = batches(
        file_keys, instance.get_dynamic_partitions(PARTITIONS), get_settings().batch_size
    )
    job = defs.resolve_job_def(ALL_FEATURES)
    landing = open_landing()
    with _progress_bar(console) as progress, _interruption() as is_interrupted:
        task = progress.add_task("", total=len(file_keys) * len(FEATURE_SETS), speed=0.0)
        for batch in ranges:
            run_id = str(uuid.uuid4())
            with _following(instance, run_id, progress, task):
                job.execute_in_process(
                    instance=instance,
                    run_id=run_id,
                    raise_on_error=False,
                    run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                    tags=batch_tags(batch, "audio-assets analyze")
                    | ({FORCE_TAG: "true"} if force else {}),
                )
            interrupted = is_interrupted()
            try:
                record_run(instance, run_id, landing)
                if not interrupted:
                    publish()  # between two batches no worker waits for it
            except Exception as error:  # noqa: BLE001 - the next batch need not fail of it
                console.print(f"not published: {error}", style="yellow", markup=False)
            if interrupted:
                raise KeyboardInterrupt
    record_ended_runs(instance, get_settings().warehouse, landing)


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether the process was interrupted.

    Dagster makes a failed run of an interruption and goes on, or, between two steps, forgets it.
    Python writes each signal's number to the wakeup descriptor, whoever handles it.
    """
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        # It may hit a connection that is being closed, of which SQLAlchemy logs a traceback.
        logging.getLogger("sqlalchemy.pool").addHandler(logging.NullHandler())

        def is_interrupted() -> bool:
            try:
                return not {signal.SIGINT, signal.SIGTERM}.isdisjoint(receiver.recv(4096))
            except BlockingIOError:
                return False

        try:
            yield is_interrupted
        finally:
            signal.set_wakeup_fd(before)


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]analysing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cells · {task.fields[speed]:.1f}x real time ·"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


@contextmanager
def _following(
    instance: dg.DagsterInstance, run_id: str, progress: Progress, task: TaskID
) -> Iterator[None]:
    """Move the bar while a run's events come in."""
    ended = threading.Event()

    def follow() -> None:
        cursor = None
        audio_s = 0.0
        while True:
            last_look = ended.wait(POLL_S)
            connection = instance.get_records_for_run(
                run_id,
                cursor,
                of_type={
                    dg.DagsterEventType.ASSET_MATERIALIZATION,
                    dg.DagsterEventType.ASSET_OBSERVATION,
                },
            )
            cursor = connection.cursor
            audio_s += sum(map(_audio_seconds, connection.records))
            elapsed = progress.tasks[task].elapsed or 1.0
            progress.update(
                task, advance=len(connection.records), speed=audio_s / len(FEATURE_SETS) / elapsed
            )
            if last_look and not connection.has_more:
                return

    follower = threading.Thread(target=follow, name="progress")
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _audio_seconds(record: dg.EventLogRecord) -> float:
    event = record.asset_materialization
    value = event.metadata.get("audio_s") if event else None
    return value.value or 0.0 if isinstance(value, dg.FloatMetadataValue) else 0.0
