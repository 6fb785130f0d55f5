"""Work that failed by its input's own fault, and is not tried again until the input changes."""

import fnmatch
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from robustness.instrumentation import emit
from robustness.settings import get_settings
from robustness.state import StateStore, get_state_store
from robustness.state_schema import insert_into, quarantine

Conditions = Mapping[str, float | str]

_HASHES_PER_QUERY = 500
"""Below the number of variables that every SQLite takes in one statement."""


@dataclass(frozen=True)
class QuarantinedCell:
    """A content and a feature set that cannot be computed from it.

    Parameters
    ----------
    content_hash : str
        Hash of the content that failed.
    feature_set : str
        The feature set that failed.
    file_key : str
        The file with this content, when it last failed.
    error_type : str
        Value of the `robustness.error_classifier.ErrorType`.
    reason : str
        What is wrong, for a reader.
    first_failed_at, last_failed_at : float
        When (s since the epoch).
    attempts : int
        Attempts made altogether.
    code_version : str or None
        Version of the feature set's code it failed with, which alone it is quarantined for; None
        for all versions.
    conditions : mapping of str to float or str, or None
        Limits and versions under which it failed. Under larger limits or other versions it is tried
        again. None if it would fail under any: its content is at fault.
    """

    content_hash: str
    feature_set: str
    file_key: str
    error_type: str
    reason: str
    first_failed_at: float
    last_failed_at: float
    attempts: int
    code_version: str | None = None
    conditions: Conditions | None = None

    def holds(self, code_version: str | None = None, conditions: Conditions | None = None) -> bool:
        """Return whether it is not to be tried now.

        Parameters
        ----------
        code_version : str, optional
            Version of the feature set's code now. Default: any.
        conditions : mapping of str to float or str, optional
            Limits and versions now. Default: it is in quarantine under any.
        """
        if None not in (code_version, self.code_version) and self.code_version != code_version:
            return False
        if self.conditions is None or conditions is None:
            return True
        is_better = any(
            _is_better(conditions[name], before)
            for name, before in self.conditions.items()
            if name in conditions
        )
        return not is_better and not self._has_parole()

    def _has_parole(self) -> bool:
        """Return whether it was left alone for as long as it had been failing before."""
        first_s = get_settings().parole_days * 86400
        waited_s = time.time() - self.last_failed_at
        return 0 < first_s < waited_s > self.last_failed_at - self.first_failed_at


class Quarantine:
    """The quarantined cells of a deployment.

    A cell is identified by the hash of its content, not by its file: a changed file is not
    quarantined, a copy under another name is.

    Parameters
    ----------
    store : StateStore, optional
        Where they are kept; the process's store by default.
    """

    def __init__(self, store: StateStore | None = None) -> None:
        self._store = store or get_state_store()

    def check(
        self,
        content_hash: str,
        feature_set: str,
        code_version: str | None = None,
        conditions: Conditions | None = None,
    ) -> QuarantinedCell | None:
        """Return the quarantined cell, None if it is not quarantined."""
        found = self.check_many([content_hash], feature_set, code_version, conditions)
        return found.get(content_hash)

    def check_many(
        self,
        content_hashes: Collection[str],
        feature_set: str,
        code_version: str | None = None,
        conditions: Conditions | None = None,
    ) -> dict[str, QuarantinedCell]:
        """Return those contents that are quarantined for a feature set, by their hashes.

        Parameters
        ----------
        content_hashes : collection of str
            The contents.
        feature_set : str
            The feature set.
        code_version, conditions
            As for `QuarantinedCell.holds`: what is to be tried now is left out.
        """
        hashes = list(content_hashes)

        def select(connection: Connection) -> dict[str, QuarantinedCell]:
            found = {}
            for start in range(0, len(hashes), _HASHES_PER_QUERY):
                some = hashes[start : start + _HASHES_PER_QUERY]
                rows = connection.execute(
                    sa.select(quarantine).where(
                        quarantine.c.feature_set == feature_set,
                        quarantine.c.content_hash.in_(some),
                    )
                ).mappings()
                found.update({row["content_hash"]: _cell(row) for row in rows})
            return {
                content_hash: cell
                for content_hash, cell in found.items()
                if cell.holds(code_version, conditions)
            }

        return self._store.query(select)

    def add(
        self,
        content_hash: str,
        feature_set: str,
        *,
        file_key: str,
        error_type: str,
        reason: str,
        attempts: int = 1,
        code_version: str | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        """Quarantine a cell, or record that one in quarantine failed again.

        Parameters
        ----------
        content_hash, feature_set, file_key, error_type, reason, code_version, conditions
            As in `QuarantinedCell`; all but the first two are replaced by the latest.
        attempts : int
            Attempts made since it was last recorded.
        """
        now = time.time()

        def upsert(connection: Connection) -> None:
            insert = insert_into(connection, quarantine).values(
                content_hash=content_hash,
                feature_set=feature_set,
                file_key=file_key,
                error_type=error_type,
                reason=reason,
                first_failed_at=now,
                last_failed_at=now,
                attempts=attempts,
                code_version=code_version,
                conditions=None if conditions is None else json.dumps(dict(conditions)),
            )
            new = insert.excluded
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["content_hash", "feature_set"],
                    set_={
                        "file_key": new.file_key,
                        "error_type": new.error_type,
                        "reason": new.reason,
                        "last_failed_at": new.last_failed_at,
                        "attempts": quarantine.c.attempts + new.attempts,
                        "code_version": new.code_version,
                        "conditions": new.conditions,
                    },
                )
            )

        self._store.transact(upsert)
        emit("quarantined", feature_set=feature_set, error_type=error_type)

    def release(self, pattern: str, feature_set: str | None = None) -> int:
        """Release cells, so that the next run tries them again.

        Parameters
        ----------
        pattern : str
            A content hash, a file key, or a pattern of file keys (``*``, ``?``, ``[...]``).
        feature_set : str, optional
            Only the cells of this feature set.

        Returns
        -------
        int
            How many cells were released.
        """

        def delete(connection: Connection) -> int:
            cells = [
                cell
                for cell in _select_all(connection)
                if feature_set in (None, cell.feature_set)
                and (
                    pattern in (cell.content_hash, cell.file_key)
                    or fnmatch.fnmatchcase(cell.file_key, pattern)
                )
            ]
            for cell in cells:
                connection.execute(
                    sa.delete(quarantine).where(
                        quarantine.c.content_hash == cell.content_hash,
                        quarantine.c.feature_set == cell.feature_set,
                    )
                )
            return len(cells)

        return self._store.transact(delete)

    def list(self) -> list[QuarantinedCell]:
        """Return all quarantined cells, those of one file together."""
        return self._store.query(_select_all)


def _select_all(connection: Connection) -> list[QuarantinedCell]:
    order = (quarantine.c.file_key, quarantine.c.feature_set, quarantine.c.content_hash)
    rows = connection.execute(sa.select(quarantine).order_by(*order)).mappings()
    return [_cell(row) for row in rows]


def _cell(row: sa.RowMapping) -> QuarantinedCell:
    conditions = row["conditions"] and json.loads(row["conditions"])
    return QuarantinedCell(**{**row, "conditions": conditions or None})


def _is_better(now: float | str, before: float | str) -> bool:
    """Return whether a limit is larger than before, or a version another one."""
    if isinstance(now, str) or isinstance(before, str):
        return now != before
    return now > before
