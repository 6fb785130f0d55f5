"""Sensors: they request runs for new and changed files, and publish results to DuckDB."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from uuid import uuid4

import dagster as dg
from blake3 import blake3

from audio_assets.defs.history import reconcile
from audio_assets.defs.jobs import all_features, robustness_stats
from audio_assets.defs.library_files import files_observation, in_words
from audio_assets.defs.long_waits import resumptions
from audio_assets.defs.partitions import (
    FINISHED,
    PARTITIONS,
    UNFINISHED,
    batch_request,
    batches,
    files_under_way,
)
from audio_assets.defs.registration import is_busy, register, scan_roots, stable_files
from audio_assets.defs.run_records import computes_features, record_ended_runs, record_run
from audio_assets.features import FEATURE_SETS
from audio_assets.library.scan import FileEntry, LibraryScan
from audio_assets.library.text import counted
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing, publish
from audio_assets.warehouse.publisher import PublishResult
from robustness.quarantine import Quarantine

SENSOR = "discover_files"

UNFINISHED_RUNS = 10
"""Most runs of `discover_files` that are queued or running at a time.

The daemon takes seconds to create a run, as it records an event for each cell.
"""

CELLS_PER_TICK = 1000
"""Most cells that a tick of `reconcile_history` reports: it must end within a minute."""

ABOUT_TAG = "audio_assets/about_run"
"""Run tag of a `robustness_stats` run: the run whose end requested it."""

_RUN_KEYS_PER_QUERY = 100
_SENSOR_TAG = "dagster/sensor_name"
_RUN_KEY_TAG = "dagster/run_key"


@dg.sensor(
    name=SENSOR,
    job_name=all_features.name,
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=(
        "Registers new files, marks files that are gone, and requests runs of every feature set "
        "for files that are new or have changed"
    ),
)
def discover_files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Scan the library; if nothing has changed, read no file and no table.

    The cursor has a digest of the files found by the previous scan.
    """
    instance = context.instance
    unfinished = instance.get_runs_count(
        dg.RunsFilter(statuses=UNFINISHED, tags={_SENSOR_TAG: SENSOR})
    )
    if unfinished > UNFINISHED_RUNS // 2:
        return dg.SkipReason(f"{unfinished} runs of this sensor are active")
    try:
        roots, scan, warnings = scan_roots(context.log)
    except ValueError as error:
        return dg.SkipReason(str(error))
    files = stable_files(scan)
    if len(files) < len(scan.files):
        warnings.append(
            f"{counted(len(scan.files) - len(files), 'file')} not ready: modified just now"
        )
    digest = _digest(files, scan)
    before = _Cursor.read(context.cursor)
    is_same = digest == before.digest and before.partitions == len(
        instance.get_dynamic_partitions(PARTITIONS)
    )
    if is_same and not before.left and (not before.waits or is_busy(instance)):
        return dg.SkipReason(
            "; ".join([f"{counted(len(files), 'file')}, none new or changed", *warnings])
        )

    registered = register(instance, scan, roots, open_landing(), files)
    changed = registered.new_or_changed
    under_way = files_under_way(instance, registered.partition_keys)
    quarantined = {cell.file_key for cell in Quarantine().list()}
    pending = _not_requested(
        instance,
        batches(
            changed.keys() - under_way,
            registered.partition_keys,
            get_settings().batch_size,
            passable={e.file_key for e in files} - changed.keys() - under_way - quarantined,
        ),
        changed,
    )
    requests = [
        batch_request(batch, SENSOR, run_key)
        for run_key, batch in islice(pending, UNFINISHED_RUNS - unfinished)
    ]
    left = next(pending, None) is not None
    is_blocked = bool(registered.to_remove or changed.keys() & under_way)
    counts = registered.counts | {
        "quarantined": len(quarantined & {entry.file_key for entry in files}),
        "runs_requested": len(requests),
    }
    summary = "; ".join([in_words(counts) + (", more to come" if left else ""), *warnings])
    context.log.info(summary)
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else summary,
        asset_events=[files_observation(summary, counts)],
        cursor=_Cursor(digest, len(registered.partition_keys), left=left, waits=is_blocked).write(),
    )


@dataclass(frozen=True)
class _Cursor:
    """What the sensor remembers of its last tick.

    Parameters
    ----------
    digest : str
        Digest of the files found.
    partitions : int
        Number of partitions, to notice those that somebody adds by hand.
    left : bool
        Whether there were more runs to request than may be active at a time.
    waits : bool
        Whether files or partitions must be processed after the active runs.
    """

    digest: str = ""
    partitions: int = 0
    left: bool = False
    waits: bool = False

    @classmethod
    def read(cls, text: str | None) -> "_Cursor":
        try:
            return cls(**json.loads(text or "{}"))
        except (ValueError, TypeError):
            return cls()

    def write(self) -> str:
        return json.dumps(asdict(self))


def _digest(files: Sequence[FileEntry], scan: LibraryScan) -> str:
    hasher = blake3()
    for entry in files:
        hasher.update(f"{entry.file_key}\0{entry.size}\0{entry.mtime_ns}\n".encode())
    hasher.update(repr((sorted(scan.unreachable), sorted(scan.unread))).encode())
    return hasher.hexdigest()


def _not_requested(
    instance: dg.DagsterInstance, ranges: Sequence[list[str]], changed: Mapping[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the batches that this sensor has not requested yet, with their run keys."""
    keyed = [(_run_key(batch, changed), batch) for batch in ranges]
    for start in range(0, len(keyed), _RUN_KEYS_PER_QUERY):
        some = keyed[start : start + _RUN_KEYS_PER_QUERY]
        tags = {_SENSOR_TAG: SENSOR, _RUN_KEY_TAG: [run_key for run_key, _ in some]}
        requested = {
            run.tags.get(_RUN_KEY_TAG) for run in instance.get_runs(dg.RunsFilter(tags=tags))
        }
        yield from (pair for pair in some if pair[0] not in requested)


def _run_key(batch: Sequence[str], changed: Mapping[str, str]) -> str:
    hasher = blake3()
    for key in batch:
        if key in changed:
            hasher.update(f"{key}\0{changed[key]}\n".encode())
    return hasher.hexdigest(length=16)


def _publishing_sensor(status: dg.DagsterRunStatus) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name=f"publish_after_{status.value.lower()}",
        run_status=status,
        request_job=robustness_stats,
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=5,
        description="Publishes a run's results to DuckDB when the run ends, and requests a run of "
        "robustness_stats, its figures and checks",
    )
    def publish_results(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
        run, instance = context.dagster_run, context.instance
        if not computes_features(run, context.repository_def):
            return dg.SkipReason(f"run {run.run_id} computed no features")
        record_run(instance, run.run_id, open_landing())
        published = _summary(publish())
        if _stats_are_queued(instance):
            return dg.SkipReason(
                f"{published}; the queued run of {robustness_stats.name} reports this run too"
            )
        return dg.RunRequest(
            run_key=run.run_id, tags={ABOUT_TAG: run.run_id, "dagster/priority": "10"}
        )

    return publish_results


def _stats_are_queued(instance: dg.DagsterInstance) -> bool:
    """Return whether a run of `robustness_stats` has yet to read the database."""
    queued = dg.RunsFilter(
        job_name=robustness_stats.name,
        statuses=[dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING],
    )
    return instance.get_runs_count(queued) > 0


def _summary(result: PublishResult) -> str:
    return f"{'published' if result.published else 'nothing newer than'} version {result.version}"


@dg.sensor(
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=60,
    description="Publishes the results of active runs to DuckDB, every minute",
)
def publish_while_running(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Publish new parts; without any this costs one listing of the landing.

    Dagster reports a run's end only once: if it could not be written then, it is written here.
    """
    published = _summary(publish())  # first, as it rebuilds a damaged database
    record_ended_runs(context.instance, get_settings().warehouse, open_landing())
    return dg.SkipReason(published)


_PROCESS = uuid4().hex


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="At each start, and once a day: reports cells whose rows are in the landing, and "
    "whose runs were killed or deleted",
)
def reconcile_history(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Reconcile one feature set, and at most `CELLS_PER_TICK` cells of it.

    The cursor has the process of the code location, the date, and the number of feature sets
    reconciled.
    """
    when = f"{_PROCESS} {datetime.now(UTC):%Y-%m-%d}"
    before, _, number = (context.cursor or "").rpartition(" ")
    done = int(number) if before == when else 0
    if done == len(FEATURE_SETS):
        return dg.SkipReason("reconciled since the start and today")
    feature_set = list(FEATURE_SETS.values())[done]
    reported = reconcile(context.instance, open_landing(), [feature_set], CELLS_PER_TICK)
    context.update_cursor(f"{when} {done + (reported < CELLS_PER_TICK)}")
    return dg.SkipReason(f"{feature_set.name}: {counted(reported, 'cell')} reported")


@dg.sensor(
    job=all_features,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Requests the deferred cells of runs that ended rather than wait for long",
)
def resume_deferred(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest]:
    """Request a run once for each that waits no longer."""
    yield from resumptions(context.instance)


default_sensors = [
    *(_publishing_sensor(status) for status in FINISHED),
    publish_while_running,
    reconcile_history,
    resume_deferred,
]
"""On by default."""
