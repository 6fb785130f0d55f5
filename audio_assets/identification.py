"""What the files of a run are: their content, or why it could not be read."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from audio_assets.backlog import inventory_row, known_identities
from audio_assets.features.base import Row
from audio_assets.file_keys import FileKeyError, decode_key
from audio_assets.library import Library
from audio_assets.warehouse.landing import Landing
from audio_assets.worker import IDENTIFY_STAGES, Identity, identify
from robustness.adaptive_timeout import get_timeout_manager
from robustness.circuit_breaker import CircuitBreakerOpenError, Permit, get_circuit_breaker
from robustness.error_classifier import ErrorInfo, get_error_classifier
from robustness.settings import get_settings
from robustness.worker_pool import WorkerFuture, WorkerPool


@dataclass(frozen=True)
class Unidentified:
    """Why a file's content is not known, and since when (s, monotonic clock)."""

    error: ErrorInfo
    since: float


class Identification:
    """Finds out what each file of a run is, once, in the workers: a file system can hang.

    A breaker per library root, ``storage:<root>``, keeps a mount that went away from costing a
    deadline for each of its files.

    Parameters
    ----------
    library : Library
        Where the files are.
    landing : Landing
        Where the inventory is.
    pool : WorkerPool
        The workers.
    workers : int
        Their number.
    """

    def __init__(self, library: Library, landing: Landing, pool: WorkerPool, workers: int) -> None:
        self._library = library
        self._landing = landing
        self._pool = pool
        self._workers = workers
        self.identities: dict[str, Identity] = {}
        self.unidentified: dict[str, Unidentified] = {}

    def look_at(self, file_keys: Sequence[str]) -> list[Row]:
        """Identify files that are not identified yet, and those that may be by now.

        Returns
        -------
        list of dict
            Rows for the inventory, of what was not known before.
        """
        waiting = deque(key for key in file_keys if self._is_open_question(key))
        known = known_identities(self._landing, list(waiting)) if waiting else {}
        max_delay = get_settings().timeout_max_delay
        look = get_timeout_manager().calculate_timeout(0.0, "metadata")
        timeout = dict(zip(IDENTIFY_STAGES, (look, max_delay), strict=True))
        in_flight: deque[tuple[str, Permit, WorkerFuture[Identity]]] = deque()
        seen: list[Row] = []
        while waiting or in_flight:
            if waiting and len(in_flight) < 2 * self._workers:
                key = waiting[0]
                try:
                    permit = self._permit(key, lease_seconds=2 * sum(timeout.values()))
                except FileKeyError as error:
                    self._failed(waiting.popleft(), error)
                    continue
                except CircuitBreakerOpenError as refusal:
                    # What is in flight may be the probe that closes the breaker.
                    if not in_flight:
                        self._failed(waiting.popleft(), refusal)
                        continue
                else:
                    future = self._pool.submit(
                        identify, self._library, key, known.get(key), timeout=timeout
                    )
                    in_flight.append((waiting.popleft(), permit, future))
                    continue
            key, permit, future = in_flight.popleft()
            failure = future.exception()
            identity = known.get(key)
            if failure is None:
                permit.succeeded()
                self.unidentified.pop(key, None)
                identity = self.identities[key] = future.result()
            else:
                systemic = self._failed(key, failure).systemic
                permit.failed(failure) if systemic else permit.ignored(failure)
            if identity is None or identity != known.get(key):
                seen.append(inventory_row(key, self._library.path_of(key), identity))
        return seen

    def _is_open_question(self, key: str) -> bool:
        known = self.unidentified.get(key)
        return key not in self.identities and (known is None or known.error.retryable)

    def _permit(self, key: str, *, lease_seconds: float) -> Permit:
        self._library.path_of(key)
        breaker = get_circuit_breaker(f"storage:{decode_key(key)[0]}")
        return breaker.acquire(lease_seconds=lease_seconds)

    def _failed(self, key: str, error: BaseException) -> ErrorInfo:
        context = {"operation": "identify", "file": key, **file_context(self._library, key)}
        info = get_error_classifier().classify_error(error, context)
        before = self.unidentified.get(key)
        self.unidentified[key] = Unidentified(info, before.since if before else time.monotonic())
        return info


def file_context(library: Library, file_key: str) -> dict[str, str]:
    """Return what the error classifier should know of a file: its path and its library root."""
    try:
        return {
            "file_path": str(library.path_of(file_key)),
            "library_root": str(library.root_of(file_key)),
        }
    except FileKeyError:
        return {}
