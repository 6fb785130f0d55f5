"""The partition key of a file: ``<root name>/<path relative to the root>``.

A key is the path with the bytes escaped, as ``%XX``, that Dagster or its user interface cannot
handle:

- of ``...``, which separates the ends of a partition range, the dots after the second; so is a
  ``.`` at the end of a key, which such a separator may follow;
- ``|``, at which the user interface splits the partition in a page's address;
- control characters: Dagster refuses some, and all break log lines;
- what makes two keys look the same: invisible characters, spaces other than the plain one, a space
  after a space (HTML shows one) or at the end, and text that is not in Unicode's normalisation
  form C. Variation selectors stay, as emoji have them;
- bytes that are not UTF-8;
- ``%`` where two hexadecimal digits follow, and ``/`` in the name of a root.

So every key is printable and in form C, keys of different files differ even after normalisation,
and a key can be decoded to the bytes of the path.
"""

import re
import unicodedata

MAX_KEY_BYTES = 2500
"""Longest key (bytes of UTF-8) that every storage of Dagster can index.

An index row of PostgreSQL holds 2704 bytes: an asset key, an event type and the partition key.
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
    # Bytes that are not UTF-8, as the error handler surrogateescape decodes them.
    r"|[\uDC80-\uDCFF]"
)
_ESCAPE = re.compile(rb"%([0-9A-F]{2})")


class FileKeyError(ValueError):
    """A text is not a file key, or its path is not below a root."""

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
        Path of the file relative to the root, in the file system's bytes: no leading slash, no
        empty part, no ``.`` or ``..``.

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
    """Return the first part of the keys of a root's files, up to the slash."""
    return _escape(root_name).replace("/", "%2F")


def decode_key(key: str) -> tuple[str, bytes]:
    """Return the root name and the relative path in a key.

    Parameters
    ----------
    key : str
        A file key.

    Returns
    -------
    root_name : str
        Name of the library root.
    relative : bytes
        Path of the file relative to the root.

    Raises
    ------
    FileKeyError
        If `encode_key` would not return this key.
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
    return "/".join(map(_escape_denormalised, escaped.split("/")))


def _escape_denormalised(part: str) -> str:
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
