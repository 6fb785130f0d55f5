import ast
import errno
import io
from pathlib import Path

import av
import pytest

from audio_assets.audio.opening import open_container
from tests.audio.test_decode import encode_format
from tests.conftest import PROJECT, write_tone

OPENING = PROJECT / "audio_assets" / "audio" / "opening.py"
# Encodes the files of the sample library: it opens them to write, and no file of a user's.
WRITES = PROJECT / "audio_assets" / "cli" / "sample_library.py"


def uses_of_av_open(path: Path) -> list[str]:
    """Return where a module names `av.open`, or imports PyAV such that it could be missed."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Attribute(value=ast.Name(id="av"), attr="open"):
                found.append(f"{path}:{node.lineno}")
            case ast.Import(names=names) if any(
                name.name.split(".")[0] == "av" and name.asname for name in names
            ):
                found.append(f"{path}:{node.lineno}")
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "av":
                found.append(f"{path}:{node.lineno}")
    return found


def test_only_one_module_opens_media_files() -> None:
    modules = [*PROJECT.glob("audio_assets/**/*.py"), *PROJECT.glob("robustness/**/*.py")]
    found = {path: uses for path in modules if (uses := uses_of_av_open(path))}

    assert found.keys() == {OPENING, WRITES}
    assert len(found[OPENING]) == len(found[WRITES]) == 1
    assert 'av.open(path, "w"' in WRITES.read_text("utf-8")


class BadDisk(io.FileIO):
    """A file on a disk of which a part cannot be read."""

    def read(self, size: int = -1) -> bytes:
        if self.tell() > 100_000:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_errors_of_the_disk_are_not_the_decoders(tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 440.0, seconds=20.0)
    with (
        BadDisk(tmp_path / "a.wav") as file,
        pytest.raises(OSError, match="Input/output error") as raised,
        open_container(file) as container,
    ):
        list(container.demux())
    assert not isinstance(raised.value, av.error.FFmpegError)


def test_a_position_that_cannot_be_prints_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A stream's properties in ASF: PyAV printed 200,000 tracebacks for one such file.
    content = bytearray(encode_format(tmp_path, "a.wma").read_bytes())
    at = content.index(bytes.fromhex("9107dcb7b7a9cf118ee600c00c205365"))
    content[at + 16 : at + 24] = (2**62).to_bytes(8, "little")
    path = tmp_path / "damaged.wma"
    path.write_bytes(content)
    with path.open("rb") as file, open_container(file) as container:
        assert list(container.demux())
    assert capfd.readouterr().err == ""
