"""A finding: what is not well or worth a look, since when, by what evidence, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from audio_assets.library.text import masked, printable


class Severity(StrEnum):
    """How bad a finding is."""

    DEGRADED = "degraded"
    """Work goes on, with less than it should have."""
    BROKEN = "broken"
    """Work does not go on, or soon will not."""
    UNKNOWN = "unknown"
    """It could not be found out; counts like degraded."""
    NOTE = "note"
    """It is as it may be, and does not count."""


class Health(StrEnum):
    """What all findings together say."""

    WELL = "well"
    DEGRADED = "degraded"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """Something that is not well, or a note.

    Parameters
    ----------
    check : str
        Which check found it, one of a fixed few.
    severity : Severity
        How bad it is.
    what : str
        What it is, in a sentence.
    evidence : str
        What was seen.
    advice : str
        What to do.
    since : datetime, optional
        Since when.
    subject : str
        What it is about, such as a disk, where a check may find several at once. Check and subject
        are those of an incident: it lasts for as long as both are found.
    """

    check: str
    severity: Severity
    what: str
    evidence: str
    advice: str
    since: datetime | None = None
    subject: str = ""

    @property
    def row(self) -> tuple[str, str, str, datetime | None, str, str]:
        """Severity, check, what, since, evidence and advice, for a table."""
        return str(self.severity), self.check, self.what, self.since, self.evidence, self.advice

    def shown(self) -> dict[str, str | None]:
        """Return it for JSON: texts as they may be shown, without passwords."""
        texts = {name: masked(printable(str(value))) for name, value in vars(self).items()}
        return {**texts, "since": self.since.isoformat() if self.since else None}


def health_of(findings: Iterable[Finding]) -> Health:
    """Return what findings together say."""
    severities = {finding.severity for finding in findings} - {Severity.NOTE}
    if Severity.BROKEN in severities:
        return Health.BROKEN
    return Health.DEGRADED if severities else Health.WELL


def at(seconds: float) -> datetime:
    """Return a time that is given in seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC)


def span(seconds: float) -> str:
    """Return a duration as text, in its largest unit."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
