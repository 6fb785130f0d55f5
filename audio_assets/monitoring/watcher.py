"""All checks in rounds, for as long as somebody watches."""

import logging
import threading
import time
from collections.abc import Sequence

from audio_assets.monitoring.alerts import Alerts
from audio_assets.monitoring.findings import Finding
from audio_assets.monitoring.health import examine
from robustness.state import StateStore

logger = logging.getLogger(__name__)

ROUND_S = 10.0
"""How often all is checked (s)."""


class Watcher:
    """Checks all in rounds, in a thread of its own, and has alerts sent.

    Parameters
    ----------
    store : StateStore
        For the checks.
    alerts : sequence of Alerts
        Get the findings of each round.

    Attributes
    ----------
    findings : list of Finding or None
        Those of the last round; None before the first.
    ended_at : float
        When that ended (s, monotonic clock).
    """

    def __init__(self, store: StateStore, alerts: Sequence[Alerts] = ()) -> None:
        self._store = store
        self._alerts = alerts
        self._stop = threading.Event()
        self.findings: list[Finding] | None = None
        self.ended_at = time.monotonic()

    def start(self) -> None:
        """Begin with the first round."""
        threading.Thread(target=self._run, name="watcher", daemon=True).start()

    def stop(self) -> None:
        """End after the present round."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.findings = examine(self._store, lets_disks_sleep=True)
                for alerts in self._alerts:
                    alerts.round(self.findings)
            except Exception:
                logger.exception("A round of checks failed")
            else:
                self.ended_at = time.monotonic()
            self._stop.wait(ROUND_S)
