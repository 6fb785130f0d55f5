"""What goes on, for the operations page and for `audio-assets top`.

Each source (the landing, the database, the state store, Dagster's storage) is read in a thread of
its own: one that hangs or fails costs the parts that are made of it, which then say why they are
not known. Nothing is read while nobody asks.

Text of files and errors is bounded, and what a terminal obeys is visible; a page must still escape
its HTML.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import UUID

import numpy as np
import sqlalchemy as sa
from duckdb import DuckDBPyConnection

from audio_assets.features import FEATURE_SETS
from audio_assets.library.text import four_digits, masked, printable
from audio_assets.monitoring.dagster_storage import DagsterStorage
from audio_assets.monitoring.estimate import COVERAGE, Attempts, Estimate, Left, estimate
from audio_assets.monitoring.findings import Finding, at, health_of, span
from audio_assets.monitoring.health import open_store
from audio_assets.monitoring.landed import LandedRows
from audio_assets.monitoring.published import Backlog, Published, PublishedReader
from audio_assets.monitoring.results import DAY_S, HOUR_S, is_landing_away, row_at
from audio_assets.monitoring.runs import SILENCE_S
from audio_assets.monitoring.state import breakers
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing
from robustness.activity import Activity, list_activity
from robustness.memory import worker_budget_mib
from robustness.state import StateStore
from robustness.state_schema import breaker_transitions

DEADLINE_S = 2.0
"""How long an overview waits for a source (s)."""

FRESH_S = 1.0
"""An overview that is not older than this serves all who look (s)."""

NOW_S = 60.0
"""Time that counts as now (s)."""

PAUSE_S = 300.0
"""After this long without any attempt work begins anew, or has ended (s)."""

WRITTEN_S = 5.0
"""Attempts are landed at most this long after they ended (s)."""

BASELINE_RUNS = 100
MIN_CELLS = 20
"""The baseline is the median of that many former runs with at least so many cells."""

BASELINE_S = 300.0
"""How long a baseline is kept (s)."""

SHOWN = 20
LONGEST = 300
"""Number of files in a list, and characters of a text."""

COLUMNS = {
    "findings": ("severity", "check", "what", "since", "evidence", "to do"),
    "throughput": ("time", "cells", "cells/s", "of usual", "audio s/s", "audio of usual"),
    "history": ("time", "cells/s", "audio s/s"),
    "runs": ("run", "host", "files", "of", "cells", "of cells", "said s ago", "waits for"),
    "workers": (
        *("host", "worker", "feature set", "stage", "file", "since", "for s", "timeout s"),
        *("no CPU s", "MiB", "run"),
    ),
    "slowest": ("file", "feature set", "s", "s of audio", "timeout s", "outcome", "began"),
    "failing": ("file", "feature sets", "error", "why", "attempts", "last"),
    "errors": ("time", "error", "attempts"),
    "breakers": ("breaker", "state", "by hand", "since", "why"),
    "transitions": ("breaker", "from", "to", "time", "why"),
    "timeouts": (
        *("feature set", "attempts", "given s", "used s", "used, median", "used, 95 %"),
        *("used at most", "timed out"),
    ),
    "memory": ("feature set", "MiB, median", "MiB, 95 %", "MiB at most", "budget MiB"),
}
"""The parts, and their columns.

Usual is the median of former runs; what had pauses is not compared. Used is a share of the timeout.
"""

_OF_STATE = ("runs", "workers", "breakers", "transitions")

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A part of the overview.

    Parameters
    ----------
    columns : tuple of str
        Names of the columns, with their units.
    rows : tuple of tuple
        A value per column: number, text, time or None.
    unknown : str or None
        Why nothing is known of it.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...] = ()
    unknown: str | None = None


@dataclass(frozen=True)
class Overview:
    """What goes on.

    Parameters
    ----------
    taken_at : datetime
        When it was read.
    health : str
        ``well``, ``degraded`` or ``broken``; ``unknown`` before the first checks have ended.
    end : Estimate or None
        When the library will be done.
    end_unknown : str or None
        Why that is not known, or that all is done.
    cells_left : int or None
        Cells that are left to compute; None if that is not known.
    parts : dict of str to Part
        The tables, by the names of `COLUMNS`.
    """

    taken_at: datetime
    health: str
    end: Estimate | None
    end_unknown: str | None
    cells_left: int | None
    parts: Mapping[str, Part]

    @property
    def unknown(self) -> list[str]:
        """Why parts are not known, each reason once."""
        return list(dict.fromkeys(part.unknown for part in self.parts.values() if part.unknown))

    @property
    def end_shown(self) -> tuple[str, str]:
        """When the library will be done, as text, and how sure that is, or why it is not known."""
        if self.end is None:
            why = self.end_unknown if self.end_unknown not in self.unknown else None
            return "?" if self.cells_left != 0 else "yes", why or ""
        low, middle, high = (
            clock(self.taken_at + timedelta(seconds=seconds))
            for seconds in vars(self.end.seconds).values()
        )
        return middle, f"{low} to {high} with a probability of {COVERAGE:.0%}"


class UnknownError(Exception):
    """Something is not known; the message says why."""


class _Source(Generic[T]):
    """Reads something in a thread of its own; while that hangs it is not read again."""

    def __init__(self, name: str, read: Callable[..., T]) -> None:
        self._name = name
        self._read = read
        self._reading: Future[T] | None = None
        self._began = 0.0

    def begin(self, *given: Any) -> None:
        """Begin to read, by what is given, if it is not being read."""
        if self._reading is None:
            self._reading, self._began = Future(), time.monotonic()
            threading.Thread(target=self._run, args=(self._reading, given), daemon=True).start()

    def ask(self, until: float) -> T | str:
        """Return what it says by a time (s, monotonic clock), or why that is not known."""
        assert self._reading is not None
        reading = self._reading
        wait({reading}, max(until - time.monotonic(), 0.0))
        if not reading.done():
            return f"{self._name} is being read, for {span(time.monotonic() - self._began)} now."
        self._reading = None
        error = reading.exception()
        if error is None:
            return reading.result()
        if isinstance(error, UnknownError):
            return str(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return str(_shown(f"{self._name} cannot be read: {reason}"))

    def _run(self, reading: "Future[T]", given: tuple[Any, ...]) -> None:
        try:
            reading.set_result(self._read(*given))
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            reading.set_exception(error)


_Rows: TypeAlias = Mapping[str, Iterable[tuple[Any, ...]]]
"""Rows of parts, by name."""


@dataclass(frozen=True)
class _End:
    """What is known of the end."""

    cells_left: int | None
    end: Estimate | None
    unknown: str | None


@dataclass(frozen=True)
class _Baseline:
    """Medians of former runs, and what computing costs: of workers, per audio (s/s)."""

    taken: float = float("-inf")
    cells_per_s: float | None = None
    audio_per_s: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


class Observer:
    """Reads what goes on.

    Parameters
    ----------
    store : StateStore
        The state store.
    rows : LandedRows
        What is landed.

    Attributes
    ----------
    findings : callable
        Returns the latest findings; None before the first.
    """

    def __init__(self, store: StateStore, rows: LandedRows) -> None:
        self.store = store
        self.rows = rows
        self.published = PublishedReader()
        self.findings: Callable[[], Sequence[Finding] | None] = lambda: None
        self._baseline = _Baseline()
        self._lock = threading.Lock()
        self._last: Overview | None = None
        self._database: _Source[Published | None] = _Source("The database", self.published.latest)
        self._files = _Source("Dagster's storage", _files)
        self._state = _Source("The state store", self._read_state)
        self._landed = _Source("The landing", self._read_landed)

    def overview(self, deadline_s: float = DEADLINE_S) -> Overview:
        """Return what goes on, as of now or of a second ago.

        Parameters
        ----------
        deadline_s : float
            How long to wait for what does not answer (s).
        """
        with self._lock:
            now = time.time()
            if self._last and 0 <= now - self._last.taken_at.timestamp() < FRESH_S:
                return self._last
            self._last = self._read(now, deadline_s)
            return self._last

    def _read(self, now: float, deadline_s: float) -> Overview:
        asked = time.monotonic()
        for first in (self._database, self._files, self._state):
            first.begin()
        published = self._database.ask(asked + deadline_s / 2)
        files = self._files.ask(asked + deadline_s / 2)
        self._landed.begin(published, files)
        state, landed = self._state.ask(asked + deadline_s), self._landed.ask(asked + deadline_s)
        rows, end = (landed, _End(None, None, landed)) if isinstance(landed, str) else landed
        findings = self.findings()
        by_part: dict[str, _Rows | str] = dict.fromkeys(COLUMNS, rows)
        by_part |= dict.fromkeys(_OF_STATE, state)
        by_part["findings"] = {"findings": (finding.row for finding in findings or ())}
        if findings is None:
            by_part["findings"] = "The first checks have not ended yet."
        return Overview(
            taken_at=at(now),
            health="unknown" if findings is None else str(health_of(findings)),
            end=end.end,
            end_unknown=end.unknown,
            cells_left=end.cells_left,
            parts={name: _part(name, by_part[name]) for name in COLUMNS},
        )

    def _read_state(self) -> _Rows:
        now = time.time()

        change = breaker_transitions.c
        statement = (
            sa.select(change.name, change.from_state, change.to_state, change.at, change.reason)
            .where(change.at >= now - DAY_S)
            .order_by(change.id)
        )
        self.store.transact(lambda connection: None)  # comes back to a store that was away
        runs, open_breakers = list_activity(self.store), breakers(self.store)
        transitions = self.store.query(lambda connection: connection.execute(statement).all())
        if self.store.degraded:
            raise UnknownError(f"The state store cannot be used: {self.store.problem}")
        return {
            "runs": [_of_run(run, now) for run in runs],
            "workers": [
                row for run in runs if now - run.at < SILENCE_S for row in _of_workers(run)
            ],
            "breakers": [_of_breaker(breaker) for breaker in open_breakers],
            "transitions": [(*change, at(when), why) for *change, when, why in transitions],
        }

    def _read_landed(
        self, published: Published | str | None, files: int | str
    ) -> tuple[_Rows, _End]:
        if is_landing_away():
            url = get_settings().landing
            raise UnknownError(f"Nothing was landed yet, or the disk of {url} is away.")
        now = time.time()
        with self.rows.up_to_date() as connection:
            if now - self._baseline.taken > BASELINE_S:
                self._baseline = _read_baseline(connection, now)
            day, budget_mib = row_at(now - DAY_S), worker_budget_mib(get_settings().workers)
            rows = {
                "throughput": [
                    _of_window(connection, now, name, seconds, self._baseline)
                    for name, seconds in (("now", NOW_S), ("hour", HOUR_S), ("day", DAY_S))
                ],
                "history": _read_history(connection, now),
                "slowest": connection.execute(_SLOWEST, [day, SHOWN]).fetchall(),
                "failing": connection.execute(_FAILING, [day, len(FEATURE_SETS), SHOWN]).fetchall(),
                "errors": connection.execute(_ERRORS, [day]).fetchall(),
                "timeouts": connection.execute(_TIMEOUTS, [day]).fetchall(),
                "memory": connection.execute(_MEMORY, [budget_mib, day]).fetchall(),
            }
            return rows, _read_end(connection, now, published, files, self._baseline)


@cache
def observer() -> Observer:
    """Return the observer of this process."""
    return Observer(open_store(), LandedRows(open_landing()))


def clock(time: datetime) -> str:
    """Return a time as text: of day, in this machine's time zone, with the day if not today's."""
    local = time.astimezone()
    is_today = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if is_today else "%a %-d %b %H:%M")


def as_text(value: Any) -> str:
    """Return a value of a part as text."""
    match value:
        case None:
            return ""
        case float():
            return four_digits(value)
        case datetime():
            return clock(value)
        case _:
            return str(value)


def _files() -> int:
    storage = DagsterStorage()
    return storage.files() if storage.exists else 0


def _shown(value: Any) -> Any:
    """Return a value as it may be shown: of a text what is visible, and not all of a long one."""
    if not isinstance(value, str):
        return value
    text = masked(printable(value[: LONGEST + 1])).replace("\n", " ").replace("\t", " ")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _part(name: str, found: _Rows | str) -> Part:
    if isinstance(found, str):
        return Part(COLUMNS[name], unknown=found)
    return Part(COLUMNS[name], tuple(tuple(map(_shown, row)) for row in found[name]))


def _of_breaker(breaker: Mapping[str, Any]) -> tuple[Any, ...]:
    opened_at = breaker["opened_at"]
    return (
        *(breaker["name"], breaker["state"], breaker["forced"]),
        *(opened_at and at(opened_at), breaker["last_error"]),
    )


def _of_run(run: Activity, now: float) -> tuple[Any, ...]:
    body = run.body
    return (
        *(run.name, run.host, body["files_finished"], body["files"]),
        *(body["cells_finished"], body["cells"], now - run.at, body["waits_for"]),
    )


def _of_workers(run: Activity) -> Iterable[tuple[Any, ...]]:
    for worker in run.body["workers"]:
        yield (
            *(run.host, worker["pid"], worker["operation"], worker["stage"], worker["file_key"]),
            *(at(run.at - worker["seconds"]), worker["seconds"], worker["timeout_s"]),
            *(worker["idle_s"], worker["memory_mib"], run.name),
        )


_TRIED = "FROM robustness.attempts WHERE row_id >= ? AND outcome IN ('succeeded', 'failed')"

_SLOWEST = f"""
SELECT file_key, feature_set, duration_s, audio_s, timeout_s, outcome, started_at
{_TRIED} ORDER BY duration_s DESC NULLS LAST LIMIT ?
"""

_FAILING = """
WITH cells AS (
    SELECT
        file_key, feature_set,
        coalesce(arg_max_null(error_type, row_id), arg_max(outcome, row_id)) AS error,
        arg_max_null(message, row_id) AS why,
        count(*) FILTER (attempt > 0) AS attempts,
        max(started_at) AS last
    FROM robustness.attempts WHERE row_id >= ?
    GROUP BY file_key, feature_set
    HAVING arg_max(outcome, row_id) IN ('failed', 'given_up', 'skipped', 'quarantined')
)
SELECT
    file_key,
    CASE WHEN count(*) = ? THEN 'all' ELSE string_agg(feature_set, ', ' ORDER BY feature_set) END,
    error, why, sum(attempts)::BIGINT, max(last)
FROM cells GROUP BY file_key, error, why ORDER BY max(last) DESC LIMIT ?
"""

_ERRORS = """
SELECT time_bucket(INTERVAL 15 minutes, started_at), coalesce(error_type, 'unknown'), count(*)
FROM robustness.attempts WHERE row_id >= ? AND outcome = 'failed' GROUP BY ALL ORDER BY ALL
"""

_TIMEOUTS = f"""
SELECT
    feature_set, count(*), median(timeout_s), median(duration_s),
    median(duration_s / nullif(timeout_s, 0)),
    quantile_cont(duration_s / nullif(timeout_s, 0), 0.95),
    max(duration_s / nullif(timeout_s, 0)),
    count(*) FILTER (error_type = 'timeout')
{_TRIED} GROUP BY ALL ORDER BY ALL
"""

_MEMORY = f"""
SELECT
    feature_set, median(peak_memory_mib), quantile_cont(peak_memory_mib, 0.95),
    max(peak_memory_mib), ?
{_TRIED} GROUP BY feature_set HAVING count(peak_memory_mib) > 0 ORDER BY ALL
"""

_DURATIONS = """
SELECT count(*), coalesce(avg(audio_s), 0), coalesce(stddev_samp(audio_s), 0)
FROM (SELECT max(audio_s) AS audio_s FROM robustness.attempts GROUP BY file_key)
WHERE audio_s IS NOT NULL
"""

_ENDED = """
WITH ended AS (
    SELECT
        file_key, feature_set, arg_max(outcome, row_id) AS outcome,
        coalesce(max(max(audio_s)) OVER (PARTITION BY file_key), $mean_s) AS audio_s
    FROM robustness.attempts WHERE row_id > $last_row GROUP BY file_key, feature_set
),
had_rows AS (
    FROM robustness.attempts
    WHERE row_id <= $last_row AND outcome IN ('succeeded', 'reused')
)
SELECT feature_set, count(*), sum(audio_s) FROM (
    FROM ended WHERE outcome NOT IN ('deferred', 'reused')
    UNION ALL
    FROM ended ANTI JOIN had_rows USING (file_key, feature_set) WHERE outcome = 'reused'
)
GROUP BY ALL
"""
"""What was reused and had no row before has that of a file with the same content."""

_RUNS = f"""
SELECT
    count(*) FILTER (outcome = 'succeeded') AS cells,
    sum(audio_s) FILTER (outcome = 'succeeded') AS audio_s,
    max(epoch(started_at) + duration_s) AS ended,
    ended - min(epoch(started_at)) AS seconds
{_TRIED} GROUP BY run_id
HAVING cells >= {MIN_CELLS} AND ended < ? AND seconds > 0
ORDER BY ended DESC LIMIT {BASELINE_RUNS}
"""


def _read_baseline(connection: DuckDBPyConnection, now: float) -> _Baseline:
    """Return medians over former runs: none of those that go on."""
    cells, audio = connection.execute(
        f"SELECT median(cells / seconds), median(audio_s / seconds) FROM ({_RUNS})",
        [row_at(0), now - PAUSE_S],
    ).fetchall()[0]
    costs = connection.execute(
        "SELECT feature_set, sum(duration_s) / sum(audio_s) FILTER (outcome = 'succeeded') "
        f"{_TRIED} GROUP BY feature_set HAVING sum(audio_s) FILTER (outcome = 'succeeded') > 0",
        [row_at(0)],
    ).fetchall()
    return _Baseline(now, cells, audio and audio / len(FEATURE_SETS), dict(costs))


def _of_window(
    connection: DuckDBPyConnection, now: float, name: str, seconds: float, baseline: _Baseline
) -> tuple[Any, ...]:
    [(cells, audio_s, parts)] = connection.execute(
        "SELECT count(*), coalesce(sum(audio_s), 0), "
        "count(DISTINCT time_bucket(to_seconds(?), started_at)) "
        "FROM robustness.attempts WHERE row_id >= ? AND outcome = 'succeeded'",
        [PAUSE_S, row_at(now - seconds)],
    ).fetchall()
    rate, audio_rate = cells / seconds, audio_s / seconds / len(FEATURE_SETS)
    # Runs are measured while they go on, and so is what is compared with them.
    is_busy = cells and parts >= seconds / PAUSE_S - 1
    of_usual, audio_of_usual = (
        f"{now / usual:.0%}" if is_busy and usual else None
        for now, usual in ((rate, baseline.cells_per_s), (audio_rate, baseline.audio_per_s))
    )
    return name, cells, rate, of_usual, audio_rate, audio_of_usual


def _read_history(connection: DuckDBPyConnection, now: float) -> list[tuple[Any, ...]]:
    """Return the rates of each minute of the last hour, also of those without any cell."""
    rows = connection.execute(
        "SELECT epoch(started_at) + duration_s, audio_s FROM robustness.attempts "
        "WHERE row_id >= ? AND outcome = 'succeeded' AND duration_s IS NOT NULL",
        [row_at(now - HOUR_S)],
    ).fetchnumpy()
    ended, audio_s = (np.ma.filled(column, 0.0) for column in rows.values())
    edges = np.arange(now // NOW_S - 60, now // NOW_S + 1) * NOW_S
    cells, _ = np.histogram(ended, edges)
    audio, _ = np.histogram(ended, edges, weights=audio_s)
    return [
        (at(edge), float(n) / NOW_S, float(s) / NOW_S / len(FEATURE_SETS))
        for edge, n, s in zip(edges, cells, audio, strict=False)
    ]


def _read_end(
    connection: DuckDBPyConnection,
    now: float,
    published: Published | str | None,
    files: int | str,
    baseline: _Baseline,
) -> _End:
    if isinstance(published, str):
        return _End(None, None, published)
    if isinstance(files, str):
        return _End(None, None, files)
    if not files and (published is None or not published.files):
        return _End(None, None, "No file is registered yet.")
    if published is None:  # files are known by their attempts alone
        [(seen, mean_s, deviation_s)] = connection.execute(_DURATIONS).fetchall()
        backlog = dict.fromkeys(FEATURE_SETS, Backlog(seen, seen * mean_s, 0))
        published = Published(set(), seen, seen, mean_s, deviation_s, [], [], backlog, None)
    left, cells = _left(connection, published, files)
    if not cells:
        return _End(0, None, "Nothing is left to compute.")
    done = _done(connection, now)
    last = done.ended.max(initial=0.0)
    if now - last > PAUSE_S:
        return _End(
            cells, None, f"No cell has ended for {span(now - last) if last else 'an hour'}."
        )
    end = estimate(left, done, *_known_time(done, now), baseline.costs)
    return _End(cells, end, None if end else "Too little has been computed yet to tell.")


def _left(connection: DuckDBPyConnection, published: Published, files: int) -> tuple[Left, int]:
    """Return what is left, and how many cells that are: what ended since publishing is not."""
    ended = connection.execute(
        _ENDED, {"mean_s": published.mean_s, "last_row": published.last_row or UUID(int=0)}
    ).fetchall()
    unseen = max(files - published.files, 0)
    audio_s = dict.fromkeys(FEATURE_SETS, 0.0)
    cells = unseen * len(FEATURE_SETS) - sum(count for _, count, _ in ended)
    for name, backlog in published.backlog.items():
        audio_s[name] = backlog.audio_s + backlog.unknown * published.mean_s
        cells += backlog.cells
    for name, _, done_s in ended:
        audio_s[name] = audio_s.get(name, 0.0) - done_s
    left = Left(audio_s, unseen, published.mean_s, published.deviation_s, published.known)
    return left, max(cells, 0)


def _done(connection: DuckDBPyConnection, now: float) -> Attempts:
    """Return the attempts that were landed in the last hour."""
    rows = connection.execute(
        "SELECT feature_set, epoch(started_at) AS began, began + duration_s AS ended, "
        f"if(outcome = 'succeeded', coalesce(audio_s, 0), 0) AS audio_s {_TRIED} "
        "AND duration_s IS NOT NULL ORDER BY began",
        [row_at(now - HOUR_S)],
    ).fetchnumpy()
    names, began, ended, audio_s = (np.ma.getdata(column) for column in rows.values())
    return Attempts(list(names), began, ended, audio_s)


def _known_time(done: Attempts, now: float) -> tuple[float, float]:
    """Return the time without a long pause of which nearly all attempts are landed."""
    pauses = np.flatnonzero(done.began[1:] - np.maximum.accumulate(done.ended)[:-1] > PAUSE_S)
    first = pauses[-1] + 1 if len(pauses) else 0
    since = max(float(done.began[first]), now - HOUR_S)
    # What goes on is not landed.
    longest = float(np.quantile((done.ended - done.began)[first:], 0.9))
    return since, max(now - WRITTEN_S - longest, (since + now) / 2)
