"""Opening of media files: no other module calls `av.open`."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import av

from audio_assets.audio.errors import CorruptFileError, UnsupportedFormatError
from audio_assets.library.formats import HEAD_BYTES, format_of, is_text


class _Source:
    """A file for PyAV, which prints a traceback for each exception that it cannot pass on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read = file.read
        self.tell = file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        """Return the new position, or FFmpeg's error for one that a damaged file made up."""
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return -errno.EINVAL


@contextmanager
def open_container(
    file: BinaryIO, demuxer: str | None = None
) -> Iterator["av.container.InputContainer"]:
    """Open a file with FFmpeg, which recognizes the format by content alone.

    In its metadata, bytes that are not UTF-8 are surrogate escapes.

    Parameters
    ----------
    file : file object
        The file.
    demuxer : str, optional
        Open it as this format alone, by FFmpeg's name.

    Raises
    ------
    CorruptFileError
        If the file is empty or its header is damaged.
    UnsupportedFormatError
        If FFmpeg does not know the format.
    OSError
        If the file cannot be read.
    """
    try:
        # Without protocols, playlists cannot make FFmpeg open other files or addresses.
        container = av.open(
            _Source(file),
            mode="r",
            format=demuxer,
            metadata_errors="surrogateescape",
            options={"protocol_whitelist": "none"},
        )
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        # It is an OSError of FFmpeg's own making, whatever its number: what reading the file
        # raises is none of them.
        if isinstance(error, av.error.DecoderNotFoundError):
            raise UnsupportedFormatError("its codec is not known to the decoder") from error
        raise unrecognized(file) from error
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
        return UnsupportedFormatError("holds no audio: the file is text")
    return UnsupportedFormatError("is in no audio format that the decoder knows")
