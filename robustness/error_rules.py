"""The vocabulary of error classification, and the rules that map exceptions onto it.

Rules are data. They look at facts about an exception: its classes, `errno`, attributes such as an
HTTP status or an SQL state, the signal that ended a process, the packages it passed through. The
message counts only where a library says what happened in no other way.
"""

import errno
import re
import signal
import sys
import tomllib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError


class _CaselessEnum(StrEnum):
    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        return cls.__members__.get(value.upper()) if isinstance(value, str) else None


class ErrorType(_CaselessEnum):
    """What kind of fault an error is."""

    TIMEOUT = "timeout"
    MEMORY = "memory"
    FILE_SYSTEM = "file_system"
    DATABASE = "database"
    NETWORK = "network"
    AUDIO_PROCESSING = "audio_processing"
    PERMISSION = "permission"
    CORRUPT_FILE = "corrupt_file"
    UNSUPPORTED_FORMAT = "unsupported_format"
    SYSTEM_RESOURCE = "system_resource"
    UNKNOWN = "unknown"


class ErrorSeverity(_CaselessEnum):
    """How much an error matters to the whole system."""

    LOW = "low"
    """A minor issue, no immediate action needed."""
    MEDIUM = "medium"
    """A moderate issue, retry recommended."""
    HIGH = "high"
    """A serious issue that may require intervention."""
    CRITICAL = "critical"
    """A threat to the system as a whole."""


class RecoveryStrategy(_CaselessEnum):
    """What the next attempt does differently."""

    INCREASE_TIMEOUT = "increase_timeout"
    REDUCE_MEMORY_USAGE = "reduce_memory_usage"
    FILE_SYSTEM_CHECK = "file_system_check"
    DATABASE_RECOVERY = "database_recovery"
    NETWORK_RETRY = "network_retry"
    AUDIO_FALLBACK = "audio_fallback"
    SKIP_FILE = "skip_file"
    FORMAT_CONVERSION = "format_conversion"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Consequences:
    """What follows from an error, unless a rule says otherwise.

    Parameters
    ----------
    severity : ErrorSeverity
        How much it matters.
    retryable : bool
        Whether another attempt, changed as the strategy says, can succeed.
    systemic : bool
        Whether it says something about the extractor or its environment, True, or about this one
        input alone, False. Circuit breakers count systemic errors only.
    recovery_strategy : RecoveryStrategy
        What to change.
    """

    severity: ErrorSeverity
    retryable: bool
    systemic: bool
    recovery_strategy: RecoveryStrategy


LOW, MEDIUM, HIGH, CRITICAL = ErrorSeverity

CONSEQUENCES: Mapping[ErrorType, Consequences] = {
    ErrorType.TIMEOUT: Consequences(MEDIUM, True, True, RecoveryStrategy.INCREASE_TIMEOUT),
    ErrorType.MEMORY: Consequences(HIGH, True, True, RecoveryStrategy.REDUCE_MEMORY_USAGE),
    ErrorType.FILE_SYSTEM: Consequences(MEDIUM, True, True, RecoveryStrategy.FILE_SYSTEM_CHECK),
    ErrorType.DATABASE: Consequences(HIGH, True, True, RecoveryStrategy.DATABASE_RECOVERY),
    ErrorType.NETWORK: Consequences(MEDIUM, True, True, RecoveryStrategy.NETWORK_RETRY),
    ErrorType.AUDIO_PROCESSING: Consequences(MEDIUM, True, True, RecoveryStrategy.AUDIO_FALLBACK),
    ErrorType.PERMISSION: Consequences(HIGH, False, False, RecoveryStrategy.FILE_SYSTEM_CHECK),
    ErrorType.CORRUPT_FILE: Consequences(LOW, False, False, RecoveryStrategy.SKIP_FILE),
    ErrorType.UNSUPPORTED_FORMAT: Consequences(
        MEDIUM, True, False, RecoveryStrategy.FORMAT_CONVERSION
    ),
    ErrorType.SYSTEM_RESOURCE: Consequences(
        CRITICAL, True, True, RecoveryStrategy.REDUCE_MEMORY_USAGE
    ),
    ErrorType.UNKNOWN: Consequences(MEDIUM, True, True, RecoveryStrategy.NONE),
}
"""The consequences of each error type."""

_PACKAGE_IN_PATH = re.compile(
    r"(?:site|dist)-packages[/\\](\w+)"  # installed packages
    r"|[/\\]lib[/\\]python3\.\d+[/\\](\w+)(?:\.py|[/\\])"  # the standard library
    r'|(?:^|File ")(\w+)[/\\]'  # extension modules built with Cython give relative paths
)


class Facts:
    """What can be observed of one exception, without those it was raised from.

    Parameters
    ----------
    exception : BaseException
        The exception.
    """

    def __init__(self, exception: BaseException) -> None:
        self._exception = exception

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of its classes: fully qualified, and short as in ``duckdb.IOException``.

        The short name is the top-level package, without a leading underscore, and the class.
        """
        classes: Iterable[type] = type(self._exception).__mro__
        qualified = []
        if stands_for := _original_class_name(self._exception):
            module, name = stands_for
            original = getattr(sys.modules.get(module), name, None)
            if isinstance(original, type):
                classes = original.__mro__
            qualified.append(stands_for)
        qualified += [(cls.__module__, cls.__qualname__) for cls in classes if cls is not object]
        short = [(module.split(".")[0], name.split(".")[-1]) for module, name in qualified]
        short = [(package.removeprefix("_"), name) for package, name in short]
        return frozenset(f"{module}.{name}" for module, name in qualified + short)

    @property
    def class_name(self) -> str:
        """Its class, fully qualified."""
        cls = type(self._exception)
        return ".".join(_original_class_name(self._exception) or (cls.__module__, cls.__qualname__))

    @cached_property
    def message(self) -> str:
        """Its text, empty if it has none or fails to produce it."""
        if _original_class_name(self._exception):
            return str(getattr(self._exception, "message", ""))
        try:
            return str(self._exception)
        except Exception:  # noqa: BLE001 - somebody's __str__ must not hide the error itself
            return ""

    @cached_property
    def errno_name(self) -> str | None:
        """The symbolic name of its `errno`, for instance ``ENOSPC``."""
        number = getattr(self._exception, "errno", None)
        return errno.errorcode.get(number) if isinstance(number, int) else None

    @cached_property
    def exit_signal(self) -> str | None:
        """The name of the signal that ended the process it reports on.

        Read from `exitcode`, `returncode` or `exit_code`, negative as Python has it or above 128
        as shells and containers have it.
        """
        for attribute in ("exitcode", "returncode", "exit_code"):
            code = getattr(self._exception, attribute, None)
            if isinstance(code, int) and (code < 0 or code > 128):
                try:
                    return signal.Signals(-code if code < 0 else code - 128).name
                except ValueError:
                    return None
        return None

    @cached_property
    def packages(self) -> frozenset[str]:
        """Top-level packages whose code it passed through, in this process or a worker's."""
        paths = [
            frame.f_code.co_filename
            for frame, _ in traceback.walk_tb(self._exception.__traceback__)
        ]
        paths += getattr(self._exception, "__notes__", [])
        if is_remote_traceback(self._exception.__cause__):
            paths.append(str(self._exception.__cause__))
        return frozenset(
            next(filter(None, match)) for path in paths for match in _PACKAGE_IN_PATH.findall(path)
        )

    def attribute(self, path: str) -> str | None:
        """Return an attribute as text, for instance ``response.status_code``; None if absent."""
        value: object = self._exception
        for name in path.split("."):
            value = getattr(value, name, None)
        return None if value is None else str(value)


def _original_class_name(exception: BaseException) -> tuple[str, str] | None:
    """Return module and name of the class that an exception stands for.

    An exception that cannot cross a process boundary is replaced by one with its class's full
    name in `type_name` and its text in `message` (`robustness.worker_pool.RemoteError`).
    """
    type_name = getattr(exception, "type_name", None)
    if not isinstance(type_name, str):
        return None
    module, _, name = type_name.rpartition(".")
    return module, name


def is_remote_traceback(exception: BaseException | None) -> bool:
    """Whether an exception only carries the text of another process's traceback."""
    return exception is not None and type(exception).__name__.lstrip("_") == "RemoteTraceback"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of the classifier: if all its conditions hold, the error is of its type.

    A condition that lists several values holds if one of them fits. At least one condition must
    be given. Values are shell patterns (``*``, ``?``, ``[...]``) where marked with *.

    Parameters
    ----------
    name : str
        What the rule recognizes; appears in logs.
    error_type : ErrorType
        The type it assigns.
    exceptions : tuple of str, optional
        * Classes, the exception's own or a base: ``package.Class`` or fully qualified.
    errnos : tuple of str, optional
        Symbolic error numbers, for instance ``ENOSPC``.
    attributes : mapping of str to tuple of str, optional
        * Values, as text, of the exception's attributes, for instance
        ``{"response.status_code": ("503",)}``. Every attribute listed must fit.
    signals : tuple of str, optional
        Signals that ended the process the exception reports on, for instance ``SIGSEGV``.
    packages : tuple of str, optional
        Top-level packages that the exception passed through.
    message : re.Pattern, optional
        Regular expression searched for in the message.
    wrapper : bool, optional
        The class only wraps or generalizes: whatever the exceptions it was raised from tell
        comes first.
    severity, retryable, systemic, recovery_strategy : optional
        Consequences that differ from those of the type.

    Raises
    ------
    ValueError
        If no condition is given.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", coerce_numbers_to_str=True
    )

    name: str
    error_type: ErrorType
    exceptions: tuple[str, ...] = ()
    errnos: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    signals: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    message: re.Pattern[str] | None = None
    wrapper: bool = False
    severity: ErrorSeverity | None = None
    retryable: bool | None = None
    systemic: bool | None = None
    recovery_strategy: RecoveryStrategy | None = None

    def __post_init__(self) -> None:
        conditions = (self.exceptions, self.errnos, self.attributes, self.signals, self.packages)
        if not any(conditions) and self.message is None:
            raise ValueError(f"rule {self.name!r} has no condition and would match every error")

    def matches(self, facts: Facts) -> bool:
        """Whether all conditions hold."""
        return (
            (not self.errnos or facts.errno_name in self.errnos)
            and (not self.signals or facts.exit_signal in self.signals)
            and (not self.exceptions or any(_fits(n, self.exceptions) for n in facts.names))
            and all(
                (value := facts.attribute(path)) is not None and _fits(value, patterns)
                for path, patterns in self.attributes.items()
            )
            and (not self.packages or not facts.packages.isdisjoint(self.packages))
            and (self.message is None or self.message.search(facts.message) is not None)
        )

    @property
    def consequences(self) -> Consequences:
        """Those of the type, with this rule's own in their place where it has any."""
        usual = CONSEQUENCES[self.error_type]
        return Consequences(
            severity=self.severity or usual.severity,
            retryable=usual.retryable if self.retryable is None else self.retryable,
            systemic=usual.systemic if self.systemic is None else self.systemic,
            recovery_strategy=self.recovery_strategy or usual.recovery_strategy,
        )


def _fits(value: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns)


class ClassifierConfigError(ValueError):
    """A table ``[tool.robustness.classifier]`` cannot be used; the message says where and why."""


def rules_from_pyproject(start: Path | None = None) -> tuple[Rule, ...]:
    """Read rules from the nearest ``pyproject.toml`` that has any.

    Parameters
    ----------
    start : Path, optional
        Folder to start from, going up; the working directory by default.

    Returns
    -------
    tuple of Rule
        The rules under ``[[tool.robustness.classifier.rules]]``, with the fields of `Rule`.

    Raises
    ------
    ClassifierConfigError
        If the file is not TOML or a rule does not fit.
    """
    start = (start or Path.cwd()).absolute()
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            rules = tuple(_read_rules(path))
            if rules:
                return rules
    return ()


def _read_rules(path: Path) -> Iterator[Rule]:
    try:
        tool = tomllib.loads(path.read_text("utf-8")).get("tool", {})
    except ValueError as error:
        raise ClassifierConfigError(f"{path}: {error}") from None
    table = tool.get("robustness", {}).get("classifier", {}).get("rules", [])
    try:
        yield from TypeAdapter(list[Rule]).validate_python(table)
    except ValidationError as error:
        problems = "; ".join(
            ".".join(map(str, ("rules", *problem["loc"]))) + ": " + problem["msg"]
            for problem in error.errors(include_url=False)
        )
        raise ClassifierConfigError(f"{path}, [tool.robustness.classifier] {problems}") from None


def _sndfile_codes(*codes: int | range) -> Mapping[str, tuple[str, ...]]:
    numbers = (n for code in codes for n in ([code] if isinstance(code, int) else code))
    return {"code": tuple(map(str, numbers))}


TRANSIENT_HTTP_STATUSES = ("408", "425", "429", "500", "502", "503", "504")

BUILT_IN_RULES: tuple[Rule, ...] = (
    # --- Somebody's wish, not a fault.
    Rule(
        name="interrupted",
        error_type=ErrorType.UNKNOWN,
        exceptions=(
            "builtins.KeyboardInterrupt",
            "builtins.SystemExit",
            "builtins.GeneratorExit",
            "asyncio.CancelledError",
            "concurrent.CancelledError",
            "dagster.DagsterExecutionInterruptedError",
        ),
        severity=LOW,
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="failure that forbids retries",
        error_type=ErrorType.UNKNOWN,
        exceptions=("dagster.Failure",),
        attributes={"allow_retries": ("False",)},
        retryable=False,
    ),
    Rule(
        name="circuit breaker open",
        error_type=ErrorType.SYSTEM_RESOURCE,
        exceptions=("robustness.CircuitBreakerOpenError",),
        severity=MEDIUM,
        # The failures that opened the breaker were counted when they happened.
        systemic=False,
        recovery_strategy=RecoveryStrategy.NONE,
    ),
    # --- Worker processes.
    Rule(
        name="worker over its deadline",
        error_type=ErrorType.TIMEOUT,
        exceptions=("robustness.WorkerTimeoutError",),
    ),
    Rule(
        name="worker over its memory",
        error_type=ErrorType.MEMORY,
        exceptions=("robustness.WorkerMemoryError",),
    ),
    Rule(
        # Nothing else sends an unasked SIGKILL as often as the kernel's out-of-memory killer.
        name="process killed",
        error_type=ErrorType.MEMORY,
        signals=("SIGKILL",),
    ),
    Rule(name="process over its CPU limit", error_type=ErrorType.TIMEOUT, signals=("SIGXCPU",)),
    Rule(
        name="process over its file size limit",
        error_type=ErrorType.SYSTEM_RESOURCE,
        signals=("SIGXFSZ",),
        recovery_strategy=RecoveryStrategy.FILE_SYSTEM_CHECK,
    ),
    Rule(
        # A page of a mapped file could not be read: it shrank, its mount or its disk went away.
        name="mapped file gone",
        error_type=ErrorType.FILE_SYSTEM,
        signals=("SIGBUS",),
        severity=HIGH,
    ),
    Rule(
        name="process stopped from outside",
        error_type=ErrorType.UNKNOWN,
        signals=("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"),
        systemic=False,
    ),
    Rule(
        name="process crashed",
        error_type=ErrorType.AUDIO_PROCESSING,
        signals=("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS"),
        severity=HIGH,
    ),
    Rule(
        name="worker exited",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("robustness.WorkerCrashedError",),
        severity=HIGH,
    ),
    # --- Resources.
    Rule(
        name="out of memory",
        error_type=ErrorType.MEMORY,
        exceptions=("builtins.MemoryError", "duckdb.OutOfMemoryException"),
    ),
    Rule(name="out of memory (errno)", error_type=ErrorType.MEMORY, errnos=("ENOMEM",)),
    Rule(
        name="out of memory (C++)",
        error_type=ErrorType.MEMORY,
        message=re.compile(r"^std::bad_(alloc|array_new_length)"),
    ),
    Rule(
        name="out of memory (SQLite)",
        error_type=ErrorType.MEMORY,
        attributes={"sqlite_errorname": ("SQLITE_NOMEM",)},
    ),
    Rule(
        name="out of memory (libsndfile)",
        error_type=ErrorType.MEMORY,
        exceptions=("soundfile.LibsndfileError",),
        attributes=_sndfile_codes(17),
    ),
    Rule(
        name="no space left",
        error_type=ErrorType.SYSTEM_RESOURCE,
        errnos=("ENOSPC", "EDQUOT", "EFBIG"),
        recovery_strategy=RecoveryStrategy.FILE_SYSTEM_CHECK,
    ),
    Rule(
        name="no space left (SQLite)",
        error_type=ErrorType.SYSTEM_RESOURCE,
        attributes={"sqlite_errorname": ("SQLITE_FULL",)},
        recovery_strategy=RecoveryStrategy.FILE_SYSTEM_CHECK,
    ),
    Rule(
        name="no space left (DuckDB)",
        error_type=ErrorType.SYSTEM_RESOURCE,
        exceptions=("duckdb.IOException",),
        message=re.compile(r"No space left on device|File too large|Disk quota exceeded"),
        recovery_strategy=RecoveryStrategy.FILE_SYSTEM_CHECK,
    ),
    Rule(
        name="no handles, threads or processes left",
        error_type=ErrorType.SYSTEM_RESOURCE,
        errnos=("EMFILE", "ENFILE", "EAGAIN", "ENOLCK", "EUSERS"),
    ),
    Rule(
        name="no threads left",
        error_type=ErrorType.SYSTEM_RESOURCE,
        exceptions=("builtins.RuntimeError",),
        message=re.compile(r"^can't start new thread$"),
    ),
    # --- Files.
    Rule(
        name="storage does not answer",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("ESTALE", "EIO", "EREMOTEIO", "ENODEV", "ENXIO", "ENOMEDIUM", "EMEDIUMTYPE"),
        severity=HIGH,
    ),
    Rule(
        # On network and FUSE mounts these come from opening a path, not from a socket.
        name="mount does not answer",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ETIMEDOUT", "ECONNABORTED"),
        attributes={"filename": ("?*",)},
        severity=HIGH,
    ),
    Rule(
        name="not permitted",
        error_type=ErrorType.PERMISSION,
        errnos=("EACCES", "EPERM", "EROFS"),
    ),
    Rule(
        name="file missing",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("ENOENT", "ENOTDIR"),
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="path unusable",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("EISDIR", "ENAMETOOLONG", "ELOOP", "EILSEQ"),
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="path in use",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("EBUSY", "ETXTBSY", "EEXIST", "ENOTEMPTY"),
    ),
    # --- Network.
    Rule(
        name="server busy",
        error_type=ErrorType.NETWORK,
        exceptions=("requests.HTTPError",),
        attributes={"response.status_code": TRANSIENT_HTTP_STATUSES},
    ),
    Rule(
        name="server busy (urllib)",
        error_type=ErrorType.NETWORK,
        exceptions=("urllib.HTTPError",),
        attributes={"code": TRANSIENT_HTTP_STATUSES},
    ),
    Rule(
        name="request rejected",
        error_type=ErrorType.NETWORK,
        exceptions=("requests.HTTPError", "urllib.HTTPError"),
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="request cannot be made",
        error_type=ErrorType.NETWORK,
        exceptions=(
            "requests.InvalidURL",
            "requests.InvalidSchema",
            "requests.MissingSchema",
            "requests.InvalidHeader",
            "requests.URLRequired",
            "requests.TooManyRedirects",
            "http.InvalidURL",
        ),
        severity=HIGH,
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="certificate refused",
        error_type=ErrorType.NETWORK,
        exceptions=("ssl.SSLError", "requests.SSLError", "urllib.URLError", "urllib3.HTTPError"),
        message=re.compile(r"CERTIFICATE_VERIFY_FAILED"),
        severity=HIGH,
        retryable=False,
    ),
    Rule(
        name="network failed",
        error_type=ErrorType.NETWORK,
        exceptions=(
            "builtins.ConnectionError",
            "requests.RequestException",
            "urllib3.HTTPError",
            "urllib.URLError",
            "http.HTTPException",
            "socket.gaierror",
            "socket.herror",
            "ssl.SSLError",
            "av.HTTPError",
            "duckdb.HTTPException",
        ),
    ),
    Rule(
        name="network failed (errno)",
        error_type=ErrorType.NETWORK,
        errnos=(
            "ETIMEDOUT",
            "EHOSTDOWN",
            "EHOSTUNREACH",
            "ENETDOWN",
            "ENETUNREACH",
            "ENETRESET",
            "ENOTCONN",
            "EADDRNOTAVAIL",
        ),
    ),
    Rule(
        # A socket's own timeout is a bare TimeoutError.
        name="network timed out",
        error_type=ErrorType.NETWORK,
        exceptions=("builtins.TimeoutError",),
        packages=("socket", "ssl", "http", "urllib"),
    ),
    # --- Databases.
    Rule(
        name="SQLite busy or out of reach",
        error_type=ErrorType.DATABASE,
        attributes={
            "sqlite_errorname": (
                "SQLITE_BUSY*",
                "SQLITE_LOCKED*",
                "SQLITE_PROTOCOL",
                "SQLITE_IOERR*",
                "SQLITE_CANTOPEN*",
                "SQLITE_INTERRUPT",
                "SQLITE_ABORT*",
                "SQLITE_SCHEMA",
            )
        },
    ),
    Rule(
        name="SQLite file damaged",
        error_type=ErrorType.DATABASE,
        attributes={"sqlite_errorname": ("SQLITE_CORRUPT*", "SQLITE_NOTADB")},
        severity=CRITICAL,
        retryable=False,
    ),
    Rule(
        name="SQLite refused",
        error_type=ErrorType.DATABASE,
        exceptions=("sqlite3.Error",),
        retryable=False,
    ),
    Rule(
        # SQLSTATE classes: connection, transaction rollback, resources, prerequisite state,
        # operator intervention, system error.
        name="SQL server busy or out of reach",
        error_type=ErrorType.DATABASE,
        attributes={"sqlstate": ("08*", "40*", "53*", "55*", "57*", "58*")},
    ),
    Rule(
        name="SQL server refused",
        error_type=ErrorType.DATABASE,
        attributes={"sqlstate": ("?*",)},
        retryable=False,
    ),
    Rule(
        name="DuckDB file damaged",
        error_type=ErrorType.DATABASE,
        exceptions=("duckdb.IOException",),
        message=re.compile(r"not a valid DuckDB database file"),
        severity=CRITICAL,
        retryable=False,
    ),
    Rule(
        # An internal or fatal error invalidates the instance: new connections, new instance.
        name="DuckDB failed",
        error_type=ErrorType.DATABASE,
        exceptions=("duckdb.InternalError", "duckdb.FatalException"),
        severity=CRITICAL,
    ),
    Rule(
        name="DuckDB busy or out of reach",
        error_type=ErrorType.DATABASE,
        exceptions=("duckdb.OperationalError", "duckdb.InterruptException"),
    ),
    Rule(
        name="DuckDB refused",
        error_type=ErrorType.DATABASE,
        exceptions=("duckdb.Error",),
        retryable=False,
    ),
    Rule(
        name="connection lost",
        error_type=ErrorType.DATABASE,
        exceptions=("sqlalchemy.DBAPIError",),
        attributes={"connection_invalidated": ("True",)},
    ),
    Rule(
        name="database out of reach",
        error_type=ErrorType.DATABASE,
        exceptions=(
            "sqlalchemy.OperationalError",
            "sqlalchemy.InterfaceError",
            "sqlalchemy.InternalError",
            "sqlalchemy.DisconnectionError",
            "sqlalchemy.PendingRollbackError",
            "sqlalchemy.TimeoutError",
        ),
        wrapper=True,
    ),
    Rule(
        name="database refused",
        error_type=ErrorType.DATABASE,
        exceptions=("sqlalchemy.SQLAlchemyError",),
        wrapper=True,
        retryable=False,
    ),
    # --- Audio libraries.
    Rule(
        name="libsndfile knows no such format",
        error_type=ErrorType.UNSUPPORTED_FORMAT,
        exceptions=("soundfile.LibsndfileError",),
        attributes=_sndfile_codes(1, 4, 18, 78),
    ),
    Rule(
        name="libsndfile could not read",
        error_type=ErrorType.FILE_SYSTEM,
        exceptions=("soundfile.LibsndfileError",),
        attributes=_sndfile_codes(2, 9, 39),
    ),
    Rule(
        # 61 to 183: one code for each way in which a header or a stream can be broken.
        name="libsndfile found damage",
        error_type=ErrorType.CORRUPT_FILE,
        exceptions=("soundfile.LibsndfileError",),
        attributes=_sndfile_codes(3, 7, 8, range(61, 184)),
    ),
    Rule(
        name="libsndfile failed",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("soundfile.SoundFileError",),
    ),
    Rule(
        name="FFmpeg knows no such format",
        error_type=ErrorType.UNSUPPORTED_FORMAT,
        exceptions=(
            "av.DemuxerNotFoundError",
            "av.DecoderNotFoundError",
            "av.PatchWelcomeError",
            "av.UnknownCodecError",
        ),
    ),
    Rule(
        name="FFmpeg found damage",
        error_type=ErrorType.CORRUPT_FILE,
        exceptions=("av.InvalidDataError", "av.EOFError"),
    ),
    Rule(
        name="FFmpeg timed out",
        error_type=ErrorType.TIMEOUT,
        exceptions=("av.TimeoutError", "av.ExitError"),
    ),
    Rule(
        name="FFmpeg failed",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("av.FFmpegError",),
    ),
    Rule(
        name="tags of another format",
        error_type=ErrorType.UNSUPPORTED_FORMAT,
        exceptions=("mutagen.*NoHeaderError", "mutagen.*HeaderNotFound"),
    ),
    Rule(
        # Mutagen wraps whatever reading the file raised.
        name="tags unreadable",
        error_type=ErrorType.CORRUPT_FILE,
        exceptions=("mutagen.MutagenError",),
        wrapper=True,
    ),
    # Essentia raises RuntimeError for everything; its fixed texts are all there is.
    Rule(
        name="Essentia found no file",
        error_type=ErrorType.FILE_SYSTEM,
        message=re.compile(r"AudioLoader: Could not open file .*error = (No such file|Is a dir)"),
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="Essentia may not read",
        error_type=ErrorType.PERMISSION,
        message=re.compile(r"AudioLoader: Could not open file .*error = Permission denied"),
    ),
    Rule(
        name="Essentia knows no such format",
        error_type=ErrorType.UNSUPPORTED_FORMAT,
        message=re.compile(
            r"AudioLoader: (Unsupported codec|Unable to instantiate codec)"
            r"|AudioLoader ERROR: found 0 streams"
        ),
    ),
    Rule(
        name="Essentia found damage",
        error_type=ErrorType.CORRUPT_FILE,
        message=re.compile(r"AudioLoader: Could not (open file|find stream information)"),
    ),
    Rule(
        name="Essentia failed",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("builtins.RuntimeError",),
        message=re.compile(r"^(In \w+\.compute:|Error while configuring \w+:)"),
    ),
    Rule(
        name="audio library failed",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("librosa.LibrosaError", "audioread.DecodeError", "onnxruntime.*"),
    ),
    # --- What is left.
    Rule(
        name="timed out",
        error_type=ErrorType.TIMEOUT,
        exceptions=(
            "builtins.TimeoutError",
            "subprocess.TimeoutExpired",
            "multiprocessing.TimeoutError",
        ),
    ),
    Rule(
        name="audio library failed (unnamed)",
        error_type=ErrorType.AUDIO_PROCESSING,
        packages=("essentia", "librosa", "soundfile", "soxr", "av", "onnxruntime"),
        wrapper=True,
    ),
    Rule(
        # The same input fails the same way again.
        name="defect in the program",
        error_type=ErrorType.UNKNOWN,
        exceptions=(
            "builtins.ArithmeticError",
            "builtins.AssertionError",
            "builtins.AttributeError",
            "builtins.ImportError",
            "builtins.LookupError",
            "builtins.NameError",
            "builtins.NotImplementedError",
            "builtins.RecursionError",
            "builtins.SyntaxError",
            "builtins.TypeError",
            "robustness.TimeoutNotEnforceableError",
        ),
        wrapper=True,
        severity=HIGH,
        retryable=False,
    ),
)
"""The built-in rules, in the order in which they are tried."""
