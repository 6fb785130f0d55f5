import logging
import os
import pwd
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory

from robustness import state
from robustness.quarantine import Quarantine
from robustness.state import StateStore, StateUnavailableError, get_state_store, reset_state_store
from robustness.state_database import revision_of
from robustness.state_schema import (
    SCHEMA_REVISION,
    TEXT_LIMIT,
    VERSION_TABLE,
    breaker_transitions,
    errors,
    insert_into,
    metadata,
    prune,
    retry_budget,
)
from tests.robustness.postgres import PostgresServer
from tests.robustness.shared_state import (
    processes,
    rows_of,
    run_in_processes,
    wait_until,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "robustness.db"


def open_store(database: Path | str) -> StateStore:
    url = database if isinstance(database, str) else f"sqlite:///{database}"
    return StateStore(url, lock_timeout=60, retry_interval=0.05)


def impatient_store(path: Path) -> StateStore:
    return StateStore(f"sqlite:///{path}", lock_timeout=0.1, retry_interval=0.05)


def deposit(store: StateStore, scope: str, tokens: float = 1.0) -> None:
    """Add tokens to a scope, as any writer with a read-modify-write would."""

    def add(connection: sa.Connection) -> None:
        connection.execute(
            insert_into(connection, retry_budget)
            .values(scope=scope, tokens=0.0, updated_at=0.0)
            .on_conflict_do_nothing()
        )
        row = retry_budget.c.scope == scope
        now = connection.execute(
            sa.select(retry_budget.c.tokens).where(row).with_for_update()
        ).scalar_one()
        connection.execute(sa.update(retry_budget).where(row).values(tokens=now + tokens))

    store.transact(add)


def tokens_in(store: StateStore) -> dict[str, float]:
    return {str(row["scope"]): float(str(row["tokens"])) for row in rows_of(store, retry_budget)}


def add_transitions(connection: sa.Connection, name: str, count: int) -> None:
    connection.execute(
        sa.insert(breaker_transitions),
        [
            {"name": name, "from_state": "CLOSED", "to_state": "OPEN", "at": at, "reason": "r" * 99}
            for at in range(count)
        ],
    )


# One shared database


def test_what_is_written_survives_the_process(url: str) -> None:
    run_in_processes(1, lambda: deposit(open_store(url), "a", 3.0))
    store = open_store(url)
    assert tokens_in(store) == {"a": 3.0}
    assert not store.degraded


def test_no_update_is_lost_between_ten_processes(url: str) -> None:
    def hammer() -> None:
        store = open_store(url)
        for _ in range(30):
            deposit(store, "shared")
        assert not store.degraded

    run_in_processes(10, hammer)
    assert tokens_in(open_store(url)) == {"shared": 300.0}


def test_no_update_is_lost_between_threads(url: str) -> None:
    store = open_store(url)

    def hammer() -> None:
        for _ in range(25):
            deposit(store, "shared")

    threads = [threading.Thread(target=hammer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tokens_in(store) == {"shared": 200.0}


def test_ten_processes_race_the_first_migration(url: str) -> None:
    start = processes.Barrier(10)

    def first_use() -> None:
        store = open_store(url)
        start.wait(30)
        deposit(store, str(os.getpid()))
        assert not store.degraded

    run_in_processes(10, first_use)
    store = open_store(url)
    assert len(tokens_in(store)) == 10
    assert store.query(lambda c: c.execute(sa.text("SELECT * FROM robustness_version")).all()) == [
        (SCHEMA_REVISION,)
    ]


@pytest.mark.parametrize("theirs", [None, "29b539ebc72a"])
def test_another_program_s_version_is_left_alone_and_an_earlier_release_s_is_taken_over(
    url: str, theirs: str | None
) -> None:
    store = open_store(url)
    deposit(store, "a")
    statements = [
        "CREATE TABLE alembic_version (version_num VARCHAR(32))",
        f"INSERT INTO alembic_version VALUES ('{theirs or SCHEMA_REVISION}')",
    ]
    if theirs is None:
        statements.append("DROP TABLE robustness_version")
    store.transact(lambda c: [c.execute(sa.text(statement)) for statement in statements])
    store = open_store(url)
    assert tokens_in(store) == {"a": 1.0}
    assert not store.degraded
    with store.read() as connection:
        assert revision_of(connection) == SCHEMA_REVISION
        assert revision_of(connection, "alembic_version") == theirs


def test_migrations_lead_to_the_declared_tables(url: str) -> None:
    store = open_store(url)
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        differences = compare_metadata(context, metadata)
    assert differences == []
    migrations = Path(state.__file__).parent / "migrations"
    assert ScriptDirectory(str(migrations)).get_current_head() == SCHEMA_REVISION


def test_database_of_an_older_version_is_migrated_with_what_it_holds(url: str) -> None:
    engine = sa.create_engine(url)
    scripts = ScriptDirectory(str(Path(state.__file__).parent / "migrations"))
    first = scripts.get_revision("0001")
    assert first is not None
    with engine.begin() as connection:
        context = MigrationContext.configure(connection)
        first.module.upgrade(Operations(context))
        context.stamp(scripts, "0001")
        connection.execute(
            sa.text(
                "INSERT INTO quarantine (content_hash, feature_set, file_key, error_type, reason,"
                " first_failed_at, last_failed_at, attempts)"
                " VALUES ('h1', 'key', 'a.mp3', 'corrupt_file', 'breaks off', 1, 2, 3)"
            )
        )
    engine.dispose()
    store = open_store(url)
    (cell,) = Quarantine(store).list()
    assert (cell.content_hash, cell.attempts, cell.code_version) == ("h1", 3, None)
    assert not store.degraded


def test_objects_work_on_in_forked_processes(url: str) -> None:
    store = open_store(url)
    deposit(store, "parent")
    with store.begin():  # a fork in the middle of a transaction
        child = processes.Process(target=lambda: tokens_in(store)["parent"] == 1.0 or os._exit(9))
        child.start()
        child.join(30)
    assert child.exitcode == 0
    run_in_processes(4, deposit, store, "children")
    assert tokens_in(store) == {"parent": 1.0, "children": 4.0}


def test_forked_process_holds_its_lock_though_the_parent_closes_the_database(path: Path) -> None:
    store = impatient_store(path)
    deposit(store, "parent")
    is_locked, release = processes.Event(), processes.Event()

    def hold() -> None:
        with store.begin():
            is_locked.set()
            release.wait(60)

    child = processes.Process(target=hold, daemon=True)
    child.start()
    assert is_locked.wait(30)
    deposit(store, "fallback")  # gives up, and closes what this process has open
    assert store.degraded
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    another = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=False)
    assert b"database is locked" in another.stderr
    release.set()
    child.join(30)
    wait_until(lambda: (tokens_in(store), not store.degraded)[1])
    assert tokens_in(store) == {"parent": 1.0, "fallback": 1.0}


def test_fork_while_another_thread_uses_the_store() -> None:
    store = StateStore()
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with store.begin():
            holding.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(30)
    child = processes.Process(target=deposit, args=(store, "child"), daemon=True)
    child.start()
    child.join(10)
    release.set()
    thread.join()
    assert child.exitcode == 0


def test_process_killed_while_it_writes_leaves_nothing_behind(url: str) -> None:
    deposit(open_store(url), "before")
    writing = processes.Event()

    def write_and_hang() -> None:
        with open_store(url).begin() as connection:
            connection.execute(sa.update(retry_budget).values(tokens=99.0))
            writing.set()
            signal.pause()

    child = processes.Process(target=write_and_hang)
    child.start()
    assert writing.wait(30)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    store = open_store(url)
    deposit(store, "after")
    assert tokens_in(store) == {"before": 1.0, "after": 1.0}
    assert not store.degraded


def test_readers_do_not_wait_for_a_writer(path: Path) -> None:
    store = impatient_store(path)
    deposit(store, "a")
    with store.begin() as connection:
        connection.execute(sa.update(retry_budget).values(tokens=2.0))
        seen: list[dict[str, float]] = []
        reader = threading.Thread(target=lambda: seen.append(tokens_in(store)))
        reader.start()
        reader.join()
    assert seen == [{"a": 1.0}]
    assert not store.degraded


def test_blocks_of_one_thread_share_a_transaction(url: str) -> None:
    store = open_store(url)

    def change_and_fail() -> None:
        with store.begin():
            deposit(store, "inner")
            assert tokens_in(store) == {"inner": 1.0}
            raise LookupError

    with pytest.raises(LookupError):
        change_and_fail()
    assert tokens_in(store) == {}


def test_wrong_statements_are_errors_of_the_caller(path: Path) -> None:
    store = impatient_store(path)
    deposit(store, "a")
    with pytest.raises(sa.exc.IntegrityError):
        store.transact(lambda c: c.execute(sa.insert(retry_budget).values(scope="a")))
    assert not store.degraded
    with pytest.raises(sa.exc.OperationalError, match="no such table"):
        store.query(lambda c: c.execute(sa.text("SELECT * FROM nowhere")))


def test_any_text_can_be_stored(url: str) -> None:
    store = open_store(url)
    texts = ["caf\udce9", "nul \0 byte", "emoji 🎵", "x" * (TEXT_LIMIT + 1)]

    def insert(connection: sa.Connection) -> None:
        for text in texts:
            connection.execute(
                sa.insert(errors).values(
                    at=0.0,
                    error_type="unknown",
                    severity="low",
                    recovery_strategy="skip_file",
                    retryable=False,
                    message=text,
                )
            )

    store.transact(insert)
    stored = [row["message"] for row in rows_of(store, errors)]
    assert stored == ["caf\\udce9", "nul \\x00 byte", "emoji 🎵", "x" * TEXT_LIMIT]


def test_prune_keeps_the_newest_of_one_group(url: str) -> None:
    store = open_store(url)

    def fill(connection: sa.Connection) -> None:
        add_transitions(connection, "a", 10)
        add_transitions(connection, "b", 10)
        prune(connection, breaker_transitions, 3, name="a")
        prune(connection, breaker_transitions, 20, name="b")

    store.transact(fill)
    kept = [(row["name"], row["at"]) for row in rows_of(store, breaker_transitions)]
    assert [at for name, at in kept if name == "a"] == [7, 8, 9]
    assert len([at for name, at in kept if name == "b"]) == 10


def test_one_store_per_process_and_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from robustness.settings import get_settings

    monkeypatch.delenv("ROBUSTNESS_STATE_URL", raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "not" / "yet" / "there"))
    get_settings.cache_clear()
    store = get_state_store()
    assert get_state_store() is store
    deposit(store, "a")
    assert (tmp_path / "not" / "yet" / "there" / "robustness.db").exists()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    get_settings.cache_clear()
    assert get_state_store() is not store
    reset_state_store()
    get_settings.cache_clear()


# Faults


@pytest.fixture
def locked(path: Path) -> Iterator[tuple[StateStore, Event]]:
    """A store whose database another process holds locked until the event is set."""
    store = open_store(path)
    deposit(store, "shared")
    store.close()  # collected in the child, its connection would undo the child's lock
    is_locked, release = processes.Event(), processes.Event()

    def hold() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        is_locked.set()
        release.wait(60)

    child = processes.Process(target=hold)
    child.start()
    assert is_locked.wait(30)
    yield impatient_store(path), release
    release.set()
    child.join()


def test_locked_database_stops_nobody_and_is_used_again(
    locked: tuple[StateStore, Event], caplog: pytest.LogCaptureFixture
) -> None:
    store, release = locked
    deposit(store, "meanwhile")
    deposit(store, "meanwhile")
    assert store.degraded
    assert tokens_in(store) == {"meanwhile": 2.0}
    said = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert "robustness.db" in said[0].getMessage()
    assert "database is locked" in said[0].getMessage()

    release.set()
    wait_until(lambda: (tokens_in(store), not store.degraded)[1])
    assert tokens_in(store) == {"shared": 1.0, "meanwhile": 2.0}
    wait_until(lambda: "is in use again" in caplog.text)


SHORT_LIVED = """
import sys
from robustness.state import StateStore
from robustness.state_schema import retry_budget
import sqlalchemy as sa

store = StateStore(sys.argv[1], lock_timeout=0.1, retry_interval=3600)
row = {"scope": "short-lived", "tokens": 1.0, "updated_at": 0.0}
store.transact(lambda c: c.execute(sa.insert(retry_budget), row))
print(store.degraded, flush=True)
sys.stdin.readline()
"""


def test_process_that_ends_before_the_next_try_leaves_what_it_recorded(
    path: Path, locked: tuple[StateStore, Event]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SHORT_LIVED, f"sqlite:///{path}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        store, release = locked
        release.set()
        wait_until(lambda: (tokens_in(store), not store.degraded)[1])
        child.communicate("\n")
    assert child.returncode == 0
    assert tokens_in(store) == {"shared": 1.0, "short-lived": 1.0}


def test_shared_state_wins_over_what_one_process_knew_meanwhile(
    locked: tuple[StateStore, Event],
) -> None:
    store, release = locked
    deposit(store, "shared", 50.0)
    store.transact(lambda c: add_transitions(c, "x", 3))
    release.set()
    wait_until(lambda: (tokens_in(store), not store.degraded)[1])
    assert tokens_in(store) == {"shared": 1.0}
    assert len(rows_of(store, breaker_transitions)) == 3


def test_block_whose_commit_fails_says_so(path: Path) -> None:
    store = impatient_store(path)
    deposit(store, "a")

    def block() -> None:
        with store.begin() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1")
            add_transitions(connection, "x", 1000)

    with pytest.raises(StateUnavailableError, match="full"):
        block()
    assert store.degraded
    deposit(store, "b")


def damage(path: Path, how: str) -> None:
    with path.open("r+b") as file:
        if how == "header":
            file.write(b"this is no database" * 10)
        elif how == "pages":
            size = path.stat().st_size
            file.seek(8192)
            file.write(os.urandom(size - 8192))
        elif how == "last page":
            file.seek(-4096, os.SEEK_END)
            file.write(os.urandom(4096))
        elif how == "cut off":
            file.truncate(9000)


def make_sound_database(path: Path) -> None:
    store = open_store(path)
    deposit(store, "old")
    store.transact(lambda c: add_transitions(c, "x", 500))
    store.close()


@pytest.mark.parametrize("how", ["header", "pages", "last page", "cut off"])
def test_corrupt_database_is_set_aside(
    path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_sound_database(path)
    damage(path, how)
    broken = path.read_bytes()
    store = impatient_store(path)
    deposit(store, "new")
    assert not store.degraded
    assert tokens_in(open_store(path)) == {"new": 1.0}
    (aside,) = path.parent.glob("robustness.db.corrupt-*[0-9]")
    assert aside.read_bytes() == broken
    assert str(aside) in caplog.text


def test_database_that_is_corrupted_in_use(path: Path) -> None:
    make_sound_database(path)
    store = impatient_store(path)
    deposit(store, "before")
    store.transact(lambda c: c.exec_driver_sql("PRAGMA cache_size = 0"))
    damage(path, "pages")
    path.with_name("robustness.db-wal").unlink(missing_ok=True)
    for _ in range(3):
        deposit(store, "after")
        rows_of(store, breaker_transitions)
    wait_until(lambda: (tokens_in(store), not store.degraded)[1])
    assert len(list(path.parent.glob("robustness.db.corrupt-*[0-9]"))) == 1
    deposit(store, "end")
    assert tokens_in(open_store(path))["end"] == 1.0


def test_ten_processes_find_the_corruption_at_once(path: Path) -> None:
    make_sound_database(path)
    damage(path, "pages")
    start = processes.Barrier(10)

    def use() -> None:
        store = open_store(path)
        start.wait(30)
        deposit(store, str(os.getpid()))
        assert not store.degraded

    run_in_processes(10, use)
    assert len(tokens_in(open_store(path))) == 10
    assert len(list(path.parent.glob("robustness.db.corrupt-*[0-9]"))) == 1


def test_database_removed_in_use_is_made_anew(path: Path) -> None:
    store = impatient_store(path)
    deposit(store, "a")
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    deposit(store, "b")
    assert not store.degraded
    assert tokens_in(open_store(path)) == {"b": 1.0}


def test_full_disk_stops_nobody_and_is_used_again(path: Path) -> None:
    deposit(open_store(path), "a")

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, lambda _number, _frame: None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        store = impatient_store(path)
        for _ in range(10):
            store.transact(lambda c: add_transitions(c, "x", 500))
        assert store.degraded
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        wait_until(lambda: (tokens_in(store), not store.degraded)[1])

    run_in_processes(1, fill)
    store = open_store(path)
    assert tokens_in(store) == {"a": 1.0}
    assert len(rows_of(store, breaker_transitions)) == 5000


@pytest.fixture
def plain_folder() -> Iterator[Path]:
    """A folder that a plain user can reach, as root may not be kept from writing anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_plain_user(function: Callable[[], None]) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    function()


def test_read_only_database_stops_nobody_and_is_used_again(plain_folder: Path) -> None:
    path = plain_folder / "robustness.db"
    store = open_store(path)
    deposit(store, "shared")
    store.close()
    files = [plain_folder, *plain_folder.iterdir()]
    for file in files:
        file.chmod(file.stat().st_mode & 0o555)
    degraded = processes.Event()
    writable = processes.Event()

    def use() -> None:
        store = impatient_store(path)
        deposit(store, "meanwhile")
        assert store.degraded
        assert tokens_in(store) == {"meanwhile": 1.0}
        degraded.set()
        assert writable.wait(30)
        wait_until(lambda: (tokens_in(store), not store.degraded)[1])
        assert tokens_in(store) == {"shared": 1.0, "meanwhile": 1.0}

    child = processes.Process(target=as_plain_user, args=(use,))
    child.start()
    assert degraded.wait(30)
    for file in files:
        file.chmod(file.stat().st_mode | 0o666)
    plain_folder.chmod(0o777)
    writable.set()
    child.join(60)
    assert child.exitcode == 0


def test_place_that_cannot_hold_a_database(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = impatient_store(tmp_path / "file" / "robustness.db")
    deposit(store, "a")
    assert store.degraded
    assert tokens_in(store) == {"a": 1.0}


def test_unreachable_server_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    store = StateStore("postgresql+psycopg://robot:secret@127.0.0.1:1/state", lock_timeout=1)
    deposit(store, "a")
    assert store.degraded
    assert tokens_in(store) == {"a": 1.0}
    assert "127.0.0.1:1/state cannot be used" in caplog.text
    assert "secret" not in caplog.text


def test_database_of_a_newer_version_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deposit(open_store(path), "a")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE robustness_version SET version_num = '9999'")
    connection.close()
    store = impatient_store(path)
    deposit(store, "b")
    assert store.degraded
    assert "a newer version of this program wrote it" in caplog.text
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT scope FROM retry_budget").fetchall() == [("a",)]
    connection.close()


@pytest.fixture
def server(postgres_url: str) -> sa.Engine:
    return sa.create_engine(postgres_url, poolclass=sa.NullPool)


def test_server_that_ends_its_connections(server: sa.Engine) -> None:
    store = open_store(server.url.render_as_string(hide_password=False))
    deposit(store, "a")
    with server.connect() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    deposit(store, "b")
    assert not store.degraded
    assert tokens_in(store) == {"a": 1.0, "b": 1.0}


def test_server_without_an_answer_in_time(server: sa.Engine) -> None:
    url = server.url.render_as_string(hide_password=False)
    deposit(open_store(url), "a")
    with server.begin() as connection:
        connection.execute(sa.text("LOCK TABLE retry_budget"))
        store = StateStore(url, lock_timeout=0.2, retry_interval=0.05)
        deposit(store, "b")
        assert store.degraded
    wait_until(lambda: (tokens_in(store), not store.degraded)[1])
    assert tokens_in(store) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["in order", "crash"])
def test_server_that_is_stopped_and_started_again(
    postgres: PostgresServer,
    postgres_url: str,
    how: signal.Signals,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = StateStore(postgres_url, lock_timeout=1, retry_interval=0.05)
    deposit(store, "before")
    postgres.stop(how)
    try:
        for _ in range(3):
            deposit(store, "meanwhile")
        assert store.degraded
        assert tokens_in(store) == {"meanwhile": 3.0}
        newcomer = StateStore(postgres_url, lock_timeout=1, retry_interval=0.05)
        deposit(newcomer, "newcomer")
        assert newcomer.degraded
    finally:
        postgres.start()
    for one in (store, newcomer):
        wait_until(lambda one=one: (tokens_in(one), not one.degraded)[1])  # type: ignore[misc]
    everything = {"before": 1.0, "meanwhile": 3.0, "newcomer": 1.0}
    wait_until(lambda: tokens_in(open_store(postgres_url)) == everything)
    assert "cannot be used" in caplog.text
    wait_until(lambda: caplog.text.count("is in use again") == 2)


def test_ten_processes_go_through_a_restart_of_the_server(
    postgres: PostgresServer, postgres_url: str
) -> None:
    deposit(open_store(postgres_url), "shared", 0.0)
    stopped, started = processes.Event(), processes.Event()
    all_degraded = processes.Barrier(11)

    def work() -> None:
        store = StateStore(postgres_url, lock_timeout=1, retry_interval=0.05)
        own = str(os.getpid())
        deposit(store, own)
        assert stopped.wait(30)
        store.transact(lambda c: add_transitions(c, own, 10))
        assert store.degraded
        all_degraded.wait(60)
        assert started.wait(60)
        wait_until(lambda: (tokens_in(store), not store.degraded)[1])

    children = [processes.Process(target=work) for _ in range(10)]
    for child in children:
        child.start()
    store = open_store(postgres_url)
    wait_until(lambda: len(tokens_in(store)) == 11)
    postgres.stop()
    stopped.set()
    try:
        all_degraded.wait(60)
    finally:
        postgres.start()
    started.set()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 10
    assert len(rows_of(store, breaker_transitions)) == 100


def insert_budgets(connection: sa.Connection, scopes: list[str]) -> None:
    rows = [{"scope": scope, "tokens": 1.0, "updated_at": 0.0} for scope in scopes]
    connection.execute(sa.insert(retry_budget), rows)


def test_what_may_wait_is_stored_together_before_it_is_read(url: str) -> None:
    store, elsewhere = open_store(url), open_store(url)
    store.transact_soon(insert_budgets, "one")
    store.transact_soon(insert_budgets, "two")
    count = sa.select(sa.func.count()).select_from(retry_budget)
    assert store.query(lambda c: c.scalar(count), latest=False) == 0
    assert store.query(lambda c: c.scalar(count)) == 2
    store.transact_soon(insert_budgets, "three")
    wait_until(lambda: elsewhere.query(lambda c: c.scalar(count)) == 3)


def test_what_may_wait_is_stored_once_though_the_process_forks(path: Path) -> None:
    store = open_store(path)
    store.transact_soon(insert_budgets, "one")
    run_in_processes(2, state._return_all)
    assert len(rows_of(store, retry_budget)) == 1


def test_what_may_wait_survives_a_store_that_fails(path: Path) -> None:
    store = impatient_store(path)
    store.query(lambda connection: None)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        store.transact_soon(insert_budgets, "one")
        assert len(rows_of(store, retry_budget)) == 1
        assert store.degraded
        other.execute("ROLLBACK")
    wait_until(lambda: (rows_of(store, retry_budget), not store.degraded)[1])
    assert len(rows_of(open_store(path), retry_budget)) == 1
