"""The fork server of the workers: it imports what they need while others go on."""

import os

from robustness.worker_pool import start_fork_server

_PRELOAD = ("audio_assets.extraction.preload",)


def start() -> None:
    """Start the fork server, unless it is running."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # each worker uses one core
    start_fork_server(_PRELOAD)
