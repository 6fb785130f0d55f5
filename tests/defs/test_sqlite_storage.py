"""Dagster's event logs in SQLite stay open, and are what Dagster's own storage reads and writes."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import Queue

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.events import ASSET_EVENTS
from dagster._core.storage.event_log import SqliteEventLogStorage

from audio_assets.defs.sqlite_storage import _MAX_OPEN, SqliteStorage
from tests.conftest import PROJECT

KEY = dg.AssetKey("one")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the project's dagster.yaml."""
    config = PROJECT / "dagster_home" / "dagster.yaml"
    (tmp_path / "dagster.yaml").write_bytes(config.read_bytes())
    return tmp_path


@pytest.fixture
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(home)) as made:
        yield made


@dg.asset
def one(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    context.log_event(dg.AssetObservation("one", metadata={"n": 1}))
    return dg.MaterializeResult(data_version=dg.DataVersion("1"))


@dg.asset(deps=[one])
def two() -> dg.MaterializeResult[None]:
    return dg.MaterializeResult(data_version=dg.DataVersion("2"))


def is_of_an_asset(entry: dg.EventLogEntry) -> bool:
    return entry.dagster_event_type in ASSET_EVENTS


def tables(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Return the rows of an event log, by table."""
    with closing(sqlite3.connect(path)) as database:
        return {
            table: database.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()
            for table, columns in (
                ("event_logs", "*"),
                ("asset_keys", "asset_key, last_materialization, last_run_id"),
                ("asset_event_tags", "*"),
            )
        }


def own_storage_of_dagster(home: Path) -> SqliteEventLogStorage:
    return SqliteEventLogStorage(str(home / "history" / "runs"))


@dg.op(config_schema={"events": int})
def report(context: dg.OpExecutionContext) -> None:
    for number in range(context.op_config["events"]):
        tags = {"dagster/data_version": "1"}
        context.log_event(dg.AssetMaterialization(KEY, partition=str(number), tags=tags))


@dg.job
def reporting() -> None:
    report()


def run(instance: dg.DagsterInstance, events: int = 3) -> str:
    config = {"ops": {"report": {"config": {"events": events}}}}
    result = reporting.execute_in_process(config, instance=instance)
    assert result.success
    return result.run_id


def test_it_is_what_the_home_uses(instance: dg.DagsterInstance, home: Path) -> None:
    reference = instance.get_ref().storage_data
    assert reference is not None
    assert (reference.module_name, reference.class_name) == (
        SqliteStorage.__module__,
        SqliteStorage.__name__,
    )
    run(instance)
    assert (home / "history" / "runs" / "index.db").exists()


def test_an_event_opens_no_database(instance: dg.DagsterInstance) -> None:
    run(instance)
    opened = 0

    def count(*_: object) -> None:
        nonlocal opened
        opened += 1

    found = []
    sa.event.listen(sa.pool.Pool, "connect", count)
    try:
        for events in (2, 50):
            before = opened
            run(instance, events)
            found.append(opened - before)
    finally:
        sa.event.remove(sa.pool.Pool, "connect", count)
    assert found[0] == found[1]


def test_dagster_s_own_storage_reads_and_adds_to_it(
    instance: dg.DagsterInstance, home: Path
) -> None:
    run_id = run(instance)
    plain = own_storage_of_dagster(home)
    assert plain.get_materialized_partitions(KEY) == {"0", "1", "2"}
    records = plain.get_records_for_run(run_id).records
    assert len(records) == len(instance.all_logs(run_id))

    plain.store_event(records[0].event_log_entry)
    assert len(instance.all_logs(run_id)) == len(records) + 1


def test_who_watches_a_run_sees_its_events_while_it_goes_on(
    instance: dg.DagsterInstance, home: Path
) -> None:
    run_id = run(instance)
    entry = instance.all_logs(run_id)[0]
    watcher, seen = own_storage_of_dagster(home), Queue[str]()
    watcher.watch(run_id, None, lambda event, cursor: seen.put(cursor))
    try:
        instance.event_log_storage.store_event(entry)
        stored = len(instance.all_logs(run_id))
        for _ in range(stored):
            seen.get(timeout=20)
        time.sleep(0.5)  # reading, which the watcher does, must not wake it again
        assert seen.empty()
        with pytest.MonkeyPatch.context() as patch:
            reads: list[str] = []
            patch.setattr(watcher, "get_records_for_run", lambda run, _: reads.append(run))
            instance.all_logs(run_id)
            time.sleep(0.5)
        assert not reads
    finally:
        watcher.dispose()


def test_a_batch_is_what_its_events_are_one_by_one(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    result = dg.materialize([one, two], instance=instance)
    events = [entry for entry in instance.all_logs(result.run_id) if is_of_an_asset(entry)]
    assert len({entry.dagster_event_type for entry in events}) == 3
    batched, single = (SqliteStorage(str(tmp_path / name)) for name in ("batched", "single"))
    batched.event_log_storage.store_event_batch(events)
    for event in events:
        single.event_log_storage.store_event(event)
    for database in ("index", result.run_id):
        found = [
            tables(tmp_path / name / "history" / "runs" / f"{database}.db")
            for name in ("batched", "single")
        ]
        assert found[0] == found[1]
        assert len(found[0]["event_logs"]) == len(events)
        assert len(found[0]["asset_event_tags"]) == (2 if database == "index" else 0)


def test_of_a_batch_that_fails_nothing_is_stored(instance: dg.DagsterInstance, home: Path) -> None:
    run_id = run(instance)
    entries = [each for each in instance.all_logs(run_id) if is_of_an_asset(each)]
    before = len(instance.all_logs(run_id))
    with sqlite3.connect(home / "history" / "runs" / "index.db") as index:
        index.execute("ALTER TABLE asset_keys RENAME TO gone")
    with pytest.raises(sa.exc.DatabaseError):
        instance.event_log_storage.store_event_batch(entries)
    with sqlite3.connect(home / "history" / "runs" / "index.db") as index:
        index.execute("ALTER TABLE gone RENAME TO asset_keys")
    assert len(instance.all_logs(run_id)) == before


def test_deleted_events_of_a_run_are_gone(instance: dg.DagsterInstance, home: Path) -> None:
    run_id = run(instance)
    for path in (home / "history" / "runs").glob(f"{run_id}.db*"):
        path.unlink()
    assert instance.all_logs(run_id) == []


def test_few_databases_are_open_at_a_time(instance: dg.DagsterInstance) -> None:
    run_ids = [run(instance) for _ in range(_MAX_OPEN + 3)]
    assert all(instance.all_logs(run_id) for run_id in run_ids)
    open_files = {link.resolve() for link in Path("/proc/self/fd").iterdir()}
    databases = {path for path in open_files if path.suffix == ".db" and path.stem in run_ids}
    assert 0 < len(databases) <= _MAX_OPEN


def test_after_an_error_it_goes_on(instance: dg.DagsterInstance) -> None:
    run_id = run(instance)
    entry = instance.all_logs(run_id)[0]
    logs = instance.event_log_storage
    assert isinstance(logs, SqliteEventLogStorage)
    stored = len(instance.all_logs(run_id))

    def fail() -> None:
        with logs.run_connection(run_id) as connection:
            connection.execute(logs.prepare_insert_event(entry))
            connection.execute(sa.text("SELECT * FROM nowhere"))

    with pytest.raises(sa.exc.DatabaseError):
        fail()
    logs.store_event(entry)
    assert len(instance.all_logs(run_id)) == stored + 1
    with sqlite3.connect(logs.path_for_shard(run_id), timeout=0) as other:
        other.execute("BEGIN EXCLUSIVE")  # nothing is left locked
