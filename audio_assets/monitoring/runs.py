"""The active runs: whether each lives, goes on, writes its rows, and has a worker that hangs."""

import time
from collections.abc import Iterator

from audio_assets.library.text import counted
from audio_assets.monitoring.dagster_storage import DagsterStorage, Run
from audio_assets.monitoring.findings import Finding, Severity, at, span
from audio_assets.monitoring.run_locks import Liveness, lock_state
from robustness.activity import Activity, list_activity
from robustness.state import StateStore

SILENCE_S = 45.0
"""A run without a report for longer than this is stopped, or cut off (s)."""

STALL_S = 900.0
"""A run in which no cell ended for longer than this does not go on (s)."""

IDLE_S = 30.0
"""A worker that has used no CPU time for longer than this hangs, or waits for a disk (s)."""

OUTBOX_S = 30.0
"""Rows that cannot be written for longer than this are a finding (s)."""


def check_runs(now: float, store: StateStore) -> Iterator[Finding]:
    """Check the runs that are active, by their locks and their reports."""
    storage = DagsterStorage()
    if not storage.exists:
        return
    reported = {activity.name: activity for activity in list_activity(store)}
    if time.monotonic() - store.returned_at < SILENCE_S:
        # Runs have yet to come back to the store, too.
        reported = {activity.name: activity for activity in recent_activity(now, store)}
    for run in storage.unfinished_runs():
        if run.status in ("QUEUED", "NOT_STARTED"):
            continue
        if lock_state(run.run_id, run.lock) is Liveness.DEAD:
            yield Finding(
                "runs",
                Severity.DEGRADED,
                f"The process of run {run.run_id} is gone",
                f"nobody holds its lock, and Dagster says {run.status}",
                "nothing, if the daemon runs: it ends the run and launches it again; else "
                "`audio-assets analyze` does the former",
                since=at(reported[run.run_id].at) if run.run_id in reported else None,
                subject=run.run_id,
            )
        elif activity := reported.get(run.run_id):
            yield from _of_activity(run, activity, now)


def recent_activity(now: float, store: StateStore) -> list[Activity]:
    """Return the activities that were reported just now."""
    return [activity for activity in list_activity(store) if now - activity.at < SILENCE_S]


def alive_and_dead(storage: DagsterStorage) -> tuple[int, int, int]:
    """Return the number of runs that are queued, alive, and whose process is gone."""
    runs = storage.unfinished_runs()
    started = [run for run in runs if run.status not in ("QUEUED", "NOT_STARTED")]
    dead = sum(lock_state(run.run_id, run.lock) is Liveness.DEAD for run in started)
    return len(runs) - len(started), len(started) - dead, dead


def _of_activity(run: Run, activity: Activity, now: float) -> Iterator[Finding]:
    body, where = activity.body, f"process {activity.pid} on {activity.host}"
    silent_s = now - activity.at
    if silent_s > SILENCE_S:
        yield Finding(
            "runs",
            Severity.BROKEN,
            f"Run {run.run_id} does not go on: it has said nothing for {span(silent_s)}",
            f"{where} holds its lock",
            "see whether that process is stopped, or waits for a disk or the state store; if it "
            "does not go on, terminate the run in Dagster",
            since=at(activity.at),
            subject=run.run_id,
        )
        return
    left = body["cells"] - body["cells_finished"]
    if body["waits_for"]:
        yield Finding(
            "runs",
            Severity.DEGRADED,
            f"Run {run.run_id} waits: what is left is deferred, {counted(left, 'cell')}",
            str(body["waits_for"]),
            "remove the cause; the run goes on by itself",
            since=at(body["cell_at"]),
            subject=run.run_id,
        )
    elif left and now - body["cell_at"] > STALL_S:
        yield Finding(
            "runs",
            Severity.DEGRADED,
            f"Run {run.run_id} has {counted(left, 'cell')} left, and ended none for "
            f"{span(now - body['cell_at'])}",
            "; ".join(_at_work(worker) for worker in body["workers"]) or "no worker has a task",
            "nothing, if its files are very long; else look at its page in Dagster",
            since=at(body["cell_at"]),
            subject=run.run_id,
        )
    failing_s = (body["outbox_failing_s"] or 0.0) + silent_s
    if body["outbox_failing_s"] and failing_s > OUTBOX_S:
        yield Finding(
            "outbox",
            Severity.BROKEN,
            f"Run {run.run_id} cannot write {counted(body['outbox_rows'], 'row')}",
            str(body["outbox_error"]),
            "make the landing writable again: the rows are kept and written then",
            since=at(now - failing_s),
            subject=run.run_id,
        )
    for worker in body["workers"]:
        if worker["idle_s"] > IDLE_S:
            yield Finding(
                "workers",
                Severity.DEGRADED,
                f"Worker {worker['pid']} on {activity.host} hangs, or waits for a disk",
                f"no CPU time for {span(worker['idle_s'])}: {_at_work(worker)}",
                "nothing: it is ended at its deadline; if it happens again, look at the disk",
                since=at(activity.at - worker["idle_s"]),
                subject=f"{run.run_id} {worker['pid']}",
            )


def _at_work(worker: dict[str, object]) -> str:
    return (
        f"{worker['operation']} of {worker['file_key']} for {worker['seconds']:.0f} s, "
        f"{worker['timeout_s']:.0f} s allowed"
    )
