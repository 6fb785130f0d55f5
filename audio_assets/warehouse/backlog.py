"""The backlog: files with cells to compute, found without reading unchanged files."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import Row
from audio_assets.library.scan import FileEntry
from audio_assets.warehouse.inventory import unchanged_contents
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import feature_table
from robustness.quarantine import Quarantine


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
    quarantined = {
        (cell.content_hash, name, cell.code_version or FEATURE_SETS[name].code_version)
        for cell in Quarantine().list()
        if (name := cell.feature_set) in FEATURE_SETS
    }
    to_compute: set[str] = set()
    not_done: set[str] = set()
    for name, feature_set in FEATURE_SETS.items():
        version = feature_set.code_version
        rows = landing.latest(
            feature_table(feature_set).landing_name,
            columns=("file_key", "content_hash", "code_version", "retry_after"),
        )
        done = {
            row["file_key"]
            for row in rows
            if row["code_version"] == version
            and unchanged.get(row["file_key"]) == row["content_hash"]
            and not is_due(row)
        }
        missing = unchanged.keys() - done
        not_done |= missing
        to_compute |= {k for k in missing if (unchanged[k], name, version) not in quarantined}
    return Backlog(
        todo=[e.file_key for e in files if e.file_key not in unchanged or e.file_key in to_compute],
        done=unchanged.keys() - not_done,
    )


def is_due(row: Row) -> bool:
    """Return whether a degraded row is to be computed again now."""
    return row["retry_after"] is not None and row["retry_after"] <= datetime.now(UTC)


def release_contents(content_hashes: Collection[str], feature_sets: Collection[str]) -> None:
    """Release the cells of some contents and feature sets from quarantine."""
    quarantine = Quarantine()
    for feature_set in feature_sets:
        for content_hash in quarantine.check_many(content_hashes, feature_set):
            quarantine.release(content_hash, feature_set)
