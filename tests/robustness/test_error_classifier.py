"""Errors are provoked for real, by the libraries and the kernel, and then classified."""

import ctypes
import errno
import functools
import importlib
import io
import logging
import operator
import os
import pickle
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import duckdb
import librosa
import mutagen
import mutagen.flac
import mutagen.mp3
import numpy as np
import onnxruntime
import pytest
import requests
import soundfile
import sqlalchemy as sa

from audio_assets.audio.errors import CorruptFileError, UnsupportedFormatError
from audio_assets.library.formats import check_content
from robustness.adaptive_timeout import timeout_context
from robustness.built_in_rules import BUILT_IN_RULES
from robustness.circuit_breaker import CircuitBreaker, CircuitBreakerOpenError
from robustness.error_classifier import (
    ErrorClassifier,
    ErrorInfo,
    ErrorSeverity,
    ErrorType,
    RecoveryStrategy,
    Rule,
    get_error_classifier,
)
from robustness.error_rules import (
    ClassifierConfigError,
    rules_from_pyproject,
)
from robustness.state import StateStore
from robustness.state_schema import errors
from robustness.worker_pool import (
    WorkerCrashedError,
    WorkerMemoryError,
    WorkerPool,
    WorkerTimeoutError,
)


@pytest.fixture
def classifier(store: StateStore) -> ErrorClassifier:
    return ErrorClassifier(rules=(), store=store)


def provoked(function: Callable[[], object]) -> BaseException:
    """Return what a function raises."""
    try:
        function()
    except BaseException as error:  # noqa: BLE001
        return error
    pytest.fail("nothing was raised")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of good and bad files."""
    noise = np.random.default_rng(0).standard_normal(44100 * 2).astype("float32") * 0.1
    soundfile.write(tmp_path / "good.wav", noise, 44100)
    soundfile.write(tmp_path / "good.flac", noise, 44100)
    flac = (tmp_path / "good.flac").read_bytes()
    (tmp_path / "truncated.flac").write_bytes(flac[: len(flac) // 3])
    (tmp_path / "flac_named.mp3").write_bytes(flac)
    (tmp_path / "headless.flac").write_bytes(b"\xa5" * 100 + flac[100:])
    (tmp_path / "cut_in_header.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:30])
    (tmp_path / "empty.wav").touch()
    (tmp_path / "zeros.wav").write_bytes(bytes(100_000))
    (tmp_path / "text.mp3").write_text("This is a love letter, not a song.\n" * 50)
    (tmp_path / "image.mp3").write_bytes(b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(5000))
    (tmp_path / "folder.wav").mkdir()
    return tmp_path


def read_soundfile(path: Path) -> object:
    return soundfile.read(path)


def read_av(path: Path) -> object:
    with av.open(str(path)) as container:
        return [frame.samples for frame in container.decode(audio=0)]


def read_mutagen(path: Path) -> object:
    return mutagen.File(path)


def read_essentia(path: Path) -> object:
    import essentia.standard

    essentia.log.infoActive = False
    return essentia.standard.MonoLoader(filename=str(path))()


class TestFiles:
    @pytest.mark.parametrize("read", [read_soundfile, read_av, read_mutagen, read_essentia])
    def test_missing(
        self, read: Callable[[Path], object], files: Path, classifier: ErrorClassifier
    ) -> None:
        path = files / "missing.wav"
        info = classifier.classify_error(provoked(lambda: read(path)), {"file_path": path})
        assert info.error_type is ErrorType.FILE_SYSTEM
        assert not info.retryable
        assert not info.systemic
        assert info.recovery_strategy is RecoveryStrategy.FILE_SYSTEM_CHECK

    @pytest.mark.parametrize("read", [read_av, read_mutagen, read_essentia])
    def test_missing_is_seen_without_a_context(
        self, read: Callable[[Path], object], files: Path, classifier: ErrorClassifier
    ) -> None:
        info = classifier.classify_error(provoked(lambda: read(files / "missing.wav")))
        assert info.error_type is ErrorType.FILE_SYSTEM
        assert not info.systemic

    @pytest.mark.parametrize("read", [read_soundfile, read_av, read_mutagen, read_essentia])
    def test_whole_storage_away(
        self, read: Callable[[Path], object], files: Path, classifier: ErrorClassifier
    ) -> None:
        path = files / "unmounted" / "track.wav"
        info = classifier.classify_error(provoked(lambda: read(path)), {"file_path": path})
        assert info.error_type is ErrorType.FILE_SYSTEM
        assert info.retryable
        assert info.systemic
        assert info.severity is ErrorSeverity.HIGH

    def test_album_deleted_from_a_library_that_is_there(
        self, files: Path, classifier: ErrorClassifier
    ) -> None:
        path = files / "deleted album" / "track.wav"
        context = {"file_path": path, "library_root": files}
        info = classifier.classify_error(provoked(lambda: read_av(path)), context)
        assert not info.retryable
        assert not info.systemic

    @pytest.mark.parametrize("read", [read_soundfile, read_av, read_mutagen, read_essentia])
    @pytest.mark.parametrize("name", ["empty.wav", "zeros.wav", "cut_in_header.wav"])
    def test_damaged(
        self, read: Callable[[Path], object], name: str, files: Path, classifier: ErrorClassifier
    ) -> None:
        path = files / name
        info = classifier.classify_error(provoked(lambda: read(path)), {"file_path": path})
        assert info.error_type is ErrorType.CORRUPT_FILE
        assert not info.retryable
        assert not info.systemic
        assert info.recovery_strategy is RecoveryStrategy.SKIP_FILE
        assert info.severity is ErrorSeverity.LOW

    @pytest.mark.parametrize("read", [read_soundfile, read_av])
    @pytest.mark.parametrize("name", ["truncated.flac", "headless.flac"])
    def test_damaged_stream(
        self, read: Callable[[Path], object], name: str, files: Path, classifier: ErrorClassifier
    ) -> None:
        path = files / name
        info = classifier.classify_error(
            provoked(lambda: read(path)), {"file_path": path}, check_content=check_content
        )
        assert info.error_type is ErrorType.CORRUPT_FILE
        assert not info.systemic

    @pytest.mark.parametrize("read", [read_soundfile, read_av, read_mutagen, read_essentia])
    @pytest.mark.parametrize("name", ["text.mp3", "image.mp3"])
    def test_not_audio(
        self, read: Callable[[Path], object], name: str, files: Path, classifier: ErrorClassifier
    ) -> None:
        path = files / name
        info = classifier.classify_error(
            provoked(lambda: read(path)), {"file_path": path}, check_content=check_content
        )
        assert info.error_type is ErrorType.UNSUPPORTED_FORMAT
        assert not info.retryable
        assert info.recovery_strategy is RecoveryStrategy.SKIP_FILE
        assert info.evidence
        assert info.evidence in info.reason

    def test_content_is_no_evidence_without_a_check(
        self, files: Path, classifier: ErrorClassifier
    ) -> None:
        error = provoked(lambda: read_av(files / "image.mp3"))
        info = classifier.classify_error(error, {"file_path": files / "image.mp3"})
        assert info.error_type is ErrorType.AUDIO_PROCESSING
        assert info.evidence is None

    def test_wrong_extension_is_worth_a_conversion(
        self, files: Path, classifier: ErrorClassifier
    ) -> None:
        path = files / "flac_named.mp3"
        error = provoked(lambda: mutagen.mp3.MP3(path))  # type: ignore[no-untyped-call]
        info = classifier.classify_error(error, {"file_path": path}, check_content=check_content)
        assert info.error_type is ErrorType.UNSUPPORTED_FORMAT
        assert info.retryable
        assert not info.systemic
        assert info.recovery_strategy is RecoveryStrategy.FORMAT_CONVERSION
        assert info.evidence == "the file is FLAC, not .mp3"

    def test_format_that_no_header_fits(self, files: Path, classifier: ErrorClassifier) -> None:
        error = provoked(lambda: mutagen.flac.FLAC(files / "good.wav"))  # type: ignore[no-untyped-call]
        assert classifier.classify_error(error).error_type is ErrorType.UNSUPPORTED_FORMAT

    def test_unknown_codec(self, classifier: ErrorClassifier) -> None:
        error = provoked(lambda: av.CodecContext.create("no such codec", "r"))
        assert classifier.classify_error(error).error_type is ErrorType.UNSUPPORTED_FORMAT

    def test_folder_in_the_place_of_a_file(self, files: Path, classifier: ErrorClassifier) -> None:
        path = files / "folder.wav"
        for read in (read_soundfile, read_av, read_mutagen, read_essentia):
            error = provoked(functools.partial(read, path))
            info = classifier.classify_error(error, {"file_path": str(path)})
            assert info.error_type is ErrorType.FILE_SYSTEM
            assert not info.retryable

    def test_unreadable(self, files: Path, classifier: ErrorClassifier) -> None:
        path = files / "good.wav"
        path.chmod(0)
        with as_nobody(files):
            error = provoked(lambda: path.read_bytes())
            info = classifier.classify_error(error, {"file_path": path})
            vague = classifier.classify_error(
                provoked(lambda: read_soundfile(path)), {"file_path": path}
            )
        for found in (info, vague):
            assert found.error_type is ErrorType.PERMISSION
            assert not found.retryable
            assert not found.systemic

    def test_scratch_gone_is_not_the_files_fault(
        self, files: Path, classifier: ErrorClassifier
    ) -> None:
        error = provoked(lambda: (files / "scratch" / "pcm.npy").open("wb"))
        info = classifier.classify_error(error, {"file_path": files / "good.wav"})
        assert info.error_type is ErrorType.FILE_SYSTEM
        assert info.systemic

    def test_undecodable_name(self, files: Path, classifier: ErrorClassifier) -> None:
        name = os.fsencode(files) + b"/caf\xe9.wav"
        info = classifier.classify_error(
            provoked(lambda: Path(os.fsdecode(name)).read_bytes()), {"file_path": name}
        )
        assert info.error_type is ErrorType.FILE_SYSTEM

    def test_sound_file_leaves_the_verdict_alone(
        self, files: Path, classifier: ErrorClassifier
    ) -> None:
        import essentia.standard

        error = provoked(lambda: essentia.standard.Spectrum()(np.zeros(0, "float32")))
        info = classifier.classify_error(
            error, {"file_path": files / "good.wav"}, check_content=check_content
        )
        assert info.error_type is ErrorType.AUDIO_PROCESSING
        assert info.recovery_strategy is RecoveryStrategy.AUDIO_FALLBACK
        assert info.evidence is None


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Drop root's rights over files for a while."""
    if os.geteuid() != 0:
        yield
        return
    closed = [p for p in (folder, *folder.parents) if not p.stat().st_mode & 0o001]
    modes = {p: p.stat().st_mode for p in closed}
    for path in closed:
        path.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


class TestAudioLibraries:
    def test_essentia(self, classifier: ErrorClassifier) -> None:
        import essentia.standard

        for provoke in (
            lambda: essentia.standard.FrameCutter(frameSize=-1),
            lambda: essentia.standard.RhythmExtractor2013()(np.zeros(0, "float32")),
            lambda: essentia.standard.Spectrum()("not an array"),
        ):
            info = classifier.classify_error(provoked(provoke))
            assert info.error_type is ErrorType.AUDIO_PROCESSING
            assert info.retryable
            assert info.systemic

    def test_librosa(self, classifier: ErrorClassifier) -> None:
        info = classifier.classify_error(provoked(lambda: librosa.stft(np.full(4096, np.nan))))
        assert info.error_type is ErrorType.AUDIO_PROCESSING

    def test_numpy_error_from_within_librosa(self, classifier: ErrorClassifier) -> None:
        error = provoked(lambda: librosa.resample(np.zeros(10), orig_sr=0, target_sr=44100))
        assert not type(error).__module__.startswith("librosa")
        assert classifier.classify_error(error).error_type is ErrorType.AUDIO_PROCESSING

    def test_onnxruntime(self, classifier: ErrorClassifier) -> None:
        error = provoked(lambda: onnxruntime.InferenceSession(b"not a model"))
        assert classifier.classify_error(error).error_type is ErrorType.AUDIO_PROCESSING

    def test_libsndfile_misuse(self, tmp_path: Path, classifier: ErrorClassifier) -> None:
        error = provoked(
            lambda: soundfile.SoundFile(tmp_path / "x.wav", "w", 44100, 2000, format="WAV")
        )
        assert isinstance(error, soundfile.LibsndfileError)
        assert classifier.classify_error(error).error_type is not ErrorType.UNKNOWN


def _raise_in_essentia() -> None:
    import essentia.standard

    essentia.standard.Spectrum()("not an array")


def test_traceback_of_a_worker_process_counts(classifier: ErrorClassifier) -> None:
    with ProcessPoolExecutor(1) as pool:
        error = provoked(pool.submit(_raise_in_essentia).result)
    assert isinstance(error, TypeError)
    assert classifier.classify_error(error).error_type is ErrorType.AUDIO_PROCESSING


class TestResources:
    @pytest.mark.parametrize("provoke", [lambda: bytearray(1 << 60), lambda: np.zeros(1 << 50)])
    def test_memory(self, provoke: Callable[[], object], classifier: ErrorClassifier) -> None:
        info = classifier.classify_error(provoked(provoke))
        assert info.error_type is ErrorType.MEMORY
        assert info.recovery_strategy is RecoveryStrategy.REDUCE_MEMORY_USAGE
        assert info.systemic

    def test_memory_of_duckdb(self, classifier: ErrorClassifier) -> None:
        def hoard() -> None:
            limits: dict[str, str | bool | int | float | list[str]] = {
                "memory_limit": "10MB",
                "temp_directory": "",
            }
            with duckdb.connect(config=limits) as connection:
                connection.execute("SELECT list(range) FROM range(10000000)")

        assert classifier.classify_error(provoked(hoard)).error_type is ErrorType.MEMORY

    def test_full_device(self, classifier: ErrorClassifier) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")

        def write() -> None:
            with Path("/dev/full").open("wb", buffering=0) as device:
                device.write(b"x")

        info = classifier.classify_error(provoked(write))
        assert info.error_type is ErrorType.SYSTEM_RESOURCE
        assert info.severity is ErrorSeverity.CRITICAL
        assert info.recovery_strategy is RecoveryStrategy.FILE_SYSTEM_CHECK
        assert info.systemic

    def test_file_size_limit(self, tmp_path: Path, classifier: ErrorClassifier) -> None:
        def write_file() -> None:
            with (tmp_path / "big").open("wb", buffering=0) as file:
                file.write(bytes(4096))
                file.write(bytes(4096))

        def fill_duckdb() -> None:
            with duckdb.connect(tmp_path / "big.duckdb") as connection:
                connection.execute("CREATE TABLE t AS SELECT random() FROM range(1000000)")

        def fill_sqlite() -> None:
            connection = sqlite3.connect(tmp_path / "big.db")
            connection.execute("PRAGMA max_page_count = 2")
            connection.execute("CREATE TABLE t (x)")
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")

        with limited(resource.RLIMIT_FSIZE, 1000):
            caught = [provoked(write_file)]
        with limited(resource.RLIMIT_FSIZE, 100_000):
            caught += [provoked(fill_duckdb)]
        caught += [provoked(fill_sqlite)]
        for error in caught:
            info = classifier.classify_error(error)
            assert info.error_type is ErrorType.SYSTEM_RESOURCE, error
            assert info.recovery_strategy is RecoveryStrategy.FILE_SYSTEM_CHECK

    def test_no_file_handles_left(self, classifier: ErrorClassifier) -> None:
        handles = []

        def hoard() -> None:
            while True:
                handles.append(os.open("/dev/null", os.O_RDONLY))

        with limited(resource.RLIMIT_NOFILE, len(list(Path("/proc/self/fd").iterdir())) + 20):
            error = provoked(hoard)
        for handle in handles:
            os.close(handle)
        info = classifier.classify_error(error)
        assert info.error_type is ErrorType.SYSTEM_RESOURCE
        assert info.recovery_strategy is RecoveryStrategy.REDUCE_MEMORY_USAGE


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    previous = resource.getrlimit(what)
    resource.setrlimit(what, (soft, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, previous)


class TestProcesses:
    @pytest.mark.parametrize(
        ("signal_number", "error_type"),
        [
            (signal.SIGKILL, ErrorType.MEMORY),
            (signal.SIGSEGV, ErrorType.AUDIO_PROCESSING),
            (signal.SIGABRT, ErrorType.AUDIO_PROCESSING),
            (signal.SIGBUS, ErrorType.FILE_SYSTEM),
            (signal.SIGXCPU, ErrorType.TIMEOUT),
            (signal.SIGXFSZ, ErrorType.SYSTEM_RESOURCE),
            (signal.SIGTERM, ErrorType.UNKNOWN),
        ],
    )
    def test_exit_signal(
        self, signal_number: signal.Signals, error_type: ErrorType, classifier: ErrorClassifier
    ) -> None:
        code = f"import os, signal; signal.signal({signal_number}, signal.SIG_DFL)"
        if signal_number is signal.SIGKILL:
            code = "import os"
        code += f"; os.kill(os.getpid(), {signal_number})"
        error = provoked(lambda: subprocess.run([sys.executable, "-c", code], check=True))
        assert isinstance(error, subprocess.CalledProcessError)
        assert classifier.classify_error(error).error_type is error_type
        through_shell = subprocess.CalledProcessError(128 + signal_number, "sh")
        assert classifier.classify_error(through_shell).error_type is error_type
        worker = WorkerCrashedError(-signal_number, signal_number.name, "extract")
        info = classifier.classify_error(worker)
        assert info.error_type is error_type
        assert info.retryable

    def test_worker_exited(self, classifier: ErrorClassifier) -> None:
        info = classifier.classify_error(WorkerCrashedError(3, None, "extract"))
        assert info.error_type is ErrorType.AUDIO_PROCESSING
        assert info.systemic

    def test_worker_limits(self, classifier: ErrorClassifier) -> None:
        late = classifier.classify_error(WorkerTimeoutError(5.0, "decode"))
        assert late.error_type is ErrorType.TIMEOUT
        assert late.recovery_strategy is RecoveryStrategy.INCREASE_TIMEOUT
        fat = classifier.classify_error(WorkerMemoryError(700, 600, "extract"))
        assert fat.error_type is ErrorType.MEMORY

    def test_real_workers(self, closed_port: int, classifier: ErrorClassifier) -> None:
        with WorkerPool(1, memory_limit_mib=None) as pool:

            def outcome(task: Callable[..., object], *args: object) -> ErrorInfo:
                future = pool.submit(task, *args, timeout={"extract": 60.0})
                return classifier.classify_error(provoked(future.result))

            assert outcome(ctypes.string_at, 0).error_type is ErrorType.AUDIO_PROCESSING
            assert outcome(os._exit, 3).error_type is ErrorType.AUDIO_PROCESSING
            assert outcome(_raise_in_essentia).error_type is ErrorType.AUDIO_PROCESSING
            assert outcome(open, "/nowhere/x.wav").error_type is ErrorType.FILE_SYSTEM
            # An exception that does not survive pickling, and arrives as a stand-in.
            refused = outcome(requests.get, f"http://127.0.0.1:{closed_port}/")
            assert refused.error_type is ErrorType.NETWORK
            assert refused.exception_type == "requests.exceptions.ConnectionError"

    def test_guarded_block_past_its_timeout(self, classifier: ErrorClassifier) -> None:
        def hang() -> None:
            with timeout_context(0.05):
                threading.Event().wait(60)

        assert classifier.classify_error(provoked(hang)).error_type is ErrorType.TIMEOUT

    def test_timeout_that_cannot_be_enforced_is_a_defect(self, classifier: ErrorClassifier) -> None:
        caught: list[BaseException] = []

        def guard() -> None:
            with timeout_context(1):
                pass

        thread = threading.Thread(target=lambda: caught.append(provoked(guard)))
        thread.start()
        thread.join()
        info = classifier.classify_error(caught[0])
        assert info.error_type is ErrorType.UNKNOWN
        assert not info.retryable

    def test_command_past_its_timeout(self, classifier: ErrorClassifier) -> None:
        error = provoked(lambda: subprocess.run(["sleep", "10"], timeout=0.05, check=True))
        assert classifier.classify_error(error).error_type is ErrorType.TIMEOUT


class TestDatabases:
    def test_locked_sqlite(self, tmp_path: Path, classifier: ErrorClassifier) -> None:
        holder = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
        holder.execute("CREATE TABLE t (x)")
        holder.execute("BEGIN EXCLUSIVE")
        engine = sa.create_engine(f"sqlite:///{tmp_path}/x.db", connect_args={"timeout": 0.01})

        def write() -> None:
            with engine.begin() as connection:
                connection.execute(sa.text("INSERT INTO t VALUES (1)"))

        info = classifier.classify_error(provoked(write))
        assert info.error_type is ErrorType.DATABASE
        assert info.retryable
        assert info.systemic
        assert info.recovery_strategy is RecoveryStrategy.DATABASE_RECOVERY
        holder.close()

    def test_damaged_sqlite(self, tmp_path: Path, classifier: ErrorClassifier) -> None:
        (tmp_path / "x.db").write_bytes(os.urandom(10_000))
        engine = sa.create_engine(f"sqlite:///{tmp_path}/x.db")
        info = classifier.classify_error(
            provoked(lambda: engine.connect().execute(sa.text("SELECT * FROM t")))
        )
        assert info.error_type is ErrorType.DATABASE
        assert info.severity is ErrorSeverity.CRITICAL
        assert not info.retryable

    def test_wrong_sql_is_not_retried(self, classifier: ErrorClassifier) -> None:
        engine = sa.create_engine("sqlite://")
        for provoke in (
            lambda: engine.connect().execute(sa.text("SELECT * FROM nowhere")),
            lambda: sqlite3.connect(":memory:").execute("SELECT * FROM nowhere"),
            lambda: duckdb.sql("SELEKT 1"),
            lambda: duckdb.sql("SELECT * FROM nowhere"),
            lambda: sa.create_engine("nosuch://"),
        ):
            info = classifier.classify_error(provoked(provoke))
            assert info.error_type is ErrorType.DATABASE
            assert not info.retryable

    def test_exhausted_pool(self, tmp_path: Path, classifier: ErrorClassifier) -> None:
        engine = sa.create_engine(
            f"sqlite:///{tmp_path}/x.db",
            poolclass=sa.QueuePool,
            pool_size=1,
            max_overflow=0,
            pool_timeout=0.01,
        )
        with engine.connect():
            info = classifier.classify_error(provoked(engine.connect))
        assert info.error_type is ErrorType.DATABASE
        assert info.retryable

    def test_locked_duckdb(self, tmp_path: Path, classifier: ErrorClassifier) -> None:
        path = tmp_path / "x.duckdb"
        hold = f"import duckdb; c = duckdb.connect({str(path)!r}); print(1, flush=True); input()"
        command = [sys.executable, "-c", hold]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as holder:
            assert holder.stdout
            holder.stdout.readline()
            info = classifier.classify_error(provoked(lambda: duckdb.connect(path)))
            holder.kill()
        assert info.error_type is ErrorType.DATABASE
        assert info.retryable

    def test_damaged_duckdb(self, tmp_path: Path, classifier: ErrorClassifier) -> None:
        (tmp_path / "x.duckdb").write_bytes(os.urandom(20_000))
        info = classifier.classify_error(provoked(lambda: duckdb.connect(tmp_path / "x.duckdb")))
        assert info.error_type is ErrorType.DATABASE
        assert not info.retryable

    @pytest.mark.parametrize(("sqlstate", "retryable"), [("40001", True), ("42P01", False)])
    def test_sqlstate(self, sqlstate: str, retryable: bool, classifier: ErrorClassifier) -> None:
        # The shape of every PostgreSQL driver's errors; there is no server to ask here.
        class ServerError(Exception):
            pass

        original = ServerError("refused")
        original.sqlstate = sqlstate  # type: ignore[attr-defined]

        def fail() -> None:
            raise sa.exc.OperationalError("SELECT 1", {}, original) from original

        info = classifier.classify_error(provoked(fail))
        assert info.error_type is ErrorType.DATABASE
        assert info.retryable is retryable


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers with the status in the path, asking to come back in 7 s."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path.strip("/")))
            self.send_header("Retry-After", "7")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


class TestNetwork:
    def test_refused(self, closed_port: int, classifier: ErrorClassifier) -> None:
        url = f"http://127.0.0.1:{closed_port}/"
        for provoke in (
            lambda: requests.get(url, timeout=1),
            lambda: urllib.request.urlopen(url, timeout=1),
            lambda: socket.create_connection(("127.0.0.1", closed_port)),
        ):
            info = classifier.classify_error(provoked(provoke))
            assert info.error_type is ErrorType.NETWORK
            assert info.retryable
            assert info.systemic
            assert info.recovery_strategy is RecoveryStrategy.NETWORK_RETRY

    def test_silent_server(self, classifier: ErrorClassifier) -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            for provoke in (
                lambda: requests.get(url, timeout=0.05),
                lambda: urllib.request.urlopen(url, timeout=0.05),
            ):
                assert classifier.classify_error(provoked(provoke)).error_type is ErrorType.NETWORK

    def test_no_such_host(self, classifier: ErrorClassifier) -> None:
        error = provoked(lambda: socket.getaddrinfo("host.invalid", 80))
        assert classifier.classify_error(error).error_type is ErrorType.NETWORK

    def test_request_that_cannot_be_made(self, classifier: ErrorClassifier) -> None:
        info = classifier.classify_error(provoked(lambda: requests.get("nosuch://x", timeout=1)))
        assert info.error_type is ErrorType.NETWORK
        assert not info.retryable

    @pytest.mark.parametrize(("status", "retryable"), [(503, True), (429, True), (404, False)])
    def test_status(
        self, status: int, retryable: bool, server: str, classifier: ErrorClassifier
    ) -> None:
        for provoke in (
            lambda: requests.get(f"{server}/{status}", timeout=5).raise_for_status(),
            lambda: urllib.request.urlopen(f"{server}/{status}", timeout=5),
        ):
            info = classifier.classify_error(provoked(provoke))
            assert info.error_type is ErrorType.NETWORK
            assert info.retryable is retryable
            assert info.retry_after == 7


class TestChain:
    def test_cause_of_an_unspecific_error(self, classifier: ErrorClassifier) -> None:
        def fail() -> None:
            try:
                bytearray(1 << 60)
            except MemoryError:
                raise RuntimeError("could not analyse") from None

        def fail_with_cause() -> None:
            try:
                bytearray(1 << 60)
            except MemoryError as error:
                raise RuntimeError("could not analyse") from error

        assert classifier.classify_error(provoked(fail)).error_type is ErrorType.UNKNOWN
        assert classifier.classify_error(provoked(fail_with_cause)).error_type is ErrorType.MEMORY

    def test_error_while_handling_another(self, files: Path, classifier: ErrorClassifier) -> None:
        def miss_then_decode() -> None:
            try:
                (files / "cache").open()
            except FileNotFoundError:
                read_av(files / "truncated.flac")

        info = classifier.classify_error(provoked(miss_then_decode))
        assert info.error_type is ErrorType.CORRUPT_FILE

    def test_group(self, classifier: ErrorClassifier) -> None:
        group = ExceptionGroup("several", [ValueError("x"), ConnectionResetError()])
        assert classifier.classify_error(group).error_type is ErrorType.NETWORK

    def test_circular_chain_ends(self, classifier: ErrorClassifier) -> None:
        first, second = RuntimeError("a"), RuntimeError("b")
        first.__cause__, second.__cause__ = second, first
        assert classifier.classify_error(first).error_type is ErrorType.UNKNOWN


class TestDeclared:
    def test_type_is_believed(self, classifier: ErrorClassifier) -> None:
        info = classifier.classify_error(CorruptFileError("breaks off after 3 of 200 s"))
        assert info.error_type is ErrorType.CORRUPT_FILE
        assert not info.systemic

    def test_type_stays_but_the_file_decides_what_to_do(
        self, files: Path, classifier: ErrorClassifier
    ) -> None:
        error = UnsupportedFormatError("holds no audio")
        assert classifier.classify(error).retryable
        info = classifier.classify(error, {"file_path": files / "empty.wav"})
        assert info.error_type is ErrorType.UNSUPPORTED_FORMAT
        assert not info.retryable
        assert info.recovery_strategy is RecoveryStrategy.SKIP_FILE

    def test_consequences_may_be_declared(self, classifier: ErrorClassifier) -> None:
        class LicenceError(Exception):
            error_type = "system_resource"
            retryable = False
            systemic = False

        info = classifier.classify_error(LicenceError())
        assert info.error_type is ErrorType.SYSTEM_RESOURCE
        assert not info.retryable
        assert not info.systemic

    def test_unknown_declaration_is_ignored(self, classifier: ErrorClassifier) -> None:
        class OddError(ConnectionError):
            error_type = "something else"

        assert classifier.classify_error(OddError()).error_type is ErrorType.NETWORK


class TestUnknown:
    def test_is_said_to_be_unknown(self, classifier: ErrorClassifier) -> None:
        info = classifier.classify_error(RuntimeError("the timeout of my memory on disk"))
        assert info.error_type is ErrorType.UNKNOWN
        assert info.rule is None
        assert info.retryable
        assert info.recovery_strategy is RecoveryStrategy.NONE

    @pytest.mark.parametrize(
        "provoke",
        [
            lambda: [0][len("12")],
            lambda: operator.attrgetter("nothing")(None),
            lambda: 1 // len(""),
            lambda: len(*["too", "many"]),
            lambda: importlib.import_module("no_such_module"),
        ],
    )
    def test_defects_are_not_retried(
        self, provoke: Callable[[], object], classifier: ErrorClassifier
    ) -> None:
        info = classifier.classify_error(provoked(provoke))
        assert info.error_type is ErrorType.UNKNOWN
        assert not info.retryable
        assert info.systemic

    def test_defect_is_not_blamed_on_the_file(
        self, files: Path, classifier: ErrorClassifier
    ) -> None:
        info = classifier.classify_error(
            provoked(lambda: [0][len("12")]), {"file_path": files / "empty.wav"}
        )
        assert info.error_type is ErrorType.UNKNOWN

    def test_interruptions_are_not_faults(self, classifier: ErrorClassifier) -> None:
        for error in (KeyboardInterrupt(), SystemExit(1)):
            info = classifier.classify_error(error)
            assert not info.retryable
            assert not info.systemic

    def test_exception_that_cannot_say_what_it_is(self, classifier: ErrorClassifier) -> None:
        class MuteError(Exception):
            def __str__(self) -> str:
                raise ValueError

        assert classifier.classify_error(MuteError()).message == "MuteError"


class TestRules:
    def test_each_strategy_has_a_recommendation(self, classifier: ErrorClassifier) -> None:
        info = classifier.classify(TimeoutError())
        for strategy in RecoveryStrategy:
            one = ErrorInfo(**{**vars(info), "recovery_strategy": strategy})
            recommendation = classifier.get_recovery_recommendation(one)
            assert recommendation["action"] == strategy.value
            assert recommendation["description"]
            assert isinstance(recommendation["parameters"], dict)
        timeout = classifier.get_recovery_recommendation(info)
        assert timeout["parameters"]["timeout_multiplier"] == 1.5  # type: ignore[index]

    def test_errnos_and_signals_of_the_rules_exist(self) -> None:
        known = set(errno.errorcode.values())
        for rule in BUILT_IN_RULES:
            assert set(rule.errnos) <= known | {"ENOMEDIUM", "EMEDIUMTYPE"}
            assert all(hasattr(signal, name) for name in rule.signals)

    def test_rule_from_code_comes_first(self, store: StateStore) -> None:
        rule = Rule(
            name="our licence server",
            error_type=ErrorType.SYSTEM_RESOURCE,
            exceptions=("builtins.ConnectionError",),
            severity=ErrorSeverity.LOW,
            systemic=False,
        )
        info = ErrorClassifier((rule,), store=store).classify_error(ConnectionResetError())
        assert info.error_type is ErrorType.SYSTEM_RESOURCE
        assert info.severity is ErrorSeverity.LOW
        assert info.rule == "our licence server"

    def test_rules_from_pyproject(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: StateStore
    ) -> None:
        (tmp_path / "pyproject.toml").write_text(
            """
            [[tool.robustness.classifier.rules]]
            name = "rate limit of the tag service"
            error_type = "network"
            exceptions = ["*.TagServiceError"]
            attributes = { "reply.status" = [420, "9??"] }
            message = "slow down"
            severity = "low"
            recovery_strategy = "NETWORK_RETRY"
            """
        )
        (tmp_path / "deeper").mkdir()
        monkeypatch.chdir(tmp_path / "deeper")
        classifier = ErrorClassifier(store=store)

        class Reply:
            status = 420

        class TagServiceError(Exception):
            reply = Reply()

        info = classifier.classify_error(TagServiceError("please slow down"))
        assert info.error_type is ErrorType.NETWORK
        assert info.severity is ErrorSeverity.LOW
        assert classifier.classify_error(TagServiceError("no")).error_type is ErrorType.UNKNOWN

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ('name = "x"\nerror_type = "nosuch"\nexceptions = ["*"]', "rules.0.error_type"),
            ('name = "x"\nerror_type = "network"\nexception = ["*"]', "rules.0.exception"),
            ('name = "x"\nerror_type = "network"', "no condition"),
            ('name = "x"\nerror_type = "network"\nmessage = "("', "rules.0.message"),
            ("= 1", "pyproject.toml"),
        ],
    )
    def test_wrong_rules_are_named(self, text: str, complaint: str, tmp_path: Path) -> None:
        (tmp_path / "pyproject.toml").write_text(f"[[tool.robustness.classifier.rules]]\n{text}")
        with pytest.raises(ClassifierConfigError, match=complaint):
            rules_from_pyproject(tmp_path)


class TestRecord:
    def test_errors_are_stored(self, store: StateStore, classifier: ErrorClassifier) -> None:
        context = {"operation": "feature_extraction", "file_path": "/music/a.flac"}
        info = classifier.classify_error(ConnectionResetError("gone"), context)
        classifier.mark_recovered(info)
        with store.read() as connection:
            row = connection.execute(sa.select(errors)).one()
        assert row.error_type == "network"
        assert row.operation == "feature_extraction"
        assert row.file == "/music/a.flac"
        assert row.recovered is True

    def test_error_seen_twice_is_one_error(
        self, store: StateStore, classifier: ErrorClassifier
    ) -> None:
        error = RuntimeError("x")
        classifier.classify_error(error)
        classifier.classify_error(error, {"operation": "decode"})
        with store.read() as connection:
            row = connection.execute(sa.select(errors)).one()
        assert row.operation == "decode"
        assert classifier.get_error_summary()["by_operation"] == {"decode": 1}

    def test_summary(self, classifier: ErrorClassifier) -> None:
        assert classifier.get_error_summary()["success_rate"] == 1.0
        for _ in range(6):
            classifier.record_success("mfcc")
        recovered = classifier.classify_error(ConnectionResetError(), {"operation": "mfcc"})
        classifier.mark_recovered(recovered)
        classifier.classify_error(bad_file := CorruptFileError("x"), {"operation": "mfcc"})
        classifier.classify_error(MemoryError(), {"operation": "key"})
        summary = classifier.get_error_summary()
        assert summary["total_errors"] == 3
        assert summary["success_rate"] == 6 / 8
        assert summary["by_type"] == {"network": 1, "corrupt_file": 1, "memory": 1}
        assert summary["by_severity"] == {"medium": 1, "low": 1, "high": 1}
        assert summary["by_operation"] == {"mfcc": 2, "key": 1}
        assert pickle.loads(pickle.dumps(bad_file)).args == ("x",)

    def test_what_cannot_be_printed_is_stored(
        self, store: StateStore, classifier: ErrorClassifier
    ) -> None:
        name = os.fsdecode(b"/music/caf\xe9.wav")
        classifier.classify_error(ValueError(f"\0 {name}"), {"file_path": name})
        with store.read() as connection:
            assert connection.execute(sa.select(sa.func.count()).select_from(errors)).scalar() == 1

    def test_breaker_counts_what_is_systemic(self) -> None:
        breaker = CircuitBreaker(failure_threshold=2, recovery_timeout=60)
        for _ in range(5):
            with pytest.raises(CorruptFileError):
                breaker.call(raising(CorruptFileError("x")))
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                breaker.call(raising(ConnectionResetError()))
        refused = provoked(lambda: breaker.call(dict))
        assert isinstance(refused, CircuitBreakerOpenError)
        info = get_error_classifier().classify_error(refused)
        assert info.retryable
        assert not info.systemic
        assert info.retry_after == pytest.approx(refused.retry_after)

    def test_records_carry_the_log_context(self, classifier: ErrorClassifier) -> None:
        from robustness.log_context import log_context

        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(run_id)s %(file)s %(feature_set)s %(attempt)s"))
        logger = logging.getLogger("robustness.error_classifier")
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            with log_context(run_id="r1", file="a.flac"), log_context(feature_set="key", attempt=2):
                classifier.classify_error(ValueError())
            classifier.classify_error(ValueError())
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
        assert stream.getvalue().splitlines() == ["r1 a.flac key 2", "None None None None"]
        with pytest.raises(TypeError, match="colour"), log_context(colour="red"):
            pass


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail
