"""The run launcher and the run coordinator that ``dagster.yaml`` names."""

import dagster as dg
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus  # not public yet
from dagster._core.run_coordinator import SubmitRunContext  # not public yet


class RunLauncher(dg.DefaultRunLauncher):
    """Dagster's default launcher, which also checks whether a run's process is alive.

    Run monitoring thus fails the runs whose process was killed, and Dagster retries them.
    """

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Always true."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return FAILED if a run's process has ended, RUNNING if it is alive or that is unknown."""
        from audio_assets.defs.run_liveness import GONE, is_dead

        if is_dead(self._instance, run):
            return CheckRunHealthResult(WorkerStatus.FAILED, GONE)
        return CheckRunHealthResult(WorkerStatus.RUNNING)


class RunCoordinator(dg.QueuedRunCoordinator):
    """Dagster's run queue, which limits pools from their first run on.

    Dagster itself writes a pool's default limit only when it dequeues the first runs, which the
    limit then does not affect.
    """

    def submit_run(self, context: SubmitRunContext) -> dg.DagsterRun:
        """Queue a run, after writing the default limits of its pools."""
        concurrency = context.dagster_run.run_op_concurrency
        storage = self._instance.event_log_storage
        known = {pool.name for pool in storage.get_pool_limits()}
        for pool in set(concurrency.all_pools or ()) - known if concurrency else ():
            storage.initialize_concurrency_limit_to_default(pool)
        return super().submit_run(context)
