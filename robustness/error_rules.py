"""The vocabulary of error classification, and what a rule is that maps exceptions onto it.

Rules are data. They test facts about an exception: its classes, `errno`, attributes such as an
HTTP status or an SQL state, the signal that ended a process, the packages it passed through. The
message counts only where a library says what happened in no other way.
"""

import errno
import re
import signal
import time
import tomllib
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from robustness.worker_process import RemoteError

if TYPE_CHECKING:
    from pydantic import ConfigDict


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


@dataclass(frozen=True)
class ErrorInfo:
    """The classification of an error.

    Parameters
    ----------
    error_type : ErrorType
        The kind of fault.
    severity : ErrorSeverity
        How much it matters.
    retryable : bool
        Whether another attempt can succeed.
    systemic : bool
        Whether it says something about the extractor or its environment (counted by circuit
        breakers) or about this one input alone.
    recovery_strategy : RecoveryStrategy
        What the next attempt should do differently, or what to do instead of one.
    message : str
        The exception's text, or its class where it has none.
    exception_type : str
        The exception's class, fully qualified.
    context : mapping of str to object
        The context given to the classifier.
    rule : str or None
        The rule that recognized it; None if the error declared its type or none did.
    evidence : str or None
        The state of the file, where that explains the error.
    retry_after : float or None
        Shortest wait (s) before the next attempt, where the error asks for one.
    at : float
        When it was first classified, in seconds since the epoch.
    record_id : int or None
        Its row in the state store's table ``errors``; None if it was not recorded.
    """

    error_type: ErrorType
    severity: ErrorSeverity
    retryable: bool
    systemic: bool
    recovery_strategy: RecoveryStrategy
    message: str
    exception_type: str
    context: Mapping[str, object] = field(default_factory=dict)
    rule: str | None = None
    evidence: str | None = None
    retry_after: float | None = None
    at: float = field(default_factory=time.time)
    record_id: int | None = None

    @property
    def reason(self) -> str:
        """The message and the evidence in one line, for people."""
        is_news = self.evidence and self.evidence not in self.message
        return f"{self.message} ({self.evidence})" if is_news else self.message


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
    def _class_names(self) -> tuple[str, ...]:
        """Full names of its class and base classes; of the original's for a `RemoteError`."""
        if isinstance(self._exception, RemoteError):
            return self._exception.type_names
        classes = type(self._exception).__mro__[:-1]  # without object
        return tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of its classes: fully qualified, and short as in ``duckdb.IOException``.

        The short name is the top-level package, without a leading underscore, and the class.
        """
        parts = [name.split(".") for name in self._class_names]
        short = [f"{first.removeprefix('_')}.{last}" for first, *_, last in parts]
        return frozenset((*self._class_names, *short))

    @property
    def class_name(self) -> str:
        """Its class, fully qualified."""
        return self._class_names[0]

    @cached_property
    def message(self) -> str:
        """Its text, empty if it has none or fails to produce it."""
        if isinstance(self._exception, RemoteError):
            return self._exception.message
        try:
            return str(self._exception)
        except Exception:  # noqa: BLE001 - a failing __str__ must not hide the error itself
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
        The class only wraps or generalizes: rules that match the exceptions it was raised from
        come first.
    severity, retryable, systemic, recovery_strategy : optional
        Consequences that differ from those of the type.

    Raises
    ------
    ValueError
        If no condition is given.
    """

    __pydantic_config__: ClassVar["ConfigDict"] = {"extra": "forbid", "coerce_numbers_to_str": True}

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
    from pydantic import TypeAdapter, ValidationError  # no worker reads rules

    try:
        yield from TypeAdapter(list[Rule]).validate_python(table)
    except ValidationError as error:
        problems = "; ".join(
            ".".join(map(str, ("rules", *problem["loc"]))) + ": " + problem["msg"]
            for problem in error.errors(include_url=False)
        )
        raise ClassifierConfigError(f"{path}, [tool.robustness.classifier] {problems}") from None
