"""What runs inside a worker process of a `robustness.worker_pool.WorkerPool`."""

import fcntl
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

from robustness.memory import offer_to_oom_killer


def pickled(value: object) -> bytes:
    """Pickle in the newest protocol: large arrays are copied once."""
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


class RemoteError(Exception):
    """Replaces an exception of a worker that cannot be sent to another process.

    It has those attributes of the original that a classifier goes by and that are text, numbers
    or truth values: `errno`, `error_type`, `retry_after` and the like, its own and its class's.

    Parameters
    ----------
    type_names : tuple of str
        Full names of its class, for instance ``package.module.SomeError``, and of its base
        classes, in the order of the method resolution.
    message : str
        Its text.
    """

    def __init__(self, type_names: tuple[str, ...], message: str) -> None:
        super().__init__(type_names, message)
        self.type_names = type_names
        self.message = message

    def __str__(self) -> str:
        return f"{self.type_names[0]}: {self.message}"

    @classmethod
    def standing_for(cls, error: BaseException) -> Self:
        """Make a stand-in; never fails, whatever the exception's own code does."""
        classes = type(error).__mro__[:-1]  # without object
        try:
            message = str(error)
        except Exception:  # noqa: BLE001
            message = ""
        names = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in classes)
        stand_in = cls(names, message)
        for name in (*vars(error), *_TELLING_ATTRIBUTES):
            if name.startswith("__") or hasattr(stand_in, name):
                continue
            with suppress(Exception):
                value = getattr(error, name)
                for kind in (bool, int, float, str):
                    if isinstance(value, kind):
                        setattr(stand_in, name, kind(value))  # a subclass may not be picklable
                        break
        return stand_in


# Attributes that need not be in an exception's own dictionary: of classes, or kept in C.
_TELLING_ATTRIBUTES = (
    *("error_type", "severity", "retryable", "systemic", "retry_after"),
    *("errno", "filename", "code", "sqlstate", "sqlite_errorname"),
    *("exitcode", "returncode", "exit_code"),
)


@dataclass(frozen=True)
class RaisedError:
    """An exception on its way to the parent, with the chain of exceptions behind it.

    Pickling alone would lose the chain and the traceback.
    """

    links: tuple[tuple[bytes, bool], ...]
    """Pickled exceptions, newest first, each with whether the next is its explicit cause."""
    traceback: str

    @classmethod
    def pack(cls, error: BaseException) -> Self:
        """Make `error` ready to be sent."""
        links: list[tuple[bytes, bool]] = []
        seen: set[int] = set()
        link: BaseException | None = error
        while link is not None and id(link) not in seen:
            seen.add(id(link))
            links.append((_sendable(link), link.__cause__ is not None))
            link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
        text = "".join(traceback.format_exception(error))
        return cls(tuple(links), f"In worker process {os.getpid()}:\n{text}")

    def unpack(self) -> BaseException:
        """Return the exception, chained as it was, its traceback in the worker as a note."""
        error: BaseException | None = None
        for data, is_cause in reversed(self.links):
            later: BaseException = pickle.loads(data)
            if is_cause:
                later.__cause__ = error
            else:
                later.__context__ = error
            error = later
        assert error is not None  # pack() always adds the exception itself
        error.add_note(self.traceback)
        return error


def _sendable(error: BaseException) -> bytes:
    """Pickle an exception, or a stand-in if it would not arrive as it is."""
    try:
        data = pickled(error)
        copy = pickle.loads(data)
        faithful = type(copy) is type(error) and str(copy) == str(error)
    except Exception:  # noqa: BLE001 - whatever an exception's own constructor does
        faithful = False
    # SystemExit and its like are not to be raised in the parent.
    if faithful and isinstance(error, Exception):
        return data
    return pickled(RemoteError.standing_for(error))


class Kind(Enum):
    """What a message from a worker is."""

    READY = auto()
    STARTED = auto()
    STAGE = auto()
    RESULT = auto()
    ERROR = auto()


class Message(NamedTuple):
    """A message from a worker; the payload is a stage's name, a result, or a `RaisedError`.

    With the last two comes the time that the task took, without that in which no core was free.
    """

    kind: Kind
    payload: Any = None
    active_seconds: float | None = None


class Request(NamedTuple):
    """A task for a worker; `stages` is None if it may report any."""

    fn: Callable[..., object]
    args: tuple[object, ...]
    stages: tuple[str, ...] | None


_report: Callable[[str], None] | None = None


def report_stage(name: str) -> None:
    """Report to the pool that the task running in this worker enters a stage.

    The stage's deadline starts now, each time that it is entered. Outside a worker this does
    nothing, so that functions which report stages can be called directly.

    Parameters
    ----------
    name : str
        The stage.

    Raises
    ------
    ValueError
        If the task was submitted with other stages.
    """
    if _report is not None:
        _report(name)


def worker_main(
    connection: Connection,
    lifeline: Connection,
) -> None:
    """Serve tasks until the parent closes the connection.

    Parameters
    ----------
    connection : Connection
        `Request` objects come in, `Message` objects go out.
    lifeline : Connection
        Reading end of a pipe that the parent alone holds open: this process dies with it.
    """
    _die_with(lifeline)
    # The terminal sends Ctrl-C to the whole process group; the parent decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    offer_to_oom_killer()
    connection.send_bytes(pickled(Message(Kind.READY)))
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(pickled(Message(Kind.STARTED)))
        connection.send_bytes(_serve(connection, data))


def _serve(connection: Connection, data: bytes) -> bytes:
    """Run a pickled `Request` and return the pickled `Message` that answers it."""
    global _report
    watch = _Stopwatch()
    try:
        request: Request = pickle.loads(data)

        def report(name: str) -> None:
            if request.stages is not None and name not in request.stages:
                raise ValueError(f"the task has the stages {request.stages}, not {name!r}")
            connection.send_bytes(pickled(Message(Kind.STAGE, name)))

        _report = report
        result = request.fn(*request.args)
        return pickled(Message(Kind.RESULT, result, watch.seconds()))
    except BaseException as error:  # noqa: BLE001 - a task may not end its worker by raising
        return pickled(Message(Kind.ERROR, RaisedError.pack(error), watch.seconds()))
    finally:
        _report = None


class _Stopwatch:
    """Measures time from now on, without that in which this process has no core and wants one."""

    def __init__(self) -> None:
        self._began, self._waited = time.monotonic(), _core_wait_seconds()

    def seconds(self) -> float:
        """Return the time so far (s)."""
        waited = _core_wait_seconds()  # before the clock: it may wait in between
        seconds = time.monotonic() - self._began
        if waited is None or self._waited is None:
            return seconds
        return seconds - (waited - self._waited)


def _core_wait_seconds() -> float | None:
    """Return for how long this process has waited for a core; None if the kernel does not say."""
    try:
        return int(Path("/proc/self/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, IndexError):
        return None


def _die_with(lifeline: Connection) -> None:
    """Have the kernel kill this process when the other end of `lifeline` is closed.

    That needs nothing from this process, which may hang holding the interpreter lock.
    """
    descriptor = lifeline.fileno()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    if lifeline.poll():  # closed before the kernel was asked
        os._exit(1)
