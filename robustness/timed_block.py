"""Interrupt a block of code when its time is over."""

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self


class OperationTimeoutError(TimeoutError):
    """What `timeout_context` guards was not done in time.

    Parameters
    ----------
    seconds : float
        Its timeout.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not done after {seconds:g} s")
        self.seconds = seconds

    def __reduce__(self) -> tuple[type[Self], tuple[float]]:
        return type(self), (self.seconds,)


class TimeoutNotEnforceableError(RuntimeError):
    """Nothing can interrupt the code here when its time is over."""


class timeout_context:  # noqa: N801 - used like a function
    """Interrupt the block when its time is over.

    The block is interrupted by a signal, so it is in Python code, a system call or a wait that
    `OperationTimeoutError` is raised. Native code that never comes back to the interpreter
    cannot be interrupted this way, only by killing its process: run it in a
    `robustness.worker_pool.WorkerPool`.

    Contexts nest: the one that is over first interrupts. A timer and a handler of ``SIGALRM`` that
    were set before are restored after the block.

    Parameters
    ----------
    seconds : float
        Time for the block.

    Raises
    ------
    TimeoutNotEnforceableError
        On entry, outside the main thread, the only one that signals interrupt.
    OperationTimeoutError
        From the block, when its time is over.
    ValueError
        If `seconds` is not positive.
    """

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"a timeout must be positive, not {seconds}")
        self._seconds = seconds

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise TimeoutNotEnforceableError(
                "only the main thread of a process can be interrupted, and this is "
                f"{threading.current_thread().name!r}; "
                "run the block in a robustness.worker_pool.WorkerPool"
            )
        self._deadline = time.monotonic() + self._seconds
        self._take_over()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._give_back()

    def _take_over(self) -> None:
        """Put this deadline in front of the timer and the handler there are."""
        left, self._outer_interval = signal.getitimer(signal.ITIMER_REAL)
        self._outer_deadline = time.monotonic() + left if left else math.inf
        self._active = True
        self._outer_handler = signal.signal(signal.SIGALRM, self._on_alarm)
        self._arm()

    def _arm(self) -> None:
        """Set the timer to this deadline or the outer one, whichever comes first."""
        _set_timer(min(self._deadline, self._outer_deadline), 0.0)

    def _give_back(self) -> None:
        """Leave the timer and the handler as they were before; once."""
        if self._active:
            self._active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._outer_handler)
            _set_timer(self._outer_deadline, self._outer_interval)

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now >= self._deadline:
            # Not left to __exit__, which an exception raised on the way into it would skip.
            self._give_back()
            raise OperationTimeoutError(self._seconds)
        if now < self._outer_deadline:
            self._arm()
            return
        # The outer timer is over: its handler runs as if this context were not there.
        self._outer_deadline = now + self._outer_interval if self._outer_interval else math.inf
        self._give_back()
        if callable(self._outer_handler):
            self._outer_handler(signum, frame)
        elif self._outer_handler is signal.SIG_DFL:
            signal.raise_signal(signum)
        self._take_over()


def _set_timer(deadline: float, interval: float) -> None:
    """Set the interval timer to a point of the monotonic clock; not at all if that is infinite."""
    if math.isfinite(deadline):
        left = max(deadline - time.monotonic(), 1e-6)  # 0 would switch the timer off
        signal.setitimer(signal.ITIMER_REAL, left, interval)
