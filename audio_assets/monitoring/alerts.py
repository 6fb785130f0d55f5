"""Alerts without Prometheus, by a command or a webhook: one per incident, and one at its end.

An incident begins when `ROUNDS` rounds of checks in a row have found it, and is over when as many
have not. What a round could not find out is as it was. The alerts of open incidents are kept in
``$DAGSTER_HOME/.incidents.<channel>.json``, so that a restart sends none twice.
"""

import json
import logging
import shlex
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from audio_assets.library.files import replacing
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
    """Sends the alerts of incidents to a channel.

    Parameters
    ----------
    channel : callable
        Sends an alert; if it raises, the alert is sent again in the next round.
    path : Path
        Where the alerts of open incidents are kept.
    """

    def __init__(self, channel: Channel, path: Path) -> None:
        self._channel = channel
        self._path = path
        self._sent: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, int] = {}
        """In how many rounds in a row an incident was found, or (negative) was not."""
        with suppress(OSError, ValueError, TypeError):
            self._sent = dict(json.loads(path.read_text("utf-8")))

    def round(self, findings: Sequence[Finding]) -> None:
        """Send alerts of the incidents that begin or are over with the findings of a round."""
        found = {
            f"{f.check} {f.subject}".rstrip(): f
            for f in findings
            if f.severity is not Severity.NOTE
        }
        hidden = {name for f in findings for name in HIDES.get(f.check, ())}
        if any(f.check == "runs" and f.severity is Severity.UNKNOWN for f in findings):
            hidden |= {"outbox", "workers"}
        for name, finding in found.items():
            self._seen[name] = max(self._seen.get(name, 0), 0) + 1
            if name not in self._sent and self._seen[name] >= ROUNDS:
                alert = {**finding.shown(), "host": socket.gethostname()}
                if self._send("begun", alert):
                    self._sent[name] = alert
                    self._keep()
        for name in sorted((self._seen.keys() | self._sent.keys()) - found.keys()):
            if name.partition(" ")[0] in hidden:
                continue
            self._seen[name] = min(self._seen.get(name, 0), 0) - 1
            if name not in self._sent:
                del self._seen[name]
            elif self._seen[name] <= -ROUNDS and self._send("over", self._sent[name]):
                del self._sent[name], self._seen[name]
                self._keep()

    def _send(self, event: str, alert: dict[str, Any]) -> bool:
        try:
            self._channel({"event": event, **alert})
        except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
            logger.warning("An alert could not be delivered, and will be tried again: %s", error)
            return False
        return True

    def _keep(self) -> None:
        try:
            with replacing(self._path) as partial:
                partial.write_text(json.dumps(self._sent), "utf-8")
        except OSError as error:  # of a full disk: a restart then sends them again
            logger.warning("%s cannot be written: %s", self._path, error.strerror)
