"""What Dagster is told of a cell: its numbers and a picture, or why it failed."""

import hashlib
import shlex
from collections.abc import Sequence

import dagster as dg

from audio_assets.extraction.cells import CellOutcome
from audio_assets.features.base import FeatureSet, Row
from audio_assets.pictures import markdown
from robustness.error_classifier import ErrorInfo, ErrorType

NAMED_FAILURES = 5

_SHOWN_OF_ATTEMPTS = (
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

_REPLACE_FILE = "Repair or replace the file: it is tried again when it has changed."
_ADVICE = {
    ErrorType.CORRUPT_FILE: _REPLACE_FILE,
    ErrorType.UNSUPPORTED_FORMAT: _REPLACE_FILE,
    ErrorType.TIMEOUT: "Let it run when the machine is less busy; if honest work takes that long "
    "here, raise TIMEOUT_MAX_DELAY.",
    ErrorType.MEMORY: "Lower AUDIO_ASSETS_WORKERS, or give the machine more memory.",
    ErrorType.FILE_SYSTEM: "Check that the file is there and can be read, and that the disk has "
    "space.",
    ErrorType.PERMISSION: "Let Dagster's user read the file.",
    ErrorType.SYSTEM_RESOURCE: "See `audio-assets status` for open breakers and what opened them.",
}


def materialization(
    key: dg.AssetKey, feature_set: FeatureSet, outcome: CellOutcome
) -> dg.AssetMaterialization:
    """Return the event of a finished cell.

    Parameters
    ----------
    key : AssetKey
        The feature set's asset.
    feature_set : FeatureSet
        Says what to show.
    outcome : CellOutcome
        An outcome with a row.
    """
    row = outcome.row or {}
    metadata: dict[str, dg.MetadataValue] = {}
    if feature_set.picture and (svg := feature_set.picture(row)):
        metadata["picture"] = dg.MetadataValue.md(markdown(svg, feature_set.name))
    metadata |= {
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


def observation(key: dg.AssetKey, outcome: CellOutcome) -> dg.AssetObservation:
    """Return the event of a failed cell: what happened and what to do, for its own page.

    Parameters
    ----------
    key : AssetKey
        The feature set's asset.
    outcome : CellOutcome
        An outcome with an error.
    """
    error = error_of(outcome)
    metadata: dict[str, dg.MetadataValue] = {
        "reason": dg.MetadataValue.text(error.message),
        "error_type": dg.MetadataValue.text(error.error_type.value),
        "severity": dg.MetadataValue.text(error.severity.value),
        "what_to_do": dg.MetadataValue.text(advice(error, outcome.file_key)),
        "recoveries": dg.MetadataValue.text(", ".join(outcome.recoveries) or "none"),
    }
    if outcome.history:
        metadata["attempts"] = _table(
            [
                {name: _shown(attempt.get(name)) for name in _SHOWN_OF_ATTEMPTS}
                for attempt in outcome.history
            ]
        )
    return dg.AssetObservation(
        key,
        partition=outcome.file_key,
        description=f"failed: {error.message}",
        metadata=metadata,
    )


def _shown(value: object) -> object:
    return round(value, 2) if isinstance(value, float) else value


def advice(error: ErrorInfo, file_key: str) -> str:
    """Say what a person can do about a failed cell.

    Parameters
    ----------
    error : ErrorInfo
        Why it failed.
    file_key : str
        The file.
    """
    release = f"audio-assets quarantine release {shlex.quote(file_key)}"
    again = f"To have it tried again as it is: {release}, then materialize this partition again."
    return f"{_ADVICE.get(error.error_type, '')} {again}".lstrip()


def error_of(outcome: CellOutcome) -> ErrorInfo:
    """Return why a cell failed or was put off.

    Raises
    ------
    ValueError
        If the outcome does not say.
    """
    if outcome.error is None:
        raise ValueError(f"{outcome.file_key}: a failed cell must say why")
    return outcome.error


def failure(failed: Sequence[CellOutcome], total: int) -> dg.Failure:
    """Return the failure of a step: which of its files failed, and why.

    Parameters
    ----------
    failed : sequence of CellOutcome
        The failed cells, at least one.
    total : int
        Files of the batch.
    """
    named = [f"{cell.file_key}: {error_of(cell).message}" for cell in failed[:NAMED_FAILURES]]
    more = [f"and {len(failed) - NAMED_FAILURES} more"] if len(failed) > NAMED_FAILURES else []
    return dg.Failure(
        description="\n".join([f"{len(failed)} of {total} files failed", *named, *more]),
        metadata={
            "failed_files": _table(
                [
                    {
                        "file": cell.file_key,
                        "error_type": error_of(cell).error_type.value,
                        "reason": error_of(cell).message,
                    }
                    for cell in failed
                ]
            )
        },
        allow_retries=False,
    )


def _table(records: Sequence[Row]) -> dg.TableMetadataValue:
    return dg.TableMetadataValue(
        records=[dg.TableRecord(record) for record in records],
        schema=dg.TableSchema([dg.TableColumn(name) for name in records[0]]),
    )
