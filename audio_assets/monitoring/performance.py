"""How fast the work is: what a run's time went to, baselines, and whether something got slower."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from audio_assets.warehouse.queries import query
from audio_assets.warehouse.schema import RUNS, WORKER_TIME

_ADVICE = {
    "computing": "This is as it should be. More cores make it faster, or fewer feature sets: the "
    "job `fast_features` leaves out MusiCNN.",
    "decoding": "Decoding reads the files: see whether their disk or network is slow. If it is "
    "not, only more cores make it faster.",
    "reading": "The library's disk or network is too slow for these workers: more of them do not "
    "help, a faster disk does.",
    "core_wait": "Other programs need the cores, too, or there are more workers than cores: "
    "lower AUDIO_ASSETS_WORKERS, or let the others wait.",
    "memory_wait": "Memory is short: lower AUDIO_ASSETS_WORKERS, or give the machine more.",
    "events": "Dagster's storage is slow, or the files are very short: put DAGSTER_HOME on a "
    "fast disk, or Dagster's storage into PostgreSQL.",
    "publishing": "Rows are slow to write or to publish: put the landing and the database on a "
    "fast disk.",
    "planning": "The run's own process cannot keep up: put the landing and the state store on a "
    "fast disk, or use fewer workers.",
    "idle": "The batches are too small for so many workers, or cells were deferred: raise "
    "AUDIO_ASSETS_BATCH_SIZE; `audio-assets status` says what is deferred.",
}
"""What to do, by what most of the workers' time went to."""


class NoRunError(Exception):
    """There is no such run, or nothing is known of its time."""


@dataclass(frozen=True)
class Use:
    """One of the things that the time of a run's workers went to.

    Parameters
    ----------
    name, description : str
        What, in a word and in a sentence.
    seconds : float
        Their time together (s).
    share : float
        Of all that there was, 0 to 1.
    """

    name: str
    description: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Explanation:
    """What the time of a run's workers went to.

    Parameters
    ----------
    run_id : str
        The run.
    started_at : datetime
        When it began.
    host : str
        Where its workers ran.
    workers : int
        How many there were.
    uses : list of Use
        What their time went to, most first: the first one is the bottleneck.
    advice : str
        What to do about that.
    """

    run_id: str
    started_at: datetime
    host: str
    workers: int
    uses: Sequence[Use]
    advice: str


def explain(warehouse: Path, run: str = "") -> Explanation:
    """Say what the time of a run's workers went to.

    Parameters
    ----------
    warehouse : Path
        The database.
    run : str
        ID of the run, or its beginning; the last run whose time is known by default.

    Raises
    ------
    NoRunError
        If there is no such run, there are several, or nothing is known of its time.
    QueryError
        If there is no database, or it cannot be read.
    """
    columns = ", ".join(column.name for column in WORKER_TIME)
    found = query(
        warehouse,
        f"SELECT run_id, started_at, host, workers, {columns} FROM {RUNS.sql_name} "
        "WHERE starts_with(run_id, ?) AND (computing_s IS NOT NULL OR ? <> '') "
        "ORDER BY started_at DESC",
        [run, run],
    ).rows
    if not found:
        raise NoRunError(
            f"No run begins with {run}." if run else "There is no run yet whose time is known."
        )
    if run and len(found) > 1:
        raise NoRunError(f"{len(found)} runs begin with {run}: give more of the ID.")
    run_id, started_at, host, workers, *seconds = found[0]
    if seconds[0] is None:
        raise NoRunError(
            f"What the time of run {run_id} went to is not known: it goes on, its process was "
            "killed, or it is of an earlier release."
        )
    total = sum(seconds) or 1.0
    uses = [
        Use(column.name.removesuffix("_s"), column.description, value, value / total)
        for column, value in zip(WORKER_TIME, seconds, strict=True)
    ]
    uses.sort(key=lambda use: -use.seconds)
    return Explanation(run_id, started_at, host, workers, uses, _ADVICE[uses[0].name])
