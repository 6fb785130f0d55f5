"""The executor: Dagster's in-process executor, which holds the run's lock."""

from collections.abc import Iterator

import dagster as dg
from dagster._core.execution.context.system import PlanOrchestrationContext  # of dg.Executor
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode

from audio_assets.defs.run_liveness import remove_old_locks
from audio_assets.monitoring.run_locks import RunLock


class _LivingExecutor(dg.Executor):
    """An executor whose process holds its run's lock until it ends."""

    def __init__(self, executor: dg.Executor) -> None:
        self._executor = executor

    @property
    def retries(self) -> RetryMode:
        return self._executor.retries

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        instance, run_id = plan_context.instance, plan_context.run_id
        while _locks:  # `audio-assets analyze` executes one run after another
            _locks.pop().release()
        _locks.append(lock := RunLock(run_id))
        instance.add_run_tags(run_id, lock.tag)
        if lock.problem:
            plan_context.log.warning(f"The run continues, but {lock.problem}")
        remove_old_locks(instance)
        yield from self._executor.execute(plan_context, execution_plan)


_locks: list[RunLock] = []
"""Held until the next run or the process's end: a run's end is recorded after its last event."""


def _create(context: dg.InitExecutorContext) -> dg.Executor:
    create = dg.in_process_executor.executor_creation_fn
    assert create is not None
    return _LivingExecutor(create(context))


living_executor = dg.ExecutorDefinition(
    name="in_process",
    config_schema=dg.in_process_executor.config_schema.as_field(),
    executor_creation_fn=_create,
    description="Executes steps in the run's process, one after another, and holds the run's lock",
)
