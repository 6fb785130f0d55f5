import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from blake3 import blake3

from audio_assets.library.file_keys import MAX_KEY_BYTES, FileKeyError, encode_key
from audio_assets.library.files import FileChangedError, FileStamp, content_hash, open_regular
from audio_assets.library.roots import parse_roots
from audio_assets.library.scan import Library, LibraryScan
from audio_assets.settings import AudioAssetsSettings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "music"
    directory.mkdir()
    return directory


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def sound(path: Path, container: str, subtype: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 22050)
    soundfile.write(path, samples, 48000, format=container, subtype=subtype)
    return path


def scan(root: Path) -> LibraryScan:
    return Library({"music": root}).scan()


def keys(found: LibraryScan) -> list[str]:
    return [entry.file_key for entry in found.files]


def reasons(found: LibraryScan) -> dict[str, str]:
    return {left_out.path.name: left_out.reason for left_out in found.left_out}


def test_files_are_found_with_what_identifies_them(root: Path) -> None:
    path = put(root / "Artist" / "Album #1" / "01 - Öl.mp3", b"not opened")
    put(root / "B.FLAC")
    found = scan(root)
    assert keys(found) == ["music/Artist/Album #1/01 - Öl.mp3", "music/B.FLAC"]
    status = path.stat()
    entry = found.files[0]
    assert (entry.path, entry.size, entry.mtime_ns) == (path, 10, status.st_mtime_ns)
    assert found.left_out == []


def test_names_of_any_bytes_are_found_again_by_their_keys(root: Path) -> None:
    names = [b"\xff\xfe.mp3", b"line\nbreak.mp3", b"n" * 251 + b".mp3", b"....mp3", b"q\"'%|.mp3"]
    for name in names:
        put(Path(os.fsdecode(os.fsencode(root) + b"/...sub/" + name)), name)
    library = Library({"music": root})
    found = library.scan()
    assert len(found.files) == len(names)
    for entry in found.files:
        assert library.path_of(entry.file_key) == entry.path
        assert library.path_of(entry.file_key).read_bytes() == os.fsencode(entry.path.name)


def test_files_are_found_by_content_where_the_extension_lies_or_is_missing(root: Path) -> None:
    sound(root / "flac without extension", "FLAC", "PCM_16")
    sound(root / "wave.txt", "WAV", "PCM_16")
    sound(root / "long wave.dat", "RF64", "PCM_16")
    sound(root / "wave 64", "W64", "PCM_16")
    sound(root / "aiff", "AIFF", "PCM_16")
    sound(root / "vorbis.jpg", "OGG", "VORBIS")
    sound(root / "opus.bak", "OGG", "OPUS")
    sound(root / "mp3.1", "MP3", "MPEG_LAYER_III")
    sound(root / "au", "AU", "PCM_16")
    sound(root / "core audio", "CAF", "PCM_16")
    assert len(scan(root).files) == 10


def test_other_files_are_not_in_the_library(root: Path) -> None:
    put(root / "cover.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF")
    put(root / "notes.txt", "ÿþ".encode("utf-16"))
    put(root / "MAC addresses", b"MAC addresses of the studio")
    put(root / "ID3.txt", b"ID3 is a tag")
    put(root / "album.cue", b'FILE "a.flac" WAVE')
    put(root / "empty")
    put(root / "photo", b"\0\0\0\x18ftypheic")
    put(root / ".DS_Store")
    put(root / "._song.mp3")
    put(root / "@eaDir" / "song.mp3" / "SYNOAUDIO_01.jpg")
    sound(root / "film.mkv", "WAV", "PCM_16")
    found = scan(root)
    assert (found.files, found.left_out) == ([], [])


def test_the_sound_of_videos_is_in_the_library_where_a_setting_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.mp4", "b.MKV", "c.webm", "d.wav"):
        put(root / name)
    monkeypatch.setenv("AUDIO_VIDEO", "mp4 .mkv")
    monkeypatch.setattr("audio_assets.settings.get_settings", AudioAssetsSettings)
    assert keys(scan(root)) == ["music/a.mp4", "music/b.MKV", "music/d.wav"]


def test_a_file_that_only_claims_to_be_audio_is_in_the_library(root: Path) -> None:
    put(root / "letter.mp3", b"Dear Sir or Madam")
    put(root / "empty.wav")
    assert keys(scan(root)) == ["music/empty.wav", "music/letter.mp3"]


def test_hidden_files_are_left_out_but_not_names_that_begin_with_dots(root: Path) -> None:
    put(root / ".hidden.mp3")
    put(root / ".trash" / "a.mp3")
    put(root / "...Baby One More Time.mp3")
    found = scan(root)
    assert keys(found) == ["music/..%2EBaby One More Time.mp3"]
    assert reasons(found) == {".hidden.mp3": "a hidden file", ".trash": "a hidden directory"}


def test_what_is_no_file_is_left_out_with_a_reason(root: Path, tmp_path: Path) -> None:
    os.mkfifo(root / "pipe.mp3")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(root / "socket.mp3"))
    put(root / "directory.mp3" / "in it.mp3")
    put(tmp_path / "elsewhere" / "a.mp3")
    (root / "out.mp3").symlink_to(tmp_path / "elsewhere" / "a.mp3")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "up").symlink_to(root)
    (root / "self.mp3").symlink_to("self.mp3")
    (root / "broken.mp3").symlink_to("nowhere.mp3")
    (root / "to pipe.mp3").symlink_to("pipe.mp3")
    (root / "null.mp3").symlink_to("/dev/null")
    found = scan(root)
    assert keys(found) == ["music/directory.mp3/in it.mp3"]
    expected = {
        "pipe.mp3": "pipe",
        "pipe": "pipe",
        "socket.mp3": "socket",
        "directory.mp3": "directory",
        "out.mp3": "leaves the root",
        "out": "leaves the root",
        "up": "scanned there",
        "self.mp3": "leads nowhere",
        "broken.mp3": "link to nothing",
        "to pipe.mp3": "pipe",
        "null.mp3": "leaves the root",
    }
    assert reasons(found).keys() == expected.keys()
    assert "music/pipe" in {left_out.file_key for left_out in found.left_out}
    for name, words in expected.items():
        assert words in reasons(found)[name]


def test_a_link_to_a_file_of_the_root_is_a_file_of_its_own(root: Path) -> None:
    target = put(root / ".annex" / "objects" / "f00d.mp3", b"content")
    (root / "song.mp3").symlink_to(target)
    library = Library({"music": root})
    found = library.scan()
    assert keys(found) == ["music/song.mp3"]
    assert found.files[0].size == 7
    assert library.path_of("music/song.mp3") == root / "song.mp3"


def test_a_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    put(root / "a.mp3")
    (tmp_path / "link").symlink_to(root)
    library = Library({"music": tmp_path / "link"})
    assert keys(library.scan()) == ["music/a.mp3"]
    assert library.path_of("music/a.mp3") == root / "a.mp3"


@pytest.fixture
def unprivileged_root() -> Iterator[Path]:
    """A root owned by a user whom file permissions bind, which the tests' user may not be."""
    with tempfile.TemporaryDirectory() as directory:
        user = os.geteuid()
        if user == 0:
            os.chown(directory, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(directory).resolve()
        finally:
            os.seteuid(user)


def test_what_permissions_keep_from_being_read(unprivileged_root: Path) -> None:
    root = unprivileged_root
    put(root / "closed" / "a.mp3").parent.chmod(0)
    put(root / "names only" / "b.mp3").parent.chmod(0o400)
    put(root / "closed.mp3").chmod(0)
    put(root / "unknown").chmod(0)
    found = scan(root)
    (root / "closed").chmod(0o700)
    (root / "names only").chmod(0o700)
    assert keys(found) == ["music/closed.mp3"]
    denied = "cannot be read: Permission denied"
    assert reasons(found) == {
        "closed": f"the directory {denied}",
        "b.mp3": f"it {denied}",
        "unknown": f"it {denied}",
    }


def test_a_path_too_long_for_a_partition_key_is_left_out_with_a_reason(root: Path) -> None:
    directory = root
    while len(os.fsencode(directory)) < MAX_KEY_BYTES + 100:
        directory = directory / ("d" * 200)
    put(directory / "deep.mp3")
    found = scan(root)
    assert found.files == []
    assert "longer than" in reasons(found)["deep.mp3"]


def test_files_that_come_and_go_do_not_disturb_a_scan(root: Path) -> None:
    for number in range(200):
        put(root / "stays" / f"{number}.mp3")
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for number in range(20):
                put(root / f"moving {number}" / "a.mp3")
                put(root / f"moving {number}" / "unknown")
            for number in range(20):
                shutil.rmtree(root / f"moving {number}")

    churner = threading.Thread(target=churn)
    churner.start()
    try:
        for _ in range(30):
            found = scan(root)
            assert sum("/stays/" in key for key in keys(found)) == 200
            assert found.left_out == []
    finally:
        stop.set()
        churner.join()


def test_a_missing_root_is_an_error_rather_than_an_empty_library(root: Path) -> None:
    put(root / "a.mp3")
    with pytest.raises(FileNotFoundError, match="unmounted"):
        Library({"music": root, "disk": root.parent / "unmounted"}).scan()
    with pytest.raises(NotADirectoryError):
        Library({"music": root / "a.mp3"}).scan()


def test_several_roots(root: Path, tmp_path: Path) -> None:
    put(root / "a.mp3")
    put(tmp_path / "other" / "a.mp3")
    library = Library({"music": root, "other/half": tmp_path / "other"})
    assert keys(library.scan()) == ["music/a.mp3", "other%2Fhalf/a.mp3"]
    assert library.path_of("other%2Fhalf/a.mp3") == tmp_path / "other" / "a.mp3"


def test_a_library_needs_a_root() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Library({})
    with pytest.raises(ValueError, match="not a name"):
        Library({"": Path("/music")})


def test_what_is_left_out_can_be_printed_whatever_its_name(root: Path) -> None:
    os.mkfifo(os.fsencode(root) + b"/\xff\n.mp3")
    (root / "link").symlink_to(b"/\xfe\n")
    (root / "b").symlink_to(b"\xfe\n.mp3")
    put(Path(os.fsdecode(os.fsencode(root.parent) + b"/\xfe\n.mp3")))
    (root / "c").symlink_to(b"../\xfe\n.mp3")
    for left_out in scan(root).left_out:
        text = left_out.file_key + left_out.reason
        assert text.isprintable()
        text.encode()


def test_keys_do_not_lead_out_of_the_library(root: Path, tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.mp3")
    (root / "link").symlink_to(tmp_path)
    library = Library({"music": root})
    for key in ("music/../secret.mp3", "music/%2E%2E/secret.mp3", f"music/{secret}", "music/", ""):
        with pytest.raises(FileKeyError):
            library.path_of(key)
    with pytest.raises(FileKeyError, match="symbolic link"):
        library.checked_path_of("music/link/secret.mp3")
    with pytest.raises(FileKeyError, match="'old', which this library has not: its roots are"):
        library.path_of("old/a.mp3")
    assert library.path_of("music/gone.mp3") == root / "gone.mp3"


def test_parse_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_roots("/srv/music") == {"music": Path("/srv/music")}
    assert parse_roots("a=/srv/music:b=/old/music:/x=y/z:") == {
        "a": Path("/srv/music"),
        "b": Path("/old/music"),
        "z": Path("/x=y/z"),
    }
    assert parse_roots("~/tunes/") == {"tunes": Path("/home/somebody/tunes")}
    assert parse_roots(".") == {tmp_path.name: tmp_path}
    assert parse_roots("here=songs") == {"here": tmp_path / "songs"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no library root"),
        (":", "no library root"),
        ("/", "needs a name"),
        ("a=", "no path"),
        ("~nosuchuser/music", "cannot be"),
        ("/music:/music/new", "overlap"),
        ("new=/music/new:/music", "overlap"),
        ("a=/music:b=/music", "overlap"),
        ("/a/music:/b/music", r"two library roots are named 'music'.*one=/a/music:two=/b/music"),
    ],
)
def test_parse_roots_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_roots(text)


def test_content_hash_is_blake3_of_the_bytes(tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(3_000_001)
    blocks: list[int] = []
    with open_regular(put(tmp_path / "a.wav", content)) as file:
        found = content_hash(file, 2, before_block=lambda: blocks.append(file.tell()))
    assert found == blake3(content).hexdigest()
    assert blocks == [0, 2 << 20]
    with open_regular(put(tmp_path / "empty.wav")) as file:
        assert content_hash(file) == blake3(b"").hexdigest()


def test_only_the_regular_file_that_is_meant_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp3")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe.mp3")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing.mp3")
    path = put(tmp_path / "a.wav", b"one")
    stamp = FileStamp.of(path.stat())
    open_regular(path, stamp).close()
    path.write_bytes(b"two")
    with pytest.raises(FileChangedError):
        open_regular(path, stamp)


def test_the_key_of_a_found_file_is_its_encoded_path(root: Path) -> None:
    put(root / "a | b" / "c\td.mp3")
    assert keys(scan(root)) == [encode_key("music", b"a | b/c\td.mp3")]
