"""The command line: what starts fast, how tables fit, how commands end."""

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import duckdb
import pytest

from audio_assets.cli import home
from audio_assets.cli.app import _Command, app
from audio_assets.cli.endings import EXIT_CODES, ExitCode
from audio_assets.library.text import four_digits
from tests.conftest import PROJECT, Home, write_tone

HEAVY = {"dagster", "pandas", "numpy", "pyarrow", "librosa", "essentia", "scipy", "alembic"}
NAME = "database_operations_of_a_service_with_a_long_name"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with a database that has nothing in it, and a breaker."""
    from tests.conftest import make_home

    home = make_home(tmp_path_factory.mktemp("published"))
    assert home.cli("publish").returncode == 0
    script = (
        "from robustness.circuit_breaker import get_circuit_breaker\n"
        f"get_circuit_breaker({NAME!r}).force_open()\n"
    )
    subprocess.run([sys.executable, "-c", script], env=home.environment(), cwd=PROJECT, check=True)
    return home


@pytest.mark.parametrize(
    ("arguments", "code", "too_heavy"),
    [
        (["--help"], 0, {"duckdb", "sqlalchemy", "pydantic_settings"}),
        (["--version"], 0, {"duckdb", "sqlalchemy", "pydantic_settings"}),
        (["query", "--help"], 0, {"duckdb", "sqlalchemy", "pydantic_settings"}),
        (["query", "--nonsense"], 2, {"duckdb", "sqlalchemy", "pydantic_settings"}),
        (["scan", "/nowhere"], 2, {"duckdb", "sqlalchemy"}),
        (["query", "FROM features.tracks"], 0, {"sqlalchemy"}),
        (["status"], 0, set()),
        (["health"], 1, {"yaml"}),
        (["explain"], 2, {"sqlalchemy"}),
    ],
)
def test_a_command_imports_only_what_it_needs(
    published: Home, arguments: list[str], code: int, too_heavy: set[str]
) -> None:
    script = (
        "import atexit, sys\n"
        "from audio_assets.cli.app import main\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=published.environment(),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert not (HEAVY | too_heavy) & set(done.stderr.split())


def in_terminal(home: Home, width: int, *arguments: str) -> str:
    """Return what a command prints to a terminal of some width."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment: Mapping[str, str] = home.environment({"TERM": "xterm", "NO_COLOR": "1"})
    with subprocess.Popen(
        [sys.executable, "-m", "audio_assets", *arguments],
        env={name: value for name, value in environment.items() if name != "COLUMNS"},
        cwd=PROJECT,
        stdin=side,
        stdout=side,
        stderr=side,
    ):
        os.close(side)
        printed = b""
        try:
            while chunk := os.read(main, 4096):
                printed += chunk
        except OSError:  # the terminal's other end is closed
            pass
    os.close(main)
    return re.sub(r"\x1b\[[\d;]*m", "", printed.decode())


def test_a_table_that_cuts_no_word_is_a_table(published: Home) -> None:
    lines = in_terminal(published, 80, "query", "SELECT 1 AS one, 'two words' AS two").splitlines()
    assert any("one" in line and "two" in line for line in lines)


def test_a_narrow_table_breaks_lines_between_words_and_after_slashes(published: Home) -> None:
    name = "music/Antidisestablishmentarianism 12/Wherefore 🍦.flac"
    sql = f"SELECT '{name}' AS name, repeat('word ', 30) AS integrated_lufs"
    lines = in_terminal(published, 60, "query", sql).splitlines()
    parts = ("music/", "Antidisestablishmentarianism", "12/Wherefore", "🍦.flac")
    assert all(any(part in line for line in lines) for part in parts)
    assert any("integrated_lufs" in line for line in lines)
    assert max(map(len, lines)) <= 60


def test_a_table_too_wide_for_the_terminal_becomes_records(published: Home) -> None:
    sql = f"SELECT {', '.join(f'{n} AS integrated_lufs_{n}' for n in range(9))}"
    lines = in_terminal(published, 80, "query", sql).splitlines()
    assert all(any(f"integrated_lufs_{n}" in line for line in lines) for n in range(9))
    assert max(map(len, lines)) <= 80


def test_elsewhere_every_name_is_whole(published: Home) -> None:
    printed = published.cli("breakers", "list").stdout
    assert NAME in printed
    assert published.cli("breakers", "disable", NAME).returncode == 0
    assert all(line == line.rstrip() for line in printed.splitlines())


def test_every_table_is_also_csv_and_json(published: Home) -> None:
    for command in (("breakers", "list"), ("quarantine", "list"), ("query", "SELECT 1 AS n")):
        rows = list(csv.DictReader(io.StringIO(published.cli(*command, "--csv").stdout)))
        objects = json.loads(published.cli(*command, "--json").stdout)
        assert [list(row) for row in rows] == [list(row) for row in objects]
    state = json.loads(published.cli("status", "--json").stdout)
    assert datetime.fromisoformat(state["published_at"]).tzinfo
    assert [breaker["breaker"] for breaker in state["breakers"]] == [NAME]
    assert NAME in published.cli("status", "--csv").stdout


def test_an_export_is_what_a_query_returns_or_a_sentence(published: Home, tmp_path: Path) -> None:
    sql = "SELECT '=1+1' AS formula, 0.1 AS x UNION ALL SELECT 'a, b', NULL ORDER BY x"
    output = tmp_path / "x.csv"
    assert published.cli("export", str(output), sql).stdout == f"2 rows are in {output}.\n"
    assert output.read_text() == published.cli("query", "--csv", sql).stdout
    (tmp_path / "directory.csv").mkdir()
    for name, code in (("x.xlsx", 2), ("directory.csv", 1), ("none/x.csv", 1), ("x.m3u8", 2)):
        done = published.cli("export", str(tmp_path / name), sql)
        assert (done.returncode, done.stdout.count("\n"), done.stderr) == (code, 1, ""), done.stdout


def test_progress_is_shown_while_standard_output_leads_elsewhere() -> None:
    script = (
        "import os\n"
        "from audio_assets.cli.analyze import _keeping_output, _Progress\n"
        "from audio_assets.cli.printing import console\n"
        "with _keeping_output(console), _Progress(console, files=3):\n"
        "    before = os.dup(1)\n"
        "    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"  # as Dagster does, for a step's log
        "os.dup2(before, 1)\n"
        "console.print('end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"0/3 files .*\nend\n", done.stdout), done.stdout


def test_times_are_local_and_numbers_have_four_digits(published: Home) -> None:
    home = Home(published.path, {"TZ": "Europe/Berlin"})
    sql = "SELECT TIMESTAMPTZ '2026-03-01 12:00:00+00' AS at, 1.23456789::DOUBLE AS x, NULL AS y"
    printed = home.cli("query", sql).stdout
    assert "2026-03-01 13:00:00 CET" in printed
    assert "1.235" in printed
    [row] = json.loads(home.cli("query", "--json", sql).stdout)
    assert datetime.fromisoformat(row.pop("at")) == datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert row == {"x": 1.23456789, "y": None}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.000123456, "0.0001235"), (-14.0, "-14"), (12345.6, "12346"), (1e20, "1e+20"), (0.0, "0")],
)
def test_numbers(value: float, text: str) -> None:
    assert four_digits(value) == text


def test_version_and_exit_codes_are_told(home: Home) -> None:
    assert home.cli("--version").stdout == f"audio-assets {version('audio-assets')}\n"
    told = " ".join(home.cli("--help").stdout.replace("│", " ").split())
    assert EXIT_CODES in told
    document = (PROJECT / "docs" / "operating.md").read_text()
    assert all(f"| {code.value} |" in document for code in ExitCode)
    assert not (home.path / "robustness.db").exists()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("breakers reset data", {NAME}),
        ("quarantine release x --feature-set lo", {"loudness"}),
        ("forget mu", {"music"}),
    ],
)
def test_names_are_completed(
    published: Home, tmp_path: Path, words: str, offered: set[str]
) -> None:
    (tmp_path / "music").mkdir()
    (tmp_path / ".env").write_text(f"DAGSTER_HOME={published.path}\nAUDIO_LIBRARY=music\n")
    environment = published.environment(
        {
            "_AUDIO_ASSETS_COMPLETE": "complete_bash",
            "COMP_WORDS": f"audio-assets {words}",
            "COMP_CWORD": str(len(words.split())),
        }
    )
    del environment["DAGSTER_HOME"]
    done = subprocess.run(
        [Path(sys.executable).with_name("audio-assets")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(done.stdout.split()) == offered, done.stderr


def test_every_command_but_the_one_that_makes_it_prepares_the_home() -> None:
    commands = [*app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        commands += group.typer_instance.registered_commands
    others = [command.callback for command in commands if command.cls is not _Command]
    assert others == [home.init]


HURRIED = """
import sys
from pathlib import Path
from audio_assets.cli import analyze, app
analyze.PUBLISH_S, publish = 0.0, analyze.publish
def noted():
    publish()
    with Path(sys.argv[2]).open("a") as file:
        file.write("published\\n")
analyze.publish = noted
app.app(["analyze", sys.argv[1]])
"""


def test_batches_are_published_while_others_follow(home: Home, tmp_path: Path) -> None:
    library, log = tmp_path / "music", tmp_path / "log"
    library.mkdir()
    for number in range(3):
        write_tone(library / f"{number}.wav", 300 + 50 * number)
    done = subprocess.run(
        [sys.executable, "-c", HURRIED, library, log],
        env=home.environment({"AUDIO_ASSETS_BATCH_SIZE": "1"}),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().splitlines()  # the last publication is another's
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        assert connection.sql("SELECT count(*) FROM features.tracks").fetchall() == [(3,)]


HOLDING = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_a_database_that_somebody_writes_to_is_replaced(home: Home, tmp_path: Path) -> None:
    library = tmp_path / "music"
    library.mkdir()
    write_tone(library / "first.wav", 300)
    assert home.cli("analyze", str(library)).returncode == 0
    write_tone(library / "second.wav", 400)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, home.warehouse],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        done = home.cli("analyze", str(library))
        holder.kill()
    assert done.returncode == 0, done.stdout + done.stderr
    with duckdb.connect(str(home.warehouse), read_only=True) as connection:
        assert connection.sql("SELECT count(*) FROM features.tracks").fetchall() == [(2,)]
