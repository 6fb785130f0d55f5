"""The partition key of a file: ``<root name>/<path relative to the root>``.

A key is the path as one reads it, with ``%XX`` (the hexadecimal value of a byte of the name) in
place of what Dagster or its user interface cannot carry:

- ``...``, which separates the ends of a partition range, and a ``.`` at the end of a key, which
  would run into it: the dots after the second, and the one at the end;
- ``|``, at which the user interface splits the partition of a page's address;
- control characters, some of which Dagster refuses and all of which break log lines;
- characters that cannot be seen or look like a plain space, a space after a space (HTML shows the
  two as one) and one at the end, and whatever is not in Unicode's normalisation form C: two keys
  that look the same would be taken for one another. Variation selectors stay: emoji have them;
- bytes that are not UTF-8;
- ``%``, only where two hexadecimal digits follow; ``/``, only in the name of a root.

So every key is printable and in form C, keys of different files differ even after normalisation,
and the bytes of the path can be read back from the key.
"""

import re
import unicodedata

MAX_KEY_BYTES = 2500
"""Longest key, in bytes of UTF-8, that every storage of Dagster can index.

An index row of PostgreSQL holds 2704 bytes; the indexed rows carry an asset key and an event type
beside the partition.
"""

_ESCAPED = re.compile(
    r"%(?=[0-9A-F]{2})"
    r"|(?<=\.\.)\."
    r"|(?<=[ ])[ ]"
    r"|[. ]\Z"
    r"|\|"
    # Controls, and the code points Unicode lists as white space or as ignored by default.
    r"|[\x00-\x1F\x7F-\xA0\xAD\u034F\u061C\u115F\u1160\u1680\u17B4\u17B5\u180B-\u180F"
    r"\u2000-\u200F\u2028-\u202F\u205F-\u206F\u3000\u3164\uFEFF\uFFA0\uFFF0-\uFFFB"
    r"\U0001BCA0-\U0001BCA3\U0001D173-\U0001D17A\U000E0000-\U000E0FFF]"
    # What the error handler surrogateescape makes of bytes that are not UTF-8.
    r"|[\uDC80-\uDCFF]"
)
_ESCAPE = re.compile(rb"%([0-9A-F]{2})")


class FileKeyError(ValueError):
    """A text is not the key of a file."""

    error_type = "FILE_SYSTEM"
    retryable = False
    systemic = False


def encode_key(root_name: str, relative: bytes) -> str:
    """Return the partition key of a file.

    Parameters
    ----------
    root_name : str
        Name of the library root, not empty.
    relative : bytes
        Path of the file relative to the root as the file system has it: no leading slash, no
        empty part, no ``.`` and ``..``.

    Returns
    -------
    str
        The key. It may be longer than `MAX_KEY_BYTES`.

    Raises
    ------
    FileKeyError
        If the root has no name or `relative` is not such a path.
    """
    if not root_name or "\0" in root_name:
        raise FileKeyError(f"{root_name!r} is not a name for a library root")
    if b"\0" in relative or any(part in (b"", b".", b"..") for part in relative.split(b"/")):
        raise FileKeyError(f"{relative!r} is not a path below a library root")
    return f"{encoded_root(root_name)}/{_escape(_text(relative))}"


def encoded_root(root_name: str) -> str:
    """Return what the keys of a root's files begin with, up to the first slash."""
    return _escape(root_name).replace("/", "%2F")


def decode_key(key: str) -> tuple[str, bytes]:
    """Return the root name and the relative path that a key stands for.

    Parameters
    ----------
    key : str
        A partition key made by `encode_key`.

    Returns
    -------
    root_name : str
        Name of the library root.
    relative : bytes
        Path of the file relative to the root.

    Raises
    ------
    FileKeyError
        If `encode_key` makes no such key.
    """
    root, _, path = key.partition("/")
    try:
        root_name, relative = _text(_unescape(root)), _unescape(path)
        made = encode_key(root_name, relative)
    except (FileKeyError, UnicodeEncodeError) as error:
        raise FileKeyError(f"{key!r} is not the key of a file: {error}") from error
    if made != key:
        raise FileKeyError(f"{key!r} is not the key of a file; did you mean {made!r}?")
    return root_name, relative


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _escape(text: str) -> str:
    escaped = _ESCAPED.sub(lambda match: _percent(match[0]), text)
    if unicodedata.is_normalized("NFC", escaped):
        return escaped
    return "/".join(map(_escape_what_normalisation_changes, escaped.split("/")))


def _escape_what_normalisation_changes(part: str) -> str:
    kept = ""
    for character in part:
        if unicodedata.is_normalized("NFC", kept + character):
            kept += character
        else:
            kept += _percent(character)
    return kept


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogateescape"))


def _unescape(text: str) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), text.encode("utf-8"))
