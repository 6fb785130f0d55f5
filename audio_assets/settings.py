"""Settings of the project, from environment variables, with their defaults."""

import os
from functools import cache
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, PositiveInt, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PROJECT_DAGSTER_HOME = Path(__file__).resolve().parent.parent / "dagster_home"


def usable_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class AudioAssetsSettings(BaseSettings):
    """What an operator can set; every name is an environment variable.

    Raises
    ------
    pydantic.ValidationError
        If a variable has a value that does not fit.
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore")

    dagster_home: Path = Field(
        PROJECT_DAGSTER_HOME,
        alias="DAGSTER_HOME",
        description="Dagster's home, below which everything generated lies",
    )
    audio_library: str | None = Field(
        None,
        alias="AUDIO_LIBRARY",
        description="Root directories of the library, separated by `:`, each a path or "
        "`name=path`; besides those given to `audio-assets analyze` and `scan` so far",
    )
    audio_warehouse: Path | None = Field(
        None,
        alias="AUDIO_WAREHOUSE",
        description="The DuckDB database; `$DAGSTER_HOME/warehouse.duckdb` if unset",
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
        description="Decoded audio that one run keeps for files that wait (MiB)",
    )
    batch_size: PositiveInt = Field(
        50, alias="AUDIO_ASSETS_BATCH_SIZE", description="Files per run"
    )
    timezone: str = Field(
        "UTC",
        alias="AUDIO_ASSETS_TIMEZONE",
        description="Time zone of the nightly schedule, for instance Europe/Berlin",
    )
    workers: PositiveInt = Field(
        default_factory=usable_cores,
        alias="AUDIO_ASSETS_WORKERS",
        description="Worker processes of a run; the usable cores if unset",
    )

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("should be the name of a time zone, as Europe/Berlin") from None
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
    """Return the process's settings, read from the environment once."""
    return AudioAssetsSettings()
