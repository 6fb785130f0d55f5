"""The feature sets as Dagster assets, partitioned by file."""

import time
from collections.abc import Iterator, Sequence

import dagster as dg

from audio_assets.defs.cell_events import StepFailedError, failure, materialization, observation
from audio_assets.defs.event_log import CellEvent, EventLog
from audio_assets.defs.library_files import LIBRARY_FILES
from audio_assets.defs.long_waits import end_long_wait, waited_before_s
from audio_assets.defs.partitions import (
    FORCE_TAG,
    POOL,
    RETRY_QUARANTINED_TAG,
    asset_key,
    audio_files,
)
from audio_assets.defs.resources import ExtractionResource
from audio_assets.extraction.cells import CellOutcome, CellStatus
from audio_assets.extraction.engine import Engine
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Column, FeatureSet
from audio_assets.library.text import counted
from audio_assets.settings import get_settings
from audio_assets.warehouse.landing import LandingError
from audio_assets.warehouse.schema import feature_table
from robustness.dagster import SmartRetryPolicy
from robustness.settings import get_settings as get_robustness_settings
from robustness.smart_retry import DeferredError
from robustness.worker_pool import WorkerStartError

MAX_RETRIES = 1000
"""A backstop: ROBUSTNESS_RETRY_TOTAL_SECONDS bounds the time a cell may take with all retries."""

LONGEST_SLEEP_S = 2.0
"""Longest sleep of Dagster before a step retry (s): it cannot be terminated meanwhile."""

PROGRESS_S = 10.0
"""Time between two log lines about progress (s)."""

CANCELLATION_POLL_S = 2.0
"""How often an op asks whether its run is being cancelled (s)."""


def column_schema(columns: Sequence[Column]) -> dg.TableSchema:
    """Return a table's columns, with their ranges and units, as Dagster shows them."""
    return dg.TableSchema(
        [dg.TableColumn(column.name, column.type, column.comment) for column in columns]
    )


def build_feature_asset(feature_set: FeatureSet) -> dg.AssetsDefinition:
    """Return the asset of one feature set.

    The ops of a run share one engine. The running op drives it and reports each cell, of any
    feature set, as soon as its row is written. It ends when the cells of its own feature set are
    finished, and fails if one of them failed. If all that are left are deferred, it asks for a
    step retry.
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
                deps=[LIBRARY_FILES],
                skippable=True,
                metadata={
                    "dagster/table_name": f"features.{feature_set.name}",
                    "dagster/column_schema": column_schema(feature_table(feature_set).all_columns),
                    "licence": feature_set.licence,
                    "citation": feature_set.citation,
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
        events = EventLog(context)
        cancellation = _Cancellation(context.instance, context.run.run_id)

        def check() -> None:
            events.flush()
            cancellation.check()
            end_long_wait(context.instance, context.run, engine)

        try:
            engine.begin(
                _feature_sets_of(context),
                file_keys,
                force=context.run.tags.get(FORCE_TAG, "").lower() == "true",
                release=context.run.tags.get(RETRY_QUARANTINED_TAG) == "true",
                waited_before_s=waited_before_s(context.run),
            )
            for outcome in engine.drive(feature_set.name, hold_s=policy.time_left, check=check):
                events.add(_event(outcome))
                progress.show()
        except (DeferredError, dg.Failure):
            raise
        except (LandingError, WorkerStartError) as error:  # a fault of the installation
            raise StepFailedError(f"{error}. `audio-assets doctor` says what to do") from error
        except Exception as error:
            failing_s = engine.failing_for(feature_set.name)
            if failing_s < get_robustness_settings().retry_total_seconds:
                raise
            raise StepFailedError(
                f"Given up after {failing_s:.0f} s of retries: {error}"
            ) from error
        finally:
            events.flush()
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


def _event(outcome: CellOutcome) -> CellEvent:
    key = asset_key(outcome.feature_set)
    if outcome.status is CellStatus.FAILED:
        return observation(key, outcome)
    return materialization(key, FEATURE_SETS[outcome.feature_set], outcome)


class _Cancellation:
    """Ends an op whose run is being cancelled.

    Dagster interrupts the process of a run that it launched; Python drops an interrupt that comes
    during an import, and the process of `audio-assets analyze` gets none.
    """

    def __init__(self, instance: dg.DagsterInstance, run_id: str) -> None:
        self._instance, self._run_id = instance, run_id
        self._checked = time.monotonic()

    def check(self) -> None:
        """Raise if the run is being cancelled."""
        if time.monotonic() - self._checked < CANCELLATION_POLL_S:
            return
        try:
            run = self._instance.get_run_by_id(self._run_id)
        except Exception:  # noqa: BLE001 - an unreachable storage is no reason to end
            run = None
        self._checked = time.monotonic()
        if run is not None and run.status is dg.DagsterRunStatus.CANCELING:
            raise dg.DagsterExecutionInterruptedError


class _Progress:
    """Logs the run's progress every `PROGRESS_S` seconds."""

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
            f"{done.files_finished} of {counted(done.files, 'file')}, "
            f"{done.cells_finished} of {counted(done.cells, 'cell')}"
        )
        if computed := done.cells_computed - self._before.cells_computed:
            speed = (done.audio_s - self._before.audio_s) / elapsed
            left = elapsed / computed * (done.cells - done.cells_finished)
            message += f", {speed:.0f} s of audio per second, about {left:.0f} s left"
        self._log.info(message)


feature_assets = [build_feature_asset(feature_set) for feature_set in FEATURE_SETS.values()]
