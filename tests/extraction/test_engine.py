"""What faults cost: each is real, and each costs its own cell alone."""

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import forkserver, spawn
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from blake3 import blake3

from audio_assets.extraction import engine as engine_module
from audio_assets.extraction.cells import CellOutcome, CellStatus
from audio_assets.extraction.engine import Engine
from audio_assets.extraction.scratch import Scratch
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import FeatureSet
from audio_assets.library.scan import Library
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import feature_table, warehouse_tables
from robustness.activity import Activity, list_activity
from robustness.adaptive_timeout import get_timeout_manager
from robustness.circuit_breaker import get_circuit_breaker
from robustness.error_classifier import ErrorType
from robustness.quarantine import Quarantine
from robustness.smart_retry import DeferredError
from robustness.worker_pool import WorkerPool, WorkerStartError
from tests import faults
from tests.conftest import forget_state, write_tone
from tests.warehouse.rows import all_rows

GOOD = ("a.wav", "b.wav", "c.wav")


pytestmark = pytest.mark.usefixtures("own_state")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    directory = tmp_path / "music"
    directory.mkdir()
    for number, name in enumerate((*GOOD, "bad.wav")):
        write_tone(directory / name, 220.0 * (number + 1))
    return directory


@contextmanager
def engine(
    root: Path, tmp_path: Path, *feature_sets: FeatureSet, memory_limit_mib: float | None = None
) -> Iterator[Engine]:
    landing = Landing(str(tmp_path / "landing"), warehouse_tables(feature_sets))
    with (
        Scratch(tmp_path / "scratch", "run", 1024) as scratch,
        WorkerPool(
            2,
            memory_limit_mib=memory_limit_mib,
            preload=("audio_assets.extraction.worker", "pandas", "tests.faults"),
            memory_high=None,
        ) as pool,
    ):
        yield Engine("run", Library({"music": root}), landing, pool, scratch)


def run(
    root: Path, tmp_path: Path, feature_set: FeatureSet, *, memory_limit_mib: float | None = None
) -> dict[str, CellOutcome]:
    keys = [f"music/{path.name}" for path in sorted(root.iterdir())]
    with engine(root, tmp_path, feature_set, memory_limit_mib=memory_limit_mib) as shared:
        shared.begin([feature_set], keys)
        outcomes = list(shared.drive(feature_set.name))
        rows = {row["file_key"] for row in latest(tmp_path, feature_set)}
    assert sorted(outcome.file_key for outcome in outcomes) == keys
    done = {o.file_key for o in outcomes if o.status is not CellStatus.FAILED}
    assert rows == done
    return {outcome.file_key.removeprefix("music/"): outcome for outcome in outcomes}


def latest(tmp_path: Path, feature_set: FeatureSet) -> list[dict[str, Any]]:
    landing = Landing(str(tmp_path / "landing"), warehouse_tables([feature_set]))
    return landing.latest(feature_table(feature_set).landing_name)


def attempts(tmp_path: Path, feature_set: FeatureSet) -> list[dict[str, object]]:
    landing = Landing(str(tmp_path / "landing"), warehouse_tables([feature_set]))
    rows = all_rows(landing, "robustness/attempts")
    return sorted(
        (row for row in rows if row["file_key"] == "music/bad.wav"), key=lambda row: row["attempt"]
    )


def learn_short_timeout(name: str) -> None:
    for _ in range(20):
        get_timeout_manager().record_performance(name, 0.1, 0.01, True, 60.0, audio_seconds=1.0)


def assert_good_ones_done(outcomes: dict[str, CellOutcome]) -> None:
    for name in GOOD:
        assert outcomes[name].status is CellStatus.MATERIALIZED
        assert outcomes[name].attempts == 1


def test_hang_is_killed_and_the_alternative_extractor_saves_the_cell(
    library: Path, tmp_path: Path
) -> None:
    feature_set = faults.feature_set("hanging", faults.hang)
    learn_short_timeout("hanging")
    outcomes = run(library, tmp_path, feature_set)
    assert_good_ones_done(outcomes)
    assert outcomes["bad.wav"].status is CellStatus.MATERIALIZED
    assert outcomes["bad.wav"].recoveries == ("increase_timeout", "audio_fallback")
    first, second, third = attempts(tmp_path, feature_set)
    assert first["error_type"] == second["error_type"] == ErrorType.TIMEOUT.value
    assert second["timeout_s"] == pytest.approx(1.5 * first["timeout_s"], rel=0.3)
    assert third["extractor"] == "alternative"


def test_feature_set_that_reads_the_file_itself_gets_learned_timeouts_too(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTNESS_TIMEOUT_MIN_SAMPLES", "2")
    forget_state()
    feature_set = replace(faults.feature_set("tags", faults.length_of_file), reads="file")
    run(library, tmp_path, feature_set)
    decision = get_timeout_manager().timeout_in_force("tags", 1.0)
    assert decision.source == "learned"


def test_segfault_costs_its_own_attempt_alone(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("crashing", faults.segfault)
    outcomes = run(library, tmp_path, feature_set)
    assert_good_ones_done(outcomes)
    assert outcomes["bad.wav"].status is CellStatus.MATERIALIZED
    assert "SIGSEGV" in str(attempts(tmp_path, feature_set)[0]["message"])
    assert attempts(tmp_path, feature_set)[-1]["extractor"] == "alternative"


def write_wavpack(path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 44100)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = 44100
    with av.open(path, "w", format="wv") as output:
        stream = output.add_stream("wavpack", rate=44100, layout="mono")
        assert isinstance(stream, av.AudioStream)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def write_headless_flac(path: Path) -> None:
    write_tone(path, 440.0)
    path.write_bytes(b"\xa5" * 1000 + path.read_bytes())


@pytest.mark.parametrize(
    ("name", "write", "reads_pcm", "recoveries"),
    [
        ("bad.wv", write_wavpack, True, ("audio_fallback",)),
        ("bad.wv", write_wavpack, False, ("audio_fallback",)),
        ("bad.flac", write_headless_flac, True, ("format_conversion", "audio_fallback")),
    ],
)
def test_crash_on_a_file_that_can_be_decoded_gets_its_fallback(
    library: Path,
    tmp_path: Path,
    name: str,
    write: Callable[[Path], None],
    reads_pcm: bool,
    recoveries: tuple[str, ...],
) -> None:
    write(library / name)
    feature_set = replace(
        faults.feature_set("crashing", faults.segfault, faults.length_of_file),
        reads="pcm" if reads_pcm else "file",
    )
    (library / "bad.wav").unlink()
    outcome = run(library, tmp_path, feature_set)[name]
    assert outcome.status is CellStatus.MATERIALIZED
    assert outcome.recoveries == recoveries
    assert Quarantine().list() == []


def test_endless_allocation_is_stopped_at_the_budget(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("hoarding", faults.hoard)
    outcomes = run(library, tmp_path, feature_set, memory_limit_mib=400)
    assert_good_ones_done(outcomes)
    assert outcomes["bad.wav"].status is CellStatus.MATERIALIZED
    assert outcomes["bad.wav"].recoveries == ("reduce_memory_usage", "audio_fallback")
    assert attempts(tmp_path, feature_set)[0]["error_type"] == ErrorType.MEMORY.value


def test_nothing_saves_a_file_that_no_extractor_survives(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("deadly", faults.segfault, faults.segfault)
    outcomes = run(library, tmp_path, feature_set)
    assert_good_ones_done(outcomes)
    bad = outcomes["bad.wav"]
    assert bad.status is CellStatus.FAILED
    assert bad.error is not None
    assert "SIGSEGV" in bad.error.message
    # One bad file says nothing of the extractor's health.
    assert get_circuit_breaker("feature:deadly").get_stats()["failure_count"] == 1


def test_what_failed_first_is_the_recorded_reason_without_a_quarantine_too(
    library: Path, tmp_path: Path
) -> None:
    feature_set = faults.feature_set("deadly", faults.segfault, faults.implausible)
    for name in GOOD:
        (library / name).unlink()
    error = run(library, tmp_path, feature_set)["bad.wav"].error
    assert Quarantine().list() == []
    rows = sorted(all_attempts(tmp_path, feature_set), key=lambda row: row["row_id"])
    assert [row["outcome"] for row in rows] == ["failed", "failed", "given_up"]
    first, last, reason = (row["message"] for row in rows)
    assert "SIGSEGV" in first
    assert first == reason != last
    assert error is not None
    assert error.reason == reason


def test_file_that_vanished_fails_with_that_reason(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("plain", faults.sound)
    keys = [f"music/{name}" for name in (*GOOD, "bad.wav")]
    (library / "bad.wav").unlink()
    with engine(library, tmp_path, feature_set) as shared:
        shared.begin([feature_set], keys)
        outcomes = {o.file_key: o for o in shared.drive("plain")}
    bad = outcomes["music/bad.wav"]
    assert bad.status is CellStatus.FAILED
    assert bad.error is not None
    assert bad.error.error_type is ErrorType.FILE_SYSTEM
    assert all(outcomes[f"music/{n}"].status is CellStatus.MATERIALIZED for n in GOOD)


def test_key_of_another_library_fails_alone(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("plain", faults.sound)
    with engine(library, tmp_path, feature_set) as shared:
        shared.begin([feature_set], ["elsewhere/a.wav", "music/a.wav"])
        outcomes = list(shared.drive("plain"))
    assert {o.file_key: o.status for o in outcomes} == {
        "elsewhere/a.wav": CellStatus.FAILED,
        "music/a.wav": CellStatus.MATERIALIZED,
    }


def test_corrupt_file_is_quarantined_until_it_changes(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("plain", faults.sound)
    (library / "bad.wav").write_text("not audio at all\n" * 100)
    assert run(library, tmp_path, feature_set)["bad.wav"].status is CellStatus.FAILED
    (cell,) = Quarantine().list()
    assert (cell.file_key, cell.feature_set) == ("music/bad.wav", "plain")

    again = run(library, tmp_path, feature_set)["bad.wav"]
    assert again.attempts == 0
    assert again.error is not None
    assert again.error.message == cell.reason

    write_tone(library / "bad.wav", 330.0)
    assert run(library, tmp_path, feature_set)["bad.wav"].status is CellStatus.MATERIALIZED


def test_files_of_one_content_are_computed_once(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("plain", faults.sound)
    shutil.copy(library / "a.wav", library / "copy.wav")
    outcomes = run(library, tmp_path, feature_set)
    statuses = {outcomes[name].status for name in ("a.wav", "copy.wav")}
    assert statuses == {CellStatus.MATERIALIZED, CellStatus.REUSED}


def test_copy_of_older_rows_replaces_what_the_file_held_before(
    library: Path, tmp_path: Path
) -> None:
    feature_set = faults.feature_set("plain", faults.sound)
    for key in ("music/a.wav", "music/bad.wav"):
        with engine(library, tmp_path, feature_set) as shared:
            shared.begin([feature_set], [key])
            list(shared.drive("plain"))
    (library / "a.wav").rename(library / "bad.wav")
    with engine(library, tmp_path, feature_set) as shared:
        shared.begin([feature_set], ["music/bad.wav"])
        (moved,) = shared.drive("plain")
    assert moved.status is CellStatus.REUSED
    assert len({row["content_hash"] for row in latest(tmp_path, feature_set)}) == 1


def test_step_that_broke_off_goes_on_where_it_was(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("plain", faults.sound)
    keys = sorted(f"music/{path.name}" for path in library.iterdir())
    with engine(library, tmp_path, feature_set) as shared:
        shared.begin([feature_set], keys)
        first = shared.drive("plain")
        unreported = next(first)
        first.close()  # type: ignore[attr-defined] - as when Dagster's storage fails of it
        outcomes = list(shared.drive("plain"))
    assert unreported in outcomes
    assert sorted(outcome.file_key for outcome in outcomes) == keys
    landing = Landing(str(tmp_path / "landing"), warehouse_tables([feature_set]))
    for table in (feature_table(feature_set).landing_name, "robustness/attempts"):
        assert sorted(row["file_key"] for row in all_rows(landing, table)) == keys


def test_unchanged_cells_are_reused_and_force_computes_them(library: Path, tmp_path: Path) -> None:
    feature_set = faults.feature_set("plain", faults.sound)
    run(library, tmp_path, feature_set)
    assert {o.status for o in run(library, tmp_path, feature_set).values()} == {CellStatus.REUSED}
    with engine(library, tmp_path, feature_set) as shared:
        shared.begin([feature_set], ["music/a.wav"], force=True)
        forced = list(shared.drive("plain"))
    assert [o.status for o in forced] == [CellStatus.MATERIALIZED]


def test_open_breaker_defers_cells_until_it_closes(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "2")
    forget_state()
    feature_set = faults.feature_set("guarded", faults.sound)
    breaker = get_circuit_breaker("feature:guarded")
    breaker.force_open()
    keys = [f"music/{name}" for name in GOOD]
    with engine(library, tmp_path, feature_set) as shared:
        shared.begin([feature_set], keys)
        with pytest.raises(DeferredError) as deferred:
            list(shared.drive("guarded"))
        with pytest.raises(DeferredError):  # too early
            list(shared.drive("guarded"))
        breaker.reset()
        done = list(shared.drive("guarded", hold_s=deferred.value.retry_after))
    assert [o.status for o in done] == [CellStatus.MATERIALIZED] * 3


def test_cells_of_all_feature_sets_are_reported_whichever_drives(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ACTIVITY_S", 0.5)
    hanging = faults.feature_set("hanging", faults.hang)
    plain = faults.feature_set("plain", faults.sound)
    learn_short_timeout("hanging")
    keys = [f"music/{name}" for name in (*GOOD, "bad.wav")]
    seen: list[Activity] = []
    with engine(library, tmp_path, hanging, plain) as shared:
        shared.begin([hanging, plain], keys)
        outcomes = [
            *shared.drive("plain", check=lambda: seen.extend(list_activity())),
            *shared.drive("hanging", check=lambda: seen.extend(list_activity())),
        ]
    cells = {(o.feature_set, o.file_key): o for o in outcomes}
    assert len(outcomes) == len(cells) == 8
    assert {outcome.status for outcome in outcomes} == {CellStatus.MATERIALIZED}
    bad = cells["hanging", "music/bad.wav"]
    assert bad.recoveries == ("increase_timeout", "audio_fallback")
    assert outcomes[-1] == bad  # a hang keeps nobody waiting
    workers = [worker for run in seen for worker in run.body["workers"]]
    hung = [w for w in workers if w["stage"] == "extract" and w["idle_s"] > 1]
    assert {worker["file_key"] for worker in hung} == {"music/bad.wav"}
    assert max(run.body["cells_finished"] for run in seen) > 0


def all_attempts(tmp_path: Path, *feature_sets: FeatureSet) -> list[dict[str, Any]]:
    landing = Landing(str(tmp_path / "landing"), warehouse_tables(feature_sets))
    return all_rows(landing, "robustness/attempts")


def test_audio_is_decoded_once_and_removed_with_the_last_cell(
    library: Path, tmp_path: Path
) -> None:
    sets = [faults.feature_set(name, faults.sound) for name in ("one", "two", "three")]
    keys = [f"music/{name}" for name in (*GOOD, "bad.wav")]
    with engine(library, tmp_path, *sets) as shared:
        shared.begin(sets, keys)
        outcomes = list(shared.drive("one"))
        for feature_set in sets[1:]:
            outcomes += shared.drive(feature_set.name)
        assert [path.name for path in (tmp_path / "scratch" / "run").iterdir()] == [".lock"]
    assert len(outcomes) == 12
    decoded = [row["file_key"] for row in all_attempts(tmp_path, *sets) if row["decode_s"]]
    assert sorted(decoded) == sorted(keys)


def test_failed_decode_is_one_attempt_for_all_feature_sets(library: Path, tmp_path: Path) -> None:
    one, two = (faults.feature_set(name, faults.sound) for name in ("one", "two"))
    tags = replace(faults.feature_set("tags", faults.length_of_file), reads="file")
    t = np.arange(44100) / 44100
    soundfile.write(library / "bad.wav", np.sin(2 * np.pi * 440 * t), 44100, "NMS_ADPCM_32")
    (library / "a.wav").write_text("not audio at all\n" * 100)
    with engine(library, tmp_path, one, two, tags) as shared:
        shared.begin([one, two, tags], ["music/a.wav", "music/bad.wav"])
        outcomes = [o for s in (one, two, tags) for o in shared.drive(s.name)]
    failed = {(o.feature_set, o.file_key) for o in outcomes if o.status is CellStatus.FAILED}
    assert failed == {("one", "music/a.wav"), ("two", "music/a.wav")}
    assert {
        (row["file_key"], row["feature_set"], row["attempt"], row["outcome"])
        for row in all_attempts(tmp_path, one, two, tags)
    } == {
        ("music/a.wav", "one", 1, "failed"),
        ("music/a.wav", "one", 0, "quarantined"),
        ("music/a.wav", "two", 0, "quarantined"),
        ("music/a.wav", "tags", 1, "succeeded"),
        ("music/bad.wav", "one", 1, "failed"),
        ("music/bad.wav", "one", 2, "succeeded"),
        ("music/bad.wav", "two", 1, "succeeded"),
        ("music/bad.wav", "tags", 1, "succeeded"),
    }
    assert get_circuit_breaker("audio_processing").get_stats()["failure_count"] == 0
    assert {(c.file_key, c.feature_set) for c in Quarantine().list()} == {
        ("music/a.wav", "one"),
        ("music/a.wav", "two"),
    }


def test_a_folder_of_junk_opens_no_breaker_and_defers_nothing(
    library: Path, tmp_path: Path
) -> None:
    chance, content = np.random.default_rng(0), (library / "a.wav").read_bytes()
    junk = (
        b"",
        bytes(5000),
        b"<html>not a song</html>" * 200,
        chance.bytes(20_000),
        content[:60],
        b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + chance.bytes(3000),
        b"OggS\0\x02" + chance.bytes(20_000),
        b"fLaC\0\0\0\x22" + chance.bytes(20_000),
        b"\0\0\0\x20ftypM4A " + chance.bytes(20_000),
        b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\0\xaa\0\x62\xce\x6c" + chance.bytes(9000),
    )
    for number, data in enumerate(junk * 2):
        (library / f"a{number}.mp3").write_bytes(data + bytes([number] * (number >= len(junk))))
    plain, tags = faults.feature_set("plain", faults.sound), FEATURE_SETS["metadata"]
    keys = [f"music/{path.name}" for path in sorted(library.iterdir())]
    with engine(library, tmp_path, plain, tags) as shared:
        shared.begin([plain, tags], keys)
        outcomes = [o for s in (plain, tags) for o in shared.drive(s.name, hold_s=60.0)]
    done = {o.file_key for o in outcomes if o.feature_set == "plain" and o.status != "failed"}
    assert done == {f"music/{name}" for name in (*GOOD, "bad.wav")}
    rows = all_attempts(tmp_path, plain, tags)
    assert {row["outcome"] for row in rows} <= {"succeeded", "failed", "quarantined", "reused"}
    for name in ("audio_processing", "feature:plain", "feature:metadata", "storage:music"):
        assert get_circuit_breaker(name).get_stats()["failure_count"] == 0
    reasons = {o.error.message for o in outcomes if o.error}
    assert len(reasons) > 3
    for reason in reasons:  # written for people
        assert not re.search(r"Error|Errno|object|NoneType|0x|<|avcodec|returned", reason), reason


def test_an_idle_worker_helps_with_the_file_of_another(library: Path, tmp_path: Path) -> None:
    sets = [faults.feature_set(name, faults.slow_everywhere) for name in ("one", "two")]
    with engine(library, tmp_path, *sets) as shared:
        shared.begin(sets, ["music/a.wav"])
        assert len(list(shared.drive("one"))) + len(list(shared.drive("two"))) == 2
    workers = {row["worker_pid"] for row in all_attempts(tmp_path, *sets)}
    assert len(workers) == 2


def test_nothing_is_made_of_a_file_that_was_replaced(library: Path, tmp_path: Path) -> None:
    swapping = faults.feature_set("swapping", faults.replace_the_file)
    plain = faults.feature_set("plain", faults.sound)
    traces = tmp_path / "traces"
    traces.mkdir()
    write_tone(traces / "other.wav", 880.0, seconds=2.0)
    shutil.copy(library / "bad.wav", traces / "original.wav")
    sets = [plain, swapping]
    with engine(library, tmp_path, *sets) as shared:
        shared.begin(sets, ["music/bad.wav"])
        outcomes = [o for s in sets for o in shared.drive(s.name)]
    assert {(o.feature_set, o.status) for o in outcomes} == {
        ("plain", CellStatus.MATERIALIZED),
        ("swapping", CellStatus.MATERIALIZED),
    }
    other = blake3((library / "bad.wav").read_bytes()).hexdigest()
    for feature_set in sets:
        (row,) = latest(tmp_path, feature_set)
        assert (row["content_hash"], row["value"]) == (other, 2.0)
    # What the file was before, under another name, is not taken for what it became.
    shutil.copy(traces / "original.wav", library / "original.wav")
    with engine(library, tmp_path, *sets) as shared:
        shared.begin(sets, ["music/original.wav"])
        outcomes = [o for s in sets for o in shared.drive(s.name)]
    assert {(o.row or {})["value"] for o in outcomes} == {1.0}


def test_file_that_keeps_changing_waits(library: Path, tmp_path: Path) -> None:
    plain = faults.feature_set("plain", faults.sound)
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.001):
            os.utime(library / "bad.wav")

    writer = threading.Thread(target=write)
    writer.start()
    keys = [f"music/{name}" for name in (*GOOD, "bad.wav")]
    with engine(library, tmp_path, plain) as shared:
        shared.begin([plain], keys)
        outcomes: list[CellOutcome] = []
        with pytest.raises(DeferredError, match="changed or replaced"):
            outcomes.extend(shared.drive("plain"))
        stop.set()
        writer.join()
        outcomes += shared.drive("plain", hold_s=5.0)
    assert {o.file_key for o in outcomes} == set(keys)
    assert {o.status for o in outcomes} == {CellStatus.MATERIALIZED}


def test_list_of_other_files_holds_nobody(library: Path, tmp_path: Path) -> None:
    os.mkfifo(library / "pipe.bin")
    (library / "bad.wav").rename(library / "other.wav")
    (library / "list.mp3").write_text("ffconcat version 1.0\nfile pipe.bin\n")
    (library / "leaving.mp3").write_text("ffconcat version 1.0\nfile other.wav\n")
    plain = faults.feature_set("plain", faults.sound)
    keys = [f"music/{name}" for name in ("list.mp3", "leaving.mp3", *GOOD)]
    with engine(library, tmp_path, plain) as shared:
        shared.begin([plain], keys)
        outcomes = {o.file_key.removeprefix("music/"): o for o in shared.drive("plain")}
    assert_good_ones_done(outcomes)
    for name in ("list.mp3", "leaving.mp3"):
        error = outcomes[name].error
        assert error is not None
        assert error.error_type is ErrorType.UNSUPPORTED_FORMAT


def test_files_of_one_content_fail_together(library: Path, tmp_path: Path) -> None:
    deadly = faults.feature_set("deadly", faults.segfault, faults.segfault)
    shutil.copy(library / "bad.wav", library / "bad copy.wav")
    outcomes = run(library, tmp_path, deadly)
    assert_good_ones_done(outcomes)
    assert {outcomes[n].status for n in ("bad.wav", "bad copy.wav")} == {CellStatus.FAILED}
    assert sum(o.attempts for o in outcomes.values()) == 3 + 2 * 2


def test_copy_is_computed_of_itself_where_the_first_file_is_gone(
    library: Path, tmp_path: Path
) -> None:
    vanishing = faults.feature_set("vanishing", faults.delete_the_first)
    shutil.copy(library / "bad.wav", library / "bad copy.wav")
    with engine(library, tmp_path, vanishing) as shared:
        shared.begin([vanishing], ["music/bad.wav", "music/bad copy.wav"])
        outcomes = [o.status for o in shared.drive("vanishing")]
    assert sorted(outcomes) == [CellStatus.FAILED, CellStatus.MATERIALIZED]


def test_copy_of_a_file_that_recovered_does_not_fail(library: Path, tmp_path: Path) -> None:
    flaky = faults.feature_set("flaky", faults.flaky, faults.flaky)
    shutil.copy(library / "bad.wav", library / "bad copy.wav")
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.001):
            os.utime(library / "bad copy.wav")

    writer = threading.Thread(target=write)  # the copy is identified when the other is reported
    writer.start()
    outcomes: list[CellOutcome] = []
    with engine(library, tmp_path, flaky) as shared:
        shared.begin([flaky], ["music/bad.wav", "music/bad copy.wav"], force=True)
        while len(outcomes) < 2:
            with suppress(DeferredError):
                for outcome in shared.drive("flaky", hold_s=5.0):
                    outcomes.append(outcome)
                    stop.set()
        writer.join()
    assert [o.file_key for o in outcomes] == ["music/bad.wav", "music/bad copy.wav"]
    assert {o.status for o in outcomes} == {CellStatus.MATERIALIZED}


def test_workers_that_cannot_start_end_the_run(
    library: Path, tmp_path: Path, new_fork_server: None
) -> None:
    plain = faults.feature_set("plain", faults.sound)
    python = spawn.get_executable()
    forkserver._forkserver._stop()
    spawn.set_executable(str(tmp_path / "no python"))
    try:
        with engine(library, tmp_path, plain) as shared:
            shared.begin([plain], [f"music/{path.name}" for path in library.iterdir()])
            with pytest.raises(WorkerStartError, match="cannot start a worker"):
                list(shared.drive("plain"))
    finally:
        spawn.set_executable(python)
    storage = get_circuit_breaker("storage:music").get_stats()
    assert storage["failure_count"] < engine_module.MAX_START_FAILURES
