"""The sensor `discover_files`: registration, and runs for new and changed files."""

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
import soundfile
from blake3 import blake3

from audio_assets.definitions import defs
from audio_assets.defs import registration, sensors
from audio_assets.defs.library_files import LIBRARY_FILES
from audio_assets.defs.partitions import batches
from audio_assets.defs.registration import register
from audio_assets.defs.resources import extraction_resource
from audio_assets.defs.sensors import SENSOR, discover_files
from audio_assets.features import FEATURE_SETS
from audio_assets.library.files import Identity
from audio_assets.library.scan import Library, LibraryScan
from audio_assets.settings import get_settings
from audio_assets.warehouse import open_landing
from audio_assets.warehouse.backlog import find_backlog
from audio_assets.warehouse.inventory import inventory_row
from audio_assets.warehouse.schema import ATTEMPTS, FILES, feature_table
from tests.conftest import forget_state
from tests.warehouse.rows import all_rows

LONG_AGO = time.time() - 3600
PARTITIONS = "audio_files"


@pytest.fixture(scope="module")
def fresh_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with its databases, which take seconds to create."""
    home = tmp_path_factory.mktemp("fresh") / "home"
    home.mkdir()
    (home / "dagster.yaml").touch()
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.get_dynamic_partitions(PARTITIONS)
        instance.get_runs(limit=1)
    return home


@pytest.fixture
def root(fresh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty library, known by the settings, and a new home."""
    home, root = tmp_path / "home", tmp_path / "music"
    shutil.copytree(fresh_home, home)
    root.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("AUDIO_LIBRARY", str(root))
    monkeypatch.setenv("AUDIO_ASSETS_BATCH_SIZE", "4")
    monkeypatch.setenv("AUDIO_ASSETS_WORKERS", "2")
    get_settings.cache_clear()
    forget_state()
    yield root
    monkeypatch.undo()
    get_settings.cache_clear()
    forget_state()


@pytest.fixture
def instance(root: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(root.parent / "home")) as instance:
        yield instance


def put(path: Path, frequency: float = 440.0, at: float = LONG_AGO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(22050) / 44100
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * frequency * t), 44100)
    os.utime(path, (at, at))


class Sensor:
    """The sensor as the daemon runs it: with its cursor, and without runs requested twice."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.cursor: str | None = None
        self.reason: str | None = None

    def tick(self) -> list[dg.DagsterRun]:
        """Evaluate the sensor, create the runs it requests without starting them."""
        result = self.evaluate()
        return [self.queue(request) for request in result.run_requests or []]

    def evaluate(self, *, killed: bool = False) -> dg.SensorResult:
        context = dg.build_sensor_context(
            self.instance, cursor=self.cursor, definitions=defs, sensor_name=SENSOR
        )
        result = discover_files(context)
        if isinstance(result, dg.SkipReason):
            self.reason = result.skip_message
            return dg.SensorResult()
        assert isinstance(result, dg.SensorResult)
        self.reason = result.skip_reason.skip_message if result.skip_reason else None
        if not killed:
            self.cursor = result.cursor
        return result

    def queue(self, request: dg.RunRequest) -> dg.DagsterRun:
        assert request.run_key
        tags = {**request.tags, "dagster/sensor_name": SENSOR, "dagster/run_key": request.run_key}
        # Without the events of planned materializations, which take seconds.
        run = dg.DagsterRun(job_name="all_features", run_id=str(uuid.uuid4()), tags=tags)
        return self.instance.add_run(run)

    def end(self, run: dg.DagsterRun, status: dg.DagsterRunStatus) -> None:
        reported = {
            dg.DagsterRunStatus.CANCELED: self.instance.report_run_canceled,
            dg.DagsterRunStatus.FAILURE: self.instance.report_run_failed,
        }
        reported[status](run)


def execute(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Execute a queued run, in this process."""
    instance.delete_run(run.run_id)
    defs.resolve_job_def(run.job_name).execute_in_process(
        instance=instance,
        run_id=run.run_id,
        tags=run.tags,
        raise_on_error=False,
        resources={"extraction": extraction_resource()},
    )


def partitions(instance: dg.DagsterInstance) -> list[str]:
    return list(instance.get_dynamic_partitions(PARTITIONS))


def ranges(runs: Sequence[dg.DagsterRun]) -> list[tuple[str, str]]:
    start, end = (f"dagster/asset_partition_range_{side}" for side in ("start", "end"))
    return [(run.tags[start], run.tags[end]) for run in runs]


def inventory() -> dict[str, bool]:
    """Return which files are gone."""
    return {row["file_key"]: row["gone"] for row in open_landing().latest(FILES.landing_name)}


def identify(*paths: Path) -> None:
    """Write files to the inventory, as a run does after hashing them."""
    landing = open_landing()
    scan = Library({"music": Path(os.environ["AUDIO_LIBRARY"])}).scan()
    landing.append(
        FILES.landing_name,
        [
            inventory_row(
                entry.file_key,
                entry.path,
                Identity(
                    blake3(entry.path.read_bytes()).hexdigest(), entry.size, entry.mtime_ns, 0.5
                ),
            )
            for entry in scan.files
            if not paths or entry.path in paths
        ],
    )


# Requests


def test_new_files_are_registered_and_requested_in_batches(
    root: Path, instance: dg.DagsterInstance
) -> None:
    for number in range(6):
        put(root / f"{number}.wav")
    sensor = Sensor(instance)
    runs = sensor.tick()
    assert partitions(instance) == [f"music/{number}.wav" for number in range(6)]
    assert ranges(runs) == [("music/0.wav", "music/3.wav"), ("music/4.wav", "music/5.wav")]
    assert [run.tags["audio_assets/files"] for run in runs] == ["4", "2"]
    assert {run.tags["audio_assets/requested_by"] for run in runs} == {SENSOR}


def test_files_of_queued_or_cancelled_runs_are_not_requested_again(
    root: Path, instance: dg.DagsterInstance
) -> None:
    put(root / "a.wav")
    sensor = Sensor(instance)
    (run,) = sensor.tick()
    assert sensor.tick() == []
    put(root / "b.wav")
    (other,) = sensor.tick()
    assert ranges([other]) == [("music/b.wav", "music/b.wav")]
    sensor.cursor = None
    assert sensor.tick() == []
    for unfinished in (run, other):
        sensor.end(unfinished, dg.DagsterRunStatus.CANCELED)
    sensor.cursor = None
    # Both files are in one batch now, which was not requested yet.
    assert len(sensor.tick()) <= 1
    assert sensor.tick() == []


def test_killed_tick_loses_nothing(root: Path, instance: dg.DagsterInstance) -> None:
    put(root / "a.wav")
    sensor = Sensor(instance)
    requested = sensor.evaluate(killed=True).run_requests
    assert requested
    again = sensor.evaluate().run_requests
    assert again
    # The daemon launches one run for one key.
    assert [r.run_key for r in requested] == [r.run_key for r in again]
    assert partitions(instance) == ["music/a.wav"]


def test_two_ticks_at_once_register_each_file_once(
    root: Path, instance: dg.DagsterInstance
) -> None:
    for number in range(3):
        put(root / f"{number}.wav")
    scan = Library({"music": root}).scan()
    landing = open_landing()
    for _ in range(2):
        register(instance, scan, {"music": root}, landing)
    assert partitions(instance) == ["music/0.wav", "music/1.wav", "music/2.wav"]


def test_an_unchanged_library_is_only_scanned(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a.wav")
    identify()
    sensor = Sensor(instance)
    assert sensor.tick() == []

    def unexpected(*_: object) -> None:
        raise AssertionError("a table is read")

    monkeypatch.setattr(sensors, "open_landing", unexpected)
    assert sensor.tick() == []
    assert sensor.reason == "1 file, none new or changed"


def test_a_changed_file_is_requested_each_time_it_changes(
    root: Path, instance: dg.DagsterInstance
) -> None:
    put(root / "a.wav")
    put(root / "b.wav")
    identify()
    sensor = Sensor(instance)
    assert sensor.tick() == []
    for change in (1, 2, 1):  # the last one is back to what the first one was
        put(root / "b.wav", 440.0 * change, at=LONG_AGO + change)
        (run,) = sensor.tick()
        assert ranges([run])[0][1] == "music/b.wav"
        assert sensor.tick() == []
        identify(root / "b.wav")
        sensor.end(run, dg.DagsterRunStatus.FAILURE)
        assert sensor.tick() == []


def test_file_being_written_is_registered_later(root: Path, instance: dg.DagsterInstance) -> None:
    put(root / "done.wav")
    put(root / "copying.wav", at=time.time())
    sensor = Sensor(instance)
    assert ranges(sensor.tick()) == [("music/done.wav", "music/done.wav")]
    assert partitions(instance) == ["music/done.wav"]
    os.utime(root / "copying.wav", (LONG_AGO, LONG_AGO))
    assert ranges(sensor.tick()) == [("music/copying.wav", "music/copying.wav")]


def test_active_runs_are_limited_and_the_rest_is_requested_later(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors, "UNFINISHED_RUNS", 2)
    for number in range(16):
        put(root / f"{number:02}.wav")
    sensor = Sensor(instance)
    first = sensor.tick()
    assert len(first) == 2
    assert sensor.tick() == []
    assert sensor.reason == "2 runs of this sensor are active"
    for run in first:
        sensor.end(run, dg.DagsterRunStatus.CANCELED)
    second = sensor.tick()
    assert len(second) == 2
    assert not set(ranges(first)) & set(ranges(second))


def test_without_a_library_it_names_the_setting(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUDIO_LIBRARY")
    get_settings.cache_clear()
    sensor = Sensor(instance)
    assert sensor.tick() == []
    assert sensor.reason
    assert "AUDIO_LIBRARY" in sensor.reason


# Gone files and unreachable roots


def test_a_deleted_file_is_marked_and_loses_its_partition(
    root: Path, instance: dg.DagsterInstance
) -> None:
    put(root / "stays.wav")
    put(root / "goes.wav")
    identify()
    sensor = Sensor(instance)
    sensor.tick()
    (root / "goes.wav").unlink()
    sensor.tick()
    assert inventory() == {"music/goes.wav": True, "music/stays.wav": False}
    assert partitions(instance) == ["music/stays.wav"]
    put(root / "goes.wav")
    assert sensor.tick() == []
    assert inventory()["music/goes.wav"] is False
    assert partitions(instance) == ["music/stays.wav", "music/goes.wav"]


def test_a_tick_says_in_one_line_what_it_found(root: Path, instance: dg.DagsterInstance) -> None:
    for name in ("a", "b", "c"):
        put(root / f"{name}.wav", ord(name) * 10)
    identify()
    sensor = Sensor(instance)
    sensor.tick()
    (root / "a.wav").rename(root / "moved.wav")
    put(root / "b.wav", at=LONG_AGO + 1)
    put(root / "new.wav", at=LONG_AGO + 2)
    result = sensor.evaluate()
    [observed] = result.asset_events
    assert observed.asset_key == LIBRARY_FILES
    assert observed.description == (
        "4 files, 2 added, 1 changed, 1 moved, 1 gone, 1 partitions removed, 1 runs requested"
    )


def test_partitions_that_name_no_file_are_removed(root: Path, instance: dg.DagsterInstance) -> None:
    put(root / "a.wav")
    identify()
    sensor = Sensor(instance)
    sensor.tick()
    by_hand = ["nonsense.mp3", "music/nonsense.mp3", "elsewhere/a.wav"]
    instance.add_dynamic_partitions(PARTITIONS, by_hand)
    sensor.tick()
    assert partitions(instance) == ["music/a.wav"]


def test_partitions_stay_until_no_run_needs_them(root: Path, instance: dg.DagsterInstance) -> None:
    put(root / "a.wav")
    put(root / "b.wav")
    sensor = Sensor(instance)
    (run,) = sensor.tick()
    (root / "b.wav").unlink()
    sensor.tick()
    assert partitions(instance) == ["music/a.wav", "music/b.wav"]
    sensor.end(run, dg.DagsterRunStatus.CANCELED)
    sensor.tick()
    assert partitions(instance) == ["music/a.wav"]


def unmount_by_removing(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))


def unmount_to_an_empty_directory(root: Path) -> None:
    unmount_by_removing(root)
    root.mkdir()


def unmount_to_a_file(root: Path) -> None:
    unmount_by_removing(root)
    root.touch()


@pytest.mark.parametrize(
    "unmount", [unmount_by_removing, unmount_to_an_empty_directory, unmount_to_a_file]
)
def test_files_of_unreachable_roots_are_not_gone(
    root: Path,
    instance: dg.DagsterInstance,
    unmount: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other"
    put(root / "a.wav")
    put(other / "b.wav")
    identify()
    monkeypatch.setenv("AUDIO_LIBRARY", f"{root}:{other}")
    get_settings.cache_clear()
    sensor = Sensor(instance)
    sensor.tick()
    unmount(root)
    put(other / "c.wav")
    assert ranges(sensor.tick()) == [("other/c.wav", "other/c.wav")]
    assert inventory() == {"music/a.wav": False}
    assert set(partitions(instance)) == {"music/a.wav", "other/b.wav", "other/c.wav"}


def test_a_directory_that_cannot_be_read_keeps_its_files(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a.wav")
    put(root / "disk" / "b.wav")
    put(root / "disk 2" / "c.wav")
    identify()
    sensor = Sensor(instance)
    sensor.tick()
    scandir = os.scandir

    def failing(path: str) -> object:
        if path == str(root / "disk"):
            raise OSError(5, "Input/output error", path)
        return scandir(path)

    # The superuser can read everything, so the disk error is simulated.
    monkeypatch.setattr("audio_assets.library.scan.os.scandir", failing)
    (root / "disk 2" / "c.wav").unlink()
    sensor.tick()
    assert inventory() == {
        "music/a.wav": False,
        "music/disk/b.wav": False,
        "music/disk 2/c.wav": True,
    }


# Ranges


@pytest.mark.parametrize(
    ("todo", "passable", "expected"),
    [
        ("", "", []),
        ("abcdef", "", ["abcd", "ef"]),
        ("ac", "", ["a", "c"]),
        ("ac", "b", ["abc"]),
        ("ae", "bcd", ["a", "e"]),
        ("adf", "bce", ["abcd", "f"]),
        ("af", "bc", ["a", "f"]),
    ],
)
def test_batches_include_finished_files_between(
    todo: str, passable: str, expected: list[str]
) -> None:
    found = batches(todo, "abcdefgh", 4, passable)
    assert ["".join(keys) for keys in found] == expected


# Changes of the library


def test_only_affected_cells_are_computed_when_the_library_changes(
    root: Path, instance: dg.DagsterInstance
) -> None:
    for number in range(8):
        put(root / f"{number}.wav", 200.0 + 10 * number)
    sensor = Sensor(instance)
    for run in sensor.tick():
        execute(instance, run)
    assert sensor.tick() == []
    assert statuses(instance) == {f"music/{number}.wav": {"MATERIALIZED"} for number in range(8)}
    attempted = attempts()

    put(root / "new.wav", 500.0)
    put(root / "1.wav", 600.0, at=LONG_AGO + 1)
    (root / "sub").mkdir()
    (root / "2.wav").rename(root / "sub" / "moved.wav")
    (root / "3.wav").unlink()
    runs = sensor.tick()
    for run in runs:
        execute(instance, run)
    assert sensor.tick() == []
    computed = attempts()[len(attempted) :]
    by_file: dict[str, list[str]] = {}
    for row in computed:
        if row["outcome"] == "succeeded":
            by_file.setdefault(row["file_key"], []).append(row["feature_set"])
        else:
            assert row["outcome"] == "reused"
    everything = sorted(FEATURE_SETS)
    assert {key: sorted(names) for key, names in by_file.items()} == {
        "music/1.wav": everything,
        "music/new.wav": everything,
        # Other feature sets are copied from the same content; the tags are read again.
        "music/sub/moved.wav": [n for n in everything if not FEATURE_SETS[n].reads_pcm],
    }
    there = {f"music/{name}.wav" for name in ("0", "1", "4", "5", "6", "7", "new", "sub/moved")}
    assert statuses(instance) == {key: {"MATERIALIZED"} for key in there}
    gone = {"music/2.wav", "music/3.wav"}
    assert {key for key, is_gone in inventory().items() if is_gone} == gone
    # The rows of files that are gone stay.
    rhythm = open_landing().latest(feature_table(FEATURE_SETS["rhythm"]).landing_name)
    assert {row["file_key"] for row in rhythm} == there | gone
    files = Library({"music": root}).scan().files
    assert find_backlog(files, open_landing()).todo == []

    put(root / "3.wav", 230.0)  # as it was
    assert sensor.tick() == []
    assert statuses(instance)["music/3.wav"] == {"MATERIALIZED"}
    assert inventory()["music/3.wav"] is False


def attempts() -> list[dict[str, str]]:
    return sorted(all_rows(open_landing(), ATTEMPTS.landing_name), key=lambda row: row["row_id"])


def statuses(instance: dg.DagsterInstance) -> dict[str, set[str]]:
    """Return Dagster's statuses of each file's cells."""
    found: dict[str, set[str]] = {key: set() for key in partitions(instance)}
    for name in FEATURE_SETS:
        key = dg.AssetKey(["features", name])
        definition = defs.get_assets_def(key).partitions_def
        assert definition is not None
        by_file = instance.get_status_by_partition(key, list(found), definition) or {}
        for file_key, status in by_file.items():
            found[file_key].add(status.value if status else "MISSING")
    return found


def test_unresponsive_directory_blocks_one_thread(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    scan = Library.scan

    def scan_when_it_answers(library: Library, *, only_reachable: bool) -> LibraryScan:
        answers.wait()
        return scan(library, only_reachable=only_reachable)

    monkeypatch.setattr(Library, "scan", scan_when_it_answers)
    monkeypatch.setattr(registration, "SCAN_S", 0.1)
    monkeypatch.setattr(registration, "STILL_SCANNING_S", 0.1)
    log = logging.getLogger("test")
    for _ in range(3):
        with pytest.raises(ValueError, match=f"still scanning {root}"):
            registration.scan_roots(log)
    assert [thread.name for thread in threading.enumerate()].count("scan") == 1
    answers.set()
    monkeypatch.setattr(registration, "STILL_SCANNING_S", 60.0)
    _, found, _ = registration.scan_roots(log)
    assert found.files == []
