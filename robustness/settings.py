"""Settings of the robustness layer: one object, filled from environment variables, checked once."""

import os
from functools import cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

Fraction = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(ge=0, le=1000)]
Count = Annotated[PositiveInt, Field(le=10**9)]
Seconds = Annotated[PositiveFloat, Field(le=1e9)]
"""Above 30 years, waits and dates overflow."""


class RobustnessSettingsError(ValueError):
    """An environment variable has a value that cannot be used; the message names each one."""


_IN_WORDS = {
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "string_too_short": "must have at least {min_length} characters",
    "value_error": "{error}",
}
"""What a value must be, by the type of pydantic's error and with its context."""


def problems_in_words(error: ValidationError) -> list[str]:
    """Return what is wrong with each variable, its value, and what it must be.

    The value of one that may hold a secret, such as the password in a URL, is left out.
    """
    problems = []
    for problem in error.errors(include_url=False):
        name = "".join(map(str, problem["loc"]))
        may_be_secret = name.endswith(("_URL", "_TOKEN", "_COMMAND"))
        given = name if may_be_secret or not name else f"{name}={problem['input']}"
        words = _IN_WORDS.get(problem["type"], "{message}")
        words = words.format(message=problem["msg"], **problem.get("ctx", {}))
        problems.append(f"{given} {words}".lstrip())
    return problems


def _default_state_url() -> str | None:
    """Return the URL of `robustness.db` in Dagster's home, None without a home."""
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        return None
    return f"sqlite:///{Path(home).expanduser().absolute() / 'robustness.db'}"


class RobustnessSettings(BaseSettings):
    """What an operator can set; each field's alias is the environment variable that sets it.

    Arguments given to the constructors of breakers, managers and pools win over these.

    Raises
    ------
    pydantic.ValidationError
        If a value does not fit; `get_settings` turns it into `RobustnessSettingsError`.
    """

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", frozen=True, validate_by_name=True
    )

    memory_aware: bool = Field(
        default=True,
        validation_alias="MEMORY_AWARE",
        description="Limit the memory of each worker and shed workers under memory pressure",
    )
    circuit_breaker_failure_threshold: Count = Field(
        default=5,
        validation_alias="CIRCUIT_BREAKER_FAILURE_THRESHOLD",
        description="Consecutive failures that open a breaker which has no threshold of its own",
    )
    circuit_breaker_recovery_timeout: Seconds = Field(
        default=60.0,
        validation_alias="CIRCUIT_BREAKER_RECOVERY_TIMEOUT",
        description="Seconds an open breaker waits before it lets a probe through",
    )
    half_open_permits: Count = Field(
        default=1,
        validation_alias="ROBUSTNESS_HALF_OPEN_PERMITS",
        description="Probes a half-open breaker admits at once, over all processes",
    )
    timeout_base_delay: Seconds = Field(
        default=60.0,
        validation_alias="TIMEOUT_BASE_DELAY",
        description="Base timeout (s) of work that the table of base timeouts does not name; "
        "not above `TIMEOUT_MAX_DELAY`",
    )
    timeout_max_delay: Seconds = Field(
        default=600.0,
        validation_alias="TIMEOUT_MAX_DELAY",
        description="Longest timeout (s), learned or not; `increase_timeout` may exceed it by half",
    )
    timeout_memory_threshold: Fraction = Field(
        default=0.8,
        validation_alias="TIMEOUT_MEMORY_THRESHOLD",
        description="Share of memory in use (0 to 1) above which timeouts are lengthened",
    )
    timeout_floor: Seconds = Field(
        default=5.0,
        validation_alias="ROBUSTNESS_TIMEOUT_FLOOR",
        description="Shortest learned timeout (s)",
    )
    timeout_quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.95,
        validation_alias="ROBUSTNESS_TIMEOUT_QUANTILE",
        description="Quantile of the observed times that a learned timeout starts from",
    )
    timeout_margin: Annotated[Factor, Field(ge=1)] = Field(
        default=4.0,
        validation_alias="ROBUSTNESS_TIMEOUT_MARGIN",
        description="Factor between that quantile and the timeout",
    )
    timeout_min_samples: Count = Field(
        default=10,
        validation_alias="ROBUSTNESS_TIMEOUT_MIN_SAMPLES",
        description="Observations before a learned timeout replaces the base timeout",
    )
    retry_max_attempts: Count = Field(
        default=3,
        validation_alias="ROBUSTNESS_RETRY_MAX_ATTEMPTS",
        description="Attempts at one cell, the first included",
    )
    retry_budget_ratio: Factor = Field(
        default=0.2,
        validation_alias="ROBUSTNESS_RETRY_BUDGET_RATIO",
        description="Retries allowed per first attempt, over all processes",
    )
    retry_total_seconds: Seconds = Field(
        default=1800.0,
        validation_alias="ROBUSTNESS_RETRY_TOTAL_SECONDS",
        description="Time (s) that one cell may take with all its retries and waits",
    )
    parole_days: Annotated[float, Field(ge=0, le=1e5)] = Field(
        default=7.0,
        validation_alias="ROBUSTNESS_PAROLE_DAYS",
        description="Days after which a cell that is in quarantine for time, memory or a crash is "
        "tried once more, then after as long as it has been failing; 0 for never",
    )
    worker_memory_mib: Count | None = Field(
        default=None,
        validation_alias="ROBUSTNESS_WORKER_MEMORY_MIB",
        description="Memory (MiB) of one worker; a share of the machine's or cgroup's if unset",
    )
    state_url: str | None = Field(
        default_factory=_default_state_url,
        validation_alias="ROBUSTNESS_STATE_URL",
        description="SQLAlchemy URL of the state that all processes share (SQLite or PostgreSQL); "
        "`$DAGSTER_HOME/robustness.db` if unset, private to each process without `DAGSTER_HOME`",
    )
    state_lock_timeout: Seconds = Field(
        default=5.0,
        validation_alias="ROBUSTNESS_STATE_LOCK_TIMEOUT",
        description="Seconds to wait for a locked or silent state store before working without it",
    )
    state_retry_interval: Seconds = Field(
        default=30.0,
        validation_alias="ROBUSTNESS_STATE_RETRY_INTERVAL",
        description="Seconds between two attempts to reconnect to the state store",
    )

    @field_validator("state_url")
    @classmethod
    def _is_supported_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith("sqlite:///"):
            from sqlalchemy import make_url  # takes long; the default does without
            from sqlalchemy.exc import ArgumentError

            try:
                backend = make_url(url).get_backend_name()
            except ArgumentError:
                raise ValueError("must be an SQLAlchemy URL") from None
            if backend not in ("sqlite", "postgresql"):
                raise ValueError(f"must be an SQLite or PostgreSQL URL, not {backend}")
        return url

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.timeout_floor > self.timeout_max_delay:
            raise ValueError(
                f"ROBUSTNESS_TIMEOUT_FLOOR={self.timeout_floor:g} must not be above "
                f"TIMEOUT_MAX_DELAY={self.timeout_max_delay:g}"
            )
        if self.timeout_base_delay > self.timeout_max_delay:
            raise ValueError(
                f"TIMEOUT_BASE_DELAY={self.timeout_base_delay:g} must not be above "
                f"TIMEOUT_MAX_DELAY={self.timeout_max_delay:g}"
            )
        return self


@cache
def get_settings() -> RobustnessSettings:
    """Return the process's settings, read from the environment once.

    `get_settings.cache_clear()` makes the next call read it again.

    Raises
    ------
    RobustnessSettingsError
        If variables have values that do not fit; the message names all of them.
    """
    try:
        return RobustnessSettings()
    except ValidationError as error:
        raise RobustnessSettingsError("; ".join(problems_in_words(error))) from None
