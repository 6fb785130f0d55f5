"""Alerts without Prometheus: a command or a webhook is told once per incident, and once at its end.

An incident begins when `ROUNDS` rounds of checks in a row have found it, and is over when as many
have not. What a round could not find out is as it was. What was told is kept in
``$DAGSTER_HOME/.incidents.json``, so that a restart tells nothing twice.
"""

import json
import logging
import os
import shlex
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from audio_assets.monitoring.findings import Finding, Severity
from audio_assets.monitoring.health import HIDES

logger = logging.getLogger(__name__)

ROUNDS = 2
DELIVERY_S = 10.0
"""Time that a command or a webhook may take (s)."""

Channel = Callable[[dict[str, Any]], None]


def command(line: str) -> Channel:
    """Return a channel that runs a command, with the alert as JSON on its standard input."""

    def deliver(alert: dict[str, Any]) -> None:
        subprocess.run(
            shlex.split(line),
            input=json.dumps(alert).encode(),
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=DELIVERY_S,
        )

    return deliver


def webhook(url: str) -> Channel:
    """Return a channel that posts the alert as JSON."""

    def deliver(alert: dict[str, Any]) -> None:
        request = urllib.request.Request(
            url, json.dumps(alert).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=DELIVERY_S):
            pass

    return deliver


class Alerts:
    """The incidents that a channel was told of.

    Parameters
    ----------
    channel : callable
        Told of an alert; what it raises has the alert told again in the next round.
    path : Path
        Where the incidents are kept.
    """

    def __init__(self, channel: Channel, path: Path) -> None:
        self._channel = channel
        self._path = path
        self._told: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, int] = {}
        """In how many rounds in a row an incident was found, or (negative) was not."""
        with suppress(OSError, ValueError, TypeError):
            self._told = dict(json.loads(path.read_text("utf-8")))

    def round(self, findings: Sequence[Finding]) -> None:
        """Tell of the incidents that have begun or are over, by the findings of a round."""
        found = {f"{f.check} {f.subject}".rstrip(): f for f in findings}
        hidden = {name for f in findings for name in HIDES.get(f.check, ())}
        if any(f.check == "runs" and f.severity is Severity.UNKNOWN for f in findings):
            hidden |= {"outbox", "workers"}
        for name, finding in found.items():
            self._seen[name] = max(self._seen.get(name, 0), 0) + 1
            if name not in self._told and self._seen[name] >= ROUNDS:
                alert = {**finding.shown(), "host": socket.gethostname()}
                if self._tell("begun", alert):
                    self._told[name] = alert
                    self._keep()
        for name in sorted((self._seen.keys() | self._told.keys()) - found.keys()):
            if name.partition(" ")[0] in hidden:
                continue
            self._seen[name] = min(self._seen.get(name, 0), 0) - 1
            if name not in self._told:
                del self._seen[name]
            elif self._seen[name] <= -ROUNDS and self._tell("over", self._told[name]):
                del self._told[name], self._seen[name]
                self._keep()

    def _tell(self, event: str, alert: dict[str, Any]) -> bool:
        try:
            self._channel({"event": event, **alert})
        except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
            logger.warning("An alert could not be delivered, and will be tried again: %s", error)
            return False
        return True

    def _keep(self) -> None:
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(self._told), "utf-8")
            partial.replace(self._path)
        except OSError as error:  # of a full disk: a restart then tells again
            logger.warning("%s cannot be written: %s", self._path, error.strerror)
