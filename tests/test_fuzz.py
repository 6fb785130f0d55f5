"""Damaged files, settings and file names, by the thousand: each ends in an error of its own.

`make fuzz` does it for half an hour.
"""

import os
import random
import shutil
import time
import unicodedata
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import mutagen
import pytest

from audio_assets.audio.decode import Limits, decode
from audio_assets.audio.pcm import Audio
from audio_assets.cli.doctor import CheckError, check_settings
from audio_assets.features import FEATURE_SETS
from audio_assets.library.formats import check_content
from audio_assets.library.roots import library_roots
from audio_assets.library.scan import Library
from audio_assets.library.text import printable
from audio_assets.settings import AudioAssetsSettings, get_settings
from robustness.error_classifier import ErrorInfo, ErrorType, get_error_classifier
from robustness.settings import RobustnessSettings
from robustness.settings import get_settings as get_robustness_settings
from robustness.worker_pool import WorkerPool
from tests.audio.test_decode import FORMATS, encode_format
from tests.conftest import forget_state

SECONDS = float(os.environ.get("AUDIO_TEST_FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("AUDIO_TEST_FUZZ_SEED", "7"))
DEADLINE_S = 30.0

BLAMES_THE_FILE = {
    ErrorType.AUDIO_PROCESSING,
    ErrorType.CORRUPT_FILE,
    ErrorType.UNSUPPORTED_FORMAT,
    ErrorType.MEMORY,
    ErrorType.TIMEOUT,
}


def probe(path: Path) -> list[ErrorInfo]:
    """Read a file by each decoder and each reader of tags; return the errors."""
    metadata = FEATURE_SETS["metadata"]
    target = path.with_suffix(".npy")
    limits = Limits(longest_h=1.0)
    errors = []
    for read in (
        lambda: decode(path, target, limits=limits),
        lambda: decode(path, target, decoder="soundfile", limits=limits),
        lambda: decode(path, target, decoder="salvage", limits=limits),
        lambda: metadata.extract(Audio.without_pcm(path)),
        lambda: metadata.extract_alternative(Audio.without_pcm(path)),
    ):
        try:
            read()
        except Exception as error:  # noqa: BLE001 - which it may be is tested
            context = {"file_path": str(path), "library_root": str(path.parent)}
            errors.append(
                get_error_classifier().classify_error(error, context, check_content=check_content)
            )
        finally:
            target.unlink(missing_ok=True)
    return errors


def mutated(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a file with a damage of some kind."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 400))
        size = min(int(rng.expovariate(1 / 40)) + 1, len(data) - at)
        match rng.randrange(7):
            case 0:
                data[at : at + size] = rng.randbytes(size)
            case 1:
                data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
            case 2:
                del data[max(at, 1) :]
            case 3:
                data[:0] = rng.randbytes(rng.randint(1, 3000))
            case 4:
                data += rng.choice([b"\0" * 5000, rng.randbytes(3000)])
            case 5:
                data[at:] = rng.choice(others)[at:]
            case 6:
                del data[at : at + size]
        data = data or bytearray(b"\0")
    return bytes(data)


def tagged(path: Path) -> bytes:
    """Return a file's bytes, with tags where mutagen can write some."""
    with suppress(TypeError, KeyError, mutagen.MutagenError):
        file = mutagen.File(path, easy=True)
        if file is not None and file.tags is None:
            file.add_tags()
        file["title"] = "Title"
        file["artist"] = ["One", "Two"]
        file.save()
    return path.read_bytes()


@pytest.mark.timeout(SECONDS + 240)
def test_damaged_files_end_in_errors_of_their_own(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    whole = {name: tagged(encode_format(tmp_path, name)) for name in FORMATS}
    tried: Counter[str] = Counter()
    wrong: list[str] = []
    with WorkerPool(2, memory_limit_mib=1500, preload=["tests.test_fuzz"]) as pool:
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            batch = {}
            for number in range(20):
                name = rng.choice(list(FORMATS))
                path = tmp_path / f"{number} {name}"
                path.write_bytes(mutated(whole[name], list(whole.values()), rng))
                batch[path] = pool.submit(probe, path, timeout=DEADLINE_S)
            for path, future in batch.items():
                failure = future.exception()
                tried["files"] += 1
                tried[type(failure).__name__ if failure else "read"] += 1
                for error in [] if failure else future.result():
                    tried[error.error_type.value] += 1
                    if error.error_type not in BLAMES_THE_FILE:
                        wrong.append(f"{path.name}: {error.error_type.value}: {error.reason}")
        assert pool.submit(probe, tmp_path / "a.flac", timeout=DEADLINE_S).result() is not None
    print(dict(tried))
    assert not wrong, "\n".join(wrong[:20])


# fmt: off
VALUES = (
    "", " ", "0", "-1", "1.5", "8", "1e9", "1e400", "nan", "inf", "1_000", "\uff11", "9" * 5000,
    "true", "none", "077", "0o77", "UTC", "Europe/Berlin", "../UTC", "/etc/passwd", "\x1b[31m",
    "music", "a=/x", "=/x", "a=", "a=b=c", ":", "/x:/x/y", "a=/x:a=/y", "~nosuchuser/x", "/" * 300,
    "sqlite:///x.db", "postgresql://u:p@h:1/b", "postgresql://[", "postgresql://h:port/b", "://",
    "s3://bucket/x", "nosuchstore://x", "file:///x", "\udcff", "a" * 5000,
)
# fmt: on


def mutated_value(rng: random.Random) -> str:
    value = rng.choice(VALUES)
    for _ in range(rng.choice((0, 0, 1, 3))):
        at = rng.randint(0, len(value))
        value = value[:at] + rng.choice((*VALUES, chr(rng.randint(1, 0xFF)))) + value[at + 1 :]
    return value


@pytest.mark.timeout(SECONDS + 240)
def test_settings_are_used_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    monkeypatch.chdir(tmp_path)
    classes = (AudioAssetsSettings, RobustnessSettings)
    names = [str(field.validation_alias) for cls in classes for field in cls.model_fields.values()]
    tried: Counter[str] = Counter()
    ends = time.monotonic() + SECONDS / 10
    while time.monotonic() < ends:
        chosen = {name: mutated_value(rng) for name in rng.sample(names, rng.randint(1, 2))}
        with monkeypatch.context() as environment:
            environment.setenv("DAGSTER_HOME", str(tmp_path))
            for name, value in chosen.items():
                environment.setenv(name, value)
            forget_state()
            try:
                check_settings()
                library_roots()
            except (CheckError, ValueError, OSError) as error:
                tried[type(error).__name__] += 1
            except Exception as error:
                raise AssertionError(f"{chosen}: {type(error).__name__}: {error}") from error
            else:
                tried["used"] += 1
                for settings in (get_settings(), get_robustness_settings()):
                    for value in vars(settings).values():
                        if isinstance(value, int | float):  # mostly a time
                            timedelta(seconds=value)
    forget_state()
    print(dict(tried))


@pytest.mark.timeout(SECONDS + 240)
def test_names_of_any_bytes_are_found_or_left_out(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    tried: Counter[str] = Counter()
    ends = time.monotonic() + SECONDS / 10
    while time.monotonic() < ends:
        root = tmp_path / str(tried["libraries"])
        root.mkdir()
        tried["libraries"] += 1
        names = set()
        for _ in range(50):
            stem = os.fsencode(mutated_value(rng))
            if rng.random() < 0.5:
                stem = rng.randbytes(rng.randint(1, 80))
            name = stem.replace(b"/", b"").replace(b"\0", b"")[:240] + b".wav"
            (root / os.fsdecode(name)).touch()
            names.add(name)
        library = Library({"music": root})
        scan = library.scan()
        tried["files"] += len(names)
        hidden = {name for name in names if name.startswith(b".")}
        assert len(scan.files) + len(scan.left_out) >= len(names - hidden)
        for entry in scan.files:
            assert library.path_of(entry.file_key).exists()
            shown = entry.file_key + printable(entry.file_key)
            assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown)
        shutil.rmtree(root)
    print(dict(tried))
