"""The feature sets as Dagster assets, partitioned by file."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import dagster as dg

from audio_assets.backlog import release_files
from audio_assets.cells import CellOutcome, CellStatus
from audio_assets.events import failure, materialization, observation
from audio_assets.extraction import Extraction
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Column, FeatureSet
from audio_assets.resources import ExtractionResource
from audio_assets.settings import get_settings
from audio_assets.warehouse.schema import feature_table
from robustness.dagster import SmartRetryPolicy
from robustness.settings import get_settings as get_robustness_settings

PARTITIONS = "audio_files"

audio_files = dg.DynamicPartitionsDefinition(name=PARTITIONS)
"""One partition per file; the key is ``<root name>/<path below the root>``."""

FORCE_TAG = "audio_assets/force"
"""Run tag: compute also cells that are done and unchanged, or quarantined."""

RETRY_QUARANTINED_TAG = "audio_assets/retry_quarantined"
"""Run tag: let the run's cells out of quarantine, so that they are tried again."""

POOL = "audio_extraction"
"""Concurrency pool of the ops that use the whole machine."""

MAX_RETRIES = 1000
"""A backstop: how long cells are waited for is bounded by ROBUSTNESS_RETRY_TOTAL_SECONDS."""

PROGRESS_S = 10.0


def asset_key(feature_set: str) -> dg.AssetKey:
    """Return the asset key of a feature set."""
    return dg.AssetKey(["features", feature_set])


def column_schema(columns: Sequence[Column]) -> dg.TableSchema:
    """Return a table's columns, with their units, as Dagster shows them."""
    return dg.TableSchema(
        [
            dg.TableColumn(
                column.name,
                column.type,
                column.description + (f" ({column.unit})" if column.unit else ""),
            )
            for column in columns
        ]
    )


def build_feature_asset(feature_set: FeatureSet) -> dg.AssetsDefinition:
    """Make the asset and op of one feature set.

    The op tells Dagster of each cell as soon as its row is durable, and raises at the end if any
    cell failed, so that a batch with one bad file shows one failed partition.
    """
    key = asset_key(feature_set.name)
    settings = get_settings()

    @dg.multi_asset(
        name=feature_set.name,
        specs=[
            dg.AssetSpec(
                key,
                group_name="features",
                description=feature_set.description,
                kinds=set(feature_set.kinds),
                owners=["team:audio-features"],
                tags={"feature_set": feature_set.name},
                code_version=feature_set.code_version,
                partitions_def=audio_files,
                skippable=True,
                metadata={
                    "dagster/table_name": f"features.{feature_set.name}",
                    "dagster/column_schema": column_schema(feature_table(feature_set).columns),
                },
            )
        ],
        pool=POOL,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.batch_size),
        retry_policy=SmartRetryPolicy(max_retries=MAX_RETRIES, operation=feature_set.name),
    )
    def extract(
        context: dg.AssetExecutionContext, extraction: ExtractionResource
    ) -> Iterator[None]:
        file_keys = context.partition_keys
        run = extraction.extraction
        force = context.run.tags.get(FORCE_TAG, "").lower() == "true"
        progress = _Progress(context.log, len(file_keys))
        deferred: list[CellOutcome] = []
        others = {
            other.path[-1]
            for other in context.job_def.asset_layer.selected_asset_keys
            if other.path[0] == key.path[0] and other != key
        }
        with _patience(run, feature_set.name):
            if context.run.tags.get(RETRY_QUARANTINED_TAG) == "true":
                _release_once(run, feature_set.name, file_keys)
            for outcome in run.run(feature_set, file_keys, others=others, force=force):
                match outcome.status:
                    case CellStatus.FAILED:
                        context.log_event(observation(key, outcome))
                    case CellStatus.DEFERRED:
                        deferred.append(outcome)
                    case _:
                        context.log_event(materialization(key, feature_set, outcome))
                progress.advance(outcome)
        if deferred:
            raise CellsDeferredError(deferred)
        if failed := run.failed(feature_set):
            raise failure(failed, len(file_keys))
        yield from ()

    return extract


def _release_once(run: Extraction, feature_set: str, file_keys: Sequence[str]) -> None:
    """Let the cells out of quarantine, but not again what a retried step has put there."""
    if feature_set not in run.released:
        release_files(file_keys, feature_set, run.landing)
        run.released.add(feature_set)


@contextmanager
def _patience(run: Extraction, feature_set: str) -> Iterator[None]:
    """Fail a step for good if its retries have got nowhere for too long.

    Raises
    ------
    dagster.Failure
        If the step has failed as a whole since ROBUSTNESS_RETRY_TOTAL_SECONDS or more.
    """
    try:
        yield
    except Exception as error:
        now = time.monotonic()
        waited = now - run.failing_since.setdefault(feature_set, now)
        if waited < get_robustness_settings().retry_total_seconds:
            raise
        raise dg.Failure(
            description=f"Given up after {waited:.0f} s of retries: {error}", allow_retries=False
        ) from error


class CellsDeferredError(Exception):
    """Some cells must wait; the step is retried for them when the wait is over.

    `SmartRetryPolicy` waits `retry_after` seconds at least, since the error says so.

    Parameters
    ----------
    deferred : sequence of CellOutcome
        The cells.
    """

    error_type = "SYSTEM_RESOURCE"
    severity = "LOW"

    def __init__(self, deferred: Sequence[CellOutcome]) -> None:
        self.retry_after = max(outcome.retry_after for outcome in deferred)
        reason = next(
            (outcome.error.message for outcome in deferred if outcome.error),
            "workers are still at them, while other feature sets go on",
        )
        super().__init__(f"{len(deferred)} files wait {self.retry_after:.0f} s: {reason}")


class _Progress:
    """Says in the step's log, now and then, how far the batch is."""

    def __init__(self, log: dg.DagsterLogManager, total: int) -> None:
        self._log, self._total = log, total
        self._done, self._audio_s = 0, 0.0
        self._started = self._told = time.monotonic()

    def advance(self, outcome: CellOutcome) -> None:
        self._done += 1
        self._audio_s += outcome.audio_s
        now = time.monotonic()
        if now - self._told >= PROGRESS_S or self._done == self._total:
            elapsed = now - self._started
            left = elapsed / self._done * (self._total - self._done)
            self._log.info(
                f"{self._done} of {self._total} files, {self._audio_s / elapsed:.0f} s of audio "
                f"per second, about {left:.0f} s left"
            )
            self._told = now


feature_assets = [build_feature_asset(feature_set) for feature_set in FEATURE_SETS.values()]
