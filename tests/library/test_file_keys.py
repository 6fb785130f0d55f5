import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import (
    AssetExecutionContext,
    AssetKey,
    BackfillPolicy,
    DagsterInstance,
    DynamicPartitionsDefinition,
    asset,
    materialize,
)
from dagster._core.definitions.partitions.utils import (
    raise_error_on_invalid_partition_key_substring,
)
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)

from audio_assets.library.file_keys import MAX_KEY_BYTES, FileKeyError, decode_key, encode_key

READABLE = {
    b"Artist/Album/01 - Song.mp3": "music/Artist/Album/01 - Song.mp3",
    b'say "hello" #1, [live] & 50% more.flac': 'music/say "hello" #1, [live] & 50% more.flac',
    "Björk/Jóga 🎧❤️.ogg".encode(): "music/Björk/Jóga 🎧❤️.ogg",
    b"back\\slash'n'*star?.wav": "music/back\\slash'n'*star?.wav",
}
ESCAPED = {
    b"...And Justice for All/One.mp3": "music/..%2EAnd Justice for All/One.mp3",
    b"wait.....mp3": "music/wait..%2E%2E%2Emp3",
    b"Vol.": "music/Vol%2E",
    b"a|b.mp3": "music/a%7Cb.mp3",
    b"two\nlines\r\t\x1b.mp3": "music/two%0Alines%0D%09%1B.mp3",
    b"100%25.mp3": "music/100%2525.mp3",
    b"100%2\n.mp3": "music/100%2%0A.mp3",
    b"caf\xe9.mp3": "music/caf%E9.mp3",
    b"a  b .mp3 ": "music/a %20b .mp3%20",
    "Beyonce\u0301.mp3".encode(): "music/Beyonce%CC%81.mp3",
    "\u212bngstrom.mp3".encode(): "music/%E2%84%ABngstrom.mp3",
    "non\u00a0breaking\u200b\u202e.mp3".encode(): "music/non%C2%A0breaking%E2%80%8B%E2%80%AE.mp3",
}
# fmt: off
TRICKY_PARTS = (
    ".", "..", "...", "%", "%2", "%41", "%2E", "%0a", " ", "  ", "#", '"', "'", "\\", "[", "]", ",",
    "|", "\n", "\r\n", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\u200d", "\ufeff", "é", "e\u0301",
    "\u0301", "A", "CA", "C", "\u1100\u1161", "가", "\u0345", "\u03a9", "\u2126", "🎧",
    "👩\u200d🎤", "\U000e0001",
)
# fmt: on


def random_names(count: int) -> Iterator[bytes]:
    """Relative paths of random bytes, of random characters and of what is tricky."""
    chance = random.Random(20)
    for _ in range(count):
        parts = []
        for _ in range(chance.choice((1, 1, 2, 4, 12))):
            match chance.randrange(3):
                case 0:
                    part = chance.randbytes(chance.choice((1, 3, 20, 255)))
                case 1:
                    codes = (chance.choice((0x7F, 0x2FF, 0x33FF, 0x1FFFF)) for _ in range(12))
                    text = "".join(chr(chance.randrange(1, code)) for code in codes)
                    part = text.encode("utf-8", "surrogatepass")
                case _:
                    pieces = chance.choices(TRICKY_PARTS, k=chance.randrange(1, 8))
                    part = "".join(pieces).encode()
            part = part.replace(b"/", b"").replace(b"\0", b"")[:255]
            parts.append(part if part not in (b"", b".", b"..") else b"song.mp3")
        yield b"/".join(parts)


@pytest.mark.parametrize(("relative", "key"), (READABLE | ESCAPED).items())
def test_keys_are_readable_and_stable(relative: bytes, key: str) -> None:
    assert encode_key("music", relative) == key
    assert decode_key(key) == ("music", relative)


def test_any_path_comes_back_from_its_key() -> None:
    relatives = set(random_names(4000))
    keys = {encode_key("music", relative): relative for relative in relatives}
    assert len(keys) == len(relatives)
    for key, relative in keys.items():
        assert decode_key(key) == ("music", relative)
        assert unicodedata.is_normalized("NFC", key)
        assert key.isascii() or not any(unicodedata.category(c) in ("Cc", "Cs") for c in key)
        assert key == key.strip()
        assert not key.endswith(".")
        assert "|" not in key
    raise_error_on_invalid_partition_key_substring(list(keys))


def test_keys_differ_where_names_look_the_same() -> None:
    composed, decomposed = (
        encode_key("music", unicodedata.normalize(form, "Dvořák.mp3").encode())
        for form in ("NFC", "NFD")
    )
    assert composed == "music/Dvořák.mp3"
    assert unicodedata.normalize("NFC", decomposed) != composed


@pytest.mark.parametrize("name", ["a/b", "a%2Fb", "c:\\music", "...", "caf\udce9", "50%", " x "])
def test_any_root_name_comes_back_from_a_key(name: str) -> None:
    key = encode_key(name, b"x/y.mp3")
    assert key.endswith("/x/y.mp3")
    assert decode_key(key) == (name, b"x/y.mp3")


def test_root_and_path_are_not_confused() -> None:
    assert encode_key("a", b"b/c.mp3") != encode_key("a/b", b"c.mp3")


@pytest.mark.parametrize(
    "relative", [b"", b"/etc/passwd", b"a//b", b"a/../b", b"..", b"./a", b"a/", b"a\0b"]
)
def test_what_is_no_path_below_a_root_has_no_key(relative: bytes) -> None:
    with pytest.raises(FileKeyError, match="not a path below a library root"):
        encode_key("music", relative)


def test_a_root_needs_a_name() -> None:
    with pytest.raises(FileKeyError, match="not a name"):
        encode_key("", b"a.mp3")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "music",
        "music/",
        "/a.mp3",
        "music/../a.mp3",
        "music/%2E%2E/a.mp3",
        "music//a.mp3",
        "music/%41.mp3",
        "music/a\nb.mp3",
        "music/a...b",
        "music/a%00b",
        "music/e\u0301",
        "music/\ud800",
    ],
)
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(FileKeyError, match="not the key of a file"):
        decode_key(key)


def test_dagster_keeps_and_materializes_ranges_of_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    deep = b"/".join([b"d" * 255] * 7)
    relatives = [*READABLE, *ESCAPED, b"n" * 255, b"\xff" * 255, deep, *random_names(80)]
    by_key = {encode_key("music", relative): relative for relative in relatives}
    keys = [key for key in by_key if len(key.encode()) <= MAX_KEY_BYTES]
    assert len(keys) > 60
    partitions = DynamicPartitionsDefinition(name="audio_files")
    seen: list[str] = []

    @asset(partitions_def=partitions, backfill_policy=BackfillPolicy.single_run())
    def listened(context: AssetExecutionContext) -> None:
        seen.extend(context.partition_keys)

    with DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("audio_files", keys)

    with DagsterInstance.get() as instance:
        assert list(instance.get_dynamic_partitions("audio_files")) == keys
        first, last = keys[2], keys[-3]
        result = materialize(
            [listened],
            instance=instance,
            tags={ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last},
        )
        assert result.success
        assert seen == keys[2:-2]
        assert instance.get_materialized_partitions(AssetKey("listened")) == set(keys[2:-2])
        assert {decode_key(key)[1] for key in seen} == {by_key[key] for key in keys[2:-2]}
        run = instance.get_run_by_id(result.run_id)
        assert run is not None
        assert run.tags[ASSET_PARTITION_RANGE_END_TAG] == last


def test_the_range_syntax_of_the_command_line_splits_any_two_keys() -> None:
    keys = [encode_key("music", relative) for relative in [*READABLE, *ESCAPED]]
    for start in keys:
        for end in keys:
            assert f"{start}...{end}".split("...") == [start, end]
