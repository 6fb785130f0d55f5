"""Resilience for long batch work: breakers, learned timeouts, classification, retries, workers.

A name is loaded from its module when it is first used, so importing one module does not load the
others. The decorators `circuit_breaker` and `smart_retry` are named like their modules: import
them from there.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # "as" says that a name is to be imported from here
    from robustness.adaptive_timeout import (  # noqa: I001 - one statement per module
        AdaptiveTimeoutManager as AdaptiveTimeoutManager,
        OperationTimeoutError as OperationTimeoutError,
        TimeoutStrategy as TimeoutStrategy,
        get_timeout_manager as get_timeout_manager,
        timeout_context as timeout_context,
    )
    from robustness.circuit_breaker import (
        CircuitBreaker as CircuitBreaker,
        CircuitBreakerOpenError as CircuitBreakerOpenError,
        CircuitState as CircuitState,
        add_transition_listener as add_transition_listener,
        all_circuit_breakers as all_circuit_breakers,
        get_circuit_breaker as get_circuit_breaker,
    )
    from robustness.error_classifier import (
        ErrorClassifier as ErrorClassifier,
        ErrorInfo as ErrorInfo,
        ErrorSeverity as ErrorSeverity,
        ErrorType as ErrorType,
        RecoveryStrategy as RecoveryStrategy,
        Rule as Rule,
        get_error_classifier as get_error_classifier,
    )
    from robustness.instrumentation import Event as Event, set_hooks as set_hooks
    from robustness.quarantine import Quarantine as Quarantine
    from robustness.settings import (
        RobustnessSettings as RobustnessSettings,
        get_settings as get_settings,
    )
    from robustness.smart_retry import (
        DeferredError as DeferredError,
        RetryResult as RetryResult,
        RetryStrategy as RetryStrategy,
        SmartRetryManager as SmartRetryManager,
        get_retry_manager as get_retry_manager,
    )
    from robustness.state import StateStore as StateStore, get_state_store as get_state_store
    from robustness.worker_pool import (
        WorkerError as WorkerError,
        WorkerPool as WorkerPool,
        report_stage as report_stage,
    )

_NAMES = {
    "adaptive_timeout": (
        "AdaptiveTimeoutManager",
        "OperationTimeoutError",
        "TimeoutStrategy",
        "get_timeout_manager",
        "timeout_context",
    ),
    "circuit_breaker": (
        "CircuitBreaker",
        "CircuitBreakerOpenError",
        "CircuitState",
        "add_transition_listener",
        "all_circuit_breakers",
        "get_circuit_breaker",
    ),
    "error_classifier": (
        "ErrorClassifier",
        "ErrorInfo",
        "ErrorSeverity",
        "ErrorType",
        "RecoveryStrategy",
        "Rule",
        "get_error_classifier",
    ),
    "instrumentation": ("Event", "set_hooks"),
    "quarantine": ("Quarantine",),
    "settings": ("RobustnessSettings", "get_settings"),
    "smart_retry": (
        "DeferredError",
        "RetryResult",
        "RetryStrategy",
        "SmartRetryManager",
        "get_retry_manager",
    ),
    "state": ("StateStore", "get_state_store"),
    "worker_pool": ("WorkerError", "WorkerPool", "report_stage"),
}

__all__ = [name for names in _NAMES.values() for name in names]


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"robustness.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
