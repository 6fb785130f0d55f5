"""The views of the warehouse: tracks with their features, and missing cells with reasons."""

from collections import Counter
from collections.abc import Sequence

from audio_assets.features.base import Column, FeatureSet
from audio_assets.warehouse.schema import feature_table, literal, quoted

TRACKS_COMMENT = "One row per file: the headline of each feature set; see the column gone"
MISSING_COMMENT = "One row per cell (a file in the library and a feature set) without a current row"

_FROM_METADATA = ("title", "artist", "duration_s")


def tracks_view(feature_sets: Sequence[FeatureSet]) -> str:
    """Return the statement that creates ``features.tracks``."""
    tables = [feature_table(feature_set).sql_name for feature_set in feature_sets]
    selected = [
        f"{quoted(feature_set)}.{quoted(column)} AS {quoted(name)}"
        for name, (feature_set, column) in headlines(feature_sets).items()
    ]
    inventory = ["files.path", "coalesce(files.gone, false) AS gone"]
    keys = " UNION ".join(f"SELECT file_key FROM {t}" for t in ("library.files", *tables))
    joins = " ".join(
        f"LEFT JOIN {table} AS {quoted(feature_set.name)} USING (file_key)"
        for feature_set, table in zip(feature_sets, tables, strict=True)
    )
    return f"""
        CREATE OR REPLACE VIEW features.tracks AS
        SELECT {", ".join(["file_key", *selected, *inventory])}
        FROM ({keys}) LEFT JOIN library.files AS files USING (file_key) {joins}
    """


def headlines(feature_sets: Sequence[FeatureSet]) -> dict[str, tuple[str, str]]:
    """Return the feature set and column that each column of ``features.tracks`` shows.

    Title, artist and duration come first. A headline is prefixed by its feature set's name if other
    feature sets have a column of that name: ``mfcc_mean``.
    """
    named = Counter(column.name for feature_set in feature_sets for column in feature_set.columns)
    shown = {
        column.name: (feature_set.name, column.name)
        for feature_set in feature_sets
        if feature_set.name == "metadata"
        for wanted in _FROM_METADATA
        for column in feature_set.columns
        if column.name == wanted
    }
    for feature_set in feature_sets:
        source = (feature_set.name, feature_set.headline)
        if source in shown.values():
            continue
        shared = named[feature_set.headline] > 1
        name = f"{feature_set.name}_{feature_set.headline}" if shared else feature_set.headline
        shown[name] = source
    return shown


def headline_columns(feature_sets: Sequence[FeatureSet]) -> dict[str, Column]:
    """Return the definitions of the columns of feature sets in ``features.tracks``."""
    defined = {
        (feature_set.name, column.name): column
        for feature_set in feature_sets
        for column in feature_set.columns
    }
    return {name: defined[source] for name, source in headlines(feature_sets).items()}


def missing_view(feature_sets: Sequence[FeatureSet]) -> str:
    """Return the statement that creates ``features.missing``."""
    names = ", ".join(f"({literal(feature_set.name)})" for feature_set in feature_sets)
    rows = " UNION ALL ".join(
        f"SELECT file_key, {literal(feature_set.name)} AS feature_set, content_hash "
        f"FROM {feature_table(feature_set).sql_name}"
        for feature_set in feature_sets
    )
    return f"""
        CREATE OR REPLACE VIEW features.missing AS
        WITH present AS ({rows}),
        last AS (
            SELECT
                file_key, feature_set,
                arg_max_null(outcome, row_id) AS outcome,
                arg_max_null(message, row_id) AS message,
                arg_max_null(error_type, row_id) AS error_type,
                arg_max_null(started_at, row_id) AS started_at
            FROM robustness.attempts GROUP BY ALL
        )
        SELECT
            file_key, feature_set,
            CASE
                WHEN outcome IN ('failed', 'given_up', 'deferred', 'skipped', 'quarantined')
                    THEN coalesce(message, outcome)
                WHEN present.file_key IS NOT NULL THEN 'the file has changed since'
                WHEN outcome IS NULL THEN 'never attempted'
                ELSE 'its row is not in the landing'
            END AS reason,
            last.outcome,
            last.error_type,
            last.started_at AS last_attempt
        FROM library.files AS files
        CROSS JOIN (VALUES {names}) AS sets(feature_set)
        LEFT JOIN present USING (file_key, feature_set)
        LEFT JOIN last USING (file_key, feature_set)
        WHERE NOT coalesce(files.gone, false)
            AND (present.file_key IS NULL OR present.content_hash <> files.content_hash)
    """
