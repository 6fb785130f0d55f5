"""The feature sets as Dagster assets, partitioned by file."""

import hashlib
import time
from collections.abc import Iterator, Sequence

import dagster as dg

from audio_assets.extraction import CellOutcome, CellStatus
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import FeatureSet
from audio_assets.resources import ExtractionResource
from audio_assets.settings import get_settings
from audio_assets.warehouse.schema import feature_table
from robustness.dagster import SmartRetryPolicy
from robustness.error_classifier import ErrorInfo, get_error_classifier

audio_files = dg.DynamicPartitionsDefinition(name="audio_files")
"""One partition per file; the key is ``<root name>/<path below the root>``."""

FORCE_TAG = "audio_assets/force"
"""Run tag: compute also cells that are done and unchanged, or quarantined."""

MAX_RETRIES = 2
"""How often a step comes back for the cells that it had to put off."""

PROGRESS_S = 10.0
NAMED_FAILURES = 5


def asset_key(feature_set: str) -> dg.AssetKey:
    """Return the asset key of a feature set."""
    return dg.AssetKey(["features", feature_set])


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
                    "dagster/column_schema": dg.TableSchema(
                        [
                            dg.TableColumn(
                                column.name,
                                column.type,
                                column.description + (f" ({column.unit})" if column.unit else ""),
                            )
                            for column in feature_table(feature_set).columns
                        ]
                    ),
                },
            )
        ],
        backfill_policy=dg.BackfillPolicy.multi_run(settings.batch_size),
        retry_policy=SmartRetryPolicy(max_retries=MAX_RETRIES, operation=feature_set.name),
    )
    def extract(
        context: dg.AssetExecutionContext, extraction: ExtractionResource
    ) -> Iterator[None]:
        file_keys = context.partition_keys
        force = context.run.tags.get(FORCE_TAG, "").lower() == "true"
        progress = _Progress(context.log, len(file_keys))
        failed: list[CellOutcome] = []
        deferred: list[CellOutcome] = []
        for outcome in extraction.extraction.run(feature_set, file_keys, force=force):
            match outcome.status:
                case CellStatus.FAILED:
                    failed.append(outcome)
                    context.log_event(_observation(key, outcome))
                case CellStatus.DEFERRED:
                    deferred.append(outcome)
                case _:
                    context.log_event(_materialization(key, feature_set, outcome))
            progress.advance(outcome)
        if deferred and context.retry_number < MAX_RETRIES:
            raise CellsDeferredError(deferred)
        _raise_failure(failed + deferred, len(file_keys))
        yield from ()

    return extract


class CellsDeferredError(Exception):
    """Some cells must wait; the step is retried for them when the wait is over.

    `SmartRetryPolicy` waits `retry_after` seconds at least, since the error says so.

    Parameters
    ----------
    deferred : sequence of CellOutcome
        The cells.
    """

    error_type = "SYSTEM_RESOURCE"

    def __init__(self, deferred: Sequence[CellOutcome]) -> None:
        self.retry_after = max(outcome.retry_after for outcome in deferred)
        reason = deferred[0].error.message if deferred[0].error else "unknown"
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


def _materialization(
    key: dg.AssetKey, feature_set: FeatureSet, outcome: CellOutcome
) -> dg.AssetMaterialization:
    row = outcome.row or {}
    metadata: dict[str, dg.MetadataValue] = {
        name: dg.MetadataValue.float(float(row[name]))
        for name in feature_set.plotted
        if row[name] is not None
    }
    metadata[feature_set.headline] = _metadata_value(row[feature_set.headline])
    metadata["extractor"] = dg.MetadataValue.text(row["extractor"])
    metadata["status"] = dg.MetadataValue.text(outcome.status.value)
    metadata["audio_s"] = dg.MetadataValue.float(outcome.audio_s)
    metadata["attempts"] = dg.MetadataValue.int(outcome.attempts)
    if outcome.recoveries:
        metadata["recoveries"] = dg.MetadataValue.text(", ".join(outcome.recoveries))
    version = f"{row['content_hash']} {row['code_version']} {row['extractor']}"
    return dg.AssetMaterialization(
        key,
        partition=outcome.file_key,
        metadata=metadata,
        tags={"dagster/data_version": hashlib.sha256(version.encode()).hexdigest()[:32]},
    )


def _metadata_value(value: object) -> dg.MetadataValue:
    match value:
        case None:
            return dg.MetadataValue.null()
        case int() | float():
            return dg.MetadataValue.float(float(value))
        case _:
            return dg.MetadataValue.text(str(value))


def _observation(key: dg.AssetKey, outcome: CellOutcome) -> dg.AssetObservation:
    """Tell on the failed partition's own page what happened and what to do."""
    error = _error_of(outcome)
    return dg.AssetObservation(
        key,
        partition=outcome.file_key,
        description=f"failed: {error.message}",
        metadata={
            "reason": error.message,
            "error_type": error.error_type.value,
            "severity": error.severity.value,
            "attempts": outcome.attempts,
            "recoveries": ", ".join(outcome.recoveries) or "none",
            "what_to_do": str(
                get_error_classifier().get_recovery_recommendation(error)["description"]
            ),
        },
    )


def _error_of(outcome: CellOutcome) -> ErrorInfo:
    if outcome.error is None:
        raise ValueError(f"{outcome.file_key}: a failed cell must say why")
    return outcome.error


def _raise_failure(failed: Sequence[CellOutcome], total: int) -> None:
    if not failed:
        return
    named = [f"{cell.file_key}: {_error_of(cell).message}" for cell in failed[:NAMED_FAILURES]]
    more = [f"and {len(failed) - NAMED_FAILURES} more"] if len(failed) > NAMED_FAILURES else []
    raise dg.Failure(
        description="\n".join([f"{len(failed)} of {total} files failed", *named, *more]),
        metadata={
            "failed_files": dg.TableMetadataValue(
                records=[
                    dg.TableRecord(
                        {
                            "file": cell.file_key,
                            "error_type": _error_of(cell).error_type.value,
                            "reason": _error_of(cell).message,
                        }
                    )
                    for cell in failed
                ],
                schema=dg.TableSchema(
                    [dg.TableColumn(name) for name in ("file", "error_type", "reason")]
                ),
            )
        },
        allow_retries=False,
    )


feature_assets = [build_feature_asset(feature_set) for feature_set in FEATURE_SETS.values()]
