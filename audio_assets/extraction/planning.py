"""Planning: which cells of a file must be computed, and which are known already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from audio_assets.features.base import FeatureSet, Row
from audio_assets.warehouse.backlog import is_due
from robustness.error_classifier import ErrorInfo, ErrorSeverity, ErrorType, RecoveryStrategy
from robustness.quarantine import QuarantinedCell


@dataclass(frozen=True)
class Known:
    """What is known about some contents, for one feature set.

    Parameters
    ----------
    rows : mapping of str to mapping of str to dict
        The rows in force that are up to date, by content hash and file key.
    quarantined : mapping of str to QuarantinedCell
        Quarantined cells, by content hash.
    """

    rows: Mapping[str, Mapping[str, Row]] = field(default_factory=dict)
    quarantined: Mapping[str, QuarantinedCell] = field(default_factory=dict)


@dataclass(frozen=True)
class Reuse:
    """The file's own row is up to date."""

    row: Row


@dataclass(frozen=True)
class Copy:
    """Another file with the same content has a row."""

    row: Row


@dataclass(frozen=True)
class Skip:
    """The cell is quarantined."""

    error: ErrorInfo


@dataclass(frozen=True)
class Compute:
    """The cell must be computed; `former` is the row to keep if that fails."""

    former: Row | None = None


Plan = Reuse | Copy | Skip | Compute


def plan_file(
    file_key: str,
    content_hash: str,
    feature_sets: Sequence[FeatureSet],
    known: Mapping[str, Known],
) -> dict[str, Plan]:
    """Plan each cell of a file.

    Parameters
    ----------
    file_key : str
        The file's partition key.
    content_hash : str
        Its content.
    feature_sets : sequence of FeatureSet
        The feature sets to plan.
    known : mapping of str to Known
        What is known, by feature set.

    Returns
    -------
    dict of str to Plan
        The plan by feature set.
    """

    def plan(feature_set: FeatureSet) -> Plan:
        about = known[feature_set.name]
        rows = about.rows.get(content_hash, {})
        if own := rows.get(file_key):
            return Compute(own) if is_due(own) else Reuse(own)
        if feature_set.reads_pcm and (others := [row for row in rows.values() if not is_due(row)]):
            return Copy(others[0])
        if content_hash in about.quarantined:
            return Skip(_quarantined(about.quarantined[content_hash]))
        return Compute()

    return {feature_set.name: plan(feature_set) for feature_set in feature_sets}


def _quarantined(cell: QuarantinedCell) -> ErrorInfo:
    return ErrorInfo(
        error_type=ErrorType(cell.error_type),
        severity=ErrorSeverity.MEDIUM,
        retryable=False,
        systemic=False,
        recovery_strategy=RecoveryStrategy.SKIP_FILE,
        message=cell.reason,
        exception_type="",
    )
