"""Fields that every log record of the robustness layer carries: which run, file and attempt."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

FIELDS = ("run_id", "file", "feature_set", "attempt")
"""Attributes of each record, for formatters; None where a field is not set."""

LOGGER_NAMES = tuple(
    f"robustness.{module}"
    for module in (
        "adaptive_timeout",
        "circuit_breaker",
        "error_classifier",
        "instrumentation",
        "quarantine",
        "smart_retry",
        "state",
        "worker_pool",
    )
)
"""The loggers whose records carry the fields."""

_current: ContextVar[Mapping[str, object]] = ContextVar(
    "robustness_log_context", default=MappingProxyType({})
)


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Attach fields to the records logged within the block, by this thread or task.

    Blocks nest; an inner block adds to the outer one's fields or replaces them.

    Parameters
    ----------
    **fields : object
        Values of `FIELDS`.

    Raises
    ------
    TypeError
        If a field has another name.
    """
    if unknown := fields.keys() - set(FIELDS):
        raise TypeError(f"unknown log fields {sorted(unknown)}; there are {FIELDS}")
    token = _current.set({**_current.get(), **fields})
    try:
        yield
    finally:
        _current.reset(token)


def current_log_fields() -> Mapping[str, object]:
    """Return the fields in force here."""
    return _current.get()


class _AttachFields(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        fields = _current.get()
        for name in FIELDS:
            setattr(record, name, fields.get(name))
        return True


_attach_fields = _AttachFields()


def get_logger(module: str) -> logging.Logger:
    """Return the logger ``robustness.<module>``, whose records carry the fields.

    A filter on the parent logger would not see the records of its children.
    """
    logger = logging.getLogger(f"robustness.{module}")
    logger.addFilter(_attach_fields)
    return logger
