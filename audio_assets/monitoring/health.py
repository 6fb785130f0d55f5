"""All checks at once, each with a deadline of its own: what hangs costs only itself.

A check reads what stands: Dagster's storage, the state store, the landing's names, the database,
the disks. It repairs nothing and writes nothing but probes.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from audio_assets.library.roots import library_roots
from audio_assets.monitoring.daemon import check_daemon
from audio_assets.monitoring.dagster_storage import StorageError
from audio_assets.monitoring.disks import check_place, places, take_sample
from audio_assets.monitoring.findings import Finding, Severity
from audio_assets.monitoring.results import check_results
from audio_assets.monitoring.roots import check_root
from audio_assets.monitoring.runs import check_runs, recent_activity
from audio_assets.monitoring.state import check_state
from robustness.settings import get_settings
from robustness.state import StateStore

DEADLINE_S = 2.0
"""A check that takes longer than this is given up (s)."""

LOCK_S = 0.5
"""How long to wait for the state store (s)."""

CHECKS = (
    *("daemon", "clock", "ticks", "queue", "runs", "outbox", "workers", "state", "breakers"),
    *("results", "landing", "publish", "errors", "quality", "disks", "roots"),
)
"""The checks that findings name."""

HIDES = {
    "daemon": ("ticks", "queue"),
    "clock": ("daemon", "ticks", "queue"),
    "state": ("breakers", "runs", "outbox", "workers"),
    "results": ("landing", "publish", "errors", "quality"),
}
"""What is not known while something is found by a check."""

_Check: TypeAlias = Callable[[float], Iterable[Finding]]
_Named: TypeAlias = tuple[str, str, _Check]
"""A check, its name and its subject."""

_hanging: set[tuple[str, str]] = set()
"""The checks that have not ended yet: none is begun again before."""

_ORDER = (Severity.BROKEN, Severity.DEGRADED, Severity.UNKNOWN, Severity.NOTE)


def open_store() -> StateStore:
    """Return the state store of the settings, for those who cannot wait for it."""
    return StateStore(get_settings().state_url, lock_timeout=LOCK_S, retry_interval=5.0)


def examine(
    store: StateStore, deadline_s: float = DEADLINE_S, *, lets_disks_sleep: bool = False
) -> list[Finding]:
    """Run all checks.

    Parameters
    ----------
    store : StateStore
        See `open_store`.
    deadline_s : float
        Time after which a check is given up (s).
    lets_disks_sleep : bool
        While no run is active, write to no disk but that of the home.

    Returns
    -------
    list of Finding
        The worst first.
    """
    now = time.time()
    writes = not lets_disks_sleep or bool(recent_activity(now, store))
    checks: list[_Named] = [
        ("daemon", "", check_daemon),
        ("runs", "", partial(check_runs, store=store)),
        ("state", "", partial(check_state, store=store)),
        ("results", "", check_results),
        ("roots", "", partial(_check_roots, deadline_s=deadline_s)),
        ("disks", "rates", _sample),
        *(
            ("disks", what, partial(check_place, what, path, writes=writes or what == "home"))
            for what, path in places().items()
        ),
    ]
    findings = _run(checks, now, deadline_s)
    return sorted(findings, key=lambda f: (_ORDER.index(f.severity), f.check, f.subject))


def _sample(now: float) -> list[Finding]:
    take_sample(now)
    return []


def _check_roots(now: float, deadline_s: float) -> list[Finding]:
    roots = library_roots()
    checks = (("roots", name, partial(check_root, name, root)) for name, root in roots.items())
    return _run(checks, now, 0.8 * deadline_s)


def _run(checks: Iterable[_Named], now: float, deadline_s: float) -> list[Finding]:
    """Run checks at once; what has not ended by the deadline is left to itself."""
    ended: queue.SimpleQueue[tuple[str, str, list[Finding]]] = queue.SimpleQueue()

    def run(name: str, subject: str, check: _Check) -> None:
        findings: list[Finding] = []
        try:
            findings += check(now)
        except StorageError as error:
            findings.append(_unknown(name, subject, f"Dagster's storage cannot be read: {error}"))
        except Exception as error:  # noqa: BLE001 - one check that fails must not end the others
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            findings.append(_unknown(name, subject, reason))
        _hanging.discard((name, subject))
        ended.put((name, subject, findings))

    open_checks = set()
    for name, subject, check in checks:
        open_checks.add((name, subject))
        if (name, subject) not in _hanging:
            _hanging.add((name, subject))
            threading.Thread(target=run, args=(name, subject, check), daemon=True).start()
    until = time.monotonic() + deadline_s
    found: list[Finding] = []
    while open_checks:
        try:
            name, subject, findings = ended.get(timeout=max(until - time.monotonic(), 0.0))
        except queue.Empty:
            break
        open_checks.discard((name, subject))
        found += findings
    no_answer = f"no answer within {deadline_s:.0f} s"
    return found + [_unknown(name, subject, no_answer) for name, subject in open_checks]


def _unknown(check: str, subject: str, evidence: str) -> Finding:
    return Finding(
        check,
        Severity.UNKNOWN,
        f"It is not known how {' '.join(filter(None, (check, subject)))} is doing",
        evidence,
        "run it again; `audio-assets doctor` checks more, and for longer",
        subject=subject,
    )
