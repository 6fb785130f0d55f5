"""Dagster's storage and the state in PostgreSQL, as docs/operating.md says."""

import re
from dataclasses import replace
from pathlib import Path

from audio_assets.cli.doctor import Verdict
from tests.cli.test_doctor import check
from tests.conftest import PROJECT, Home, write_tone
from tests.robustness.conftest import postgres, postgres_url  # noqa: F401 - fixtures


def test_analyze_with_all_state_in_postgresql(
    home: Home,
    tmp_path: Path,
    postgres_url: str,  # noqa: F811
) -> None:
    document = (PROJECT / "docs" / "operating.md").read_text("utf-8")
    (storage,) = re.findall(r"^```yaml\n(storage:.*?)^```", document, re.M | re.S)
    exported = re.findall(r"^export (DAGSTER_PG_URL|ROBUSTNESS_STATE_URL)=(.*?://)", document, re.M)
    address = postgres_url.partition("://")[2]
    home = replace(home, variables={name: scheme + address for name, scheme in exported})
    assert len(home.variables) == 2
    with (home.path / "dagster.yaml").open("a") as file:
        file.write(storage)

    (finding,) = check(home, "Dagster", {"DAGSTER_PG_URL": f"postgresql://{address}"})
    assert finding.verdict is Verdict.FAILED
    assert "postgresql+psycopg2://" in finding.advice

    (tmp_path / "music").mkdir()
    write_tone(tmp_path / "music" / "tone.wav", 440)
    done = home.cli("analyze", str(tmp_path / "music"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "music/tone.wav" in done.stdout
    assert not done.stderr  # the state store is usable, though Dagster's tables are beside its own
    for name in ("Dagster", "state store"):
        assert [finding.verdict for finding in check(home, name)] == [Verdict.OK]
    assert not list(home.path.glob("**/*.db"))
