"""Notifies systemd's watchdog for as long as Dagster's daemon lives (sd_notify(3))."""

import os
import socket
import time

from audio_assets.monitoring.daemon import is_alive
from audio_assets.monitoring.dagster_storage import DagsterStorage, StorageError


def watch(parent: int) -> None:
    """Notify systemd twice in its interval while the daemon has heartbeats.

    Parameters
    ----------
    parent : int
        The daemon's process, whose child this one is; returns when it has ended.
    """
    address = os.environ["NOTIFY_SOCKET"]
    if address.startswith("@"):
        address = "\0" + address[1:]
    interval_s = int(os.environ.get("WATCHDOG_USEC", 60_000_000)) / 2e6
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        while os.getppid() == parent:
            if _is_alive():
                systemd.sendto(b"WATCHDOG=1", address)
            time.sleep(interval_s)


def _is_alive() -> bool:
    try:
        storage = DagsterStorage()
        return storage.exists and bool(is_alive(storage, time.time()))
    except StorageError:
        return False
