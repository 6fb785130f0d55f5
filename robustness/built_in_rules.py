"""The rules of error classification that are there from the start."""

import re
from collections.abc import Mapping

from robustness.error_rules import ErrorSeverity, ErrorType, RecoveryStrategy, Rule

LOW, MEDIUM, HIGH, CRITICAL = ErrorSeverity


def _sndfile_codes(*codes: int | range) -> Mapping[str, tuple[str, ...]]:
    numbers = (n for code in codes for n in ([code] if isinstance(code, int) else code))
    return {"code": tuple(map(str, numbers))}


TRANSIENT_HTTP_STATUSES = ("408", "425", "429", "500", "502", "503", "504")

BUILT_IN_RULES: tuple[Rule, ...] = (
    # --- Somebody's wish, not a fault.
    Rule(
        name="interrupted",
        error_type=ErrorType.UNKNOWN,
        exceptions=(
            "builtins.KeyboardInterrupt",
            "builtins.SystemExit",
            "builtins.GeneratorExit",
            "asyncio.CancelledError",
            "concurrent.CancelledError",
            "dagster.DagsterExecutionInterruptedError",
        ),
        severity=LOW,
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="failure that forbids retries",
        error_type=ErrorType.UNKNOWN,
        exceptions=("dagster.Failure",),
        attributes={"allow_retries": ("False",)},
        retryable=False,
    ),
    Rule(
        name="circuit breaker open",
        error_type=ErrorType.SYSTEM_RESOURCE,
        exceptions=("robustness.CircuitBreakerOpenError",),
        severity=MEDIUM,
        # The failures that opened the breaker were counted when they happened.
        systemic=False,
        recovery_strategy=RecoveryStrategy.NONE,
    ),
    # --- Worker processes.
    Rule(
        name="worker over its deadline",
        error_type=ErrorType.TIMEOUT,
        exceptions=("robustness.WorkerTimeoutError",),
    ),
    Rule(
        name="worker over its memory",
        error_type=ErrorType.MEMORY,
        exceptions=("robustness.WorkerMemoryError",),
    ),
    Rule(
        # Nothing else sends an unasked SIGKILL as often as the kernel's out-of-memory killer.
        name="process killed",
        error_type=ErrorType.MEMORY,
        signals=("SIGKILL",),
    ),
    Rule(name="process over its CPU limit", error_type=ErrorType.TIMEOUT, signals=("SIGXCPU",)),
    Rule(
        name="process over its file size limit",
        error_type=ErrorType.SYSTEM_RESOURCE,
        signals=("SIGXFSZ",),
        recovery_strategy=RecoveryStrategy.FILE_SYSTEM_CHECK,
    ),
    Rule(
        # A page of a mapped file could not be read: it shrank, its mount or its disk went away.
        name="mapped file gone",
        error_type=ErrorType.FILE_SYSTEM,
        signals=("SIGBUS",),
        severity=HIGH,
    ),
    Rule(
        name="process stopped from outside",
        error_type=ErrorType.UNKNOWN,
        signals=("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"),
        systemic=False,
    ),
    Rule(
        name="process crashed",
        error_type=ErrorType.AUDIO_PROCESSING,
        signals=("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS"),
        severity=HIGH,
    ),
    Rule(
        name="worker exited",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("robustness.WorkerCrashedError",),
        severity=HIGH,
    ),
    # --- Resources.
    Rule(
        name="out of memory",
        error_type=ErrorType.MEMORY,
        exceptions=("builtins.MemoryError", "duckdb.OutOfMemoryException"),
    ),
    Rule(name="out of memory (errno)", error_type=ErrorType.MEMORY, errnos=("ENOMEM",)),
    Rule(
        name="out of memory (C++)",
        error_type=ErrorType.MEMORY,
        message=re.compile(r"^std::bad_(alloc|array_new_length)"),
    ),
    Rule(
        name="out of memory (SQLite)",
        error_type=ErrorType.MEMORY,
        attributes={"sqlite_errorname": ("SQLITE_NOMEM",)},
    ),
    Rule(
        name="out of memory (libsndfile)",
        error_type=ErrorType.MEMORY,
        exceptions=("soundfile.LibsndfileError",),
        attributes=_sndfile_codes(17),
    ),
    Rule(
        name="no space left",
        error_type=ErrorType.SYSTEM_RESOURCE,
        errnos=("ENOSPC", "EDQUOT", "EFBIG"),
        recovery_strategy=RecoveryStrategy.FILE_SYSTEM_CHECK,
    ),
    Rule(
        name="no space left (SQLite)",
        error_type=ErrorType.SYSTEM_RESOURCE,
        attributes={"sqlite_errorname": ("SQLITE_FULL",)},
        recovery_strategy=RecoveryStrategy.FILE_SYSTEM_CHECK,
    ),
    Rule(
        name="no space left (DuckDB)",
        error_type=ErrorType.SYSTEM_RESOURCE,
        exceptions=("duckdb.IOException",),
        message=re.compile(r"No space left on device|File too large|Disk quota exceeded"),
        recovery_strategy=RecoveryStrategy.FILE_SYSTEM_CHECK,
    ),
    Rule(
        name="no handles, threads or processes left",
        error_type=ErrorType.SYSTEM_RESOURCE,
        errnos=("EMFILE", "ENFILE", "EAGAIN", "ENOLCK", "EUSERS"),
    ),
    Rule(
        name="no threads left",
        error_type=ErrorType.SYSTEM_RESOURCE,
        exceptions=("builtins.RuntimeError",),
        message=re.compile(r"^can't start new thread$"),
    ),
    # --- Files.
    Rule(
        name="storage does not answer",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("ESTALE", "EIO", "EREMOTEIO", "ENODEV", "ENXIO", "ENOMEDIUM", "EMEDIUMTYPE"),
        severity=HIGH,
    ),
    Rule(
        # On network and FUSE mounts these come from opening a path, not from a socket.
        name="mount does not answer",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ETIMEDOUT", "ECONNABORTED"),
        attributes={"filename": ("?*",)},
        severity=HIGH,
    ),
    Rule(
        name="not permitted",
        error_type=ErrorType.PERMISSION,
        errnos=("EACCES", "EPERM", "EROFS"),
    ),
    Rule(
        name="file missing",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("ENOENT", "ENOTDIR"),
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="path unusable",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("EISDIR", "ENAMETOOLONG", "ELOOP", "EILSEQ"),
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="path in use",
        error_type=ErrorType.FILE_SYSTEM,
        errnos=("EBUSY", "ETXTBSY", "EEXIST", "ENOTEMPTY"),
    ),
    # --- Network.
    Rule(
        name="server busy",
        error_type=ErrorType.NETWORK,
        exceptions=("requests.HTTPError",),
        attributes={"response.status_code": TRANSIENT_HTTP_STATUSES},
    ),
    Rule(
        name="server busy (urllib)",
        error_type=ErrorType.NETWORK,
        exceptions=("urllib.HTTPError",),
        attributes={"code": TRANSIENT_HTTP_STATUSES},
    ),
    Rule(
        name="request rejected",
        error_type=ErrorType.NETWORK,
        exceptions=("requests.HTTPError", "urllib.HTTPError"),
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="request cannot be made",
        error_type=ErrorType.NETWORK,
        exceptions=(
            "requests.InvalidURL",
            "requests.InvalidSchema",
            "requests.MissingSchema",
            "requests.InvalidHeader",
            "requests.URLRequired",
            "requests.TooManyRedirects",
            "http.InvalidURL",
        ),
        severity=HIGH,
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="certificate refused",
        error_type=ErrorType.NETWORK,
        exceptions=("ssl.SSLError", "requests.SSLError", "urllib.URLError", "urllib3.HTTPError"),
        message=re.compile(r"CERTIFICATE_VERIFY_FAILED"),
        severity=HIGH,
        retryable=False,
    ),
    Rule(
        name="network failed",
        error_type=ErrorType.NETWORK,
        exceptions=(
            "builtins.ConnectionError",
            "requests.RequestException",
            "urllib3.HTTPError",
            "urllib.URLError",
            "http.HTTPException",
            "socket.gaierror",
            "socket.herror",
            "ssl.SSLError",
            "av.HTTPError",
            "duckdb.HTTPException",
        ),
    ),
    Rule(
        name="network failed (errno)",
        error_type=ErrorType.NETWORK,
        errnos=(
            "ETIMEDOUT",
            "EHOSTDOWN",
            "EHOSTUNREACH",
            "ENETDOWN",
            "ENETUNREACH",
            "ENETRESET",
            "ENOTCONN",
            "EADDRNOTAVAIL",
        ),
    ),
    Rule(
        # A socket's own timeout is a bare TimeoutError.
        name="network timed out",
        error_type=ErrorType.NETWORK,
        exceptions=("builtins.TimeoutError",),
        packages=("socket", "ssl", "http", "urllib"),
    ),
    # --- Databases.
    Rule(
        name="SQLite busy or unreachable",
        error_type=ErrorType.DATABASE,
        attributes={
            "sqlite_errorname": (
                "SQLITE_BUSY*",
                "SQLITE_LOCKED*",
                "SQLITE_PROTOCOL",
                "SQLITE_IOERR*",
                "SQLITE_CANTOPEN*",
                "SQLITE_INTERRUPT",
                "SQLITE_ABORT*",
                "SQLITE_SCHEMA",
            )
        },
    ),
    Rule(
        name="SQLite file damaged",
        error_type=ErrorType.DATABASE,
        attributes={"sqlite_errorname": ("SQLITE_CORRUPT*", "SQLITE_NOTADB")},
        severity=CRITICAL,
        retryable=False,
    ),
    Rule(
        name="SQLite refused",
        error_type=ErrorType.DATABASE,
        exceptions=("sqlite3.Error",),
        retryable=False,
    ),
    Rule(
        # SQLSTATE classes: connection, transaction rollback, resources, prerequisite state,
        # operator intervention, system error.
        name="SQL server busy or unreachable",
        error_type=ErrorType.DATABASE,
        attributes={"sqlstate": ("08*", "40*", "53*", "55*", "57*", "58*")},
    ),
    Rule(
        name="SQL server refused",
        error_type=ErrorType.DATABASE,
        attributes={"sqlstate": ("?*",)},
        retryable=False,
    ),
    Rule(
        name="DuckDB file damaged",
        error_type=ErrorType.DATABASE,
        exceptions=("duckdb.IOException",),
        message=re.compile(r"not a valid DuckDB database file"),
        severity=CRITICAL,
        retryable=False,
    ),
    Rule(
        # An internal or fatal error invalidates the instance: new connections, new instance.
        name="DuckDB failed",
        error_type=ErrorType.DATABASE,
        exceptions=("duckdb.InternalError", "duckdb.FatalException"),
        severity=CRITICAL,
    ),
    Rule(
        name="DuckDB busy or unreachable",
        error_type=ErrorType.DATABASE,
        exceptions=("duckdb.OperationalError", "duckdb.InterruptException"),
    ),
    Rule(
        name="DuckDB refused",
        error_type=ErrorType.DATABASE,
        exceptions=("duckdb.Error",),
        retryable=False,
    ),
    Rule(
        name="connection lost",
        error_type=ErrorType.DATABASE,
        exceptions=("sqlalchemy.DBAPIError",),
        attributes={"connection_invalidated": ("True",)},
    ),
    Rule(
        name="database unreachable",
        error_type=ErrorType.DATABASE,
        exceptions=(
            "sqlalchemy.OperationalError",
            "sqlalchemy.InterfaceError",
            "sqlalchemy.InternalError",
            "sqlalchemy.DisconnectionError",
            "sqlalchemy.PendingRollbackError",
            "sqlalchemy.TimeoutError",
        ),
        wrapper=True,
    ),
    Rule(
        name="database refused",
        error_type=ErrorType.DATABASE,
        exceptions=("sqlalchemy.SQLAlchemyError",),
        wrapper=True,
        retryable=False,
    ),
    # --- Audio libraries.
    Rule(
        name="libsndfile knows no such format",
        error_type=ErrorType.UNSUPPORTED_FORMAT,
        exceptions=("soundfile.LibsndfileError",),
        attributes=_sndfile_codes(1, 4, 18, 78),
    ),
    Rule(
        name="libsndfile could not read",
        error_type=ErrorType.FILE_SYSTEM,
        exceptions=("soundfile.LibsndfileError",),
        attributes=_sndfile_codes(2, 9, 39),
    ),
    Rule(
        # 61 to 183: one code for each way in which a header or a stream can be broken.
        name="libsndfile found damage",
        error_type=ErrorType.CORRUPT_FILE,
        exceptions=("soundfile.LibsndfileError",),
        attributes=_sndfile_codes(3, 7, 8, range(61, 184)),
    ),
    Rule(
        name="libsndfile failed",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("soundfile.SoundFileError",),
    ),
    Rule(
        name="FFmpeg knows no such format",
        error_type=ErrorType.UNSUPPORTED_FORMAT,
        exceptions=(
            "av.DemuxerNotFoundError",
            "av.DecoderNotFoundError",
            "av.PatchWelcomeError",
            "av.UnknownCodecError",
        ),
    ),
    Rule(
        name="FFmpeg found damage",
        error_type=ErrorType.CORRUPT_FILE,
        exceptions=("av.InvalidDataError", "av.EOFError"),
    ),
    Rule(
        name="FFmpeg timed out",
        error_type=ErrorType.TIMEOUT,
        exceptions=("av.TimeoutError", "av.ExitError"),
    ),
    Rule(
        name="FFmpeg failed",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("av.FFmpegError",),
    ),
    Rule(
        name="tags of another format",
        error_type=ErrorType.UNSUPPORTED_FORMAT,
        exceptions=("mutagen.*NoHeaderError", "mutagen.*HeaderNotFound"),
    ),
    Rule(
        # Mutagen wraps whatever reading the file raised.
        name="tags unreadable",
        error_type=ErrorType.CORRUPT_FILE,
        exceptions=("mutagen.MutagenError",),
        wrapper=True,
    ),
    # Essentia raises RuntimeError for everything; its fixed texts are all there is.
    Rule(
        name="Essentia found no file",
        error_type=ErrorType.FILE_SYSTEM,
        message=re.compile(r"AudioLoader: Could not open file .*error = (No such file|Is a dir)"),
        retryable=False,
        systemic=False,
    ),
    Rule(
        name="Essentia may not read",
        error_type=ErrorType.PERMISSION,
        message=re.compile(r"AudioLoader: Could not open file .*error = Permission denied"),
    ),
    Rule(
        name="Essentia knows no such format",
        error_type=ErrorType.UNSUPPORTED_FORMAT,
        message=re.compile(
            r"AudioLoader: (Unsupported codec|Unable to instantiate codec)"
            r"|AudioLoader ERROR: found 0 streams"
        ),
    ),
    Rule(
        name="Essentia found damage",
        error_type=ErrorType.CORRUPT_FILE,
        message=re.compile(r"AudioLoader: Could not (open file|find stream information)"),
    ),
    Rule(
        name="Essentia failed",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("builtins.RuntimeError",),
        message=re.compile(r"^(In \w+\.compute:|Error while configuring \w+:)"),
    ),
    Rule(
        name="audio library failed",
        error_type=ErrorType.AUDIO_PROCESSING,
        exceptions=("librosa.LibrosaError", "audioread.DecodeError", "onnxruntime.*"),
    ),
    # --- What is left.
    Rule(
        name="timed out",
        error_type=ErrorType.TIMEOUT,
        exceptions=(
            "builtins.TimeoutError",
            "subprocess.TimeoutExpired",
            "multiprocessing.TimeoutError",
        ),
    ),
    Rule(
        name="audio library failed (unnamed)",
        error_type=ErrorType.AUDIO_PROCESSING,
        packages=("essentia", "librosa", "soundfile", "soxr", "av", "onnxruntime"),
        wrapper=True,
    ),
    Rule(
        # The same input fails the same way again.
        name="defect in the program",
        error_type=ErrorType.UNKNOWN,
        exceptions=(
            "builtins.ArithmeticError",
            "builtins.AssertionError",
            "builtins.AttributeError",
            "builtins.ImportError",
            "builtins.LookupError",
            "builtins.NameError",
            "builtins.NotImplementedError",
            "builtins.RecursionError",
            "builtins.SyntaxError",
            "builtins.TypeError",
            "robustness.TimeoutNotEnforceableError",
        ),
        wrapper=True,
        severity=HIGH,
        retryable=False,
    ),
)
"""The built-in rules, in the order in which they are tried."""
