"""What processes are at."""

import os
import socket
import time

import pytest
import sqlalchemy as sa

from robustness.activity import KEPT_S, end_activity, list_activity, report_activity
from robustness.state_schema import activity
from tests.robustness.test_state import open_store


def test_a_report_replaces_the_one_before_until_the_work_ends(url: str) -> None:
    store = open_store(url)
    report_activity("run 1", {"cells": 1, "file": "nul \0 and \udcff"}, store)
    report_activity("run 1", {"cells": 2}, store)
    report_activity("run 2", {}, store)
    first, second = list_activity(open_store(url))
    assert (first.name, first.body, second.name) == ("run 1", {"cells": 2}, "run 2")
    assert (first.host, first.pid) == (socket.gethostname(), os.getpid())
    assert first.at == pytest.approx(time.time(), abs=60)
    end_activity("run 1", store)
    assert [work.name for work in list_activity(store)] == ["run 2"]


def test_what_was_left_behind_goes_after_a_day(url: str) -> None:
    store = open_store(url)
    report_activity("killed", {}, store)
    long_ago = sa.update(activity).values(at=time.time() - KEPT_S - 1)
    store.transact(lambda connection: connection.execute(long_ago))
    report_activity("run", {}, store)
    assert [work.name for work in list_activity(store)] == ["run"]
