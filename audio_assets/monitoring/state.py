"""The state store, and the breakers and the quarantine in it."""

import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from audio_assets.monitoring.findings import Finding, Severity, at
from robustness.state import StateStore
from robustness.state_schema import circuit_breakers

STATE = sa.case(
    {"open": "OPEN", "disabled": "CLOSED"},
    value=circuit_breakers.c.forced,
    else_=circuit_breakers.c.state,
).label("state")
"""The state of a breaker, also of one that was set by hand."""

_BY_HAND = {"open": "held open by hand", "disabled": "disabled by hand: it lets all calls through"}

RETURN_S = 0.6
"""Time that a store takes to come back, or to see that it cannot (s)."""


def check_state(now: float, store: StateStore) -> Iterator[Finding]:
    """Check that the store can be written, and that every breaker in it is closed."""
    store.transact(lambda connection: None)
    if store.degraded:
        time.sleep(RETURN_S)  # it may have been locked before, and come back with this use
    if store.degraded:
        yield Finding(
            "state",
            Severity.DEGRADED,
            "The state store cannot be used: each process goes on with state of its own",
            f"{store.url}: {store.problem}",
            "see who locks it, and that its disk has space; `audio-assets doctor` checks more",
        )
        return
    for row in breakers(store):
        opened_at = row["opened_at"]
        forced = row["forced"]
        yield Finding(
            "breakers",
            Severity.DEGRADED,
            f"The breaker {row['name']} is "
            + (_BY_HAND[forced] if forced else row["state"].lower().replace("_", "-")),
            str(row["last_error"] or "set by hand"),
            f"`audio-assets breakers reset {row['name']}`"
            if forced
            else "remove the cause; it closes by itself",
            since=at(opened_at) if opened_at else None,
            subject=row["name"],
        )


def breakers(store: StateStore) -> list[dict[str, Any]]:
    """Return the breakers that are not closed or were set by hand, by name, as dicts of columns."""
    breaker = circuit_breakers.c
    statement = (
        sa.select(breaker.name, STATE, breaker.forced, breaker.opened_at, breaker.last_error)
        .where((STATE != "CLOSED") | breaker.forced.is_not(None))
        .order_by(breaker.name)
    )
    rows = store.query(lambda connection: connection.execute(statement).mappings().all())
    return [dict(row) for row in rows]
