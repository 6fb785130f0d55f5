"""What happens in this package, as events for whoever counts or measures.

`emit` calls every hook. Without any set, there is one that counts with prometheus-client, where
that is installed, in the default registry of its process. A hook that fails is logged, and stops
nobody.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeAlias

from robustness.log_context import get_logger

logger = get_logger("instrumentation")
_lock = threading.Lock()


@dataclass(frozen=True)
class Event:
    """A kind of event.

    Parameters
    ----------
    name : str
        By Prometheus's naming conventions, without prefix and suffix.
    kind : {'counter', 'histogram'}
        Whether its values are added up, or are measurements.
    description : str
        What it says.
    labels : tuple of str
        Its labels; their values are names that the code gives, and no names of files.
    """

    name: str
    kind: Literal["counter", "histogram"]
    description: str
    labels: tuple[str, ...]


EVENTS = {
    event.name: event
    for event in (
        Event("errors", "counter", "Errors classified", ("error_type", "severity")),
        Event(
            "breaker_transitions",
            "counter",
            "Changes of a breaker's state; `unnamed` for those without a name",
            ("breaker", "to_state"),
        ),
        Event("breaker_refusals", "counter", "Calls that a breaker refused", ("breaker",)),
        Event(
            "retry_delay_seconds",
            "histogram",
            "Waits before another attempt (s)",
            ("operation", "strategy"),
        ),
        Event(
            "retried",
            "counter",
            "Operations that ended after more than one attempt",
            ("operation", "strategy", "outcome"),
        ),
        Event(
            "duration_seconds",
            "histogram",
            "Time that work took which has a learned timeout (s)",
            ("operation", "outcome"),
        ),
        Event("timeout_seconds", "histogram", "Timeout that it was given (s)", ("operation",)),
        Event(
            "worker_failures",
            "counter",
            "Tasks that a worker failed by dying or being killed",
            ("error",),
        ),
        Event("quarantined", "counter", "Cells quarantined", ("feature_set", "error_type")),
        Event("state_failures", "counter", "Times that the state store was given up", ()),
    )
}
"""Every event, by name."""

Hook: TypeAlias = Callable[[Event, float, Mapping[str, str]], None]

_hooks: tuple[Hook, ...] | None = None


def set_hooks(hooks: Iterable[Hook] | None) -> None:
    """Have these functions called with each event, its value and its labels.

    Parameters
    ----------
    hooks : iterable of callable, optional
        None for the default, and an empty one for none. They are called in the thread of the
        event, at once, and so must be fast.
    """
    global _hooks
    _hooks = None if hooks is None else tuple(hooks)


def emit(name: str, value: float = 1.0, **labels: str | None) -> None:
    """Call the hooks with an event of `EVENTS`; a label that is None is empty."""
    event = EVENTS[name]
    texts = {label: labels[label] or "" for label in event.labels}
    for hook in _default_hooks() if _hooks is None else _hooks:
        try:
            hook(event, value, texts)
        except Exception:
            logger.exception("A hook for %s failed", name)


def _default_hooks() -> tuple[Hook, ...]:
    with _lock:  # a registry takes each metric once
        return _prometheus_hooks()


@cache
def _prometheus_hooks() -> tuple[Hook, ...]:
    if not find_spec("prometheus_client"):
        return ()
    from prometheus_client import Counter, Histogram

    kinds = {"counter": Counter, "histogram": Histogram}
    metrics = {
        event.name: kinds[event.kind](f"robustness_{event.name}", event.description, event.labels)
        for event in EVENTS.values()
    }

    def count(event: Event, value: float, labels: Mapping[str, str]) -> None:
        metric = metrics[event.name]
        child = metric.labels(**labels) if labels else metric
        child.inc(value) if isinstance(child, Counter) else child.observe(value)

    return (count,)
