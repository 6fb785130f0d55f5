"""The resource that the feature ops of a run share: workers, decoded audio and the landing."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import dagster as dg
from pydantic import Field, PrivateAttr

from audio_assets.defs.long_waits import result_tags
from audio_assets.defs.machine_slot import machine_slot
from audio_assets.defs.run_records import record_start, record_worker_time
from audio_assets.extraction import fork_server
from audio_assets.extraction.engine import Engine
from audio_assets.extraction.scratch import Scratch
from audio_assets.library.roots import library_roots
from audio_assets.library.scan import Library
from audio_assets.settings import get_settings, usable_cores
from audio_assets.warehouse import open_landing
from robustness.activity import end_activity
from robustness.dagster import log_to
from robustness.memory import worker_budget_mib
from robustness.settings import get_settings as get_robustness_settings
from robustness.worker_pool import WorkerPool


class ExtractionResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Worker processes, decoded audio and the landing of one run."""

    scratch: str = Field(description="Directory for decoded audio")
    scratch_mib: int = Field(
        4096, description="Decoded audio kept for files with deferred cells (MiB)"
    )
    workers: int = Field(default_factory=usable_cores, description="Worker processes")

    _engine: Engine = PrivateAttr()

    @property
    def engine(self) -> Engine:
        """The engine that the ops of the run share."""
        return self._engine

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[Self]:
        """Start the workers, and stop them when the run ends, also by an error."""
        fork_server.start()
        if context.run is None or context.log is None or context.instance is None:
            raise dg.DagsterInvariantViolationError("features are extracted in a run")
        run_id = context.run.run_id
        is_aware = get_robustness_settings().memory_aware
        with (
            log_to(context.log, run_id),
            machine_slot(context.instance, context.run, context.log),
            Scratch(Path(self.scratch), run_id, self.scratch_mib) as scratch,
            WorkerPool(
                self.workers,
                memory_limit_mib=worker_budget_mib(self.workers) if is_aware else None,
                memory_high=0.9 if is_aware else None,
            ) as pool,
        ):
            landing = open_landing()  # no field: Dagster would store a password in its URL
            library = Library(library_roots())
            self._engine = Engine(run_id, library, landing, pool, scratch)
            with _unless_unreachable(context.log, "The run's start"):
                record_start(context.run, self.workers, landing)
            try:
                yield self
            finally:
                pool.kill()  # a cancelled run leaves workers running
                end_activity(run_id)
                self._engine.end_trace()
                with _unless_unreachable(context.log, "What the workers' time went to"):
                    record_worker_time(context.run, self._engine.worker_time, landing)
                with _unless_unreachable(context.log, "The run's result"):
                    context.instance.add_run_tags(run_id, result_tags(self._engine))


@contextmanager
def _unless_unreachable(log: dg.DagsterLogManager, what: str) -> Generator[None]:
    """Record something of a run that the run can do without."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - object stores and databases have their own errors
        log.warning(f"{what} is not recorded: {error}")


def extraction_resource() -> ExtractionResource:
    """Return the resource with the values of the settings."""
    settings = get_settings()
    return ExtractionResource(
        scratch=str(settings.scratch),
        scratch_mib=settings.audio_scratch_mib,
        workers=settings.workers,
    )
