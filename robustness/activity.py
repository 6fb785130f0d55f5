"""What each process is at now, for those who watch from outside.

A process reports it every few seconds to the state store, under a name of its own. A report that
is not renewed says that the process is gone, stopped or cut off from the store.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from robustness.state import StateStore, get_state_store
from robustness.state_schema import activity, insert_into

KEPT_S = 86_400.0
"""A report that was not renewed for this long is deleted by the next one (s)."""


@dataclass(frozen=True)
class Activity:
    """What a process was at.

    Parameters
    ----------
    name : str
        Of the work, such as the ID of a run.
    host : str
        Where the process runs.
    pid : int
        Its process ID there.
    at : float
        When it was reported (s since the epoch).
    body : dict
        What was reported.
    """

    name: str
    host: str
    pid: int
    at: float
    body: Mapping[str, Any]


def report_activity(name: str, body: Mapping[str, Any], store: StateStore | None = None) -> None:
    """Report what this process does, in place of its report before.

    Parameters
    ----------
    name : str
        Of the work.
    body : mapping
        Anything that JSON holds.
    store : StateStore, optional
        That of the settings by default.
    """
    now = time.time()
    row = {
        "name": name,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "at": now,
        "body": json.dumps(body),
    }

    def write(connection: sa.Connection) -> None:
        connection.execute(sa.delete(activity).where(activity.c.at < now - KEPT_S))
        statement = insert_into(connection, activity)
        connection.execute(
            statement.on_conflict_do_update(index_elements=["name"], set_=dict(row)), row
        )

    (store or get_state_store()).transact(write)


def end_activity(name: str, store: StateStore | None = None) -> None:
    """Say that some work has ended."""
    statement = sa.delete(activity).where(activity.c.name == name)
    (store or get_state_store()).transact(lambda connection: connection.execute(statement))


def list_activity(store: StateStore | None = None) -> list[Activity]:
    """Return what all processes that share the store are at, by name."""
    rows = (store or get_state_store()).query(
        lambda c: c.execute(sa.select(activity).order_by(activity.c.name)).mappings().all()
    )
    return [Activity(**{**row, "body": json.loads(row["body"])}) for row in rows]
