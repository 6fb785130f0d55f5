"""Recoveries that save a cell whose first attempt fails for real, in runs of Dagster's own.

``pytest -rP tests/test_recoveries.py`` tells of each fault what it was taken for, what was done
about it, and how soon there was a good cell again.
"""

import http.server
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
import soundfile

from audio_assets.audio.pcm import Audio
from audio_assets.defs.assets import build_feature_asset
from audio_assets.defs.partitions import asset_key
from audio_assets.defs.registration import add_partitions
from audio_assets.defs.resources import ExtractionResource
from audio_assets.features import FEATURE_SETS
from audio_assets.features.base import FeatureSet, Row
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.schema import feature_table, warehouse_tables
from robustness.adaptive_timeout import get_timeout_manager
from robustness.quarantine import Quarantine
from robustness.state import get_state_store
from tests import faults
from tests.conftest import PROJECT, Home, forget_state, write_tone
from tests.warehouse.rows import all_rows

pytestmark = pytest.mark.usefixtures("own_state")

GOOD = ("a.wav", "b.wav", "c.wav")
FILES = (*GOOD, "bad.wav")


@dataclass
class Result:
    """What a run left behind."""

    success: bool
    materialized: set[str]
    rows: dict[str, dict[str, Any]]
    attempts: list[dict[str, Any]]

    def of(self, name: str) -> list[dict[str, Any]]:
        """Attempts at a file that ran, in order."""
        ran = ("succeeded", "failed")
        return sorted(
            (a for a in self.attempts if a["file_key"] == f"music/{name}" and a["outcome"] in ran),
            key=lambda attempt: attempt["attempt"],
        )

    def told(self) -> str:
        """Say what each attempt failed of, what followed, and how soon a cell was good again."""
        good = sorted(_end(a) for a in self.attempts if a["outcome"] == "succeeded")
        failed = sorted((a for a in self.attempts if a["outcome"] == "failed"), key=_end)
        lines = []
        for attempt in failed:
            later = next((at for at in good if at > _end(attempt)), None)
            soon = f"{(later - _end(attempt)).total_seconds():.1f} s later" if later else "none"
            lines.append(
                f"{attempt['file_key']}: {attempt['error_type']} ({attempt['severity']}) after "
                f"{attempt['duration_s']:.1f} s, then {attempt['recovery_strategy'] or 'given up'}"
                f"; next good cell: {soon}"
            )
        lost = {a["file_key"].removeprefix("music/") for a in self.attempts} - self.materialized
        return "\n".join([*lines, f"cells lost: {', '.join(sorted(lost)) or 'none'}"])

    def deferrals(self, name: str) -> list[str]:
        return [
            a["message"]
            for a in self.attempts
            if a["file_key"] == f"music/{name}" and a["outcome"] == "deferred"
        ]


def _end(attempt: dict[str, Any]) -> datetime:
    end: datetime = attempt["started_at"] + timedelta(seconds=attempt["duration_s"])
    return end


class Workbench:
    """A library, and runs over it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.root = directory / "music"
        self.landing = directory / "landing"
        self.scratch = directory / "scratch"
        self._monkeypatch = monkeypatch
        self.root.mkdir()
        (directory / "traces").mkdir()
        monkeypatch.setenv("DAGSTER_HOME", str(directory))
        monkeypatch.setenv("AUDIO_LIBRARY", f"music={self.root}")
        forget_state()

    def add_tones(self, *names: str) -> None:
        for number, name in enumerate(names):
            write_tone(self.root / name, 220.0 * (number + 1))

    def run(
        self, feature_set: FeatureSet, *, workers: int = 2, names: Sequence[str] = ()
    ) -> Result:
        """Materialize a feature set for all files, or those named, as a backfill's run does."""
        self._monkeypatch.setitem(FEATURE_SETS, feature_set.name, feature_set)
        self._monkeypatch.setenv("AUDIO_LANDING", str(self.landing))
        forget_state()
        defs = dg.Definitions(
            assets=[build_feature_asset(feature_set)],
            resources={
                "extraction": ExtractionResource(
                    scratch=str(self.scratch),
                    scratch_mib=4096,
                    workers=workers,
                )
            },
            executor=dg.in_process_executor,
        )
        names = names or [path.name for path in sorted(self.root.iterdir())]
        keys = [f"music/{name}" for name in names]
        with dg.DagsterInstance.ephemeral() as instance:
            add_partitions(instance, keys)
            done = defs.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=instance,
                raise_on_error=False,
                tags={
                    "dagster/asset_partition_range_start": keys[0],
                    "dagster/asset_partition_range_end": keys[-1],
                },
            )
            materialized = instance.get_materialized_partitions(asset_key(feature_set.name))
        landing = Landing(str(self.landing), warehouse_tables(FEATURE_SETS.values()))
        rows = landing.latest(feature_table(feature_set).landing_name)
        result = Result(
            success=done.success,
            materialized={key.removeprefix("music/") for key in materialized},
            rows={row["file_key"].removeprefix("music/"): row for row in rows},
            attempts=all_rows(landing, "robustness/attempts"),
        )
        print(result.told())
        return result


@pytest.fixture
def workbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    bench = Workbench(tmp_path, monkeypatch)
    bench.add_tones(*FILES)
    return bench


def assert_all_saved(result: Result, *recoveries: str) -> None:
    assert result.success
    assert result.materialized == set(result.rows) == set(FILES)
    history = result.of("bad.wav")
    assert [attempt["outcome"] for attempt in history] == [
        *["failed"] * len(recoveries),
        "succeeded",
    ]
    assert [attempt["recovery_strategy"] for attempt in history[:-1]] == list(recoveries)
    for name in GOOD:
        assert len(result.of(name)) == 1


def test_increase_timeout(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Between the two deadlines there is room for what a fresh worker may have to import.
    monkeypatch.setenv("ROBUSTNESS_TIMEOUT_FLOOR", "12")
    forget_state()
    for _ in range(20):
        get_timeout_manager().record_performance("slow", 0.1, 0.01, True, 60.0, audio_seconds=1.0)
    (workbench.directory / "traces" / "seconds").write_text("13")
    result = workbench.run(faults.feature_set("slow", faults.slow))
    assert_all_saved(result, "increase_timeout")
    first, second = result.of("bad.wav")
    assert first["error_type"] == "timeout"
    assert second["timeout_s"] == pytest.approx(1.5 * first["timeout_s"])


def test_reduce_memory_usage(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hours of audio in 600 MiB."""
    monkeypatch.setenv("ROBUSTNESS_WORKER_MEMORY_MIB", "600")
    forget_state()
    t = np.arange(8000 * 60) / 8000
    minute = (0.4 * np.sin(2 * np.pi * 330 * t) * (t % 0.5 < 0.1)).astype(np.float32)
    with soundfile.SoundFile(workbench.root / "bad.wav", "w", 8000, 1, "PCM_16") as file:
        for _ in range(3 * 60):
            file.write(minute)
    result = workbench.run(faults.feature_set("level", faults.median_level))
    assert_all_saved(result, "reduce_memory_usage")
    first, second = result.of("bad.wav")
    assert first["error_type"] == "memory"
    assert second["extractor"] == "primary/blocks"
    assert second["peak_memory_mib"] <= 600


def test_file_system_check_waits_for_a_mount_that_went_away(workbench: Workbench) -> None:
    away = workbench.root.with_name("away")

    def bring_back() -> None:
        while not away.exists():
            time.sleep(0.05)
        time.sleep(2.0)
        away.rename(workbench.root)

    with _beside(bring_back):
        result = workbench.run(faults.feature_set("mounted", faults.take_storage_away))
    assert result.success
    assert result.materialized == set(result.rows) == set(FILES)
    first, *_, last = result.of("bad.wav")
    assert first["error_type"] == "file_system"
    assert first["recovery_strategy"] == "file_system_check"
    assert last["outcome"] == "succeeded"
    assert last["retry_strategy"] == "adaptive"
    assert any("unreachable" in message for message in result.deferrals("bad.wav"))


def test_mount_that_is_away_from_the_start(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "4")
    forget_state()
    away = workbench.root.with_name("away")
    workbench.root.rename(away)
    workbench.root.mkdir()

    def bring_back() -> None:
        time.sleep(2.0)
        away.rename(workbench.root)  # over the empty mount point

    with _beside(bring_back):
        result = workbench.run(faults.feature_set("plain", faults.sound), names=FILES)
    assert result.success
    assert result.materialized == set(FILES)


def test_database_recovery_opens_new_connections(workbench: Workbench) -> None:
    result = workbench.run(faults.feature_set("noting", faults.note_in_database), workers=1)
    assert_all_saved(result, "database_recovery")
    first, second = result.of("bad.wav")
    assert first["error_type"] == "database"
    assert second["worker_pid"] != first["worker_pid"]
    assert second["retry_delay_s"] > 0


@contextmanager
def _busy_server(workbench: Workbench, *answers: int) -> Iterator[None]:
    """A server that gives these HTTP statuses in turn; extractors find its address."""
    statuses = iter(answers)

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(next(statuses))
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        (workbench.directory / "traces" / "url").write_text(url)
        yield
        server.shutdown()


def test_network_retry(workbench: Workbench) -> None:
    with _busy_server(workbench, 503, 503, 200):
        result = workbench.run(faults.feature_set("asking", faults.ask_server))
    assert_all_saved(result, "network_retry", "network_retry")
    assert [attempt["retry_strategy"] for attempt in result.of("bad.wav")] == [
        None,
        "exponential",
        "exponential",
    ]


def test_service_that_is_away_for_all_files_is_given_more_attempts(workbench: Workbench) -> None:
    with _busy_server(workbench, *[503] * 4, 200):
        result = workbench.run(faults.feature_set("asking", faults.ask_server), names=["bad.wav"])
    assert result.materialized == {"bad.wav"}
    assert [attempt["outcome"] for attempt in result.of("bad.wav")] == ["failed"] * 4 + [
        "succeeded"
    ]


def test_step_that_was_retried_still_tells_what_failed_before(workbench: Workbench) -> None:
    (workbench.root / "c.wav").write_text("not audio at all\n" * 100)
    with _busy_server(workbench, 503, 200):
        result = workbench.run(faults.feature_set("asking", faults.ask_server))
    assert not result.success
    assert result.materialized == set(FILES) - {"c.wav"}
    assert result.of("bad.wav")[-1]["retry_strategy"] == "exponential"


def test_audio_fallback_to_the_other_decoder(workbench: Workbench) -> None:
    t = np.arange(44100) / 44100
    soundfile.write(
        workbench.root / "bad.wav", 0.5 * np.sin(2 * np.pi * 440 * t), 44100, subtype="NMS_ADPCM_32"
    )
    result = workbench.run(faults.feature_set("plain", faults.sound))
    assert_all_saved(result, "audio_fallback")
    assert result.of("bad.wav")[0]["error_type"] == "audio_processing"


@pytest.mark.parametrize(
    ("fault", "said"),
    [(faults.segfault, "SIGSEGV"), (faults.implausible, "value is -1, its range is ≥ 0")],
)
def test_audio_fallback_to_the_other_extractor(
    workbench: Workbench, fault: Callable[[Audio], Row], said: str
) -> None:
    result = workbench.run(faults.feature_set("crashing", fault))
    assert_all_saved(result, "audio_fallback")
    assert said in result.of("bad.wav")[0]["message"]
    assert result.rows["bad.wav"]["extractor"] == "alternative"
    assert said in result.rows["bad.wav"]["degraded"]


@pytest.mark.parametrize("extension", ["flac", "wav", "ogg", "mp3"])
def test_format_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str) -> None:
    """Something stands before the stream, as where a download kept what a proxy said first."""
    workbench = Workbench(tmp_path, monkeypatch)
    good, bad = workbench.root / f"a.{extension}", workbench.root / f"bad.{extension}"
    write_tone(good, 440.0, seconds=5.0)
    junk = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    bad.write_bytes(junk + good.read_bytes())
    result = workbench.run(faults.feature_set("plain", faults.sound))
    assert result.success
    assert [a["recovery_strategy"] for a in result.of(bad.name)] == ["format_conversion", None]
    assert result.rows[bad.name]["value"] == pytest.approx(5.0, abs=0.1)


def test_skip_file(workbench: Workbench) -> None:
    bad = workbench.root / "bad.wav"
    bad.write_bytes(bad.read_bytes()[:20_000])
    result = workbench.run(faults.feature_set("plain", faults.sound))
    assert not result.success
    assert result.materialized == set(GOOD)
    (attempt,) = result.of("bad.wav")
    assert attempt["error_type"] == "corrupt_file"
    assert [cell.file_key for cell in Quarantine().list()] == ["music/bad.wav"]


def test_flaky_extractor(workbench: Workbench) -> None:
    result = workbench.run(faults.feature_set("flaky", faults.flaky, faults.flaky))
    assert_all_saved(result, "none", "audio_fallback")


def test_what_fails_through_all_recoveries_is_quarantined_for_this_code(
    workbench: Workbench,
) -> None:
    deadly = faults.feature_set("deadly", faults.segfault, faults.segfault)
    assert workbench.run(deadly).materialized == set(GOOD)
    (cell,) = Quarantine().list()
    assert "SIGSEGV" in cell.reason
    assert len(workbench.run(deadly).of("bad.wav")) == 2  # those of the first run
    mended = faults.feature_set("deadly", faults.sound, code_version="2")
    assert workbench.run(mended).materialized == set(FILES)


def test_wrong_extension_makes_no_difference(workbench: Workbench) -> None:
    write_tone(workbench.root / "c.flac", 330.0)
    (workbench.root / "c.flac").rename(workbench.root / "bad.mp3")
    result = workbench.run(faults.feature_set("plain", faults.sound))
    assert result.success
    assert len(result.of("bad.mp3")) == 1


def test_file_that_vanishes_while_it_is_read(workbench: Workbench) -> None:
    result = workbench.run(faults.feature_set("vanishing", faults.delete_the_file))
    assert not result.success
    assert result.materialized == set(GOOD)
    (attempt,) = result.of("bad.wav")
    assert attempt["error_type"] == "file_system"
    assert "no longer there" in attempt["message"]
    assert Quarantine().list() == []  # if it comes back, it is computed


def test_full_disk_under_the_landing_costs_no_cell(workbench: Workbench) -> None:
    with _small_disk(workbench.directory / "small") as disk:
        workbench.landing = disk / "landing"
        filler = disk / "filler"

        def make_room() -> None:
            time.sleep(4.0)  # after the first retries, before the breaker has seen enough
            filler.unlink()

        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(b"\0" * (5 << 20))
        with _beside(make_room):
            result = workbench.run(faults.feature_set("plain", faults.sound))
    assert result.success
    assert result.materialized == set(result.rows) == set(FILES)
    for name in FILES:
        assert len(result.of(name)) == 1  # saved later, not computed again


def test_full_disk_under_the_scratch_fails_what_needs_it(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTNESS_RETRY_TOTAL_SECONDS", "3")
    monkeypatch.setenv("AUDIO_RESERVE_MIB", "0")
    forget_state()
    with _small_disk(workbench.directory / "small") as disk:
        workbench.scratch = disk / "scratch"
        write_tone(workbench.root / "bad.wav", 440.0, seconds=60.0)
        result = workbench.run(faults.feature_set("plain", faults.sound))
    assert not result.success
    assert result.materialized == set(GOOD)
    first = result.of("bad.wav")[0]
    assert first["error_type"] == "system_resource"
    assert first["recovery_strategy"] == "file_system_check"
    assert f"No space left on device: '{disk}/scratch" in first["message"]
    [given_up] = [a["message"] for a in result.attempts if a["outcome"] == "given_up"]
    assert "s of waiting" in given_up
    assert Quarantine().list() == []


def test_landing_that_never_answers_ends_the_step(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTNESS_RETRY_TOTAL_SECONDS", "2")
    forget_state()
    asked = []

    def latest(*_: object, **__: object) -> list[Any]:
        asked.append(time.monotonic())
        raise ConnectionResetError("the landing does not answer")

    monkeypatch.setattr(Landing, "latest", latest)
    with pytest.raises(ConnectionResetError):  # what the bench itself reads afterwards
        workbench.run(faults.feature_set("plain", faults.sound))
    assert 2 <= len(asked) < 20


def test_locked_state_store_stops_nothing(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTNESS_STATE_LOCK_TIMEOUT", "0.3")
    forget_state()
    get_state_store().query(lambda connection: None)
    with closing(sqlite3.connect(workbench.directory / "state.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        result = workbench.run(faults.feature_set("crashing", faults.segfault))
        assert get_state_store().degraded
    assert_all_saved(result, "audio_fallback")


def test_unreadable_file(home: Home, tmp_path: Path) -> None:
    root = tmp_path / "music"
    root.mkdir()
    for name in ("a.wav", "bad.wav"):
        write_tone(root / name, 440.0)
    (root / "bad.wav").chmod(0)
    # Root may read everything, unless it gives that up.
    without = "--bounding-set=-dac_override,-dac_read_search"
    prefix = ["setpriv", without] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "audio_assets", "analyze", str(root)],
        env=home.environment({"COLUMNS": "200"}),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "bad.wav" in done.stdout
    assert "Permission denied" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    rows = home.cli("query", "--csv", "SELECT file_key FROM features.rhythm")
    assert "music/a.wav" in rows.stdout
    assert "bad.wav" not in rows.stdout


@contextmanager
def _beside(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def _small_disk(mount_point: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount_point)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)
