"""Events of cells reach Dagster's event log, in batches where Dagster stores batches."""

from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from audio_assets.defs.event_log import EventLog
from tests.robustness.conftest import postgres, postgres_url  # noqa: F401 - fixtures

ONE, TWO = dg.AssetKey("one"), dg.AssetKey("two")

STORED = sa.text(
    "SELECT dagster_event_type, asset_key, partition, xmin::text AS transaction FROM event_logs "
    "WHERE dagster_event_type IN ('ASSET_MATERIALIZATION', 'ASSET_OBSERVATION') ORDER BY id"
)


@dg.op
def report(context: dg.OpExecutionContext) -> None:
    log = EventLog(context)
    for n in range(5):
        for key in (ONE, TWO):
            log.add(dg.AssetMaterialization(key, partition=str(n)))
        log.add(dg.AssetObservation(ONE, partition=f"failed {n}"))
    log.flush()
    log.add(dg.AssetMaterialization(ONE, partition="last"))
    log.flush()


@dg.job
def reporting() -> None:
    report()


@pytest.mark.parametrize("batch_size", ["0", "3"])
def test_events_are_stored_in_batches_of_an_asset(
    batch_size: str,
    tmp_path: Path,
    postgres_url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", batch_size)
    url = postgres_url.replace("+psycopg:", "+psycopg2:")
    (tmp_path / "dagster.yaml").write_text(f"storage:\n  postgres:\n    postgres_url: {url}\n")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert reporting.execute_in_process(instance=instance).success
        assert instance.get_materialized_partitions(ONE) == {*"01234", "last"}
    engine = sa.create_engine(postgres_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        rows = connection.execute(STORED).all()
    for kind, key, partitions in (
        ("ASSET_MATERIALIZATION", ONE, [*"01234", "last"]),
        ("ASSET_MATERIALIZATION", TWO, [*"01234"]),
        ("ASSET_OBSERVATION", ONE, [f"failed {n}" for n in range(5)]),
    ):
        own = [r for r in rows if r[:2] == (kind, key.to_string())]
        assert [row.partition for row in own] == partitions
        transactions = len({row.transaction for row in own})
        # Of six materializations five came before the first flush: batches of 3, 2 and 1.
        batches = 3 if len(own) == 6 else 2
        assert transactions == (batches if batch_size == "3" else len(own))
