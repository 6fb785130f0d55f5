"""Settings of the project, from environment variables, with their defaults."""

import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

_PARENT = Path(__file__).resolve().parent.parent
CHECKOUT = _PARENT if (_PARENT / "pyproject.toml").exists() else None
"""The project's checkout; None if its wheel is installed."""

_HOME_FILES = (
    (CHECKOUT / "dagster_home" / "dagster.yaml", CHECKOUT / "workspace.yaml")
    if CHECKOUT
    else tuple((Path(__file__).parent / "home").glob("*.yaml"))
)

DEFAULT_HOME = (
    CHECKOUT / "dagster_home" if CHECKOUT else Path.home() / ".local" / "share" / "audio-assets"
)
"""Dagster's home where `DAGSTER_HOME` names none."""


def usable_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_FORMS = {
    "audio_video": (r"[\w. ]*", "extensions with spaces between them, such as mp4 mkv"),
    "umask": ("0*[0-7]{2}", "two octal digits, such as 027"),
    "alert_url": (r"https?://.+", "a URL that begins with http:// or https://"),
}
"""Forms of settings: a regular expression, and in words."""


class AudioAssetsSettings(BaseSettings):
    """The settings; each alias is an environment variable.

    Raises
    ------
    pydantic.ValidationError
        If a variable has an invalid value.
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore")

    dagster_home: Path = Field(
        DEFAULT_HOME,
        alias="DAGSTER_HOME",
        description="Dagster's home, where all generated files are",
    )
    audio_library: str | None = Field(
        None,
        alias="AUDIO_LIBRARY",
        description="Root directories of the library, separated by `:`, each a path or "
        "`name=path`; in addition to those given to `audio-assets analyze` and `scan`",
    )
    audio_video: str = Field(
        "",
        alias="AUDIO_VIDEO",
        description="Extensions of video files whose sound is analysed too, such as `mp4 mkv webm`",
    )
    audio_warehouse: Path | None = Field(
        None,
        alias="AUDIO_WAREHOUSE",
        description="The DuckDB database, a file whose name ends in `.duckdb`; "
        "`$DAGSTER_HOME/warehouse.duckdb` if unset",
    )
    audio_landing: str | None = Field(
        None,
        alias="AUDIO_LANDING",
        description="Directory or fsspec URL of the Parquet parts; "
        "`$DAGSTER_HOME/landing` if unset",
    )
    audio_scratch: Path | None = Field(
        None,
        alias="AUDIO_SCRATCH",
        description="Directory for decoded audio; `$DAGSTER_HOME/scratch` if unset",
    )
    audio_scratch_mib: PositiveInt = Field(
        4096,
        alias="AUDIO_SCRATCH_MIB",
        le=10**9,
        description="Decoded audio that one run keeps for files with deferred cells (MiB)",
    )
    audio_max_hours: PositiveFloat = Field(
        12.0,
        alias="AUDIO_MAX_HOURS",
        le=10_000,
        description="Longest audio that is analysed (h); of longer audio, the beginning is",
    )
    audio_min_seconds: NonNegativeFloat = Field(
        3.0,
        alias="AUDIO_MIN_SECONDS",
        description="Shortest part of a damaged file's audio that is analysed (s)",
    )
    audio_partial: Literal["accept", "refuse"] = Field(
        "accept",
        alias="AUDIO_PARTIAL",
        description="Whether what can be decoded of damaged audio is analysed: `accept`, or "
        "`refuse`, and the file fails",
    )
    audio_reserve_mib: NonNegativeInt = Field(
        512,
        alias="AUDIO_RESERVE_MIB",
        le=10**9,
        description="Space that decoding leaves free on the disk of the decoded audio (MiB)",
    )
    batch_size: PositiveInt = Field(
        50, alias="AUDIO_ASSETS_BATCH_SIZE", le=100_000, description="Files per run"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        alias="AUDIO_ASSETS_DEVICE",
        description="What runs neural networks: `cpu`; `cuda`, an NVIDIA GPU, which needs the "
        "package `onnxruntime-gpu` in place of `onnxruntime`; or `auto`, a GPU if there is one",
    )
    umask: str = Field(
        "077",
        alias="AUDIO_ASSETS_UMASK",
        description="Permissions (octal) that all generated files lack; `027` lets a group read "
        "them, `007` write them",
    )
    token: str | None = Field(
        None,
        alias="AUDIO_ASSETS_TOKEN",
        min_length=8,
        repr=False,
        description="What a request to `audio-assets serve` must bear, as in `Authorization: "
        "Bearer …`, or a browser give once, as in `/?token=…`; needed to listen on other addresses "
        "than this machine's own",
    )
    alert_command: str | None = Field(
        None,
        alias="AUDIO_ASSETS_ALERT_COMMAND",
        description="Run by `audio-assets serve` once per incident, and once when it is over, with "
        "the alert as JSON on its standard input",
    )
    alert_url: str | None = Field(
        None,
        alias="AUDIO_ASSETS_ALERT_URL",
        description="Where `audio-assets serve` posts the same",
    )
    timezone: str = Field(
        "UTC",
        alias="AUDIO_ASSETS_TIMEZONE",
        description="Time zone of the nightly schedule, for instance Europe/Berlin",
    )
    workers: PositiveInt = Field(
        default_factory=usable_cores,
        alias="AUDIO_ASSETS_WORKERS",
        le=1000,
        description="Worker processes of a run; the usable cores if unset",
    )

    @field_validator(*_FORMS)
    @classmethod
    def _has_its_form(cls, value: str | None, info: ValidationInfo) -> str | None:
        pattern, words = _FORMS[info.field_name or ""]
        if value is not None and not re.fullmatch(pattern, value):
            raise ValueError(f"must be {words}")
        return value

    @field_validator("dagster_home", "audio_warehouse", "audio_scratch")
    @classmethod
    def _is_local(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        if path.parts and path.parts[0].endswith(":"):
            raise ValueError("must be a path on this machine, not a URL")
        try:
            return path.expanduser()
        except RuntimeError:
            raise ValueError(f"must not be in the home of {path.parts[0]}: no such user") from None

    @field_validator("audio_warehouse")
    @classmethod
    def _can_be_a_database(cls, path: Path | None) -> Path | None:
        if path and path.stem in ("features", "library", "publishing", "robustness"):
            raise ValueError(f"must have another name: {path.stem} is a schema in the database")
        # What the file holds is replaced: another kind of file must not be named by mistake.
        if path and (path.suffix != ".duckdb" or (path.exists() and not path.is_file())):
            raise ValueError("must be a file whose name ends in .duckdb")
        return path

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("must be the name of a time zone, such as Europe/Berlin") from None
        return name

    @property
    def warehouse(self) -> Path:
        """Path of the DuckDB database."""
        return self.audio_warehouse or self.dagster_home / "warehouse.duckdb"

    @property
    def landing(self) -> str:
        """Directory or URL of the Parquet parts."""
        return self.audio_landing or str(self.dagster_home / "landing")

    @property
    def scratch(self) -> Path:
        """Directory for decoded audio."""
        return self.audio_scratch or self.dagster_home / "scratch"


@cache
def get_settings() -> AudioAssetsSettings:
    """Return the settings, read from the environment once per process."""
    return AudioAssetsSettings()


def set_umask() -> None:
    """Keep what this process and its children generate from other users, as the settings say."""
    os.umask(int(get_settings().umask, 8))


def prepare_home() -> Path:
    """Set the umask, and create Dagster's home with `dagster.yaml` and `workspace.yaml`.

    Returns
    -------
    Path
        The home.

    Raises
    ------
    OSError
        If it cannot be written to.
    """
    set_umask()
    home = get_settings().dagster_home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    for template in _HOME_FILES:
        if not (home / template.name).exists():
            partial = home / f".{template.name}.{os.getpid()}"
            shutil.copyfile(template, partial)
            partial.replace(home / template.name)
    return home
