"""Dagster events of cells: a materialization with values and a picture, or a failure."""

import hashlib
import shlex
from collections.abc import Sequence
from urllib.parse import urlencode

import dagster as dg
from dagster._core.errors import DagsterUserCodeProcessError  # see StepFailedError
from dagster_shared.error import SerializableErrorInfo

from audio_assets.defs.partitions import PARTITION_TAG
from audio_assets.extraction.cells import CellOutcome
from audio_assets.features.base import FeatureSet, Row
from audio_assets.features.pictures import markdown
from audio_assets.library.text import counted, four_digits, plain_markdown, printable
from robustness.error_classifier import ErrorInfo, ErrorType

FAILURES_NAMED = 5

_ATTEMPT_COLUMNS = (
    "attempt",
    "outcome",
    "error_type",
    "message",
    "extractor",
    "timeout_s",
    "duration_s",
    "peak_memory_mib",
    "recovery_strategy",
)

_REPLACE_FILE = "Repair or replace the file: a changed file is tried again."
_ADVICE = {
    ErrorType.CORRUPT_FILE: _REPLACE_FILE,
    ErrorType.UNSUPPORTED_FORMAT: _REPLACE_FILE,
    ErrorType.TIMEOUT: "Try again when the machine is less busy. If the computation really takes "
    "that long on this machine, raise TIMEOUT_MAX_DELAY.",
    ErrorType.MEMORY: "Lower AUDIO_ASSETS_WORKERS, or give the machine more memory.",
    ErrorType.FILE_SYSTEM: "Check that the file exists and is readable, and that the disk has free "
    "space.",
    ErrorType.PERMISSION: "Give the user that runs Dagster permission to read the file.",
    ErrorType.SYSTEM_RESOURCE: "Run `audio-assets status` to see open breakers and their errors.",
}


def materialization(
    key: dg.AssetKey, feature_set: FeatureSet, outcome: CellOutcome
) -> dg.AssetMaterialization:
    """Return the materialization of a computed, reused or copied cell.

    Parameters
    ----------
    key : AssetKey
        The feature set's asset.
    feature_set : FeatureSet
        The feature set, which defines the values to show.
    outcome : CellOutcome
        An outcome with a row.
    """
    row = outcome.row or {}
    metadata: dict[str, dg.MetadataValue] = {}
    if svg := feature_set.draw(row):
        metadata["picture"] = dg.MetadataValue.md(markdown(svg, feature_set.name))
    metadata |= {name: _float(row[name]) for name in feature_set.plotted if row[name] is not None}
    metadata[feature_set.headline] = _metadata_value(row[feature_set.headline])
    metadata["extractor"] = dg.MetadataValue.text(row["extractor"])
    metadata["status"] = dg.MetadataValue.text(outcome.status.value)
    if outcome.audio_s:  # a reused cell analysed nothing
        metadata["audio_s"] = _float(outcome.audio_s)
    metadata["attempts"] = dg.MetadataValue.int(outcome.attempts)
    if row["degraded"]:
        metadata["degraded"] = dg.MetadataValue.text(printable(row["degraded"]))
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
            return _float(value)
        case _:
            return dg.MetadataValue.text(printable(str(value)))


def _float(value: float) -> dg.MetadataValue:
    return dg.MetadataValue.float(float(four_digits(value)))


def observation(key: dg.AssetKey, outcome: CellOutcome) -> dg.AssetObservation:
    """Return the observation of a failed cell: what happened and what to do.

    Parameters
    ----------
    key : AssetKey
        The feature set's asset.
    outcome : CellOutcome
        An outcome with an error.
    """
    error = error_of(outcome)
    metadata: dict[str, dg.MetadataValue] = {
        "reason": dg.MetadataValue.text(printable(error.message)),
        "error_type": dg.MetadataValue.text(error.error_type.value),
        "severity": dg.MetadataValue.text(error.severity.value),
        "what_to_do": dg.MetadataValue.text(advice(error, outcome.file_key)),
        "retry": dg.MetadataValue.url(retry_url(outcome.file_key)),
        "recoveries": dg.MetadataValue.text(", ".join(outcome.recoveries) or "none"),
    }
    if outcome.history:
        metadata["attempts"] = _table(
            [
                {name: _shown(attempt.get(name)) for name in _ATTEMPT_COLUMNS}
                for attempt in outcome.history
            ]
        )
    return dg.AssetObservation(
        key,
        partition=outcome.file_key,
        description=plain_markdown(f"failed: {error.message}"),
        metadata=metadata,
    )


def _shown(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    return float(four_digits(value)) if isinstance(value, float) else value


def advice(error: ErrorInfo, file_key: str) -> str:
    """Return what a person can do about a failed cell, in the UI and in a shell.

    Parameters
    ----------
    error : ErrorInfo
        Why it failed.
    file_key : str
        The file.
    """
    release = f"audio-assets quarantine release {shlex.quote(file_key)}"
    again = (
        "To try the file again as it is, launch the job retry_failed for it, by the link below; "
        f"or, in a shell: {release}, then audio-assets analyze."
    )
    return f"{_ADVICE.get(error.error_type, '')} {again}".lstrip()


def events_url(feature_set: str, file_key: str) -> str:
    """Return the address, in Dagster's UI, of a cell's events: why it failed, and its attempts."""
    query = {"view": "events", "partitions[0]": file_key}
    return f"/assets/features/{feature_set}?{urlencode(query)}"


def retry_url(file_key: str) -> str:
    """Return the address, in Dagster's UI, of the job `retry_failed`, ready to launch for a file.

    It names no code location: Dagster looks for the one that has the job.
    """
    query = {"tags[0][key]": PARTITION_TAG, "tags[0][value]": file_key}
    return f"/guess/retry_failed/playground/setup?{urlencode(query)}"


def error_of(outcome: CellOutcome) -> ErrorInfo:
    """Return why a cell failed.

    Raises
    ------
    ValueError
        If the outcome has no error.
    """
    if outcome.error is None:
        raise ValueError(f"{outcome.file_key}: a failed cell must have an error")
    return outcome.error


class StepFailedError(DagsterUserCodeProcessError, dg.Failure):
    """A failure whose reason is known: Dagster shows its description, and no stack trace.

    Dagster takes the error of a `DagsterUserCodeProcessError` as it is; other failures get the
    stack of the ops around them.

    Parameters
    ----------
    description : str
        What failed, why, and what to do.
    """

    def __init__(self, description: str) -> None:
        error = SerializableErrorInfo(f"{description}\n", [], None)
        super().__init__(  # type: ignore[no-untyped-call]
            description, None, False, user_code_process_error_infos=[error]
        )


def failure(failed: Sequence[CellOutcome], total: int) -> StepFailedError:
    """Return the error that ends a step, with some of the files that failed and why.

    Parameters
    ----------
    failed : sequence of CellOutcome
        The failed cells, at least one.
    total : int
        Number of files of the batch.
    """
    named = [
        f"{cell.file_key}: {printable(error_of(cell).message)}" for cell in failed[:FAILURES_NAMED]
    ]
    more = [f"and {len(failed) - FAILURES_NAMED} more"] if len(failed) > FAILURES_NAMED else []
    failures = f"{len(failed)} of {counted(total, 'file')} failed"
    summary = f"{failures}; the check analysed says why and what to do"
    return StepFailedError("\n".join([summary, *named, *more]))


def _table(records: Sequence[Row]) -> dg.TableMetadataValue:
    return dg.TableMetadataValue(
        records=[dg.TableRecord(record) for record in records],
        schema=dg.TableSchema([dg.TableColumn(name) for name in records[0]]),
    )
