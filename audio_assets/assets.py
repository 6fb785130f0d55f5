"""The feature sets as Dagster assets, partitioned by file."""

import time
from collections.abc import Iterator, Sequence

import dagster as dg

from audio_assets.events import failure, materialization, observation
from audio_assets.extraction.cells import CellOutcome, CellStatus
from audio_assets.extraction.engine import Engine
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Column, FeatureSet
from audio_assets.resources import ExtractionResource
from audio_assets.settings import get_settings
from audio_assets.warehouse.schema import feature_table
from robustness.dagster import SmartRetryPolicy
from robustness.settings import get_settings as get_robustness_settings
from robustness.smart_retry import DeferredError

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

LONGEST_SLEEP_S = 2.0
"""How long Dagster sleeps before it retries a step (s): it is deaf to a termination meanwhile."""

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

    The ops of a run share one engine: whichever is at work drives it and reports each cell of any
    feature set as soon as its row is durable. An op ends when its own cells are over. It raises if
    one of them failed, so that a batch with one bad file shows one failed partition, and asks to
    be retried while all that are left must wait.
    """
    key = asset_key(feature_set.name)
    settings = get_settings()
    policy = SmartRetryPolicy(
        max_retries=MAX_RETRIES, operation=feature_set.name, longest_sleep=LONGEST_SLEEP_S
    )

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
        retry_policy=policy,
    )
    def extract(
        context: dg.AssetExecutionContext, extraction: ExtractionResource
    ) -> Iterator[None]:
        engine, file_keys = extraction.engine, context.partition_keys
        progress = _Progress(context.log, engine)
        try:
            engine.begin(
                _feature_sets_of(context),
                file_keys,
                force=context.run.tags.get(FORCE_TAG, "").lower() == "true",
                release=context.run.tags.get(RETRY_QUARANTINED_TAG) == "true",
            )
            for outcome in engine.drive(feature_set.name, hold_s=policy.time_left):
                context.log_event(_event(outcome))
                progress.show()
        except DeferredError:
            raise
        except Exception as error:
            waited = engine.failing_for(feature_set.name)
            if waited < get_robustness_settings().retry_total_seconds:
                raise
            raise dg.Failure(
                description=f"Given up after {waited:.0f} s of retries: {error}",
                allow_retries=False,
            ) from error
        if failed := engine.failed(feature_set.name):
            raise failure(failed, len(file_keys))
        yield from ()

    return extract


def _feature_sets_of(context: dg.AssetExecutionContext) -> list[FeatureSet]:
    """Return the feature sets of the steps that this run executes."""
    selected = context.job_def.asset_layer.selected_asset_keys
    steps = context.run.step_keys_to_execute
    return [
        feature_set
        for name, feature_set in FEATURE_SETS.items()
        if asset_key(name) in selected and (steps is None or name in steps)
    ]


def _event(outcome: CellOutcome) -> dg.AssetMaterialization | dg.AssetObservation:
    key = asset_key(outcome.feature_set)
    if outcome.status is CellStatus.FAILED:
        return observation(key, outcome)
    return materialization(key, FEATURE_SETS[outcome.feature_set], outcome)


class _Progress:
    """Says in the step's log, now and then, how far the run is."""

    def __init__(self, log: dg.DagsterLogManager, engine: Engine) -> None:
        self._log, self._engine = log, engine
        self._before = engine.progress
        self._started = self._shown = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._shown < PROGRESS_S:
            return
        self._shown = now
        done, elapsed = self._engine.progress, now - self._started
        message = (
            f"{done.files_over} of {done.files} files, {done.cells_over} of {done.cells} cells"
        )
        if computed := done.cells_computed - self._before.cells_computed:
            speed = (done.audio_s - self._before.audio_s) / elapsed
            left = elapsed / computed * (done.cells - done.cells_over)
            message += f", {speed:.0f} s of audio per second, about {left:.0f} s left"
        self._log.info(message)


feature_assets = [build_feature_asset(feature_set) for feature_set in FEATURE_SETS.values()]
