"""A token bucket per scope, shared by all processes, that bounds the share of retries.

It works as the retry budgets of gRPC (proposal A6) and Finagle do, so that an outage is not made
worse by everybody asking again.
"""

import time
from collections import defaultdict
from typing import Final

import sqlalchemy as sa

from robustness.state import StateStore
from robustness.state_schema import insert_into, retry_budget

BUDGET_RESERVE: Final = 10.0
"""Retries that a new or long idle scope may make before it has done any work."""
BUDGET_CAPACITY: Final = 100.0
"""Most retries a scope can save up."""
BUDGET_REFILL_SECONDS: Final = 600.0
"""Time (s) in which an exhausted budget gets its reserve back, with no work done at all."""


def deposit(store: StateStore, scope: str, tokens: float) -> None:
    """Add tokens to a scope, within a second."""
    store.transact_soon(_deposit, (scope, tokens))


def try_spend(store: StateStore, scope: str) -> bool:
    """Take one token from a scope; False if there is none."""
    return store.transact(lambda connection: _change(connection, scope, -1.0))


def _deposit(connection: sa.Connection, deposits: list[tuple[str, float]]) -> None:
    sums: dict[str, float] = defaultdict(float)
    for scope, tokens in deposits:
        sums[scope] += tokens
    for scope, tokens in sorted(sums.items()):  # all processes lock rows in one order
        _change(connection, scope, tokens)


def _change(connection: sa.Connection, scope: str, change: float) -> bool:
    """Add to a scope's tokens, or take some; False, and nothing changed, if there are too few."""
    now = time.time()
    row = connection.execute(
        sa.select(retry_budget.c.tokens, retry_budget.c.updated_at)
        .where(retry_budget.c.scope == scope)
        .with_for_update()
    ).one_or_none()
    tokens = BUDGET_RESERVE
    if row:
        idle = max(0.0, now - row.updated_at)
        refilled = row.tokens + idle * BUDGET_RESERVE / BUDGET_REFILL_SECONDS
        tokens = max(row.tokens, min(refilled, BUDGET_RESERVE))
    if tokens + change < 0:
        return False
    values = {"tokens": min(tokens + change, BUDGET_CAPACITY), "updated_at": now}
    connection.execute(
        insert_into(connection, retry_budget)
        .values(scope=scope, **values)
        .on_conflict_do_update(index_elements=["scope"], set_=values)
    )
    return True
