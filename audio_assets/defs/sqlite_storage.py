"""Dagster's SQLite storage that ``dagster.yaml`` names: an event takes a quarter of the time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

# Not public. Dagster's storage makes an engine and a connection for each statement, which is most
# of what an event costs; that has no setting.
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData

from audio_assets.settings import get_settings

_MAX_OPEN = 8
"""Databases kept open: Dagster has one per run, and one for all."""


class SqliteStorage(DagsterSqliteStorage):
    """Dagster's SQLite storage below its home, with the event logs kept open."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)
        self._event_log_storage = _EventLogs(self._event_log_storage._base_dir)

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Nothing is to be configured."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Any
    ) -> "SqliteStorage":
        """Open the storage below Dagster's home."""
        return cls.from_local(str(get_settings().dagster_home.absolute()), inst_data)


class _EventLogs(SqliteEventLogStorage):
    """Dagster's event logs, each with one connection that stays open."""

    def __init__(self, base_dir: str) -> None:
        self._engines: dict[str, sa.Engine] = {}  # the one used last is last
        self._tables: set[str] = set()
        self._columns: set[str] = set()
        super().__init__(base_dir)

    def store_event(self, event: dg.EventLogEntry) -> None:
        """Store an event, and let the UI know."""
        super().store_event(event)
        # The page of a run waits for a change of its file, but with a connection open SQLite
        # writes to another file first.
        os.utime(self.path_for_shard(event.run_id))

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

    @contextmanager
    def _connect(self, shard: str) -> Iterator[sa.Connection]:
        with self._db_lock:
            engine = self._engines.pop(shard, None)
            if engine is None or not Path(self.path_for_shard(shard)).exists():
                engine = self._open(shard)
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
