"""What is printed is text: nothing in a name, a tag or a message is obeyed."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.table import Table

from audio_assets.cli.printing import console
from audio_assets.library.text import csv_text, masked, printable
from tests.conftest import PROJECT, Home, write_tone


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("gpj.\u202e3pm", r"gpj.\u202e3pm"),
        ("\udcff\r\x9b", r"\udcff\r\x9b"),
        ("one\u2028two\u200b", r"one\u2028two\u200b"),
        ("two\nlines\tand tab", "two\nlines\tand tab"),
        ("Début\xa0: 音 👩\u200d🎤", "Début\xa0: 音 👩\u200d🎤"),
    ],
)
def test_what_a_terminal_obeys_is_made_visible(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", [":heart:", "root:x:0", "[red]", "[/]", "[link=http://x]y[/link]"])
def test_markup_and_emoji_codes_are_shown_as_they_are(text: str) -> None:
    table = Table(text, title=text)
    table.add_row(text)
    with console.capture() as printed:
        console.print(text)
        console.print(text, style="red")
        console.print(table)
    assert printed.get().count(text) == 5


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ftp://user:pass@word@host/landing", "ftp://user:***@host/landing"),
        ("cannot reach postgresql://u:p@h:1/b?x=1", "cannot reach postgresql://u:***@h:1/b?x=1"),
        ("postgresql://h/b?user=u&password=p&x=1", "postgresql://h/b?user=u&password=***&x=1"),
        ("s3://bucket/landing@2 on http://localhost:3000/a@b", None),
    ],
)
def test_secrets_are_masked(text: str, shown: str | None) -> None:
    assert masked(text) == (shown or text)
    with console.capture() as printed:
        console.print(text, soft_wrap=True)
    assert printed.get() == (shown or text) + "\n"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1"])
def test_formulas_are_quoted_in_csv(text: str) -> None:
    assert csv_text(text) == "'" + printable(text)


def test_query_prints_tags_as_text(home: Home) -> None:
    assert home.cli("publish").returncode == 0
    sql = "SELECT chr(27) || '[31m' AS \"[/]\", ':heart:' AS b, '=1+1' AS \"@c\", -1 AS d"
    printed = home.cli("query", sql).stdout
    assert "\x1b" not in printed
    for text in (r"\x1b[31m", "[/]", ":heart:", "=1+1"):
        assert text in printed

    def table(*options: str) -> list[list[str]]:
        return list(csv.reader(io.StringIO(home.cli("query", sql, "--csv", *options).stdout)))

    assert table() == [["[/]", "b", "'@c", "d"], [r"\x1b[31m", ":heart:", "'=1+1", "-1"]]
    assert table("--raw") == [["[/]", "b", "@c", "d"], ["\x1b[31m", ":heart:", "=1+1", "-1"]]


def test_analyze_prints_any_name_in_a_locale_that_lacks_its_characters(
    home: Home, tmp_path: Path
) -> None:
    # In a home of one's own, which is to be made safe as well.
    (home.path / "dagster.yaml").unlink()
    home = replace(home, variables={"PYTHONIOENCODING": "ascii"})
    (tmp_path / "music").mkdir()
    write_tone(tmp_path / "music" / ":heart: ☃ [b].wav", 440)
    done = home.cli("analyze", f"[red]={tmp_path / 'music'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert r"[red]/:heart: \u2603 [b].wav" in done.stdout
    assert "dagster.io" not in done.stdout + done.stderr
    project = PROJECT / "dagster_home" / "dagster.yaml"
    assert (home.path / "dagster.yaml").read_bytes() == project.read_bytes()
    open_to_others = [path for path in home.path.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == []
