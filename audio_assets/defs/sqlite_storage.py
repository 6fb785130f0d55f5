"""The instance of ``dagster.yaml``: in its SQLite storage an event takes a tenth of the time.

The files are those of Dagster's own storage, which makes an engine and a connection for each
statement, and a transaction for each event.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import dagster as dg
import sqlalchemy as sa

# Not public: there is no setting for what this changes.
from dagster._core.events import ASSET_EVENTS
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.event_log import SqlEventLogStorageTable, SqliteEventLogStorage
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData

_MAX_OPEN = 8
"""Databases kept open: Dagster has one per run, and one for all."""

_BATCH_SIZE = "50"


class Instance(dg.DagsterInstance):
    """Dagster's instance with `SqliteStorage`, unless ``dagster.yaml`` names another storage."""

    @staticmethod
    def config_schema() -> Mapping[str, dg.Field]:
        """Return no settings but Dagster's."""
        return {}

    @staticmethod
    def config_defaults(base_dir: str) -> Mapping[str, ConfigurableClassData | None]:
        """Return Dagster's defaults, with the storage replaced."""
        storage = ConfigurableClassData(
            __name__, SqliteStorage.__name__, json.dumps({"base_dir": base_dir})
        )
        return {**InstanceRef.config_defaults(base_dir), "storage": storage}


class SqliteStorage(DagsterSqliteStorage):
    """Dagster's SQLite storage, with the event logs kept open."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)
        self._event_log_storage = _EventLogs(self._event_log_storage._base_dir)

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Any
    ) -> "SqliteStorage":
        """Open the storage in a directory."""
        return cls.from_local(config_value["base_dir"], inst_data)


class _EventLogs(SqliteEventLogStorage):
    """Dagster's event logs, each with one connection that stays open."""

    def __init__(self, base_dir: str) -> None:
        self._engines: dict[str, sa.Engine] = {}  # the one used last is last
        self._tables: set[str] = set()
        self._columns: set[str] = set()
        super().__init__(base_dir)
        self._lock = RLock()  # a batch holds two databases
        os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", _BATCH_SIZE)  # else Dagster makes none

    def store_event(self, event: dg.EventLogEntry) -> None:
        """Store an event."""
        super().store_event(event)
        self._announce(event.run_id)

    def store_event_batch(self, events: Sequence[dg.EventLogEntry]) -> None:
        """Store events, those of assets in one transaction of each database."""
        run_id = events[0].run_id
        if any(e.dagster_event_type not in ASSET_EVENTS or e.run_id != run_id for e in events):
            super().store_event_batch(events)
            return
        rows = [self._event_to_row(event) for event in events]
        insert = SqlEventLogStorageTable.insert()
        with self.index_connection() as index, self.run_connection(run_id) as run:
            run.execute(insert, rows)
            number = SqlEventLogStorageTable.c.id
            ids = index.scalars(insert.returning(number, sort_by_parameter_order=True), rows).all()
            self._store_asset_event_tags(index, events, ids)
            last = {
                (row["asset_key"], row["dagster_event_type"]): place
                for place, row in enumerate(rows)
            }
            for place in last.values():
                self._store_asset_event(index, events[place], ids[place])
        self._announce(run_id)

    def has_table(self, table_name: str) -> bool:
        """Return whether a table exists; one that did is not looked for again."""
        if table_name not in self._tables and super().has_table(table_name):
            self._tables.add(table_name)
        return table_name in self._tables

    def _has_asset_key_col_on_connection(self, conn: sa.Connection, column_name: str) -> bool:
        if column_name not in self._columns and super()._has_asset_key_col_on_connection(
            conn, column_name
        ):
            self._columns.add(column_name)
        return column_name in self._columns

    def _announce(self, run_id: str) -> None:
        """Let the UI's page of a run know of new events.

        It waits for a change of the run's database, and SQLite, while a connection is open, writes
        to another file first.
        """
        os.utime(self.path_for_shard(run_id))

    @contextmanager
    def _connect(self, shard: str) -> Iterator[sa.Connection]:
        with self._lock:
            engine = self._engines.pop(shard, None)
            if engine and not Path(self.path_for_shard(shard)).exists():
                engine.dispose()  # it holds a deleted file
                engine = None
            engine = engine or self._open(shard)
            try:
                with engine.begin() as connection:
                    yield connection
            except BaseException:
                engine.dispose()  # whatever was wrong with it, the next one is new
                raise
            self._engines[shard] = engine
            if len(self._engines) > _MAX_OPEN:
                self._engines.pop(next(iter(self._engines))).dispose()

    def _open(self, shard: str) -> sa.Engine:
        engine = sa.create_engine(
            self.conn_string_for_shard(shard),
            connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS},
            pool_size=1,
        )
        self._initdb(engine)
        return engine
