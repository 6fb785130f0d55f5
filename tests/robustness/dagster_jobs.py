"""Jobs that fail in the ways the tests of the Dagster adapter are about."""

import logging
import os
import signal
from pathlib import Path

from dagster import Config, Failure, OpExecutionContext, in_process_executor, job, op

from robustness.circuit_breaker import CircuitBreaker
from robustness.dagster import SmartRetryPolicy, log_to
from robustness.log_context import log_context

POLICY = SmartRetryPolicy(max_retries=2, strategy="constant", operation="test")


class Trace(Config):
    """Where attempts are counted: a file that gets a line for each."""

    path: str
    fault: str = "flaky"


class FlakyError(Exception):
    """Goes away when tried again."""


class BusyError(Exception):
    """A server that wants to be left alone."""

    error_type = "NETWORK"
    retry_after = 86400.0


@op(retry_policy=POLICY)
def work(context: OpExecutionContext, config: Trace) -> None:
    with Path(config.path).open("a") as trace:
        trace.write(f"{os.getpid()}\n")
    attempt = len(Path(config.path).read_text().splitlines())
    match config.fault:
        case "flaky" if attempt < 3:
            raise FlakyError("try again")
        case "forbidden":
            raise Failure("no", allow_retries=False)
        case "defect":
            raise TypeError("the same every time")
        case "flaky, then crashes" if attempt == 1:
            raise FlakyError("try again")
        case "flaky, then crashes" if attempt == 2:
            os._exit(7)
        case "interrupted" if attempt < 2:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        case "open breaker" if attempt < 2:
            breaker = CircuitBreaker("adapter test", failure_threshold=1, recovery_timeout=1.3)
            breaker.force_open()
            breaker.call(dict)
        case "asks for a day":
            raise BusyError
        case "logs":
            breaker = CircuitBreaker("logging test", failure_threshold=1, recovery_timeout=60)
            with log_to(context.log, context.run_id), log_context(file="a.flac", attempt=1):
                breaker.force_open()
                logging.getLogger("robustness.smart_retry").warning("seen in the run")
            logging.getLogger("robustness.smart_retry").warning("not seen in the run")
            breaker.reset()


@job(executor_def=in_process_executor)
def in_process() -> None:
    work()


@job
def multiprocess() -> None:
    work()
