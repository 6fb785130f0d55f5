"""Dagster's daemon: whether it lives, its sensors tick, and the queue moves."""

from collections.abc import Iterator

from audio_assets.library.text import counted
from audio_assets.monitoring.dagster_storage import DagsterStorage, Run
from audio_assets.monitoring.findings import Finding, Severity, at, span

HEARTBEAT_S = 50.0
"""Without any heartbeat for this long the daemon is gone or stopped (s): it has one every 30 s."""

FORGOTTEN_S = 7 * 86_400.0
"""After this long without the daemon, and with no run queued, a home does without (s)."""

TICK_S = 180.0
"""A tick that is late by this much is missing (s): sensors take their turns."""

QUEUE_S = 45.0
"""A run that is queued for longer than this while none is active is stuck (s)."""

CLOCK_S = 60.0
"""A time this far in the future says that a clock was changed (s)."""

_UNREACHABLE = "DagsterUserCodeUnreachableError"
"""In the errors of ticks while a code location is not loaded: one cause for all of them."""

_START = "start Dagster's daemon: `make dev`, or its service"


def is_alive(storage: DagsterStorage, now: float) -> bool | None:
    """Return whether the daemon runs; None if it never did."""
    beats = storage.heartbeats().values()
    return now - max(beats) < HEARTBEAT_S if beats else None


def check_daemon(now: float) -> Iterator[Finding]:
    """Check the daemon, its sensors and schedules, and the queue, where the daemon is used."""
    storage = DagsterStorage()
    if not storage.exists:
        return
    runs = storage.unfinished_runs()
    queued = [run for run in runs if run.status == "QUEUED"]
    beats = storage.heartbeats().values()
    if not beats:
        if queued:
            yield _not_running(queued, None, now)
        return
    newest = max(beats)
    if newest > now + CLOCK_S:
        yield Finding(
            "clock",
            Severity.UNKNOWN,
            "The clock was changed, so that it is not known whether Dagster's daemon runs",
            f"its last heartbeat is {span(newest - now)} in the future",
            "set the clock right; this passes with the daemon's next heartbeat",
        )
    elif now - newest > HEARTBEAT_S:
        if queued or now - newest < FORGOTTEN_S:
            yield _not_running(queued, newest, now)
    else:
        yield from _late_ticks(storage, now)
        if len(queued) == len(runs):
            yield from _stuck(queued, now)


def _not_running(queued: list[Run], newest: float | None, now: float) -> Finding:
    return Finding(
        "daemon",
        Severity.BROKEN if queued else Severity.DEGRADED,
        "Dagster's daemon does not run: nothing is published, requested or launched",
        (f"no heartbeat for {span(now - newest)}" if newest else "it has never run")
        + (f"; queued: {counted(len(queued), 'run')}" if queued else ""),
        f"{_START}; if there is still a process that no longer responds, kill it first",
        since=at(newest) if newest else None,
    )


def _late_ticks(storage: DagsterStorage, now: float) -> Iterator[Finding]:
    instigators = storage.instigators()
    unreachable = [each for each in instigators if _UNREACHABLE in (each.error or "")]
    if unreachable:
        yield Finding(
            "ticks",
            Severity.DEGRADED,
            "The code location cannot be reached: its sensors and schedules do not tick",
            f"{len(unreachable)} of {len(instigators)}, as {unreachable[0].name}",
            "nothing, if it was just loaded; else look at Deployment in Dagster, and reload it",
            since=min((at(e.failed_since) for e in unreachable if e.failed_since), default=None),
            subject="code location",
        )
    for instigator in instigators:
        name, ticked_at = instigator.name, instigator.ticked_at
        if instigator in unreachable:
            continue
        if instigator.error:
            yield Finding(
                "ticks",
                Severity.DEGRADED,
                f"The ticks of {name} fail",
                instigator.error.strip().splitlines()[0],
                f"look at its page in Dagster, under Automation, {name}",
                since=at(instigator.failed_since) if instigator.failed_since else None,
                subject=name,
            )
        elif ticked_at and instigator.interval_s:
            late_s = now - ticked_at - instigator.interval_s
            if late_s > TICK_S:
                yield Finding(
                    "ticks",
                    Severity.DEGRADED,
                    f"{name} does not tick",
                    f"its last tick was {span(now - ticked_at)} ago, and the daemon runs",
                    "look at its page in Dagster; if the code location does not load, reload it",
                    since=at(ticked_at),
                    subject=name,
                )


def _stuck(queued: list[Run], now: float) -> Iterator[Finding]:
    oldest = min((run.since for run in queued), default=now)
    if now - oldest > QUEUE_S:
        yield Finding(
            "queue",
            Severity.BROKEN,
            "The queue does not move: runs wait, and none is active",
            f"{counted(len(queued), 'run')}, the first for {span(now - oldest)}",
            "look at Deployment, Concurrency in Dagster: a limit of 0, or slots of runs that are "
            "gone, hold them back",
            since=at(oldest),
        )
