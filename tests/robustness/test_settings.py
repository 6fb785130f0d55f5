from collections.abc import Iterator
from pathlib import Path

import pytest

from robustness.settings import RobustnessSettings, RobustnessSettingsError, get_settings


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for field in RobustnessSettings.model_fields.values():
        monkeypatch.delenv(str(field.validation_alias), raising=False)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_defaults() -> None:
    settings = get_settings()
    assert settings.memory_aware is True
    assert settings.circuit_breaker_failure_threshold == 5
    assert settings.circuit_breaker_recovery_timeout == 60
    assert settings.timeout_base_delay == 60
    assert settings.timeout_max_delay == 600
    assert settings.timeout_memory_threshold == 0.8
    assert settings.state_url is None


def test_environment_sets_every_field(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "MEMORY_AWARE": "false",
        "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "7",
        "CIRCUIT_BREAKER_RECOVERY_TIMEOUT": "90",
        "ROBUSTNESS_HALF_OPEN_PERMITS": "2",
        "ROBUSTNESS_PAROLE_DAYS": "14",
        "TIMEOUT_BASE_DELAY": "30",
        "TIMEOUT_MAX_DELAY": "300",
        "TIMEOUT_MEMORY_THRESHOLD": "0.9",
        "ROBUSTNESS_TIMEOUT_FLOOR": "3",
        "ROBUSTNESS_TIMEOUT_QUANTILE": "0.9",
        "ROBUSTNESS_TIMEOUT_MARGIN": "5",
        "ROBUSTNESS_TIMEOUT_MIN_SAMPLES": "20",
        "ROBUSTNESS_RETRY_MAX_ATTEMPTS": "4",
        "ROBUSTNESS_RETRY_BUDGET_RATIO": "0.1",
        "ROBUSTNESS_RETRY_TOTAL_SECONDS": "900",
        "ROBUSTNESS_WORKER_MEMORY_MIB": "700",
        "ROBUSTNESS_STATE_URL": "postgresql://db/robustness",
        "ROBUSTNESS_STATE_LOCK_TIMEOUT": "2",
        "ROBUSTNESS_STATE_RETRY_INTERVAL": "10",
    }
    defaults = get_settings()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    settings = get_settings()
    for name, field in RobustnessSettings.model_fields.items():
        assert field.validation_alias in values
        assert field.description
        assert getattr(settings, name) != getattr(defaults, name), name


def test_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_settings()
    monkeypatch.setenv("TIMEOUT_MAX_DELAY", "120")
    assert get_settings() is first


def test_state_lies_in_dagster_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert get_settings().state_url == f"sqlite:///{tmp_path}/robustness.db"


def test_all_problems_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_FAILURE_THRESHOLD", "0")
    monkeypatch.setenv("TIMEOUT_MEMORY_THRESHOLD", "80")
    monkeypatch.setenv("MEMORY_AWARE", "perhaps")
    with pytest.raises(RobustnessSettingsError) as caught:
        get_settings()
    message = str(caught.value)
    assert "CIRCUIT_BREAKER_FAILURE_THRESHOLD=0 must be more than 0" in message
    assert "TIMEOUT_MEMORY_THRESHOLD=80 must be at most 1" in message
    assert "MEMORY_AWARE=perhaps must be true or false" in message


@pytest.mark.parametrize("value", ["inf", "1e300", "nan"])
def test_times_that_no_clock_can_add_are_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("ROBUSTNESS_RETRY_TOTAL_SECONDS", value)
    with pytest.raises(RobustnessSettingsError, match="ROBUSTNESS_RETRY_TOTAL_SECONDS"):
        get_settings()


def test_bounds_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMEOUT_MAX_DELAY", "30")
    with pytest.raises(RobustnessSettingsError, match="TIMEOUT_BASE_DELAY=60 must not be above"):
        get_settings()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("mysql://robot:secret@db/state", "must be an SQLite or PostgreSQL URL, not mysql"),
        ("robot:secret at db", "must be an SQLAlchemy URL"),
    ],
)
def test_unusable_state_url_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, url: str, problem: str
) -> None:
    monkeypatch.setenv("ROBUSTNESS_STATE_URL", url)
    with pytest.raises(RobustnessSettingsError) as caught:
        get_settings()
    assert f"ROBUSTNESS_STATE_URL {problem}" in str(caught.value)
    assert "secret" not in str(caught.value)
