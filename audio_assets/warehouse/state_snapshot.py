"""A snapshot of the state store, which is published in the warehouse's robustness tables."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from duckdb import DuckDBPyConnection
from sqlalchemy import Connection

from audio_assets.features.base import Row
from audio_assets.warehouse.schema import (
    BREAKER_TRANSITIONS,
    CIRCUIT_BREAKERS,
    QUARANTINE,
    RETRY_PARAMETERS,
    RUNS,
    Table,
    quoted,
)
from robustness import state_schema
from robustness.state import StateStore

STATE_TABLES = (CIRCUIT_BREAKERS, BREAKER_TRANSITIONS, RETRY_PARAMETERS)
"""Tables of snapshots that are written to the landing, and so survive a rebuild."""

_QUARANTINE_COLUMNS = ", ".join(quoted(column.name) for column in QUARANTINE.computed)


@dataclass(frozen=True)
class StateSnapshot:
    """What the state store held at one time.

    Parameters
    ----------
    breakers, transitions, retry_parameters : list of dict
        Rows of the store's tables.
    quarantine : list of tuple
        Rows of ``robustness.quarantine``.
    """

    breakers: list[Row]
    transitions: list[Row]
    retry_parameters: list[Row]
    quarantine: list[tuple[Any, ...]]

    def is_published(self, connection: DuckDBPyConnection) -> bool:
        """Return whether a version has this quarantine and all these transitions."""
        published = connection.execute(
            f"SELECT {_QUARANTINE_COLUMNS} FROM {QUARANTINE.sql_name}"
        ).fetchall()
        return set(published) == set(self.quarantine) and not self._new_transitions(connection)

    def new_rows(self, connection: DuckDBPyConnection) -> dict[Table, list[Row]]:
        """Return the rows to add to the `STATE_TABLES` of a version, by table.

        Breakers and retry parameters are those of the runs in the temporary table ``touched``.
        """
        # The present state is not that at the end of a run which is long over.
        runs = connection.execute(
            f"""
            SELECT run_id FROM touched
            WHERE NOT EXISTS (
                FROM {CIRCUIT_BREAKERS.sql_name} AS seen JOIN {RUNS.sql_name} USING (run_id)
                WHERE seen.run_id = touched.run_id AND seen.seen_at >= runs.recorded_at
            )
            """
        ).fetchall()
        by_table = {
            CIRCUIT_BREAKERS: [{**row, "run_id": run} for (run,) in runs for row in self.breakers],
            BREAKER_TRANSITIONS: self._new_transitions(connection),
            RETRY_PARAMETERS: [
                {**row, "run_id": run} for (run,) in runs for row in self.retry_parameters
            ],
        }
        now = datetime.now(UTC)
        return {
            table: [
                {c.name: row[c.name] for c in table.columns if c.name in row} | {"seen_at": now}
                for row in rows
            ]
            for table, rows in by_table.items()
        }

    def replace_quarantine(self, connection: DuckDBPyConnection) -> None:
        """Make the quarantine of a version this one."""
        connection.execute(f"DELETE FROM {QUARANTINE.sql_name}")
        if self.quarantine:
            marks = ", ".join("?" for _ in QUARANTINE.computed)
            connection.executemany(
                f"INSERT INTO {QUARANTINE.sql_name} ({_QUARANTINE_COLUMNS}) VALUES ({marks})",
                self.quarantine,
            )

    def _new_transitions(self, connection: DuckDBPyConnection) -> list[Row]:
        key = BREAKER_TRANSITIONS.key
        selected = ", ".join(map(quoted, key))
        known = set(
            connection.execute(f"SELECT {selected} FROM {BREAKER_TRANSITIONS.sql_name}").fetchall()
        )
        return [row for row in self.transitions if tuple(row[k] for k in key) not in known]


def read_state(store: StateStore | None) -> StateSnapshot | None:
    """Read the state store; None if there is none or it is degraded."""
    if store is None:
        return None
    snapshot = store.query(_read)
    # The fallback of a store whose database is down knows nothing of the time before.
    return None if store.degraded else snapshot


def _read(connection: Connection) -> StateSnapshot:
    def rows(table: sa.Table) -> list[Row]:
        return [
            {name: _as_time(value) if _is_time(name) else value for name, value in row.items()}
            for row in connection.execute(sa.select(table)).mappings()
        ]

    return StateSnapshot(
        breakers=rows(state_schema.circuit_breakers),
        transitions=rows(state_schema.breaker_transitions),
        retry_parameters=rows(state_schema.retry_parameters),
        quarantine=[
            tuple(row[column.name] for column in QUARANTINE.computed)
            for row in rows(state_schema.quarantine)
        ],
    )


def _is_time(name: str) -> bool:
    return name == "at" or name.endswith("_at")


def _as_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
