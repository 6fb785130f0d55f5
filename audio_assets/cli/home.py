"""Dagster's home: `audio-assets init`, and what every command does first."""

import os
import shlex
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from audio_assets.cli.doctor import CheckError, check_settings
from audio_assets.cli.endings import UserError
from audio_assets.cli.printing import console

ENV_FILE = """\
# Settings of Dagster and audio-assets, when they are started in this directory.
# AUDIO_LIBRARY=~/Music
"""


def find() -> str:
    """Read `.env` of the current directory, and return Dagster's home."""
    from dotenv import load_dotenv

    from audio_assets.settings import DEFAULT_HOME

    load_dotenv(".env", override=True)  # as Dagster's own commands do
    return os.environ.get("DAGSTER_HOME") or str(DEFAULT_HOME)


def prepare(directory: str, *, must_exist: bool = False) -> Path:
    """Make a directory this process's home, and a safe place.

    Raises
    ------
    CheckError
        If a setting is wrong.
    UserError
        If the directory does not exist and must.
    OSError
        If the home cannot be written to.
    """
    from audio_assets.settings import get_settings, prepare_home

    os.environ["DAGSTER_HOME"] = directory
    check_settings()
    if must_exist and not get_settings().dagster_home.exists():
        raise UserError(
            f"{directory} does not exist: correct DAGSTER_HOME, or make it a home by "
            "`audio-assets init` or `audio-assets analyze`."
        )
    prepared = prepare_home()
    os.environ["DAGSTER_HOME"] = str(prepared)
    get_settings.cache_clear()
    return prepared


def init(
    directory: Annotated[Path, typer.Argument(help="Made if it does not exist.")],
) -> None:
    """Make a directory a home: Dagster and `audio-assets` that are started in it use it."""
    from dotenv import set_key

    try:
        home = prepare(str(directory))
        if not (home / ".env").exists():
            (home / ".env").write_text(ENV_FILE)
            set_key(home / ".env", "DAGSTER_HOME", str(home))
        # Compiled in two processes at once, librosa crashes (github.com/numba/numba/issues/10128).
        with console.status("compiling, which takes a minute, once"):
            import_module("audio_assets.features.kernels")
            import_module("librosa.beat")
            import_module("librosa.feature")
    except (CheckError, OSError) as error:
        raise UserError(f"{error}.") from None
    console.print(
        f"{home} is prepared. Next:\n"
        f"cd {shlex.quote(str(home))}\n"
        "audio-assets analyze DIRECTORY    # or, without one, a sample library\n"
        "dagster dev                       # Dagster's UI on http://localhost:3000",
        highlight=False,
    )
