"""Fills in the documents' tables between ``<!-- generated: NAME -->`` and ``<!-- end -->``.

Run ``.venv/bin/python docs/generate.py`` after a change of settings, feature sets, error rules or
recoveries; a test fails until then.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from audio_assets.defs.partitions import FORCE_TAG, RESULT_TAG, RETRY_QUARANTINED_TAG
from audio_assets.defs.resources import ExtractionResource
from audio_assets.extraction.recovery import DECODE, EXTRACT, next_recovery
from audio_assets.features import FEATURE_SETS
from audio_assets.settings import AudioAssetsSettings
from audio_assets.warehouse.views import ACOUSTICBRAINZ, SPOTIFY
from robustness.adaptive_timeout import BASE_TIMEOUTS
from robustness.built_in_rules import BUILT_IN_RULES
from robustness.circuit_breaker import get_circuit_breaker
from robustness.error_classifier import ErrorInfo, ErrorType, RecoveryStrategy
from robustness.error_rules import CONSEQUENCES, Rule
from robustness.instrumentation import EVENTS
from robustness.log_context import FIELDS, LOGGER_NAMES
from robustness.settings import RobustnessSettings

DOCS = Path(__file__).parent
PROJECT = DOCS.parent

BREAKERS = (
    "audio_processing",
    "feature_extraction",
    "database_operations",
    "network_operations",
)


def main() -> None:
    """Bring the documents up to date."""
    for path in DOCS.glob("*.md"):
        text = path.read_text("utf-8")
        if (rendered := render(text)) != text:
            path.write_text(rendered, "utf-8")
            print(f"{path} is up to date now")


def render(text: str) -> str:
    """Return a document with its generated parts as they should be."""
    return re.sub(
        r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + "\n" + TABLES[match[2]]() + "\n" + match[3],
        text,
        flags=re.DOTALL,
    )


def table(*rows: Iterable[str]) -> str:
    """Return a table; the first row is its head."""
    head, *body = (list(row) for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def settings(model: type[AudioAssetsSettings] | type[RobustnessSettings]) -> str:
    """Return the environment variables that fill a settings object."""
    rows = (
        (f"`{field.validation_alias}`", default(field), field.description or "")
        for field in model.model_fields.values()
    )
    return table(("variable", "default", "meaning"), *rows)


def default(field: FieldInfo) -> str:
    """Return a field's default; its description says what is taken where there is none."""
    value = field.default
    if field.default_factory is not None or value in (None, "") or field.is_required():
        return ""
    if isinstance(value, Path):
        value = value.relative_to(PROJECT)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value!s}`".replace("True", "true")


def run_config() -> str:
    """Return the configuration of the resource that the feature ops share."""
    rows = (
        (f"`{name}`", field.description or "")
        for name, field in ExtractionResource.model_fields.items()
    )
    return table(("`resources.extraction.config`", "meaning"), *rows)


def run_tags() -> str:
    """Return the run tags that mean something here."""
    return table(
        ("tag", "meaning"),
        (
            f"`{FORCE_TAG}`",
            "`true`: compute finished and quarantined cells again",
        ),
        (
            f"`{RESULT_TAG}`",
            "set at the end of a run: `complete`, `bad_files` (the cells that failed are "
            "quarantined) or `incomplete`",
        ),
        (
            f"`{RETRY_QUARANTINED_TAG}`",
            "`true`: first release the run's cells from quarantine, as the job `retry_failed` does",
        ),
        (
            "`dagster/asset_partition_range_start`, `…_end`",
            "The first and the last file of the run's batch; set by backfills and by "
            "`audio-assets analyze`",
        ),
    )


def feature_sets() -> str:
    """Return the installed feature sets, with their sources."""
    head = ("feature set", "what", "units", "extractor", "alternative", "licences", "publications")
    rows = (
        (
            f"`{name}`",
            re.split(r"(?<! al)\. |\.$", feature_set.description)[0],
            ", ".join(dict.fromkeys(c.unit for c in feature_set.columns if c.unit)),
            feature_set.extractor,
            feature_set.alternative,
            feature_set.licence,
            feature_set.citation,
        )
        for name, feature_set in FEATURE_SETS.items()
    )
    return table(head, *rows)


def errors() -> str:
    """Return what follows from each error type, and the rules that recognize it."""
    rows = []
    for error_type, usual in CONSEQUENCES.items():
        rules = (rule.name for rule in BUILT_IN_RULES if rule.error_type is error_type)
        rows.append(
            (
                f"`{error_type.name}`",
                usual.severity.value,
                yes(usual.retryable),
                yes(usual.systemic),
                *(recoveries(error_type, stage) for stage in (DECODE, EXTRACT)),
                "; ".join(rules),
            )
        )
    head = ("type", "severity", "retried", "breakers count it")
    stages = (f"recoveries of a failed {stage}" for stage in (DECODE, EXTRACT))
    return table((*head, *stages, "recognized by"), *rows)


def recoveries(error_type: ErrorType, stage: str) -> str:
    """Return the recoveries that follow one another while errors of one type go on."""
    usual = CONSEQUENCES[error_type]
    error = ErrorInfo(
        error_type=error_type,
        severity=usual.severity,
        retryable=usual.retryable,
        systemic=usual.systemic,
        recovery_strategy=usual.recovery_strategy,
        message="",
        exception_type="",
    )
    tried: list[RecoveryStrategy] = []
    while (strategy := next_recovery(error, stage, tried)) and strategy not in tried:
        tried.append(strategy)
    return ", ".join(f"`{strategy}`" for strategy in tried) or "none"


def exceptional_rules() -> str:
    """Return the rules whose consequences are not those of their type."""
    rows = [
        (rule.name, f"`{rule.error_type.name}`", ", ".join(differences))
        for rule in BUILT_IN_RULES
        if (differences := list(_differences(rule)))
    ]
    return table(("rule", "type", "but"), *rows)


def _differences(rule: Rule) -> Iterator[str]:
    own, usual = rule.consequences, CONSEQUENCES[rule.error_type]
    if own.severity is not usual.severity:
        yield f"severity {own.severity}"
    if own.retryable is not usual.retryable:
        yield "retried" if own.retryable else "not retried"
    if own.systemic is not usual.systemic:
        yield "breakers count it" if own.systemic else "breakers do not count it"
    if own.recovery_strategy is not usual.recovery_strategy:
        yield f"recovery `{own.recovery_strategy}`"


def breakers() -> str:
    """Return the breakers that have thresholds of their own."""
    rows = (
        (f"`{name}`", str(breaker.failure_threshold), f"{breaker.recovery_timeout:g}")
        for name in BREAKERS
        if (breaker := get_circuit_breaker(name))
    )
    return table(
        ("breaker", "opens after failures in a row", "probes after (s)"),
        *rows,
        (
            "any other",
            "`CIRCUIT_BREAKER_FAILURE_THRESHOLD`",
            "`CIRCUIT_BREAKER_RECOVERY_TIMEOUT`",
        ),
    )


def base_timeouts() -> str:
    """Return the timeouts before anything is learned."""
    return table(
        ("work", "timeout (s)"),
        *((f"`{name}`", f"{seconds:g}") for name, seconds in BASE_TIMEOUTS.items()),
        ("anything else", "`TIMEOUT_BASE_DELAY`"),
    )


def logging() -> str:
    """Return the loggers and the fields of their records."""
    return table(
        ("logger", "fields of each record"),
        *((f"`{name}`", ", ".join(f"`{field}`" for field in FIELDS)) for name in LOGGER_NAMES),
    )


def events() -> str:
    """Return the events that hooks are called with."""
    return table(
        ("event", "kind", "labels", "what it says"),
        *(
            (
                f"`{event.name}`",
                event.kind,
                ", ".join(f"`{label}`" for label in event.labels) or "none",
                event.description,
            )
            for event in EVENTS.values()
        ),
    )


def services() -> str:
    """Return what the columns under the names of other services are made of."""
    rows = (
        (f"`{view}.{c.name}`", f"`{c.feature_set}.{c.source}`", c.description or "", c.unit or "")
        for view, columns in (("acousticbrainz", ACOUSTICBRAINZ), ("spotify", SPOTIFY))
        for c in columns
    )
    return table(("column of `features`", "made of", "what", "unit"), *rows)


def yes(value: bool) -> str:
    """Return a truth value in words."""
    return "yes" if value else "no"


TABLES: dict[str, Callable[[], str]] = {
    "project_settings": lambda: settings(AudioAssetsSettings),
    "robustness_settings": lambda: settings(RobustnessSettings),
    "run_config": run_config,
    "run_tags": run_tags,
    "feature_sets": feature_sets,
    "errors": errors,
    "exceptional_rules": exceptional_rules,
    "breakers": breakers,
    "base_timeouts": base_timeouts,
    "logging": logging,
    "events": events,
    "services": services,
}

if __name__ == "__main__":
    main()
