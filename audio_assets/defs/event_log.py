"""Writing the events of cells to Dagster's event log, in batches where that is set up.

Dagster stores up to ``DAGSTER_EVENT_BATCH_SIZE`` events at once if they come as a batch. An event
then takes 0.7 ms of CPU time instead of 6.5 ms on PostgreSQL. On SQLite, `sqlite_storage` sets it.
"""

import os
from collections import defaultdict
from uuid import uuid4

import dagster as dg

# `AssetExecutionContext.log_event` takes no batch; these are what it calls.
from dagster._core.events import DagsterEvent, DagsterEventBatchMetadata

CellEvent = dg.AssetMaterialization | dg.AssetObservation


class EventLog:
    """The event log of a step.

    Parameters
    ----------
    context : AssetExecutionContext or OpExecutionContext
        The step's context.
    """

    def __init__(self, context: dg.AssetExecutionContext | dg.OpExecutionContext) -> None:
        self._context = context
        self._batch_size = int(os.environ.get("DAGSTER_EVENT_BATCH_SIZE", "0"))
        self._waiting: dict[tuple[type, dg.AssetKey], list[CellEvent]] = defaultdict(list)

    def add(self, event: CellEvent) -> None:
        """Log an event, with others of its asset if events are stored in batches."""
        if self._batch_size < 2:
            self._context.log_event(event)
            return
        batch = self._waiting[type(event), event.asset_key]
        batch.append(event)
        if len(batch) == self._batch_size:
            self._write(batch)

    def flush(self) -> None:
        """Log the events that wait for others."""
        for batch in self._waiting.values():
            self._write(batch)

    def _write(self, batch: list[CellEvent]) -> None:
        step, batch_id = self._context.get_step_execution_context(), str(uuid4())
        for number, event in enumerate(batch, start=1):
            place = DagsterEventBatchMetadata(batch_id, number == len(batch))
            if isinstance(event, dg.AssetMaterialization):
                DagsterEvent.asset_materialization(step, event, place)
            else:
                DagsterEvent.asset_observation(step, event, place)
        batch.clear()
