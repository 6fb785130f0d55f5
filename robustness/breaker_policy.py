"""When a circuit breaker opens, probes and closes: the decisions, without clock, store or settings.

`robustness.breaker_store` keeps the state; `robustness.circuit_breaker` is the module to import.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal, NamedTuple

Outcome = Literal["success", "failure", "ignored", "released"]
Forced = Literal["open", "disabled"]


class CircuitState(StrEnum):
    """What a breaker does with calls: admit them, refuse them, or admit a few probes."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"


@dataclass(frozen=True)
class Transition:
    """A breaker changed its state.

    Parameters
    ----------
    name : str
        The breaker.
    from_state, to_state : str
        A `CircuitState`, or FORCED_OPEN or DISABLED for a state set by hand.
    at : float
        When (s since the epoch).
    reason : str
        Why.
    run_id : str or None
        The Dagster run that was logging when it happened.
    """

    name: str
    from_state: str
    to_state: str
    at: float
    reason: str
    run_id: str | None


@dataclass(frozen=True)
class Report:
    """How a call went, under which permit: the breaker's generation and, of a probe, its token."""

    generation: int
    token: str | None
    outcome: Outcome
    error: BaseException | None
    slow: bool


class Rates(NamedTuple):
    """Shares (0 to 1) of failed and of slow calls in the sliding window."""

    failed: float
    slow: float


@dataclass
class BreakerRecord:
    """A breaker's row in the store."""

    name: str
    state: str
    recovery_timeout: float
    forced: str | None = None
    generation: int = 0
    failure_count: int = 0
    success_count: int = 0
    ignored_count: int = 0
    rejected_count: int = 0
    consecutive_failures: int = 0
    probe_successes: int = 0
    opened_at: float | None = None
    last_failure_at: float | None = None
    last_error: str | None = None
    updated_at: float = 0.0

    def effective_state(self, now: float) -> CircuitState:
        """Return the state for a call now: an open breaker whose time is up admits a probe."""
        if self.forced is not None:
            return CircuitState.OPEN if self.forced == "open" else CircuitState.CLOSED
        if self.state == CircuitState.OPEN and self.retry_after(now) <= 0:
            return CircuitState.HALF_OPEN
        return CircuitState(self.state)

    def retry_after(self, now: float) -> float:
        """Return the seconds until the breaker admits a call, 0 if it does so now."""
        if self.forced == "open":
            return self.recovery_timeout  # until when is unknown
        if self.forced is not None or self.state != CircuitState.OPEN or self.opened_at is None:
            return 0.0
        # A clock that was set back must not keep the breaker open beyond its time.
        return min(max(self.opened_at + self.recovery_timeout - now, 0.0), self.recovery_timeout)

    def why_refused(self, now: float) -> str:
        """Return why an open breaker refuses a call."""
        if self.forced == "open":
            return "is held open by hand"
        since = datetime.fromtimestamp(self.opened_at or now, UTC)
        return f"is open since {since:%Y-%m-%d %H:%M:%S} UTC (last error: {self.last_error})"


@dataclass(frozen=True, kw_only=True)
class BreakerPolicy:
    """The thresholds of a breaker; see `robustness.circuit_breaker.BreakerOptions`.

    Raises
    ------
    ValueError
        If one is out of its range.
    """

    failure_threshold: int
    recovery_timeout: float
    half_open_permits: int
    half_open_successes: int = 1
    failure_rate_threshold: float | None = None
    slow_call_seconds: float | None = None
    slow_call_rate_threshold: float | None = None
    window_size: int = 100
    window_seconds: float | None = None
    minimum_calls: int | None = None

    def __post_init__(self) -> None:
        for option, lowest in (
            ("failure_threshold", 1),
            ("recovery_timeout", 0),
            ("window_size", 1),
            ("half_open_permits", 1),
            ("half_open_successes", 1),
        ):
            if getattr(self, option) < lowest:
                raise ValueError(f"{option}={getattr(self, option)} should be at least {lowest}")
        for option in ("failure_rate_threshold", "slow_call_rate_threshold"):
            rate = getattr(self, option)
            if rate is not None and not 0 < rate <= 1:
                raise ValueError(f"{option}={rate} should be above 0 and at most 1")
        if (self.slow_call_seconds is None) != (self.slow_call_rate_threshold is None):
            raise ValueError("slow_call_seconds and slow_call_rate_threshold go together")
        if self.minimum_calls is not None and not 1 <= self.minimum_calls <= self.window_size:
            raise ValueError(
                f"minimum_calls={self.minimum_calls} should be between 1 and the window_size, "
                f"{self.window_size}"
            )

    @property
    def has_window(self) -> bool:
        """Whether calls are kept in a sliding window."""
        return not (self.failure_rate_threshold is self.slow_call_rate_threshold is None)

    def is_slow(self, seconds: float) -> bool:
        """Return whether a call that took this long is slow."""
        return self.slow_call_seconds is not None and seconds > self.slow_call_seconds

    def why_open(self, record: BreakerRecord, rates: Rates | None) -> str | None:
        """Return why a closed breaker is to open now, None if it is not.

        Parameters
        ----------
        record : BreakerRecord
            Its state, the last call's outcome included.
        rates : Rates or None
            Those of its window; None while it holds fewer than `minimum_calls`.
        """
        if record.consecutive_failures >= self.failure_threshold:
            return f"{record.consecutive_failures} failures in a row, the last {record.last_error}"
        if rates is None:
            return None
        limit = self.failure_rate_threshold
        if limit is not None and rates.failed >= limit:
            failed = f"{rates.failed:.0%} of the recent calls failed"
            return f"{failed}, the last with {record.last_error}"
        if (
            self.slow_call_rate_threshold is not None
            and rates.slow >= self.slow_call_rate_threshold
        ):
            return f"{rates.slow:.0%} of the recent calls took over {self.slow_call_seconds:g} s"
        return None

    def after_probe(self, record: BreakerRecord, report: Report) -> tuple[CircuitState, str] | None:
        """Count a probe's success or failure; return the state to go to and why, if to any."""
        if report.outcome == "failure" or report.slow:
            record.consecutive_failures += 1
            if report.outcome == "failure":
                return CircuitState.OPEN, f"a probe failed with {record.last_error}"
            return CircuitState.OPEN, f"a probe took over {self.slow_call_seconds:g} s"
        record.probe_successes += 1
        if record.probe_successes < self.half_open_successes:
            return None
        return CircuitState.CLOSED, f"{record.probe_successes} probes in a row succeeded"
