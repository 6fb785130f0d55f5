"""`audio-assets analyze`: runs over batches of files, in this process."""

import logging
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

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

from audio_assets.definitions import defs
from audio_assets.defs.jobs import all_features
from audio_assets.defs.machine_slot import runs_ahead
from audio_assets.defs.partitions import ANALYZE, FORCE_TAG, PARTITIONS, batch_tags, batches
from audio_assets.defs.run_liveness import RunLock
from audio_assets.defs.run_records import record_ended_runs, record_run
from audio_assets.features import FEATURE_SETS
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish

POLL_S = 1.0

CELL_EVENTS = {
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.ASSET_OBSERVATION,
}
"""The events that end a cell."""

NO_RETRIES = {"dagster/max_retries": "0"}
"""Dagster's daemon cannot retry a run that it did not launch."""


def run_batches(
    instance: dg.DagsterInstance, file_keys: Sequence[str], console: Console, *, force: bool
) -> None:
    """Materialize every feature set of the files, in batches, with a progress bar.

    Parameters
    ----------
    instance : DagsterInstance
        Records the runs and materializations.
    file_keys : sequence of str
        Registered files.
    console : rich.console.Console
        Where the progress bar goes.
    force : bool
        Compute finished and quarantined cells again.

    Raises
    ------
    KeyboardInterrupt
        If the command was interrupted, after the current batch has ended.
    """
    ranges = batches(
        file_keys, instance.get_dynamic_partitions(PARTITIONS), get_settings().batch_size
    )
    job = defs.resolve_job_def(all_features.name)
    tags = {FORCE_TAG: "true"} if force else {}
    landing = open_landing()
    with _progress_bar(console) as progress, _interruption() as is_interrupted:
        task = progress.add_task("", total=len(file_keys) * len(FEATURE_SETS), speed=0.0)
        for batch in ranges:
            run_id = str(uuid.uuid4())
            lock = RunLock(run_id)
            with _following(instance, run_id, progress, task, is_interrupted):
                job.execute_in_process(
                    instance=instance,
                    run_id=run_id,
                    raise_on_error=False,
                    run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                    tags=batch_tags(batch, ANALYZE) | NO_RETRIES | lock.tag | tags,
                )
            lock.release()
            interrupted = is_interrupted()
            try:
                record_run(instance, run_id, landing)
                if not interrupted:
                    publish()  # between two batches it delays no worker
            except Exception as error:  # noqa: BLE001 - the next batch publishes it
                console.print(f"not published: {error}", style="yellow")
            if interrupted:
                raise KeyboardInterrupt
    record_ended_runs(instance, get_settings().warehouse, landing)


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether the process was interrupted.

    After an interruption Dagster fails the run and continues, or, between two steps, ignores it.
    Python writes each signal's number to the wakeup descriptor, whatever handles the signal.
    """
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        # SQLAlchemy logs a traceback if the closing of a connection is interrupted.
        logging.getLogger("sqlalchemy.pool").addHandler(logging.NullHandler())

        received: set[int] = set()

        def is_interrupted() -> bool:
            with suppress(BlockingIOError):
                received.update(receiver.recv(4096))
            return not received.isdisjoint({signal.SIGINT, signal.SIGTERM})

        try:
            yield is_interrupted
        finally:
            signal.set_wakeup_fd(before)


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cells · {task.fields[speed]:.1f}x real time ·"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


@contextmanager
def _following(
    instance: dg.DagsterInstance,
    run_id: str,
    progress: Progress,
    task: TaskID,
    is_interrupted: Callable[[], bool],
) -> Iterator[None]:
    """Update the progress bar by a run's events while it is running; cancel an interrupted run.

    An interruption is lost if it comes while Python collects garbage or imports a module.
    """
    ended = threading.Event()

    def follow() -> None:
        cursor = None
        audio_s = 0.0
        is_waiting = False
        while True:
            is_last = ended.wait(POLL_S)
            try:
                if is_interrupted():
                    _cancel(instance, run_id)
                connection = instance.get_records_for_run(run_id, cursor, of_type=CELL_EVENTS)
            except Exception:  # noqa: BLE001 - Dagster's storage is away; the run itself says so
                if is_last:
                    return
                continue
            cursor = connection.cursor
            audio_s += sum(map(_audio_seconds, connection.records))
            elapsed = progress.tasks[task].elapsed or 1.0
            ahead = runs_ahead(run_id)
            if ahead and not is_waiting:
                progress.console.print(f"Waits until {' and '.join(ahead)} has ended.")
            is_waiting = bool(ahead)
            progress.update(
                task,
                description="waiting" if ahead else "analysing",
                advance=len(connection.records),
                speed=audio_s / len(FEATURE_SETS) / elapsed,
            )
            if is_last and not connection.has_more:
                return

    follower = threading.Thread(target=follow, name="progress")
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _cancel(instance: dg.DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is not None and run.status is dg.DagsterRunStatus.STARTED:
        instance.report_run_canceling(run)  # the running op notices it


def _audio_seconds(record: dg.EventLogRecord) -> float:
    event = record.asset_materialization
    value = event.metadata.get("audio_s") if event else None
    return value.value or 0.0 if isinstance(value, dg.FloatMetadataValue) else 0.0
