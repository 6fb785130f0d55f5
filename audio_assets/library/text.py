"""Text to show: file names, tags and errors, which can hold anything; numbers; CSV."""

import csv
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import TextIO

_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of controls, invisible marks, surrogates and separators of lines."""

_KEPT = "\n\t\u200c\u200d"
"""Of these, those that are shown: joiners are part of emoji and of Persian."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MARKDOWN = re.compile(r"[\\`*_\[\]<>!&#|~]")
_SECRET = re.compile(
    r"(://[^/@:\s]*:)[^/\s]*(?=@)"
    r"|([?&][^=&\s]*(?:password|secret|token|key)[^=&\s]*=)[^&\s]+",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    r"""Return a text with all that a terminal obeys or hides made visible.

    Control, escape and invisible characters, such as those that reverse the direction of writing,
    and lone surrogates become ``\x1b`` or ``\u202e``. Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in _ESCAPED and c not in _KEPT
        else c
        for c in text
    )


def masked(text: str) -> str:
    """Return a text with the passwords and keys in its URLs replaced by ``***``."""
    return _SECRET.sub(r"\1\2***", text)


def plain_markdown(text: str) -> str:
    """Return Markdown that shows a text as it is: no image, no HTML."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def four_digits(value: float) -> str:
    """Return a number with four significant digits, or all those before the point."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which gets an ``s`` in the plural: ``1 file``, ``2 files``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def csv_text(text: str) -> str:
    """Return a text for CSV that spreadsheets do not take for a formula."""
    return "'" * text.startswith(_FORMULA) + printable(text)


def write_csv(
    file: TextIO, columns: Iterable[str], rows: Iterable[Sequence[object]], *, raw: bool
) -> None:
    """Write a table as CSV.

    Parameters
    ----------
    file : text file
        Where to.
    columns : iterable of str
        Names of the columns.
    rows : iterable of sequence
        A value per column: a number, text, time, list, dict or None.
    raw : bool
        Leave control characters and formulas of spreadsheets as they are.
    """

    def field(value: object) -> object:
        shown = plain(value)
        if isinstance(shown, list | dict):
            return json.dumps(shown)
        return csv_text(shown) if isinstance(shown, str) and not raw else shown

    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(field, columns))
    writer.writerows(map(field, row) for row in rows)


def plain(value: object) -> object:
    """Return a value that JSON has: times as ISO 8601 in the local time zone, NaN as null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return float(value)
        case datetime():
            return (value.astimezone() if value.tzinfo else value).isoformat()
        case list() | tuple():
            return [plain(item) for item in value]
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case _:
            return str(value)
