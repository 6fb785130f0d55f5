"""Errors that tell the owner of an audio file what is wrong with it.

Each class declares its type for the error classifier: `error_type` is the name of a
`robustness.error_classifier.ErrorType`.
"""

from typing import ClassVar


class AudioFileError(Exception):
    """An audio file cannot be analysed.

    Parameters
    ----------
    message : str
        What is wrong, without the path.
    """

    error_type: ClassVar[str] = "AUDIO_PROCESSING"


class CorruptFileError(AudioFileError):
    """The file is damaged: its stream breaks off or cannot be decoded."""

    error_type = "CORRUPT_FILE"


class UnsupportedFormatError(AudioFileError):
    """No decoder knows the file's format, or there is no audio stream in it."""

    error_type = "UNSUPPORTED_FORMAT"


class DecoderError(AudioFileError):
    """A decoder or tag reader failed on a file that may be sound: another one may read it.

    It says nothing about other files, so no breaker counts it.
    """

    systemic: ClassVar[bool] = False
