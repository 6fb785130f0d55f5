"""The views of the warehouse: tracks, missing cells with reasons, and the services' columns."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from audio_assets.features.base import Column, FeatureSet
from audio_assets.warehouse.schema import FILES, feature_table, literal, quoted


@dataclass(frozen=True)
class View:
    """A view of the warehouse.

    Parameters
    ----------
    name : str
        Its name in the schema ``features``.
    description : str
        What one row is.
    select : str
        Its query.
    columns : tuple of Column
        What its columns are, in order; the query decides on their types.
    """

    name: str
    description: str
    select: str
    columns: tuple[Column, ...]

    @property
    def sql_name(self) -> str:
        """Quoted name of the view in DuckDB."""
        return f"features.{quoted(self.name)}"


@dataclass(frozen=True)
class Derived:
    """A column of a view, made of a column of a feature set.

    Parameters
    ----------
    name : str
        Its name.
    feature_set, source : str
        The column that it is made of.
    sql : str
        How; ``{}`` stands for that column.
    description, unit : str, optional
        What it is. Default: what that column is.
    type : str, optional
        Its type. Default: that column's.
    """

    name: str
    feature_set: str
    source: str
    sql: str = "{}"
    description: str | None = None
    unit: str | None = None
    type: str | None = None


def _same(feature_set: str, *names: str) -> tuple[Derived, ...]:
    return tuple(Derived(name, feature_set, name) for name in names)


_TRACKS = (
    *_same("metadata", "title", "artist", "album"),
    Derived(
        "year",
        "metadata",
        "date",
        "TRY_CAST(nullif(regexp_extract({}, '[12][0-9][0-9][0-9]'), '') AS INTEGER)",
        "Year of the tagged date",
        type="INTEGER",
    ),
    *_same("metadata", "genre", "duration_s", "container", "codec"),
    *_same("rhythm", "bpm", "bpm_confidence", "beat_confidence"),
    *_same("key", "key", "scale", "camelot"),
    Derived("key_strength", "key", "strength"),
    *_same("loudness", "integrated_lufs", "loudness_range_lu", "true_peak_dbtp"),
    *_same("danceability", "danceability"),
    *_same("musicnn", "top_tag", "top_tags"),
)


def _measured(
    name: str, feature_set: str, source: str, what: str, unit: str | None = None, sql: str = "{}"
) -> Derived:
    return Derived(name, feature_set, source, sql, f"measured: {what}", unit)


def _moments(name: str, source: str, what: str, unit: str | None = None) -> tuple[Derived, ...]:
    square = f"{unit}²" if unit else None
    return (
        _measured(f"{name}_mean", "spectral", f"{source}_mean", f"mean {what}", unit),
        _measured(
            f"{name}_var", "spectral", f"{source}_std", f"variance of {what}", square, "{} ** 2"
        ),
    )


ACOUSTICBRAINZ = (
    _measured("metadata_audio_properties_length", "metadata", "duration_s", "duration", "s"),
    _measured("metadata_audio_properties_codec", "metadata", "codec", "codec, by FFmpeg's name"),
    _measured("metadata_audio_properties_bit_rate", "metadata", "bit_rate", "bit rate", "bit/s"),
    *(
        _measured(f"metadata_tags_{tag}", "metadata", source, f"tag {tag}, the first value")
        for tag, source in (
            ("title", "title"),
            ("artist", "artist"),
            ("album", "album"),
            ("genre", "genre"),
            ("date", "date"),
            ("musicbrainz_recordingid", "musicbrainz_recording_id"),
        )
    ),
    _measured(
        "lowlevel_dynamic_complexity",
        "loudness",
        "dynamic_complexity_db",
        "mean deviation of the level from the global level",
        "dB",
    ),
    *_moments("lowlevel_spectral_centroid", "centroid", "spectral centroid", "Hz"),
    *_moments("lowlevel_spectral_rolloff", "rolloff", "85 % spectral rolloff", "Hz"),
    *_moments("lowlevel_spectral_flux", "flux", "spectral flux"),
    *_moments("lowlevel_zerocrossingrate", "zero_crossing_rate", "zero crossing rate, 0 to 1"),
    _measured(
        "lowlevel_spectral_contrast_coeffs_mean",
        "spectral",
        "contrast_mean",
        "mean spectral contrast of six bands, -1 to 0",
    ),
    _measured("lowlevel_mfcc_mean", "mfcc", "mean", "mean of 13 coefficients", "dB"),
    _measured("rhythm_bpm", "rhythm", "bpm", "tempo", "1/min"),
    _measured("rhythm_beats_count", "rhythm", "beats_count", "number of beats"),
    _measured("rhythm_beats_position", "rhythm", "beats", "times of the beats", "s"),
    _measured("rhythm_onset_rate", "rhythm", "onset_rate", "onsets per second", "1/s"),
    _measured("rhythm_danceability", "danceability", "danceability", "danceability, 0 to about 3"),
    *(
        Derived(
            f"tonal_key_{source}", "key", source, "{}", f"estimated: {what}, by another profile"
        )
        for source, what in (
            ("key", "tonic, with a flat or a sharp"),
            ("scale", "major or minor"),
            ("strength", "correlation with the key's profile, -1 to 1"),
        )
    ),
    _measured("tonal_hpcp_mean", "chroma", "mean", "mean of each pitch class, A first; 12, not 36"),
    _measured("tonal_tuning_frequency", "chroma", "tuning_hz", "frequency of the tuning A", "Hz"),
)
"""Under the names of its JSON, joined by ``_``."""

_PITCH_CLASSES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")

SPOTIFY = (
    _measured(
        "duration_ms", "metadata", "duration_s", "duration", "ms", "round(1000 * {})::BIGINT"
    ),
    _measured("tempo", "rhythm", "bpm", "tempo", "1/min"),
    _measured(
        "key",
        "key",
        "key",
        "tonic, 0 (C) to 11 (B); -1 if there is none",
        sql=f"coalesce(list_position({list(_PITCH_CLASSES)}, {{}}), 0) - 1",
    ),
    _measured(
        "mode",
        "key",
        "scale",
        "1 in major, 0 in minor",
        sql="CASE {} WHEN 'major' THEN 1 WHEN 'minor' THEN 0 END",
    ),
    Derived(
        "loudness",
        "loudness",
        "integrated_lufs",
        description="estimated: integrated loudness of EBU R128, in place of a mean level",
        unit="LUFS",
    ),
    Derived(
        "danceability",
        "danceability",
        "danceability",
        "CASE WHEN {0} IS NOT NULL THEN least({0} / 3, 1) END",
        "estimated: a third of Essentia's danceability, 0 to 1; another algorithm than Spotify's",
    ),
)
"""Under the names of its Web API."""


def views(feature_sets: Sequence[FeatureSet]) -> tuple[View, ...]:
    """Return every view; columns of feature sets that are not installed are left out."""
    return (
        _of_files(
            "tracks",
            "One row per file that is in the library: what to filter by, then the headline of each "
            "other feature set",
            (*_TRACKS, *_headlines(feature_sets), _too_short(feature_sets)),
            feature_sets,
            last=(
                _names_where(feature_sets, lambda one: f"{quoted(one.name)}.degraded IS NOT NULL")
                + " AS degraded",
                Column("degraded", "VARCHAR[]", "Feature sets whose rows are degraded"),
            ),
        ),
        _of_files(
            "acousticbrainz",
            "One row per file that is in the library: values under the names of AcousticBrainz's "
            "low-level data",
            ACOUSTICBRAINZ,
            feature_sets,
        ),
        _of_files(
            "spotify",
            "One row per file that is in the library: values under the names of Spotify's audio "
            "features",
            SPOTIFY,
            feature_sets,
        ),
        _missing(feature_sets),
        _degraded(feature_sets),
    )


def _of_files(
    name: str,
    description: str,
    derived: Sequence[Derived],
    feature_sets: Sequence[FeatureSet],
    last: tuple[str, Column] | None = None,
) -> View:
    """Return a view with a row for each file that is there; `last` is a column of its own."""
    defined = {
        (feature_set.name, column.name): column
        for feature_set in feature_sets
        for column in feature_set.columns
    }
    known = [column for column in derived if (column.feature_set, column.source) in defined]
    needed = {column.feature_set for column in known}
    if last:
        needed |= {feature_set.name for feature_set in feature_sets}
    of_files = [c for c in FILES.columns if c.name in ("file_key", "path", "content_hash")]
    selected, columns = [f"files.{column.name}" for column in of_files], list(of_files)
    for column in known:
        source = defined[column.feature_set, column.source]
        sql = column.sql.format(f"{quoted(column.feature_set)}.{quoted(column.source)}")
        selected.append(f"{sql} AS {quoted(column.name)}")
        columns.append(
            replace(source, name=column.name)
            if column.description is None
            else Column(column.name, column.type or source.type, column.description, column.unit)
        )
    if last:
        selected.append(last[0])
        columns.append(last[1])
    joins = " ".join(
        f"LEFT JOIN {feature_table(feature_set).sql_name} AS {quoted(feature_set.name)} "
        "USING (file_key)"
        for feature_set in feature_sets
        if feature_set.name in needed
    )
    select = (
        f"SELECT {', '.join(selected)} FROM library.files AS files {joins} "
        "WHERE NOT coalesce(files.gone, false)"
    )
    return View(name, description, select, tuple(columns))


def _headlines(feature_sets: Sequence[FeatureSet]) -> list[Derived]:
    """Return the headlines that ``features.tracks`` does not have by name.

    One is prefixed by its feature set's name if other feature sets have a column of that name:
    ``mfcc_mean``.
    """
    named = Counter(column.name for feature_set in feature_sets for column in feature_set.columns)
    shown = {(column.feature_set, column.source) for column in _TRACKS}
    names = {column.name for column in _TRACKS} | {"path", "too_short"}
    found = []
    for feature_set in feature_sets:
        headline = feature_set.headline
        if (feature_set.name, headline) not in shown:
            is_taken = named[headline] > 1 or headline in names
            name = f"{feature_set.name}_{headline}" if is_taken else headline
            found.append(Derived(name, feature_set.name, headline))
    return found


def _too_short(feature_sets: Sequence[FeatureSet]) -> Derived:
    needs = ", ".join(f"{one.name} {one.shortest_s:g} s" for one in feature_sets if one.shortest_s)
    return Derived(
        "too_short",
        "metadata",
        "duration_s",
        _names_where(feature_sets, lambda one: f"{{0}} < {one.shortest_s}"),
        f"Feature sets that need a longer file for their values to mean something ({needs})",
        type="VARCHAR[]",
    )


def _names_where(feature_sets: Sequence[FeatureSet], condition: Callable[[FeatureSet], str]) -> str:
    """Return the SQL of the list of feature sets that fulfil a condition."""
    cases = (f"CASE WHEN {condition(one)} THEN {literal(one.name)} END" for one in feature_sets)
    return f"[{', '.join(cases)}].list_filter(lambda name: name IS NOT NULL)"


def _degraded(feature_sets: Sequence[FeatureSet]) -> View:
    select = " UNION ALL ".join(
        f"SELECT file_key, {literal(feature_set.name)} AS feature_set, degraded AS reason, "
        "degraded_since AS since, retry_after IS NULL AS final "
        f"FROM {feature_table(feature_set).sql_name} JOIN library.files USING (file_key) "
        "WHERE degraded IS NOT NULL AND NOT coalesce(files.gone, false)"
        for feature_set in feature_sets
    )
    return View(
        "degraded",
        "One row per cell whose values may differ from those of a sound file and run",
        select,
        (
            FILES.columns[0],
            Column("feature_set", "VARCHAR", "The feature set"),
            Column("reason", "VARCHAR", "What is missing, or what failed"),
            Column("since", "TIMESTAMPTZ", "When the values were first computed so"),
            Column("final", "BOOLEAN", "Whether the file is the cause; else it is computed again"),
        ),
    )


def _missing(feature_sets: Sequence[FeatureSet]) -> View:
    names = ", ".join(f"({literal(feature_set.name)})" for feature_set in feature_sets)
    rows = " UNION ALL ".join(
        f"SELECT file_key, {literal(feature_set.name)} AS feature_set, content_hash "
        f"FROM {feature_table(feature_set).sql_name}"
        for feature_set in feature_sets
    )
    select = f"""
        WITH present AS ({rows}),
        absent AS (
            SELECT file_key, feature_set, present.file_key IS NOT NULL AS is_outdated
            FROM library.files AS files
            CROSS JOIN (VALUES {names}) AS sets(feature_set)
            LEFT JOIN present USING (file_key, feature_set)
            WHERE NOT coalesce(files.gone, false)
                AND (present.file_key IS NULL OR present.content_hash <> files.content_hash)
        ),
        tried AS (
            SELECT attempts.* FROM robustness.attempts
            SEMI JOIN absent USING (file_key, feature_set)
        ),
        last AS (
            SELECT
                file_key, feature_set,
                arg_max_null(outcome, row_id) AS outcome,
                arg_max_null(message, row_id) AS message,
                arg_max_null(error_type, row_id) AS error_type,
                arg_max_null(started_at, row_id) AS started_at,
                max(row_id) FILTER (outcome IN ('succeeded', 'reused')) AS success_id
            FROM tried GROUP BY ALL
        ),
        failing AS (
            SELECT file_key, feature_set, min(tried.started_at) AS since
            FROM tried JOIN last USING (file_key, feature_set)
            WHERE success_id IS NULL OR row_id > success_id
            GROUP BY ALL
        )
        SELECT
            file_key, feature_set,
            CASE
                WHEN outcome IN ('failed', 'given_up', 'deferred', 'skipped', 'quarantined')
                    THEN coalesce(regexp_replace(message, {literal(_VARYING)}, '', 'g'), outcome)
                WHEN is_outdated THEN 'the file has changed since'
                WHEN outcome IS NULL THEN 'never attempted'
                ELSE 'its row is not in the landing'
            END AS reason,
            failing.since,
            last.outcome,
            last.error_type,
            last.started_at AS last_attempt
        FROM absent
        LEFT JOIN last USING (file_key, feature_set)
        LEFT JOIN failing USING (file_key, feature_set)
    """
    return View(
        "missing",
        "One row per cell (a file in the library and a feature set) without a current row",
        select,
        (
            FILES.columns[0],
            Column("feature_set", "VARCHAR", "The feature set"),
            Column("reason", "VARCHAR", "Why there is no row; the same for all that fail alike"),
            Column("since", "TIMESTAMPTZ", "First attempt since the last success; NULL if none"),
            Column("outcome", "VARCHAR", "Outcome of the last attempt; NULL if there was none"),
            Column("error_type", "VARCHAR", "Classified error of the last attempt; NULL if none"),
            Column("last_attempt", "TIMESTAMPTZ", "When the last attempt began; NULL if none did"),
        ),
    )


_VARYING = (
    r"^in quarantine( since [^:]*(:\d\d)*( UTC)?)?: "
    r"| since \d{4}-\d\d-\d\d[ T][\d:.]+( UTC)?|; try again in \d+ s$"
)
"""What differs between the messages of cells that fail alike."""
