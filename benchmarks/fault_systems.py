"""The systems that `benchmarks.faults` compares, each run as a process of its own.

    python -m benchmarks.fault_systems plain|fixed|product LIBRARY

Workers run this module as their parent's main script, and so have the faults too.
"""

import json
import math
import os
import sys
from pathlib import Path

RETRIES = 3


def main() -> None:
    system, library = sys.argv[1:]
    from benchmarks import injection

    injection.install()
    if system == "plain":
        _run_plain(library)
        return
    if system == "fixed":
        _use_fixed_breakers()
        _fix_number_of_workers()
    from audio_assets.cli import app, runs

    runs._show_results = lambda *_: 0  # it shows columns of all feature sets
    app.app(["analyze", library])


def _use_fixed_breakers() -> None:
    """Have two breakers of this process alone, for everything, that count every failure."""
    from audio_assets.extraction import dispatch
    from robustness.circuit_breaker import CircuitBreaker, get_circuit_breaker

    def count_all(_: Exception) -> bool:
        return True

    breakers = {
        "audio_processing": CircuitBreaker(
            failure_threshold=3, recovery_timeout=30, counts=count_all
        ),
        "feature_extraction": CircuitBreaker(
            failure_threshold=2, recovery_timeout=45, counts=count_all
        ),
    }

    def get(name: str) -> CircuitBreaker:
        if name.startswith("feature:"):
            name = "feature_extraction"
        return breakers.get(name) or get_circuit_breaker(name)

    dispatch.get_circuit_breaker = get


def _fix_number_of_workers() -> None:
    """Have no other worker beside one that hangs."""
    from robustness import worker_task

    worker_task._IDLE_SECONDS = math.inf


# Plain Dagster: an asset per feature set that loops over the files, stock retries, stock executor.


def plain_job():  # noqa: ANN201 - dagster is imported when it runs
    import dagster as dg

    from audio_assets.features import FEATURE_SETS
    from benchmarks import injection

    if not isinstance(FEATURE_SETS["metadata"].extract, injection.Faulty):
        injection.install()  # a step's own process
    retry = dg.RetryPolicy(max_retries=RETRIES, delay=1, backoff=dg.Backoff.EXPONENTIAL)
    assets = [_plain_asset(name, retry) for name in FEATURE_SETS]
    definitions = dg.Definitions(assets=assets, jobs=[dg.define_asset_job("plain")])
    return definitions.resolve_job_def("plain")


def _plain_asset(name, retry):  # noqa: ANN001, ANN202
    import dagster as dg

    @dg.asset(name=name, retry_policy=retry)
    def extract(context: dg.AssetExecutionContext) -> None:
        from audio_assets.features import FEATURE_SETS
        from benchmarks import injection
        from benchmarks.plain import extract_row

        home = Path(os.environ["DAGSTER_HOME"])
        rows = home / f"{name}.jsonl"
        done = {json.loads(line)["file"] for line in rows.open()} if rows.exists() else set()
        failed = []
        for path in _plain_files():
            if path.name in done:
                continue
            pcm = home / "pcm" / f"{path.name}.npy"
            pcm.parent.mkdir(exist_ok=True)
            injection.entering(name)
            try:
                row = extract_row(path, FEATURE_SETS[name], pcm)
            except Exception as error:  # noqa: BLE001 - the next file may do
                context.log.error(f"{path}: {error}")
                failed.append(path)
                continue
            with rows.open("a") as file:
                file.write(json.dumps({"file": path.name, "row": row}, default=str) + "\n")
        if failed:
            raise RuntimeError(f"{len(failed)} files failed")

    return extract


def _plain_files() -> list[Path]:
    root = Path(os.environ["AUDIO_ASSETS_BENCHMARK_LIBRARY"])
    return sorted(path for path in root.rglob("*") if path.is_file())


def _run_plain(library: str) -> None:
    import dagster as dg

    from benchmarks.fault_systems import plain_job as importable

    os.environ["AUDIO_ASSETS_BENCHMARK_LIBRARY"] = library
    with dg.DagsterInstance.get() as instance:
        dg.execute_job(
            dg.reconstructable(importable),
            instance,
            run_config={
                "execution": {
                    "config": {"multiprocess": {"max_concurrent": len(os.sched_getaffinity(0))}}
                }
            },
        )


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    from benchmarks import injection

    injection.install()
