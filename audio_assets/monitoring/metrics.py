"""The metrics of the whole product, in OpenMetrics by Prometheus's naming conventions.

Runs are many short processes on any number of hosts, so nothing is counted in them for this: the
counters are counts of what is landed, the rest is read from the state store, Dagster's storage and
the disks at each scrape. A source that cannot be read costs its own metrics only, and
``audio_assets_source_up`` says so.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from duckdb import DuckDBPyConnection
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from audio_assets.library.text import printable
from audio_assets.monitoring.dagster_storage import DagsterStorage
from audio_assets.monitoring.disks import disks
from audio_assets.monitoring.findings import Health, Severity, health_of
from audio_assets.monitoring.health import CHECKS
from audio_assets.monitoring.overview import Observer
from audio_assets.monitoring.performance import Trend, trends
from audio_assets.monitoring.results import (
    DAY_S,
    HOUR_S,
    ended_since,
    landed_parts,
)
from audio_assets.monitoring.runs import alive_and_dead, recent_activity
from audio_assets.monitoring.state import STATE
from audio_assets.settings import get_settings
from audio_assets.warehouse.part_names import written_at
from robustness.circuit_breaker import CircuitState
from robustness.memory import worker_budget_mib
from robustness.quarantine import Quarantine
from robustness.state_schema import circuit_breakers

PREFIX = "audio_assets_"

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)
SPEEDS = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0)
"""Upper bounds of buckets."""

TRENDS_S = 300.0
"""How often it is judged whether something got slower (s): a million attempts take 5 s."""

_MIB = 2**20

_TRIED = "FROM robustness.attempts WHERE outcome IN ('succeeded', 'failed')"

_RECOVERIES = """
SELECT strategy, count(*), count(*) FILTER (outcome = 'succeeded')
FROM (
    SELECT outcome, lag(recovery_strategy) OVER (
        PARTITION BY run_id, file_key, feature_set ORDER BY row_id
    ) AS strategy
    FROM robustness.attempts AS attempts
    SEMI JOIN (
        SELECT run_id, file_key, feature_set FROM robustness.attempts
        WHERE recovery_strategy IS NOT NULL
    ) AS recovered USING (run_id, file_key, feature_set)
    WHERE outcome IN ('succeeded', 'failed')
)
WHERE strategy IS NOT NULL GROUP BY strategy ORDER BY strategy
"""


class ProductCollector(Collector):
    """Collects all metrics.

    Parameters
    ----------
    observer : Observer
        What reads the sources.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._trends: list[Trend] = []
        self._trends_due = float("-inf")

    def describe(self) -> Iterable[Metric]:
        """Return nothing: to register this must not read anything."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read every source."""
        up = GaugeMetricFamily(
            f"{PREFIX}source_up", "Whether a source of metrics could be read", labels=["source"]
        )
        for source, read in (
            ("health", self._of_health),
            ("landing", self._of_landing),
            ("state", self._of_state),
            ("dagster", self._of_dagster),
            ("database", self._of_database),
            ("disks", _of_disks),
        ):
            try:
                metrics = list(read())
            except Exception:  # noqa: BLE001 - whatever it is, the others can be read
                metrics = []
                up.add_metric([source], 0)
            else:
                up.add_metric([source], 1)
            yield from metrics
        yield up

    def _of_health(self) -> Iterator[Metric]:
        findings = self._observer.findings()
        if findings is None:
            return
        state = health_of(findings)
        yield StateSetMetricFamily(
            f"{PREFIX}health", "How all is doing", {str(h): h is state for h in Health}
        )
        found = GaugeMetricFamily(
            f"{PREFIX}findings", "What is not well", labels=["check", "severity"]
        )
        for check in CHECKS:
            for severity in Severity:
                number = sum((f.check, f.severity) == (check, severity) for f in findings)
                found.add_metric([check, str(severity)], number)
        yield found

    def _of_landing(self) -> Iterator[Metric]:
        with self._observer.rows.up_to_date() as connection:
            yield _counter(
                "attempts",
                "Records of attempts at cells, by outcome",
                ["feature_set", "outcome"],
                connection,
                "FROM robustness.attempts",
            )
            yield _counter(
                "errors",
                "Failed attempts, by classified error",
                ["feature_set", "error_type"],
                connection,
                "FROM robustness.attempts WHERE outcome = 'failed'",
            )
            yield _counter(
                "degraded_attempts",
                "Attempts that succeeded with a degraded row",
                ["feature_set"],
                connection,
                "FROM robustness.attempts WHERE outcome = 'succeeded' AND degraded IS NOT NULL",
            )
            yield _counter(
                "breaker_transitions",
                "Changes of a breaker's state, once published",
                ["name", "to_state"],
                connection,
                "FROM robustness.breaker_transitions",
            )
            retried = CounterMetricFamily(
                f"{PREFIX}recoveries_tried", "Attempts after a recovery", labels=["strategy"]
            )
            helped = CounterMetricFamily(
                f"{PREFIX}recoveries_succeeded", "Those that succeeded", labels=["strategy"]
            )
            for strategy, tried, succeeded in connection.execute(_RECOVERIES).fetchall():
                retried.add_metric([strategy], tried)
                helped.add_metric([strategy], succeeded)
            yield from (retried, helped)
            for name, what, value, where, bounds in (
                ("attempt_duration_seconds", "Time of an attempt", "duration_s", "", SECONDS),
                ("attempt_timeout_seconds", "Timeout of an attempt", "timeout_s", "", SECONDS),
                (
                    "audio_speed_ratio",
                    "Audio analysed by an attempt that succeeded, per time it took",
                    "audio_s / nullif(duration_s, 0)",
                    "AND outcome = 'succeeded'",
                    SPEEDS,
                ),
            ):
                yield _histogram(name, what, value, where, bounds, connection)
            budget = GaugeMetricFamily(
                f"{PREFIX}error_budget_spent_ratio",
                "Share of the error budget of a window that is spent",
                labels=["window"],
            )
            now = time.time()
            for window, seconds in (("1h", HOUR_S), ("24h", DAY_S)):
                ended = ended_since(connection, now - seconds)
                if ended.budget_spent is not None:
                    budget.add_metric([window], ended.budget_spent)
            yield budget
            if time.monotonic() >= self._trends_due:
                self._trends = trends(connection)
                self._trends_due = time.monotonic() + TRENDS_S
            yield from _of_trends(self._trends)

    def _of_state(self) -> Iterator[Metric]:
        states = GaugeMetricFamily(
            f"{PREFIX}breaker_state", "1 for the state of a breaker", labels=["breaker", "state"]
        )
        statement = sa.select(circuit_breakers.c.name, STATE).order_by(circuit_breakers.c.name)
        for name, state in self._observer.store.query(lambda c: c.execute(statement).all()):
            for each in CircuitState:
                states.add_metric([printable(name), each.value.lower()], state == each.value)
        yield states
        quarantined = sorted(
            (cell.feature_set, cell.error_type) for cell in Quarantine(self._observer.store).list()
        )
        family = GaugeMetricFamily(
            f"{PREFIX}quarantined_cells",
            "Cells in quarantine",
            labels=["feature_set", "error_type"],
        )
        for labels, cells in groupby(quarantined):
            family.add_metric(labels, len(list(cells)))
        yield family
        runs = recent_activity(time.time(), self._observer.store)
        workers = [worker for run in runs for worker in run.body["workers"]]
        for name, what, value in (
            ("workers_busy", "Workers that have a task", len(workers)),
            (
                "workers_memory_bytes",
                "Memory that they hold",
                _MIB * sum(worker["memory_mib"] for worker in workers),
            ),
            (
                "worker_memory_budget_bytes",
                "Memory that each worker of this host may hold",
                _MIB * worker_budget_mib(get_settings().workers),
            ),
            (
                "open_cells",
                "Cells of active runs that have not ended",
                sum(run.body["cells"] - run.body["cells_finished"] for run in runs),
            ),
            (
                "outbox_rows",
                "Rows of active runs that are not written yet",
                sum(run.body["outbox_rows"] for run in runs),
            ),
        ):
            yield GaugeMetricFamily(PREFIX + name, what, value=value)
        if self._observer.store.degraded:
            raise OSError(self._observer.store.problem)

    def _of_dagster(self) -> Iterator[Metric]:
        storage = DagsterStorage()
        runs = alive_and_dead(storage) if storage.exists else (0, 0, 0)
        family = GaugeMetricFamily(
            f"{PREFIX}runs", "Runs that have not ended, by their process", labels=["state"]
        )
        for state, number in zip(("queued", "alive", "dead"), runs, strict=True):
            family.add_metric([state], number)
        yield family
        if storage.exists and (beats := storage.heartbeats().values()):
            yield GaugeMetricFamily(
                f"{PREFIX}daemon_heartbeat_timestamp_seconds",
                "Last heartbeat of Dagster's daemon",
                value=max(beats),
            )

    def _of_database(self) -> Iterator[Metric]:
        now, landed = time.time(), landed_parts()
        published = self._observer.published.latest()
        if published:
            landed -= published.parts
        oldest = min(map(written_at, landed), default=None)
        yield GaugeMetricFamily(
            f"{PREFIX}publish_lag_seconds",
            "Age of the oldest part that is not published",
            value=max(now - oldest.timestamp(), 0.0) if oldest else 0.0,
        )
        if published is None:
            return
        yield GaugeMetricFamily(f"{PREFIX}files", "Files in the library", value=published.files)
        yield _gauge(
            "missing_cells", "Cells without a row", ["feature_set", "outcome"], published.missing
        )
        yield _gauge(
            "degraded_cells", "Cells whose rows are degraded", ["feature_set"], published.degraded
        )
        overview = self._observer.overview()
        if overview.cells_left is not None:
            yield GaugeMetricFamily(
                f"{PREFIX}backlog_cells", "Cells left to compute", value=overview.cells_left
            )
        if overview.end:
            yield _gauge(
                "backlog_end_timestamp_seconds",
                "When the library will be done; with a probability of 90 % between low and high",
                ["bound"],
                [(bound, now + value) for bound, value in vars(overview.end.seconds).items()],
            )


def _of_trends(trends: Iterable[Trend]) -> Iterator[Metric]:
    ratio = GaugeMetricFamily(
        f"{PREFIX}time_to_baseline_ratio",
        "Time per second of audio of the last cells, to that of the baseline",
        labels=["feature_set", "host"],
    )
    slower = GaugeMetricFamily(
        f"{PREFIX}slower", "Whether they got slower", labels=["feature_set", "host"]
    )
    for trend in trends:
        labels = [trend.feature_set, printable(trend.host)]
        ratio.add_metric(labels, trend.ratio)
        slower.add_metric(labels, trend.is_slower)
    yield from (ratio, slower)


def _of_disks() -> Iterator[Metric]:
    free = GaugeMetricFamily(
        f"{PREFIX}disk_free_bytes", "Free space of a disk in use", labels=["used_for"]
    )
    full = GaugeMetricFamily(
        f"{PREFIX}disk_full_seconds",
        "Time until it is full at the rate of the last hours; absent if it does not fill up",
        labels=["used_for"],
    )
    for disk in disks(time.time()):
        used_for = [", ".join(disk.used_for)]
        free.add_metric(used_for, disk.free_mib * _MIB)
        if disk.full_in_s is not None:
            full.add_metric(used_for, disk.full_in_s)
    yield from (free, full)


def _gauge(
    name: str, what: str, labels: Sequence[str], rows: Iterable[tuple[Any, ...]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, what, labels=labels)
    for *values, number in rows:
        family.add_metric(list(map(str, values)), number)
    return family


def _counter(
    name: str, what: str, labels: Sequence[str], connection: DuckDBPyConnection, rows: str
) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, what, labels=labels)
    selected = ", ".join(f"coalesce({label}, 'unknown')" for label in labels)
    counted = connection.execute(f"SELECT {selected}, count(*) {rows} GROUP BY ALL ORDER BY ALL")
    for *values, number in counted.fetchall():
        family.add_metric(values, number)
    return family


def _histogram(
    name: str,
    what: str,
    value: str,
    where: str,
    bounds: Sequence[float],
    connection: DuckDBPyConnection,
) -> HistogramMetricFamily:
    """Return a histogram of the attempts that were tried, by feature set."""
    bucket = " ".join(f"WHEN value <= {bound} THEN {i}" for i, bound in enumerate(bounds))
    rows = connection.execute(
        f"SELECT feature_set, CASE {bucket} ELSE {len(bounds)} END AS bucket, count(*), sum(value) "
        f"FROM (SELECT feature_set, {value} AS value {_TRIED} {where}) WHERE value IS NOT NULL "
        "GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    family = HistogramMetricFamily(PREFIX + name, what, labels=["feature_set"])
    edges = [*map(str, bounds), "+Inf"]
    for feature_set, cells in groupby(rows, itemgetter(0)):
        counts = [0] * len(edges)
        total = 0.0
        for _, number, count, added in cells:
            counts[number] = count
            total += added
        buckets = list(zip(edges, map(float, accumulate(counts)), strict=True))
        family.add_metric([feature_set], buckets, total)
    return family
