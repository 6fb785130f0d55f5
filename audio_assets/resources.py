"""The resource that the feature ops of one run share."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import dagster as dg
from pydantic import Field, PrivateAttr

from audio_assets.extraction.engine import Engine
from audio_assets.extraction.scratch import Scratch
from audio_assets.features import FEATURE_SETS
from audio_assets.library import Library
from audio_assets.roots import library_roots
from audio_assets.settings import get_settings, usable_cores
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import warehouse_tables
from robustness.dagster import log_to
from robustness.memory import worker_budget_mib
from robustness.settings import get_settings as get_robustness_settings
from robustness.worker_pool import WorkerPool


class ExtractionResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Worker processes, decoded audio and the landing, for the length of one run."""

    landing: str = Field(description="Directory or fsspec URL of the Parquet parts")
    scratch: str = Field(description="Directory for decoded audio")
    scratch_mib: int = Field(4096, description="Decoded audio kept for files that wait (MiB)")
    workers: int = Field(default_factory=usable_cores, description="Worker processes")

    _engine: Engine = PrivateAttr()

    @property
    def engine(self) -> Engine:
        """The engine that the ops of the run share; there only while the run goes on."""
        return self._engine

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[Self]:
        """Start the workers; stop them, whatever happens, when the run ends."""
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(variable, "1")  # a worker is one core's work
        if context.run is None or context.log is None:
            raise dg.DagsterInvariantViolationError("features are extracted in a run")
        run_id = context.run.run_id
        settings = get_robustness_settings()
        limit = settings.worker_memory_mib or worker_budget_mib(self.workers)
        with (
            log_to(context.log, run_id),
            Scratch(Path(self.scratch), run_id, self.scratch_mib) as scratch,
            WorkerPool(
                self.workers,
                memory_limit_mib=limit if settings.memory_aware else None,
                preload=("audio_assets.preload",),
                memory_high=0.9 if settings.memory_aware else None,
            ) as pool,
        ):
            self._engine = Engine(
                run_id=run_id,
                library=Library(library_roots()),
                landing=Landing(self.landing, warehouse_tables(FEATURE_SETS.values())),
                pool=pool,
                scratch=scratch,
            )
            try:
                yield self
            finally:
                pool.kill()  # what workers are still at was asked for by a run that was cancelled


def extraction_resource() -> ExtractionResource:
    """Return the resource as the settings have it."""
    settings = get_settings()
    return ExtractionResource(
        landing=settings.landing,
        scratch=str(settings.scratch),
        scratch_mib=settings.audio_scratch_mib,
        workers=settings.workers,
    )
