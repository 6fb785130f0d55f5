"""Text to show: file names, tags and error messages, which can hold anything, and numbers."""

import re
import unicodedata

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


def csv_text(text: str) -> str:
    """Return a text for CSV that spreadsheets do not take for a formula."""
    return "'" * text.startswith(_FORMULA) + printable(text)
