"""The state store, and the breakers and the quarantine in it."""

import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from audio_assets.monitoring.findings import Finding, Severity, at
from robustness.state import StateStore
from robustness.state_schema import circuit_breakers

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
            f"The breaker {row['name']} is {row['state'].lower().replace('_', '-')}"
            + (f", set {forced} by hand" if forced else ""),
            str(row["last_error"] or "set by hand"),
            f"`audio-assets breakers reset {row['name']}`"
            if forced
            else "remove the cause; it closes by itself",
            since=at(opened_at) if opened_at else None,
            subject=row["name"],
        )


def breakers(store: StateStore) -> list[dict[str, Any]]:
    """Return the breakers that are not closed or were set by hand, as rows of the store."""
    is_closed = (circuit_breakers.c.state == "CLOSED") & circuit_breakers.c.forced.is_(None)
    statement = sa.select(circuit_breakers).where(~is_closed).order_by(circuit_breakers.c.name)
    rows = store.query(lambda connection: connection.execute(statement).mappings().all())
    return [dict(row) for row in rows]
