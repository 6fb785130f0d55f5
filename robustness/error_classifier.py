"""What kind of fault an error is, how much it matters, and what to do about it."""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Final, NamedTuple

import sqlalchemy as sa

from robustness.built_in_rules import BUILT_IN_RULES
from robustness.error_rules import (
    CONSEQUENCES,
    Consequences,
    ErrorInfo,
    ErrorSeverity,
    ErrorType,
    Facts,
    RecoveryStrategy,
    Rule,
    is_remote_traceback,
    rules_from_pyproject,
)
from robustness.file_evidence import ContentCheck, FileEvidence, FileState, inspect_file
from robustness.instrumentation import emit
from robustness.log_context import get_logger
from robustness.state import StateStore, get_state_store
from robustness.state_schema import errors, prune

__all__ = [
    "ErrorClassifier",
    "ErrorInfo",
    "ErrorSeverity",
    "ErrorType",
    "RecoveryStrategy",
    "Rule",
    "get_error_classifier",
]

logger = get_logger("error_classifier")

ERRORS_KEPT: Final = 10_000
"""Errors kept in the state store."""

_GROUPS = ("by_type", "by_severity", "by_recovery_strategy", "by_operation")


@dataclass(frozen=True, slots=True)
class _Explanation:
    """What a state of the file makes of the errors that it explains."""

    error_type: ErrorType
    consequences: Consequences
    explains: frozenset[ErrorType]


_ABOUT_CONTENT = frozenset(
    {ErrorType.AUDIO_PROCESSING, ErrorType.CORRUPT_FILE, ErrorType.UNSUPPORTED_FORMAT}
)
_ABOUT_ACCESS = frozenset({ErrorType.FILE_SYSTEM, ErrorType.PERMISSION})
_SKIP = Consequences(ErrorSeverity.LOW, False, False, RecoveryStrategy.SKIP_FILE)
_GONE = Consequences(ErrorSeverity.MEDIUM, False, False, RecoveryStrategy.FILE_SYSTEM_CHECK)
_AWAY = Consequences(ErrorSeverity.HIGH, True, True, RecoveryStrategy.FILE_SYSTEM_CHECK)

_EXPLANATIONS: Mapping[FileState, _Explanation] = {
    FileState.MISSING: _Explanation(
        ErrorType.FILE_SYSTEM, _GONE, _ABOUT_CONTENT | _ABOUT_ACCESS | {ErrorType.UNKNOWN}
    ),
    FileState.STORAGE_UNREACHABLE: _Explanation(
        ErrorType.FILE_SYSTEM, _AWAY, _ABOUT_CONTENT | _ABOUT_ACCESS | {ErrorType.UNKNOWN}
    ),
    FileState.NOT_A_FILE: _Explanation(
        ErrorType.FILE_SYSTEM, _GONE, _ABOUT_CONTENT | _ABOUT_ACCESS | {ErrorType.UNKNOWN}
    ),
    FileState.UNREADABLE: _Explanation(
        ErrorType.PERMISSION,
        CONSEQUENCES[ErrorType.PERMISSION],
        _ABOUT_CONTENT | _ABOUT_ACCESS | {ErrorType.UNKNOWN},
    ),
    FileState.EMPTY: _Explanation(
        ErrorType.CORRUPT_FILE, _SKIP, _ABOUT_CONTENT | {ErrorType.UNKNOWN}
    ),
    FileState.ZERO_FILLED: _Explanation(
        ErrorType.CORRUPT_FILE, _SKIP, _ABOUT_CONTENT | {ErrorType.UNKNOWN}
    ),
    FileState.WRONG_CONTENT: _Explanation(
        ErrorType.UNSUPPORTED_FORMAT, _SKIP, _ABOUT_CONTENT | {ErrorType.UNKNOWN}
    ),
    # Something may have been put before a stream that is sound itself.
    FileState.HEADER_DAMAGED: _Explanation(
        ErrorType.CORRUPT_FILE,
        Consequences(ErrorSeverity.LOW, True, False, RecoveryStrategy.FORMAT_CONVERSION),
        _ABOUT_CONTENT,
    ),
    # Whoever fails to decode it may have trusted the name: converted by content it may be sound.
    FileState.MISLABELLED: _Explanation(
        ErrorType.UNSUPPORTED_FORMAT,
        CONSEQUENCES[ErrorType.UNSUPPORTED_FORMAT],
        frozenset({ErrorType.CORRUPT_FILE, ErrorType.UNSUPPORTED_FORMAT}),
    ),
}

_RECOMMENDATIONS: Mapping[RecoveryStrategy, tuple[str, Mapping[str, object]]] = {
    RecoveryStrategy.INCREASE_TIMEOUT: (
        "Increase timeout by 50% and retry",
        {"timeout_multiplier": 1.5, "wait": False},
    ),
    RecoveryStrategy.REDUCE_MEMORY_USAGE: (
        "Free memory and retry in bounded memory",
        {"bounded_memory": True, "worker_share": 0.5, "wait": False},
    ),
    RecoveryStrategy.FILE_SYSTEM_CHECK: (
        "Check that the file is there and readable and the disk has space, then retry",
        {"checks": ("exists", "readable", "free_space"), "wait": True},
    ),
    RecoveryStrategy.DATABASE_RECOVERY: (
        "Reset database connections and retry",
        {"reset_connections": True, "wait": True},
    ),
    RecoveryStrategy.NETWORK_RETRY: (
        "Retry with exponential backoff",
        {"retry_strategy": "exponential", "wait": True},
    ),
    RecoveryStrategy.AUDIO_FALLBACK: (
        "Try the alternative audio processing method",
        {"use_alternative": True, "wait": False},
    ),
    RecoveryStrategy.SKIP_FILE: (
        "Skip the file and continue",
        {"quarantine": True, "wait": False},
    ),
    RecoveryStrategy.FORMAT_CONVERSION: (
        "Convert to PCM and retry",
        {"target_format": "pcm", "wait": False},
    ),
    RecoveryStrategy.NONE: ("Retry unchanged after a wait", {"wait": True}),
}


class ErrorClassifier:
    """Classifies errors by facts and by rules, records them, and recommends recoveries.

    An exception that declares an attribute `error_type` (an `ErrorType` or its name) is believed;
    it may declare `severity`, `retryable` and `systemic` too. Otherwise the rules are tried on the
    exception, then on those it was raised from. Where the context names the file, the state of the
    file is weighed against the exception.

    Parameters
    ----------
    rules : sequence of Rule, optional
        Rules tried before the built-in ones; those of the nearest ``pyproject.toml`` by default,
        see `robustness.error_rules.rules_from_pyproject`.
    store : StateStore, optional
        Where errors are recorded; the process's store by default.

    Raises
    ------
    ClassifierConfigError
        If the rules in ``pyproject.toml`` cannot be used.
    """

    def __init__(
        self, rules: Sequence[Rule] | None = None, *, store: StateStore | None = None
    ) -> None:
        own = rules_from_pyproject() if rules is None else tuple(rules)
        self._rules = own + BUILT_IN_RULES
        self._given_store = store
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    @property
    def _store(self) -> StateStore:
        return self._given_store or get_state_store()

    def classify_error(
        self,
        exception: BaseException,
        context: Mapping[str, object] | None = None,
        *,
        check_content: ContentCheck | None = None,
    ) -> ErrorInfo:
        """Classify an error and record it.

        An exception that is classified again, for instance by a circuit breaker and then by the
        code around it, is one error; its record follows the last classification.

        Parameters
        ----------
        exception : BaseException
            The error.
        context : mapping, optional
            What is known of the circumstances. Used are `operation` (str), `file_path` (path of
            the file being worked on) and `library_root` (path of the library it belongs to).
        check_content : callable, optional
            Compares that file's first bytes with its name, see `robustness.file_evidence`;
            without it, its content is evidence only if it is empty or all zeros.

        Returns
        -------
        ErrorInfo
            The classification.
        """
        info = self.classify(exception, context, check_content=check_content)
        return self._record(exception, info)

    def classify(
        self,
        exception: BaseException,
        context: Mapping[str, object] | None = None,
        *,
        check_content: ContentCheck | None = None,
    ) -> ErrorInfo:
        """Classify an error without recording it; see `classify_error`."""
        context = dict(context or {})
        facts = Facts(exception)
        links = tuple(_links(exception))
        verdict, evidence = _weigh_file(self._judge(links), context, check_content)
        info = ErrorInfo(
            error_type=verdict.error_type,
            severity=verdict.consequences.severity,
            retryable=verdict.consequences.retryable,
            systemic=verdict.consequences.systemic,
            recovery_strategy=verdict.consequences.recovery_strategy,
            message=facts.message or facts.class_name.rpartition(".")[2],
            exception_type=facts.class_name,
            context=context,
            rule=verdict.rule.name if verdict.rule else None,
            evidence=evidence.finding if evidence else None,
            retry_after=next((wait for link in links if (wait := _retry_after(link))), None),
        )
        logger.log(
            logging.ERROR if info.severity is ErrorSeverity.CRITICAL else logging.DEBUG,
            "%s is %s, severity %s, %s (rule: %s): %s",
            info.exception_type,
            info.error_type,
            info.severity,
            "retryable" if info.retryable else "not retryable",
            info.rule,
            info.reason,
        )
        return info

    def _judge(self, links: Sequence[BaseException]) -> "_Verdict":
        facts = [Facts(link) for link in links]
        for wrappers in (False, True):
            for link, known in zip(links, facts, strict=True):
                if not wrappers and (declared := _declared_verdict(link)):
                    return declared
                for rule in self._rules:
                    if rule.wrapper is wrappers and rule.matches(known):
                        return _Verdict(rule.error_type, rule.consequences, link, rule)
        return _Verdict(ErrorType.UNKNOWN, CONSEQUENCES[ErrorType.UNKNOWN], links[0])

    def get_recovery_recommendation(self, error_info: ErrorInfo) -> dict[str, object]:
        """Say what to do about an error.

        Parameters
        ----------
        error_info : ErrorInfo
            A classification.

        Returns
        -------
        dict
            ``action``, the name of the recovery strategy; ``description``, a sentence;
            ``parameters``, a dict of what the strategy needs to know, among it ``wait``: whether
            the next attempt should wait (True) or, as it will go another way, may start at once.
        """
        description, parameters = _RECOMMENDATIONS[error_info.recovery_strategy]
        return {
            "action": error_info.recovery_strategy.value,
            "description": description,
            "parameters": dict(parameters),
        }

    def record_success(self, operation: str) -> None:
        """Count an operation that ended well, for the success rate of `get_error_summary`.

        Parameters
        ----------
        operation : str
            The operation, named as in the context of its errors.
        """
        with self._lock:
            self._counts["successes", operation] += 1

    def mark_recovered(self, error_info: ErrorInfo, recovered: bool = True) -> None:
        """Record whether the work succeeded in the end, in spite of an error.

        Parameters
        ----------
        error_info : ErrorInfo
            What `classify_error` returned.
        recovered : bool, optional
            True if a later attempt succeeded, False if the work was given up.
        """
        if recovered:
            with self._lock:
                self._counts["recovered", ""] += 1
        self._store.transact(
            lambda connection: connection.execute(
                sa.update(errors)
                .where(errors.c.id == error_info.record_id, errors.c.at == error_info.at)
                .values(recovered=recovered)
            )
        )

    def get_error_summary(self) -> dict[str, object]:
        """Sum up the errors and successes recorded by this process.

        The errors of all processes are in the state store's table ``errors``.

        Returns
        -------
        dict
            ``total_errors`` and ``total_successes`` (int); ``recovered_errors``, those after
            which the work succeeded; ``success_rate`` (0 to 1), the share of operations that
            ended well: successes over successes and errors that were not recovered, 1 while
            there are neither; ``by_type``, ``by_severity``, ``by_recovery_strategy`` and
            ``by_operation``, dicts of error counts.
        """
        with self._lock:
            counts = +self._counts  # positive counts only
        by_group: dict[str, dict[str, int]] = {group: {} for group in _GROUPS}
        for (group, value), count in counts.items():
            if group in by_group:
                by_group[group][value] = count
        total = sum(by_group["by_type"].values())
        recovered = counts["recovered", ""]
        successes = sum(n for (group, _), n in counts.items() if group == "successes")
        ended = successes + total - recovered
        return {
            "total_errors": total,
            "total_successes": successes,
            "recovered_errors": recovered,
            "success_rate": successes / ended if ended else 1.0,
            **by_group,
        }

    def _record(self, exception: BaseException, info: ErrorInfo) -> ErrorInfo:
        previous: _Mark | None = getattr(exception, _MARK, None)
        if previous:
            info = replace(info, at=previous.at)
        operation = _text(info.context.get("operation"))
        row = {
            "at": info.at,
            "error_type": info.error_type.value,
            "severity": info.severity.value,
            "recovery_strategy": info.recovery_strategy.value,
            "retryable": info.retryable,
            "operation": operation,
            "file": _text(_path(info.context.get("file_path"))),
            "message": info.message,
        }

        def write(connection: sa.Connection) -> int:
            if previous:
                same = (errors.c.id == previous.record_id, errors.c.at == previous.at)
                if connection.execute(sa.update(errors).where(*same).values(row)).rowcount:
                    return previous.record_id
            inserted = connection.execute(sa.insert(errors).values(row)).inserted_primary_key
            assert inserted is not None
            record_id: int = inserted[0]
            if record_id % 100 == 0:
                prune(connection, errors, ERRORS_KEPT)
            return record_id

        record_id = self._store.transact(write)
        if not previous:
            emit("errors", error_type=info.error_type.value, severity=info.severity.value)
        mark = _Mark(
            record_id,
            info.at,
            (
                ("by_type", info.error_type.value),
                ("by_severity", info.severity.value),
                ("by_recovery_strategy", info.recovery_strategy.value),
                ("by_operation", operation or "unknown"),
            ),
        )
        with self._lock:
            self._counts.subtract(previous.counted if previous else ())
            self._counts.update(mark.counted)
        with suppress(AttributeError):  # a class without __dict__
            setattr(exception, _MARK, mark)
        return replace(info, record_id=record_id)


@cache
def get_error_classifier() -> ErrorClassifier:
    """Return the process's classifier."""
    return ErrorClassifier()


_MARK = "_robustness_recorded"


class _Mark(NamedTuple):
    """Left on an exception that has been recorded, so that it is one error."""

    record_id: int
    at: float
    counted: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A classification, the exception of the chain it rests on, and its rule."""

    error_type: ErrorType
    consequences: Consequences
    link: BaseException
    rule: Rule | None = None
    declared: bool = False

    def in_the_light_of(self, evidence: FileEvidence) -> "_Verdict":
        explanation = _EXPLANATIONS[evidence.state]
        return replace(
            self,
            error_type=self.error_type if self.declared else explanation.error_type,
            consequences=explanation.consequences,
        )

    def about_something_else(self) -> "_Verdict":
        """Say that it is not about the file worked on but something all work needs."""
        consequences = replace(
            self.consequences,
            severity=ErrorSeverity.HIGH,
            retryable=self.error_type is ErrorType.FILE_SYSTEM,
            systemic=True,
        )
        return replace(self, consequences=consequences)


def _links(exception: BaseException) -> Iterator[BaseException]:
    """Yield an exception, then what it was raised from or groups, outermost first."""
    waiting = deque([exception])
    seen = set()
    while waiting:
        link = waiting.popleft()
        if id(link) in seen or is_remote_traceback(link):
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, BaseExceptionGroup):
            waiting.extend(link.exceptions)
        origin = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
        if origin is not None:
            waiting.append(origin)


def _declared_verdict(link: BaseException) -> _Verdict | None:
    declared = getattr(link, "error_type", None)
    if not isinstance(declared, str):
        return None
    try:
        error_type = ErrorType(declared)
        consequences = CONSEQUENCES[error_type]
        severity = ErrorSeverity(getattr(link, "severity", consequences.severity))
    except ValueError:
        return None
    consequences = replace(
        consequences,
        severity=severity,
        retryable=getattr(link, "retryable", consequences.retryable),
        systemic=getattr(link, "systemic", consequences.systemic),
    )
    return _Verdict(error_type, consequences, link, declared=True)


def _weigh_file(
    verdict: _Verdict, context: Mapping[str, object], check_content: ContentCheck | None
) -> tuple[_Verdict, FileEvidence | None]:
    """Weigh a verdict against the evidence of the file it is about."""
    worked_on = _path(context.get("file_path"))
    named = _path(getattr(verdict.link, "filename", None))
    about_access = verdict.error_type in _ABOUT_ACCESS
    if about_access and worked_on and named and worked_on != named:
        return verdict.about_something_else(), None
    path = worked_on or (named if about_access else None)
    if path is None or not any(verdict.error_type in e.explains for e in _EXPLANATIONS.values()):
        return verdict, None
    if verdict.error_type is ErrorType.UNKNOWN and verdict.rule:
        return verdict, None  # an interruption or a defect is not the file's doing
    evidence = inspect_file(path, _path(context.get("library_root")), check_content)
    explanation = _EXPLANATIONS.get(evidence.state)
    if explanation is None or verdict.error_type not in explanation.explains:
        if isinstance(verdict.link, FileNotFoundError) and named == worked_on:
            # It was missing a moment ago: its storage was unreachable.
            there = FileEvidence(evidence.state, "the file is there again")
            return replace(verdict, consequences=_AWAY), there
        return verdict, None
    if verdict.declared and evidence.state is FileState.MISLABELLED:
        return verdict, None  # the code that declares the type has read the file
    return verdict.in_the_light_of(evidence), evidence


def _path(value: object) -> Path | None:
    if isinstance(value, str | bytes | PathLike):
        return Path(os.fsdecode(value)).absolute()
    return None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _retry_after(link: BaseException) -> float | None:
    """Return how long to wait (s), as an open circuit breaker or an HTTP server asked for."""
    asked: object = getattr(link, "retry_after", None)
    if asked is None:
        headers = getattr(getattr(link, "response", link), "headers", None)
        asked = headers.get("Retry-After") if isinstance(headers, Mapping | Message) else None
    if isinstance(asked, str):
        try:
            # Either seconds or an HTTP date (RFC 9110, section 10.2.3).
            if asked.isdigit():
                asked = float(asked)
            else:
                asked = parsedate_to_datetime(asked).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, float(asked)) if isinstance(asked, int | float) else None
