"""The backlog: files with cells to compute, found without reading unchanged files."""

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import FeatureSet, Row
from audio_assets.library.scan import FileEntry
from audio_assets.settings import get_settings
from audio_assets.warehouse.inventory import unchanged_contents
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import feature_table
from robustness.error_classifier import ErrorType
from robustness.memory import worker_budget_mib
from robustness.quarantine import Quarantine
from robustness.settings import get_settings as get_robustness_settings


@dataclass(frozen=True)
class Backlog:
    """What remains to be computed.

    Parameters
    ----------
    todo : list of str
        Keys of files with a cell that is neither done nor quarantined.
    done : set of str
        Keys of files of which every cell is done.
    """

    todo: list[str]
    done: set[str]


def find_backlog(files: Sequence[FileEntry], landing: Landing) -> Backlog:
    """Find the files with a cell that is missing, failed, outdated, due again or of a changed file.

    Parameters
    ----------
    files : sequence of FileEntry
        The files of the library.
    landing : Landing
        Where the inventory and the computed cells are.
    """
    unchanged = unchanged_contents(files, landing)
    conditions = {name: conditions_of(feature_set) for name, feature_set in FEATURE_SETS.items()}
    quarantined = {
        (cell.content_hash, name)
        for cell in Quarantine().list()
        if (name := cell.feature_set) in FEATURE_SETS
        and cell.holds(FEATURE_SETS[name].code_version, conditions[name])
    }
    to_compute: set[str] = set()
    not_done: set[str] = set()
    for name, feature_set in FEATURE_SETS.items():
        rows = landing.latest(
            feature_table(feature_set).landing_name,
            columns=("file_key", "content_hash", "code_version", "retry_after"),
        )
        done = {
            row["file_key"]
            for row in rows
            if row["code_version"] == feature_set.code_version
            and unchanged.get(row["file_key"]) == row["content_hash"]
            and not is_due(row)
        }
        missing = unchanged.keys() - done
        not_done |= missing
        to_compute |= {k for k in missing if (unchanged[k], name) not in quarantined}
    return Backlog(
        todo=[e.file_key for e in files if e.file_key not in unchanged or e.file_key in to_compute],
        done=unchanged.keys() - not_done,
    )


def is_due(row: Row) -> bool:
    """Return whether a degraded row is to be computed again now."""
    return row["retry_after"] is not None and row["retry_after"] <= datetime.now(UTC)


def conditions_of(feature_set: FeatureSet) -> dict[str, float | str]:
    """Return the limits and versions on which it depends whether a cell can be computed."""
    limits = get_robustness_settings()
    memory_mib = worker_budget_mib(get_settings().workers) if limits.memory_aware else math.inf
    packages = ("av", feature_set.extractor, feature_set.alternative)
    return {name: found for name in packages if (found := _version(name))} | {
        ErrorType.TIMEOUT.value: limits.timeout_max_delay,
        ErrorType.MEMORY.value: memory_mib,
    }


@cache
def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def release_contents(content_hashes: Collection[str], feature_sets: Collection[str]) -> None:
    """Release the cells of some contents and feature sets from quarantine."""
    quarantine = Quarantine()
    for feature_set in feature_sets:
        for content_hash in quarantine.check_many(content_hashes, feature_set):
            quarantine.release(content_hash, feature_set)
