"""The state of circuit breakers: in the store for all processes, and a copy in this one.

A call that meets a closed breaker costs no access to the store: its state may be a second old, and
successes are stored together, within a second. Failures, probes and transitions are stored at once.
"""

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, cast

import sqlalchemy as sa
from sqlalchemy import Connection

from robustness.breaker_policy import (
    BreakerPolicy,
    BreakerRecord,
    CircuitState,
    Forced,
    Rates,
    Report,
    Transition,
)
from robustness.log_context import current_log_fields
from robustness.state import StateStore, get_state_store
from robustness.state_schema import (
    breaker_outcomes,
    breaker_probes,
    breaker_transitions,
    circuit_breakers,
    insert_into,
    prune,
)

CACHE_SECONDS = 1.0
"""How old the state that a call is judged by, and a success not yet stored, may be."""

TRANSITIONS_KEPT = 1000
"""Stored transitions per breaker."""


@dataclass(frozen=True)
class Admission:
    """Leave to make a call: the breaker's generation and, of a probe, its token."""

    generation: int
    token: str | None


@dataclass(frozen=True)
class Refusal:
    """A call may not be made: why, and the seconds until it is worth asking again."""

    retry_after: float
    why: str


_Harmless = Literal["success", "ignored", "rejected"]
"""An outcome that changes no state, so that it can wait a moment to be stored."""


class BreakerState:
    """A breaker's state, shared by all that have its name.

    Parameters
    ----------
    name : str
        The breaker.
    policy : BreakerPolicy
        Its thresholds.
    store : StateStore or None
        Where its state lies; None for the process's store at the time.
    announce : callable
        Called with the transitions that this process has brought about, once they are stored.
    """

    def __init__(
        self,
        name: str,
        policy: BreakerPolicy,
        store: StateStore | None,
        announce: Callable[[Sequence[Transition]], None],
    ) -> None:
        self.name = name
        self._policy = policy
        self._given_store = store
        self._announce = announce
        self._cached: tuple[float, StateStore, BreakerRecord] | None = None

    @property
    def _store(self) -> StateStore:
        return self._given_store or get_state_store()

    def recent(self) -> BreakerRecord:
        """Return the stored record, at most `CACHE_SECONDS` old."""
        cached, store = self._cached, self._store
        if cached is not None and time.monotonic() < cached[0] and cached[1] is store:
            return cached[2]
        record = store.query(self._read, latest=False)
        self._remember(record)
        return record

    def current(self) -> tuple[BreakerRecord, Rates | None]:
        """Return the record and the rates of the window as they are stored now."""
        record, rates = self._store.query(lambda c: (self._read(c), self._rates(c, time.time())))
        self._remember(record)
        return record, rates

    def admit(self, lease_seconds: float) -> Admission | Refusal:
        """Ask for leave to make a call; a probe's is given to others when its lease is over."""
        record = self.recent()
        now = time.time()
        state = record.effective_state(now)
        answer: Admission | Refusal
        if state is CircuitState.CLOSED:
            return Admission(record.generation, None)
        if state is CircuitState.OPEN:
            answer = Refusal(record.retry_after(now), record.why_refused(now))
        else:
            record, transitions, answer = self._store.transact(
                lambda c: self._admit(c, lease_seconds)
            )
            self._remember(record)
            self._announce(transitions)
        if isinstance(answer, Refusal):
            self._store_soon("rejected")
        return answer

    def report(self, report: Report) -> None:
        """Record how a call went."""
        if report.token is None:
            if report.outcome == "released":
                return
            if report.outcome == "ignored":
                self._store_soon("ignored")
                return
            # A success matters only after failures, or if it is slow.
            if (
                report.outcome == "success"
                and not report.slow
                and self.recent().consecutive_failures == 0
            ):
                self._store_soon("success")
                return
        record, transitions = self._store.transact(lambda c: self._store_report(c, report))
        self._remember(record)
        self._announce(transitions)

    def force(self, forced: Forced | None) -> None:
        """Set the state by hand; None closes the breaker and forgets its counts and probes."""
        record, transition = self._store.transact(lambda c: self._force(c, forced))
        self._remember(record)
        self._announce([transition])

    def _remember(self, record: BreakerRecord) -> None:
        self._cached = time.monotonic() + CACHE_SECONDS, self._store, record

    def _new_record(self) -> BreakerRecord:
        """Return the record of a breaker that the store does not know.

        A store that has just fallen back to this process knows none: it goes on with what was
        last seen.
        """
        cached, store = self._cached, self._store
        if cached is not None and cached[1] is store and store.degraded:
            return replace(cached[2])
        return BreakerRecord(self.name, CircuitState.CLOSED, self._policy.recovery_timeout)

    def _store_soon(self, outcome: _Harmless) -> None:
        self._store.transact_soon(_store_harmless, (self, outcome, time.time()))

    # Everything below runs inside a transaction.

    def _read(self, connection: Connection) -> BreakerRecord:
        return self._select(connection, sa.select(circuit_breakers)) or self._new_record()

    def _select(
        self, connection: Connection, query: "sa.Select[tuple[object, ...]]"
    ) -> BreakerRecord | None:
        row = connection.execute(query.where(circuit_breakers.c.name == self.name)).mappings()
        found = row.one_or_none()
        return None if found is None else BreakerRecord(**found)

    def _lock_record(self, connection: Connection) -> BreakerRecord:
        """Return the record, locked against other writers until the end of the transaction."""
        query = sa.select(circuit_breakers).with_for_update()
        record = self._select(connection, query)
        if record is None:
            insert = insert_into(connection, circuit_breakers).on_conflict_do_nothing()
            connection.execute(insert, asdict(self._new_record()))
            record = self._select(connection, query)
        return cast("BreakerRecord", record)

    def _save(self, connection: Connection, record: BreakerRecord, now: float) -> None:
        record.updated_at = now
        connection.execute(
            sa.update(circuit_breakers).where(circuit_breakers.c.name == self.name),
            asdict(record),
        )

    def _admit(
        self, connection: Connection, lease_seconds: float
    ) -> tuple[BreakerRecord, list[Transition], Admission | Refusal]:
        """Admit a probe if one is due, half-opening the breaker if its time has come."""
        record = self._lock_record(connection)
        now = time.time()
        state = record.effective_state(now)
        if state is CircuitState.CLOSED:
            return record, [], Admission(record.generation, None)
        if state is CircuitState.OPEN:
            return record, [], Refusal(record.retry_after(now), record.why_refused(now))
        transitions = []
        if record.state == CircuitState.OPEN:
            reason = f"its recovery timeout of {record.recovery_timeout:g} s is over"
            transitions.append(self._move(connection, record, CircuitState.HALF_OPEN, now, reason))
            self._save(connection, record, now)
        # Probes of a former half-open state that still run count as well.
        mine = breaker_probes.c.name == self.name
        connection.execute(sa.delete(breaker_probes).where(mine, breaker_probes.c.expires_at < now))
        in_flight, first_expiry = connection.execute(
            sa.select(sa.func.count(), sa.func.min(breaker_probes.c.expires_at)).where(mine)
        ).one()
        if in_flight >= self._policy.half_open_permits:
            wait = min(first_expiry - now, record.recovery_timeout)
            return record, transitions, Refusal(wait, "is being probed")
        token = uuid.uuid4().hex
        connection.execute(
            sa.insert(breaker_probes).values(
                token=token, name=self.name, started_at=now, expires_at=now + lease_seconds
            )
        )
        return record, transitions, Admission(record.generation, token)

    def _count(self, connection: Connection, times: Mapping[_Harmless, list[float]]) -> None:
        record = self._lock_record(connection)
        success_times = times["success"]
        record.success_count += len(success_times)
        record.ignored_count += len(times["ignored"])
        record.rejected_count += len(times["rejected"])
        if record.forced is None and record.state == CircuitState.CLOSED and success_times:
            if success_times[-1] > (record.last_failure_at or 0):
                record.consecutive_failures = 0
            self._extend_window(connection, [(at, False, False) for at in success_times])
        self._save(connection, record, time.time())

    def _store_report(
        self, connection: Connection, report: Report
    ) -> tuple[BreakerRecord, list[Transition]]:
        """Store a report, and the transition that follows from it."""
        record = self._lock_record(connection)
        now = time.time()
        transitions = self._judge(connection, record, report, now)
        self._save(connection, record, now)
        return record, transitions

    def _judge(
        self, connection: Connection, record: BreakerRecord, report: Report, now: float
    ) -> list[Transition]:
        failed = report.outcome == "failure"
        record.success_count += report.outcome == "success"
        record.ignored_count += report.outcome == "ignored"
        if failed:
            record.failure_count += 1
            record.last_failure_at = now
            record.last_error = f"{type(report.error).__name__}: {report.error}"
        # A probe's permit may have been given to another when its lease was over.
        holds_permit = (
            report.token is not None
            and connection.execute(
                sa.delete(breaker_probes).where(breaker_probes.c.token == report.token)
            ).rowcount
            == 1
        )
        if (
            report.outcome not in ("success", "failure")
            or report.generation != record.generation
            or record.forced is not None
        ):
            return []
        verdict: tuple[CircuitState, str] | None = None
        if record.state == CircuitState.CLOSED:
            record.consecutive_failures = record.consecutive_failures + 1 if failed else 0
            self._extend_window(connection, [(now, failed, report.slow)])
            reason = self._policy.why_open(record, self._rates(connection, now))
            verdict = (CircuitState.OPEN, reason) if reason else None
        elif holds_permit:
            verdict = self._policy.after_probe(record, report)
        return [self._move(connection, record, verdict[0], now, verdict[1])] if verdict else []

    def _extend_window(
        self, connection: Connection, window: list[tuple[float, bool, bool]]
    ) -> None:
        if not self._policy.has_window:
            return
        connection.execute(
            sa.insert(breaker_outcomes),
            [
                {"name": self.name, "at": at, "failed": failed, "slow": slow}
                for at, failed, slow in window
            ],
        )
        prune(connection, breaker_outcomes, self._policy.window_size, name=self.name)

    def _rates(self, connection: Connection, now: float) -> Rates | None:
        """Return the rates of the window, None if it is too empty."""
        policy = self._policy
        if not policy.has_window:
            return None
        window = sa.select(breaker_outcomes).where(breaker_outcomes.c.name == self.name)
        if policy.window_seconds is not None:
            window = window.where(breaker_outcomes.c.at > now - policy.window_seconds)
        newest = window.order_by(breaker_outcomes.c.id.desc()).limit(policy.window_size).subquery()
        calls, failed, slow = connection.execute(
            sa.select(
                sa.func.count(),
                sa.func.count().filter(newest.c.failed),
                sa.func.count().filter(newest.c.slow),
            ).select_from(newest)
        ).one()
        fewest = policy.minimum_calls or min(10, policy.window_size)
        return None if calls < fewest else Rates(failed / calls, slow / calls)

    def _move(
        self,
        connection: Connection,
        record: BreakerRecord,
        to_state: CircuitState,
        now: float,
        reason: str,
    ) -> Transition:
        transition = Transition(self.name, record.state, to_state, now, reason, _current_run_id())
        if record.state == CircuitState.CLOSED:
            record.recovery_timeout = self._policy.recovery_timeout
        record.state = to_state
        record.probe_successes = 0
        if to_state is CircuitState.OPEN:
            record.opened_at = now
        elif to_state is CircuitState.CLOSED:
            record.consecutive_failures = 0
        self._begin_generation(connection, record, transition)
        return transition

    def _begin_generation(
        self, connection: Connection, record: BreakerRecord, transition: Transition
    ) -> None:
        """Store a transition; what was measured in the former state no longer counts."""
        record.generation += 1
        connection.execute(sa.delete(breaker_outcomes).where(breaker_outcomes.c.name == self.name))
        connection.execute(sa.insert(breaker_transitions), asdict(transition))
        prune(connection, breaker_transitions, TRANSITIONS_KEPT, name=self.name)

    def _force(
        self, connection: Connection, forced: Forced | None
    ) -> tuple[BreakerRecord, Transition]:
        record = self._lock_record(connection)
        now = time.time()
        names = {"open": "FORCED_OPEN", "disabled": "DISABLED"}
        before = names[record.forced] if record.forced else record.state
        after = names[forced] if forced else CircuitState.CLOSED.value
        transition = Transition(self.name, before, after, now, "set by hand", _current_run_id())
        if forced is None:
            record = BreakerRecord(
                self.name,
                CircuitState.CLOSED,
                self._policy.recovery_timeout,
                generation=record.generation,
            )
            connection.execute(sa.delete(breaker_probes).where(breaker_probes.c.name == self.name))
        record.forced = forced
        self._begin_generation(connection, record, transition)
        self._save(connection, record, now)
        return record, transition


def _store_harmless(
    connection: Connection, outcomes: list[tuple[BreakerState, _Harmless, float]]
) -> None:
    """Count outcomes, breaker by breaker in an order that all processes keep."""
    times: dict[BreakerState, dict[_Harmless, list[float]]] = defaultdict(lambda: defaultdict(list))
    for state, outcome, at in outcomes:
        times[state][outcome].append(at)
    for state in sorted(times, key=lambda state: state.name):
        state._count(connection, times[state])


def _current_run_id() -> str | None:
    run_id = current_log_fields().get("run_id")
    return None if run_id is None else str(run_id)
