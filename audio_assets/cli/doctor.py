"""`audio-assets doctor`: checks all that an installation needs, and says what to fix.

Each check runs in its own process with a deadline, so that a library that crashes or a mount that
hangs fails only its own check.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from audio_assets.library.text import counted

if TYPE_CHECKING:
    from dagster import DagsterInstance

_PACKAGE = "audio-assets"
_WHERE_SET = "correct this in the environment, or in the file .env"

TIMEOUT_S = 120.0
"""Deadline of a check (s): on a slow machine the imports alone take a minute."""

MIN_WORKER_MIB = 512
"""A worker needs about this for its imports and one decoded track (MiB)."""

ROOMY_WORKER_MIB = 1024
"""With less than this for a worker the check warns (MiB)."""

LOOKING_S = 5.0
"""Time to look for an audio file in a root (s)."""

READING_S = 60.0
"""Time for reading the database (s)."""

_MIB = 2**20


class Verdict(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Parameters
    ----------
    check : str
        What was checked.
    verdict : Verdict
        The result.
    found : str
        What was found.
    advice : str
        What to do; empty if the verdict is OK.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


class CheckError(Exception):
    """A check failed; parameters as in `Finding`."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found)
        self.advice = advice


_Found: TypeAlias = Iterator[str | Finding]
"""A check yields findings and, before a step that may hang, a name for that step."""


def check_settings() -> None:
    """Check the environment variables.

    Raises
    ------
    CheckError
        If some are invalid; it names them.
    """
    from pydantic import ValidationError

    from audio_assets.settings import AudioAssetsSettings
    from robustness.settings import RobustnessSettingsError, get_settings, problems_in_words

    try:
        AudioAssetsSettings()
        get_settings()
    except ValidationError as error:
        raise CheckError("; ".join(problems_in_words(error)), _WHERE_SET) from None
    except RobustnessSettingsError as error:
        raise CheckError(str(error), _WHERE_SET) from None


def _check_settings() -> _Found:
    from audio_assets.library.roots import library_roots
    from audio_assets.settings import get_settings

    check_settings()
    try:
        library_roots()
    except ValueError as error:
        raise CheckError(str(error), "correct AUDIO_LIBRARY, or the file that it names") from None
    settings = get_settings()
    yield _ok(
        "settings",
        f"{counted(settings.workers, 'worker')}, {counted(settings.batch_size, 'file')} per run",
    )


def _check_packages() -> _Found:
    """Check that every package this one needs, directly or not, is there in a version it allows."""
    from importlib.metadata import PackageNotFoundError, distribution, metadata, version

    from packaging.requirements import Requirement

    wrong: list[str] = []
    seen: set[str] = set()
    extras = ",".join(metadata(_PACKAGE).get_all("Provides-Extra") or ())
    todo = [Requirement(f"{_PACKAGE}[{extras}]")]
    for requirement in todo:
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            # One of an extra may be absent.
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            wrong.append(f"{requirement.name} is {found.version}, not {requirement.specifier}")
        for needed in map(Requirement, found.requires or ()):
            names = ("", *requirement.extras)
            applies = needed.marker is None or any(
                needed.marker.evaluate({"extra": name}) for name in names
            )
            if applies and str(needed) not in seen:
                seen.add(str(needed))
                todo.append(needed)
    if wrong:
        raise CheckError("; ".join(wrong), _reinstall())
    yield _ok("packages", f"{_PACKAGE} {version(_PACKAGE)} has what it needs")


def _reinstall(*options: str) -> str:
    """Return the command that installs this package anew, with what it needs."""
    from importlib.metadata import distribution, version

    from audio_assets.settings import CHECKOUT

    if CHECKOUT:
        return "make clean && make run"
    origin = json.loads(distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    pip = (
        f"{sys.executable} -m pip install"
        if find_spec("pip")
        else f"uv pip install --python {sys.executable}"
    )
    source = origin.get("url") or f"{_PACKAGE}=={version(_PACKAGE)}"
    return " ".join((pip, "--force-reinstall", *options, source))


def _check_decoders() -> _Found:
    import numpy as np
    import soundfile

    from audio_assets.audio.decode import decode
    from audio_assets.audio.streams import DecoderName

    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(22050) / 44100)
    decoders: tuple[DecoderName, ...] = ("av", "soundfile")
    with tempfile.TemporaryDirectory() as directory:
        for decoder in decoders:
            for container in ("WAV", "FLAC", "OGG", "MP3"):
                path = Path(directory) / f"{decoder}.{container.lower()}"
                soundfile.write(path, tone, 44100, format=container)
                source = decode(path, path.with_suffix(".pcm"), decoder=decoder)
                if not 0.4 < source.duration_s < 0.7:
                    raise CheckError(
                        f"{decoder} decodes {source.duration_s:.2f} s of a 0.5 s {container} file",
                        _UNFIT,
                    )
    yield _ok("decoders", "av and soundfile decode WAV, FLAC, Ogg Vorbis and MP3")


def _check_essentia() -> _Found:
    import numpy as np

    from audio_assets.features.essentia_library import essentia

    standard = essentia()
    noise = np.random.default_rng(0).uniform(-1, 1, 2048).astype(np.float32)
    centroid = standard.Centroid()(standard.Spectrum()(noise))
    if not 0 < centroid < 1:
        raise CheckError(f"the spectral centroid of noise is {centroid}", _UNFIT)
    yield _ok("essentia", "computes")


def _check_librosa() -> _Found:
    import librosa
    import numpy as np

    noise = np.random.default_rng(0).uniform(-1, 1, 22050).astype(np.float32)
    if not np.isfinite(librosa.feature.spectral_centroid(y=noise, sr=22050)).all():
        raise CheckError("the spectral centroid of noise is not finite", _UNFIT)
    yield _ok("librosa", "computes")


def _check_models() -> _Found:
    import numpy as np

    from audio_assets.features.musicnn_network import DeviceError, WeightsError, load_network

    patch = np.zeros((187, 96), np.float32)
    for model in ("MSD_musicnn", "MTT_musicnn"):
        try:
            network = load_network(model)
        except WeightsError as error:
            raise CheckError(str(error), _reinstall("--no-deps")) from None
        except DeviceError as error:
            raise CheckError(str(error), "set AUDIO_ASSETS_DEVICE to auto") from None
        activations, _ = network.run(patch)
        if not np.isfinite(activations).all():
            raise CheckError(f"{model} returns values that are not finite", _UNFIT)
    yield _ok("models", "MSD_musicnn and MTT_musicnn load and run")


def _check_feature_sets() -> _Found:
    from audio_assets.features import BROKEN_FEATURE_SETS, FEATURE_SETS

    yield _ok("feature sets", ", ".join(FEATURE_SETS))
    for broken in BROKEN_FEATURE_SETS:
        yield _warning(
            "feature sets",
            f"{broken.name!r} of the package {broken.distribution} is left out: {broken.reason}",
            "correct this package, or uninstall it",
        )


def _check_dagster() -> _Found:
    import dagster as dg

    from audio_assets.settings import get_settings

    home = get_settings().dagster_home
    advice = f"set DAGSTER_HOME to a directory that can be written to, or repair {home}"
    yield f"DAGSTER_HOME {home}"
    _try_writing(home, advice)
    if not (home / "dagster.yaml").exists():
        yield _warning(
            "dagster.yaml",
            f"{home} has none: runs are not limited",
            "run any command but this one, such as `audio-assets status`, which puts it there",
        )
    try:
        with dg.DagsterInstance.from_config(str(home)) as instance:
            instance.get_runs(limit=1)
            partitions = len(instance.get_dynamic_partitions("audio_files"))
            limits = instance.get_concurrency_config()
            _check_storage(instance)
    except CheckError:
        raise
    except Exception as error:  # noqa: BLE001 - Dagster and its storages raise many types
        raise CheckError(
            f"the instance in {home} does not load: {_first_line(error)}",
            f"correct {home}/dagster.yaml, or delete it: the next command puts the project's there",
        ) from None
    pool = limits.pool_config.default_pool_limit
    yield _ok(
        "Dagster",
        f"{home}, {counted(partitions, 'partition')}, extraction runs at a time: {pool or 'any'}",
    )


def _check_storage(instance: "DagsterInstance") -> None:
    """Check what else only a run would notice: an old schema, and PostgreSQL's driver."""
    import sqlalchemy as sa

    for storage in (instance.run_storage, instance.event_log_storage, instance.schedule_storage):
        revision = storage and storage.alembic_version()
        if revision and revision[0] != revision[1]:
            raise CheckError(
                f"its storage has schema {revision[0]}, not {revision[1]}",
                f"DAGSTER_HOME={instance.root_directory} dagster instance migrate",
            )
    url = sa.make_url(getattr(instance.event_log_storage, "postgres_url", "sqlite://"))
    if url.get_backend_name() == "postgresql" and url.get_driver_name() != "psycopg2":
        raise CheckError(
            f"SQLAlchemy takes {url.get_driver_name()} for its storage, which needs psycopg2",
            "begin the storage's URL with postgresql+psycopg2://",
        )


def _check_state() -> _Found:
    import sqlalchemy as sa

    from robustness.settings import get_settings
    from robustness.state_database import revision_of
    from robustness.state_schema import SCHEMA_REVISION, VERSION_TABLE

    text = get_settings().state_url
    if text is None:
        raise CheckError("there is none", "set DAGSTER_HOME or ROBUSTNESS_STATE_URL")
    url = sa.make_url(text)
    shown = url.render_as_string(hide_password=True)
    yield f"state store {shown}"
    arguments = {}
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "")
        if not path.exists():
            _try_writing(path.parent, "set ROBUSTNESS_STATE_URL to a writable place")
            yield _ok("state store", f"{shown} is created by the first run")
            return
    else:
        url = url.set(drivername="postgresql+psycopg")
        arguments = {"connect_timeout": 10}
    try:
        engine = sa.create_engine(url, connect_args=arguments)
        with engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
                if verdict != "ok":
                    raise CheckError(f"{shown} is damaged: {verdict}", _DAMAGED_STATE)
            revision = revision_of(connection)
            if revision:
                connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = version_num"))
            connection.rollback()
    except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
        what = str(getattr(error, "orig", None) or error)
        damaged = "malformed" in what or "not a database" in what
        raise CheckError(
            f"{shown}: {_first_line(what)}",
            _DAMAGED_STATE if damaged else "check that it is reachable and writable",
        ) from None
    if revision != SCHEMA_REVISION:
        yield _warning(
            "state store",
            f"{shown} has schema {revision}, not {SCHEMA_REVISION}",
            "the next run migrates it; if a newer version of the project wrote it, upgrade",
        )
        return
    yield _ok("state store", f"{shown}, schema {revision}")


def _check_warehouse() -> _Found:
    import duckdb
    from filelock import FileLock, Timeout

    from audio_assets.settings import get_settings
    from audio_assets.warehouse.database import read_all, reading
    from audio_assets.warehouse.ingest import LedgerError, check_ledger

    path = get_settings().warehouse.absolute()
    yield f"warehouse {path}"
    _try_writing(path.parent, "set AUDIO_WAREHOUSE to a writable place")
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            lock = ""
    except Timeout:
        lock = ", being published to right now"
    if not path.exists():
        yield _ok("warehouse", f"{path} is created by the first run{lock}")
        return
    try:
        with reading(path) as connection:
            ((version, files),) = connection.execute(
                "SELECT version, (SELECT count(*) FROM library.files WHERE NOT gone) "
                "FROM publishing.version"
            ).fetchall()
            check_ledger(connection, digests=True)
            extent = "" if read_all(connection, READING_S) else f", read for {READING_S:.0f} s"
    except (duckdb.Error, LedgerError, ValueError) as error:
        raise CheckError(
            f"{path} is damaged: {_first_line(error)}",
            "run `audio-assets publish --rebuild`, which makes it anew from the landing",
        ) from None
    yield _ok("warehouse", f"{path}, version {version}, {counted(files, 'file')}{extent}{lock}")


def try_home_and_landing() -> None:
    """Write to Dagster's home and to the landing, as a run will have to.

    Raises
    ------
    CheckError
        If one of them cannot be written to.
    """
    from audio_assets.settings import get_settings

    _try_writing(get_settings().dagster_home, "set DAGSTER_HOME to a writable directory")
    _try_landing()


def check_state() -> None:
    """Check that the state which all processes share can be read.

    Raises
    ------
    CheckError
        If it cannot.
    """
    from robustness.state import get_state_store

    store = get_state_store()
    store.query(lambda connection: None)
    if store.degraded:
        raise CheckError(f"the state store {store.url} cannot be read", "check that it is there")


def _try_landing() -> Path | None:
    """Write to the landing, and return its directory if it is local."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    from audio_assets.settings import get_settings

    url = get_settings().landing
    advice = "set AUDIO_LANDING to a writable place"
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        if isinstance(filesystem, LocalFileSystem):
            _try_writing(Path(root), advice)
            return Path(root)
        probe = f"{root.rstrip('/')}/.doctor"
        filesystem.pipe_file(probe, b"probe")
        filesystem.rm_file(probe)
    except CheckError:
        raise
    except Exception as error:  # noqa: BLE001 - each file system raises its own types
        raise CheckError(f"{url}: {_first_line(error)}", advice) from None
    return None


def _check_landing() -> _Found:
    from audio_assets.monitoring.disks import MIN_FREE_MIB
    from audio_assets.settings import get_settings

    url = get_settings().landing
    yield f"landing {url}"
    if directory := _try_landing():
        yield from _space("landing", directory, MIN_FREE_MIB)
    else:
        yield _ok("landing", f"{url} is writable")


def _check_scratch() -> _Found:
    from audio_assets.settings import get_settings

    settings = get_settings()
    yield f"scratch {settings.scratch}"
    _try_writing(settings.scratch, "set AUDIO_SCRATCH to a writable place")
    yield from _space("scratch", settings.scratch, settings.audio_scratch_mib)


def _check_memory() -> _Found:
    import psutil

    from audio_assets.settings import get_settings
    from robustness.memory import available_memory_mib, memory_limit_mib, worker_budget_mib

    workers = get_settings().workers
    machine, limit = psutil.virtual_memory().total / _MIB, memory_limit_mib()
    budget = worker_budget_mib(workers)
    found = (
        f"{machine:.0f} MiB, {available_memory_mib():.0f} available"
        + (f", limited to {limit:.0f} by the control group" if limit < machine - 1 else "")
        + f"; {budget:.0f} MiB for each of {counted(workers, 'worker')}"
    )
    advice = "lower AUDIO_ASSETS_WORKERS, or give the machine more memory"
    if budget < MIN_WORKER_MIB:
        raise CheckError(found, advice)
    roomy = budget >= ROOMY_WORKER_MIB
    yield _ok("memory", found) if roomy else _warning("memory", found, advice)


def _check_library() -> _Found:
    from audio_assets.library.roots import library_roots

    yield "the library's roots"
    roots = library_roots()
    if not roots:
        advice = "set AUDIO_LIBRARY, or run `audio-assets scan DIRECTORY`"
        yield _warning("library", "no directory is known", advice)
    for name, root in roots.items():
        yield f"library root {name!r} ({root})"
        yield _root_finding(name, root)


def _root_finding(name: str, root: Path) -> Finding:
    from audio_assets.library.scan import audio_extensions

    check = f"library {name}"
    extensions = audio_extensions()
    until = time.monotonic() + LOOKING_S
    try:
        os.scandir(root).close()
    except OSError as error:
        advice = "mount it, or correct AUDIO_LIBRARY; until then it is unreachable"
        return Finding(check, Verdict.FAILED, f"{root}: {error.strerror}", advice)
    for _, _, names in os.walk(root):
        if any(Path(name).suffix.lower() in extensions for name in names):
            return _ok(check, f"{root}: has audio files")
        if time.monotonic() > until:
            break
    return _warning(check, f"{root}: no audio file found", "is it mounted? is it the right one?")


CHECKS: dict[str, Callable[[], _Found]] = {
    "settings": _check_settings,
    "packages": _check_packages,
    "decoders": _check_decoders,
    "essentia": _check_essentia,
    "librosa": _check_librosa,
    "models": _check_models,
    "feature sets": _check_feature_sets,
    "Dagster": _check_dagster,
    "state store": _check_state,
    "warehouse": _check_warehouse,
    "landing": _check_landing,
    "scratch": _check_scratch,
    "memory": _check_memory,
    "library": _check_library,
}

_WITHOUT_SETTINGS = ("packages", "decoders", "essentia", "librosa", "models", "feature sets")
_UNFIT = "correct what `packages` says; else its wheel does not fit this machine's processor"
_DAMAGED_STATE = (
    "nothing, if it is an SQLite file: the next run moves it aside and creates a new one"
)


def diagnose(timeout_s: float = TIMEOUT_S) -> Iterator[Finding]:
    """Run all checks.

    Parameters
    ----------
    timeout_s : float
        Deadline of a check (s).

    Yields
    ------
    Finding
        In the order of `CHECKS`.
    """
    settings = _run_check("settings", timeout_s)
    yield from settings
    if any(finding.verdict is Verdict.FAILED for finding in settings):
        names = list(_WITHOUT_SETTINGS)  # the others would only repeat the failure
    else:
        names = [name for name in CHECKS if name != "settings"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for findings in pool.map(lambda name: _run_check(name, timeout_s), names):
            yield from findings


def _run_check(name: str, timeout_s: float) -> list[Finding]:
    """Run a check in its own process, without waiting for it after a kill."""
    process = subprocess.Popen(
        [sys.executable, "-m", "audio_assets.cli.doctor", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    problem = None
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as expired:
        process.kill()
        output = expired.stdout or b""
        problem = f"no answer within {timeout_s:.0f} s"
    else:
        if process.returncode:
            problem = f"the check's process ended with status {process.returncode}"
    findings, step = [], name
    for line in output.decode().splitlines():
        result = json.loads(line)
        if isinstance(result, str):
            step = result
        else:
            findings.append(Finding(**{**result, "verdict": Verdict(result["verdict"])}))
    if problem:
        advice = "is it on a mount that does not answer?" if step != name else _UNFIT
        findings.append(Finding(name, Verdict.FAILED, f"{step}: {problem}", advice))
    return findings


def _ok(check: str, found: str) -> Finding:
    return Finding(check, Verdict.OK, found)


def _warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Verdict.WARNING, found, advice)


def _try_writing(directory: Path, advice: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckError(f"{directory} is not writable: {error.strerror}", advice) from None


def _space(check: str, directory: Path, wanted_mib: float) -> Iterator[Finding]:
    import psutil

    from audio_assets.monitoring.disks import MIN_FREE_MIB

    free = psutil.disk_usage(str(directory)).free / _MIB
    found = f"{directory}, {free:.0f} MiB free"
    if free < MIN_FREE_MIB:
        raise CheckError(found, "free space on this disk")
    if free < wanted_mib:
        advice = f"up to {wanted_mib:.0f} MiB are needed: free space, or lower AUDIO_SCRATCH_MIB"
        yield _warning(check, found, advice)
    else:
        yield _ok(check, found)


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _main(name: str) -> None:
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to stdout

    def report(result: str | Finding) -> None:
        results.write(json.dumps(result if isinstance(result, str) else asdict(result)) + "\n")
        results.flush()

    try:
        for result in CHECKS[name]():
            report(result)
    except CheckError as error:
        report(Finding(name, Verdict.FAILED, str(error), error.advice))
    except Exception as error:  # noqa: BLE001 - any error is a finding
        found = f"{type(error).__name__}: {_first_line(error)}"
        report(Finding(name, Verdict.FAILED, found, _reinstall()))


if __name__ == "__main__":
    _main(sys.argv[1])
