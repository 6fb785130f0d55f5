"""A worker process as its pool holds it: start, messages, death."""

import contextlib
import os
import pickle
import signal
import socket
import struct
import threading
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

from robustness.log_context import get_logger
from robustness.worker_process import Kind, Message, worker_main
from robustness.worker_task import WorkerStartError

logger = get_logger("worker_pool")

_START_SECONDS = 120.0
"""A worker that is not ready by then never will be (the first waits for the preload)."""

STALL_SECONDS = 10
"""A worker that stops for so long in the middle of a message is hung."""

DEATH_SECONDS = 5.0
"""A killed process that is still there by then waits for a device, and the kernel lets it."""

_START_POLL_SECONDS = 0.1
"""How often a fork server that is dying is asked again."""

# multiprocessing keeps its list of children without a lock: starting a process reaps others, and
# of two threads that reap one process the second gets a wrong exit code.
_processes = threading.Lock()


def _start(process: BaseProcess) -> None:
    """Start a process, by a new fork server if the old one is dying."""
    deadline = time.monotonic() + DEATH_SECONDS
    while True:
        try:
            with _processes:
                process.start()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_START_POLL_SECONDS)


def _limit_stalls(connection: Connection) -> None:
    """Let no message that stops in the middle hold anyone for long."""
    stall = struct.pack("ll", STALL_SECONDS, 0)  # a struct timeval
    with socket.socket(fileno=os.dup(connection.fileno())) as same_socket:
        same_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
        same_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)


class WorkerGoneError(Exception):
    """The worker's end of the connection is closed: it died."""


class Worker:
    """A worker process as its lane sees it.

    Raises
    ------
    WorkerStartError
        If the system or the fork server refuses to start it.
    """

    def __init__(self, context: ForkServerContext) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as workers:
            try:
                self._connection, workers_connection = context.Pipe()
                ours.enter_context(self._connection)
                workers.enter_context(workers_connection)
                # Closing the lifeline kills the process.
                workers_lifeline, self._lifeline = context.Pipe(duplex=False)
                ours.enter_context(self._lifeline)
                workers.enter_context(workers_lifeline)
                _limit_stalls(self._connection)
                self._process = context.Process(
                    target=worker_main, args=(workers_connection, workers_lifeline), daemon=True
                )
                _start(self._process)
            except Exception as error:
                raise WorkerStartError(f"cannot start a worker process: {error!r}") from error
            ours.pop_all()
        self.pid = self._process.pid or 0

    def wait_until_ready(self) -> None:
        """Wait until the process has started.

        Raises
        ------
        WorkerStartError
            If it dies or is not ready in time.
        """
        if not self.wait(_START_SECONDS):
            raise WorkerStartError(f"a worker process was not ready after {_START_SECONDS:.0f} s")
        try:
            self.receive()
        except WorkerGoneError:
            raise WorkerStartError("a worker process died while it started") from None

    def wait(self, seconds: float) -> bool:
        """Wait for a message or the worker's death; return whether there is one of them.

        Death shows as the end of the connection. The process's sentinel would also report the
        death of the fork server, which a worker survives.
        """
        return self._connection.poll(max(seconds, 0))

    def take(self, request: bytes) -> bool:
        """Send a pickled request; return whether the worker begins with it."""
        try:
            self._connection.send_bytes(request)
            return self.wait(STALL_SECONDS) and self.receive().kind is Kind.STARTED
        except (WorkerGoneError, OSError):
            return False

    def receive(self) -> Message:
        """Receive a message.

        Raises
        ------
        WorkerGoneError
            If there is none, since the worker died.
        BlockingIOError
            If it stops in the middle.
        """
        try:
            data = self._connection.recv_bytes()
        except (EOFError, ConnectionError) as error:
            raise WorkerGoneError from error
        message: Message = pickle.loads(data)
        return message

    def kill(self) -> None:
        """Kill the process; from any thread, and without waiting."""
        self._lifeline.close()
        self._process.kill()

    def end(self, grace: float) -> int | None:
        """Close the connection, upon which an idle worker exits; kill it if it does not.

        Parameters
        ----------
        grace : float
            Seconds to wait before killing it.

        Returns
        -------
        int or None
            Exit status as `multiprocessing` gives it; None if it could not be killed.
        """
        self._connection.close()
        wait([self._process.sentinel], grace)
        self.kill()
        if not wait([self._process.sentinel], DEATH_SECONDS):
            # It goes as soon as the system call it is in returns.
            logger.error("worker %d was killed but is still there, left alone", self.pid)
            return None
        with _processes:
            self._process.join()
            exitcode = self._process.exitcode
            self._process.close()
        return exitcode


def signal_name(exitcode: int | None) -> str | None:
    """Return the name of the signal behind a process's exit status, None if it was none."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:  # a real-time signal
        return f"signal {-exitcode}"
