"""A real PostgreSQL server for the tests, from the programs installed on the machine."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from tests.robustness.shared_state import wait_until

_PLACES = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin", "usr/libexec/postgresql*")


def find_programs() -> Path | None:
    """Return the directory of ``initdb`` and ``postgres``, of the newest version; None if none."""
    found = [folder for place in _PLACES for folder in Path("/").glob(place)]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    complete = [folder for folder in found if (folder / "initdb").exists()]
    return max(complete, key=lambda folder: [int(n) for n in _numbers(folder)], default=None)


def _numbers(folder: Path) -> Iterator[str]:
    return (part for part in str(folder).replace("-", "/").split("/") if part.isdigit())


class PostgresServer:
    """A server in a directory of its own, reached by a socket in it.

    Parameters
    ----------
    programs : Path
        The directory of ``initdb`` and ``postgres``.
    directory : Path
        An empty directory with a short name.
    """

    def __init__(self, programs: Path, directory: Path) -> None:
        self._programs = programs
        self._directory = directory
        # The server refuses to run as root.
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user:
            account = pwd.getpwnam(self._user)
            os.chown(directory, account.pw_uid, account.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        initdb = ("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        self._start(*initdb, f"--pgdata={self._data}").wait()

    @property
    def _data(self) -> Path:
        return self._directory / "data"

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._directory / "log").open("ab") as log:
            return subprocess.Popen(
                [str(self._programs / program), *arguments],
                cwd=self._directory,
                stdout=log,
                stderr=log,
                user=self._user,
                extra_groups=[] if self._user else None,
            )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._directory),
            "fsync": "off",
            "max_connections": "200",
        }
        self._process = self._start(
            "postgres", "-D", str(self._data), *(f"--{name}={v}" for name, v in options.items())
        )
        wait_until(self._answers, 60)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "log").read_text()
        try:
            with self._engine("postgres").connect():
                return True
        except sa.exc.OperationalError:
            return False

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT ends its connections in order, SIGQUIT as a crash would."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()

    def url(self, database: str) -> str:
        """Return the SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://postgres@/{database}?host={self._directory}"

    def _engine(self, database: str) -> sa.Engine:
        return sa.create_engine(
            self.url(database), poolclass=sa.NullPool, isolation_level="AUTOCOMMIT"
        )

    @contextmanager
    def empty_database(self) -> Iterator[str]:
        """Make a database for the block; yield its URL."""
        name = f"test_{uuid.uuid4().hex}"
        self._execute(f"CREATE DATABASE {name}")
        yield self.url(name)
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        with self._engine("postgres").connect() as connection:
            connection.execute(sa.text(statement))


@contextmanager
def running_server(programs: Path) -> Iterator[PostgresServer]:
    """Run a server in a temporary directory; the names of pytest's are too long for sockets."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as directory:
        server = PostgresServer(programs, Path(directory))
        try:
            server.start()
            yield server
        finally:
            server.stop()
