"""Errors that say what is wrong with a file, in words its owner understands.

Each class declares `error_type`, the name of the `robustness.error_classifier.ErrorType` it
stands for: the classifier trusts an error that declares its own type.
"""

from typing import ClassVar


class AudioFileError(Exception):
    """Something about the file itself keeps it from being analysed.

    Parameters
    ----------
    message : str
        What is wrong, and where it helps, what to do; without the path.
    """

    error_type: ClassVar[str] = "AUDIO_PROCESSING"


class CorruptFileError(AudioFileError):
    """The file is damaged: its stream breaks off or cannot be decoded."""

    error_type = "CORRUPT_FILE"


class UnsupportedFormatError(AudioFileError):
    """No decoder knows the file's format, or there is no audio stream in it."""

    error_type = "UNSUPPORTED_FORMAT"


class DecoderError(AudioFileError):
    """A decoder failed on a file that may be sound: another decoder may read it."""

    error_type = "AUDIO_PROCESSING"


class FileChangedError(Exception):
    """The file is not the one any more, or not what it was, that was identified."""

    error_type = "FILE_SYSTEM"

    def __init__(self) -> None:
        super().__init__("is being changed or replaced while it is analysed")

    def __reduce__(self) -> tuple[type["FileChangedError"], tuple[()]]:
        return type(self), ()
