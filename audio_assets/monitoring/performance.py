"""How fast the work is: what a run's time went to, and whether something got slower.

The time of a cell is that of its attempt without decoding, which is judged by itself, and without
the time in which other processes had the cores. What is compared is the logarithm of the time per
second of audio. It differs with

- what was decoded, by what, on which host, beside how many other workers, and by which code: cells
  that agree in these are a *series*, each with a baseline of its own;
- the length, as some of the work does not depend on it: each half octave of length has a *location*
  of its own, the median of the baseline's cells. The *scale* is 1.4826 times the median absolute
  deviation from these.

The last cells of a feature set on a host, of whichever series, are judged by a cumulative sum
(E. S. Page, Continuous inspection schemes, Biometrika 41, 1954) of the log likelihood ratio of a
slowdown by `SLOWDOWN` to none. At `EVIDENCE` there is a false alarm in exp(`EVIDENCE`) cells at
most (G. Lorden, Procedures for reacting to a change in distribution, Ann. Math. Statist. 42, 1971),
as far as cells do not depend on each other. Those of a run do, whence `MIN_SCALE` and
`MAX_DEVIATION`: in a simulation ten runs of 100 cells that differ by 3 % raise nothing, and a
slowdown by 30 % is found after 70 cells, in 9 of 10 cases after 110.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from duckdb import DuckDBPyConnection

from audio_assets.warehouse.queries import Result, query
from audio_assets.warehouse.schema import RUNS, WORKER_TIME

SLOWDOWN = 1.3
"""What is to be found: this much more time per second of audio."""

JUDGED_CELLS = 200
"""So many of the last cells are judged, against all that are older."""

BASELINE_CELLS = 20
"""The first so many cells of each length in a series are not judged: there must be a baseline."""

BASELINE_DAYS = 30
"""Cells that are so much older than the newest one count no longer: what is new becomes usual."""

EVIDENCE = 14.0
"""A logarithm of a likelihood ratio at which a slowdown is believed."""

MIN_SCALE = 0.4
"""Least standard deviation that a logarithm is taken to have: whole runs differ by some percent."""

MAX_DEVIATION = 2.0
"""No cell counts for more than so many standard deviations: one may meet a burst of other load."""

DECODING = "decoding"
"""Under this name decoding is judged like a feature set."""

_SHIFT = math.log(SLOWDOWN)
_SIGMAS = 1.4826
"""Standard deviations of a normal distribution to a median absolute deviation."""

_SERIES = "feature_set, extractor, decoder, code_version, host, workers"
_LENGTH = "round(2 * log2(audio_s))"

_CELLS = f"""
WITH succeeded AS (
    SELECT
        row_id, started_at, run_id, feature_set, coalesce(extractor, '') AS extractor,
        coalesce(decoder, '') AS decoder, coalesce(code_version, '') AS code_version,
        coalesce(host, '') AS host, coalesce(workers, 0) AS workers, audio_s, peak_memory_mib,
        duration_s - coalesce(decode_s, 0) - coalesce(core_wait_s, 0) AS seconds,
        decode_s - coalesce(decode_core_wait_s, 0) AS decoding_s
    FROM robustness.attempts
    LEFT JOIN (SELECT run_id, host, workers FROM robustness.runs) USING (run_id)
    WHERE outcome = 'succeeded' AND audio_s > 0 AND started_at > (
        SELECT max(started_at) - to_days({BASELINE_DAYS}) FROM robustness.attempts
    )
), timed AS (
    FROM succeeded
    UNION ALL BY NAME
    SELECT
        * EXCLUDE (extractor, code_version)
        REPLACE (
            '{DECODING}' AS feature_set, decoding_s AS seconds, NULL AS peak_memory_mib
        ),
        '' AS extractor, '' AS code_version
    FROM succeeded
), cells AS (
    SELECT
        *, {_LENGTH} AS length, ln(seconds / audio_s) AS rate,
        row_number() OVER (PARTITION BY feature_set, host ORDER BY row_id DESC) > {JUDGED_CELLS}
        OR row_number() OVER (PARTITION BY {_SERIES}, {_LENGTH} ORDER BY row_id)
            <= {BASELINE_CELLS} AS is_baseline
    FROM timed WHERE seconds > 0
), locations AS (
    SELECT {_SERIES}, length, median(rate) AS location
    FROM cells WHERE is_baseline
    GROUP BY ALL HAVING count(*) >= {BASELINE_CELLS}
), ratios AS (
    SELECT cells.*, rate - location AS ratio
    FROM cells JOIN locations USING ({_SERIES}, length)
), scales AS (
    SELECT {_SERIES}, greatest({_SIGMAS} * mad(ratio), {MIN_SCALE}) AS scale
    FROM ratios WHERE is_baseline GROUP BY ALL
)
"""

_BASELINES = f"""
{_CELLS}
SELECT
    {_SERIES}, count(*), exp(median(rate)), {_SIGMAS} * mad(exp(rate)),
    median(peak_memory_mib), {_SIGMAS} * mad(peak_memory_mib)
FROM ratios WHERE is_baseline GROUP BY ALL ORDER BY ALL
"""

_FEATURE_SETS = f"""
{_CELLS}
SELECT
    feature_set, count(*) AS cells, sum(seconds) AS seconds,
    median(exp(rate)) AS seconds_per_second,
    exp(median(rate - location) FILTER (NOT is_baseline)) AS to_baseline
FROM cells LEFT JOIN locations USING ({_SERIES}, length)
WHERE run_id = ? GROUP BY ALL ORDER BY seconds DESC
"""

_TRENDS = f"""
{_CELLS}
, judged AS (
    SELECT
        feature_set, host, row_id, started_at, ratio,
        {_SHIFT} / scale ** 2 * (
            greatest(least(ratio, {MAX_DEVIATION} * scale), -{MAX_DEVIATION} * scale)
            - {_SHIFT} / 2
        ) AS step
    FROM ratios JOIN scales USING ({_SERIES})
    WHERE NOT is_baseline
), summed AS (
    SELECT *, sum(step) OVER so_far AS total
    FROM judged WINDOW so_far AS (PARTITION BY feature_set, host ORDER BY row_id)
), cusum AS (
    SELECT *, total - least(min(total) OVER so_far, 0) AS evidence
    FROM summed WINDOW so_far AS (PARTITION BY feature_set, host ORDER BY row_id)
), since AS (
    SELECT
        *, coalesce(
            row_id > max(row_id) FILTER (evidence = 0) OVER (PARTITION BY feature_set, host), true
        ) AS counts
    FROM cusum
)
SELECT
    feature_set, host, count(*), exp(median(ratio)), arg_max(evidence, row_id),
    min(started_at) FILTER (counts), exp(median(ratio) FILTER (counts))
FROM since GROUP BY ALL ORDER BY ALL
"""

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
    "idle": "There were few files for so many workers, or cells were deferred, as `audio-assets "
    "status` says. Of a large library, raise AUDIO_ASSETS_BATCH_SIZE.",
}
"""What to do, by what most of the workers' time went to."""


@dataclass(frozen=True)
class Baseline:
    """What the cells of a series usually take.

    Parameters
    ----------
    feature_set, extractor, decoder, code_version, host : str
        What the cells have in common; empty where it is not known.
    workers : int
        Number of workers of their runs; 0 if it is not known.
    cells : int
        Number of cells that this was learned from.
    rate, rate_scale : float
        Time per second of audio (s/s): median, and scaled median absolute deviation.
    memory_mib, memory_scale_mib : float or None
        Peak memory of the worker (MiB), in the same way; None for decoding.
    """

    feature_set: str
    extractor: str
    decoder: str
    code_version: str
    host: str
    workers: int
    cells: int
    rate: float
    rate_scale: float
    memory_mib: float | None
    memory_scale_mib: float | None


@dataclass(frozen=True)
class Trend:
    """Whether a feature set, or decoding, takes more time on a host than it did.

    Parameters
    ----------
    feature_set, host : str
        Which, and where.
    cells : int
        Number of cells judged.
    ratio : float
        Their time to that of the baseline, the median.
    evidence : float
        That it got slower: `EVIDENCE` or more is believed.
    since : datetime or None
        From which cell on; None if nothing speaks for it.
    slowdown : float or None
        The ratio of the cells since then.
    """

    feature_set: str
    host: str
    cells: int
    ratio: float
    evidence: float
    since: datetime | None
    slowdown: float | None

    @property
    def is_slower(self) -> bool:
        """Whether it is believed to be slower."""
        return self.evidence >= EVIDENCE


def baselines(connection: DuckDBPyConnection) -> list[Baseline]:
    """Return what each series usually takes, of the tables `robustness.attempts` and `runs`."""
    return [Baseline(*row) for row in connection.execute(_BASELINES).fetchall()]


def trends(connection: DuckDBPyConnection) -> list[Trend]:
    """Return whether anything got slower, of the same tables."""
    return [Trend(*row) for row in connection.execute(_TRENDS).fetchall()]


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
    feature_sets : Result
        Of each feature set, and of decoding: its cells, their time (s), the median of their time
        per second of audio, and its ratio to the baseline; without time in which other processes
        had the cores.
    """

    run_id: str
    started_at: datetime
    host: str
    workers: int
    uses: Sequence[Use]
    advice: str
    feature_sets: Result


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
    return Explanation(
        run_id,
        started_at,
        host,
        workers,
        uses,
        _ADVICE[uses[0].name],
        query(warehouse, _FEATURE_SETS, [run_id]),
    )
