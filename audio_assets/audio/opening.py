"""Opening of media files: no other module calls `av.open`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import av

from audio_assets.audio.errors import CorruptFileError, DecoderError, UnsupportedFormatError
from audio_assets.library.formats import HEAD_BYTES, format_of, is_text


@contextmanager
def open_container(file: BinaryIO) -> Iterator["av.container.InputContainer"]:
    """Open a file with FFmpeg, which recognizes the format by content alone.

    In its metadata, bytes that are not UTF-8 are surrogate escapes.

    Raises
    ------
    CorruptFileError
        If the file is empty or its header is damaged.
    UnsupportedFormatError
        If FFmpeg does not know the format.
    DecoderError
        If FFmpeg fails for another reason.
    OSError
        If the file cannot be read.
    """
    try:
        # Without protocols, playlists cannot make FFmpeg open other files or addresses.
        container = av.open(
            file,
            mode="r",
            metadata_errors="surrogateescape",
            options={"protocol_whitelist": "none"},
        )
    except (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError) as error:
        raise unrecognized(file) from error
    except av.error.FFmpegError as error:
        raise translated(error) from error
    with container:
        yield container


def audio_stream(container: "av.container.InputContainer") -> "av.AudioStream":
    """Return the audio stream that FFmpeg rates best.

    Raises
    ------
    UnsupportedFormatError
        If there is none, or FFmpeg does not know its codec.
    """
    stream = container.streams.best("audio")
    if stream is None:
        if any(other.type == "video" for other in container.streams):
            raise UnsupportedFormatError("holds no audio, only a picture or video")
        raise UnsupportedFormatError("holds no audio that can be decoded")
    if stream.codec_context is None:
        raise UnsupportedFormatError("its codec is not known to the decoder")
    return cast("av.AudioStream", stream)


def unrecognized(
    file: BinaryIO, *, by_soundfile: bool = False
) -> UnsupportedFormatError | CorruptFileError:
    """Return the error that says why FFmpeg, or libsndfile, does not open a file."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if not head:
        return CorruptFileError("holds no audio: the file is empty")
    found = format_of(head)
    if found and (found.by_soundfile or not by_soundfile):
        return CorruptFileError("its header is damaged or incomplete")
    if not any(head):
        return UnsupportedFormatError("holds no audio: it begins with nothing but zero bytes")
    if is_text(head):
        return UnsupportedFormatError("holds no audio: it is a text file")
    return UnsupportedFormatError("is in no audio format that the decoder knows")


def translated(error: "av.error.FFmpegError") -> Exception:
    """Return the error of this package for one of FFmpeg's; `MemoryError` stays.

    FFmpeg's `OSError` is of its own making, whatever its number: what reading the file raises is
    not translated, as it never comes from FFmpeg.
    """
    if isinstance(error, MemoryError):
        return error
    if isinstance(error, av.error.DecoderNotFoundError):
        return UnsupportedFormatError("its codec is not known to the decoder")
    if isinstance(error, av.error.InvalidDataError):
        return CorruptFileError("its stream cannot be read to the end")
    return DecoderError(f"its stream cannot be decoded (FFmpeg: {error.strerror})")
