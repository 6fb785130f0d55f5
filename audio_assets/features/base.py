"""What a feature set is: its columns, its two extractors, what it shows in the UI."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audio_assets.audio import Audio

Row = dict[str, Any]
"""One cell's values by column name: plain Python numbers, strings, lists, dicts, or None."""


@dataclass(frozen=True)
class Column:
    """A column of a feature set's table.

    Parameters
    ----------
    name : str
        Column name.
    type : str
        DuckDB type, for instance ``DOUBLE``, ``FLOAT[13]``, ``DOUBLE[]``,
        ``MAP(VARCHAR, FLOAT)``, ``VARCHAR``.
    description : str
        What it is, with its value range.
    unit : str, optional
        Unit, for instance ``s``, ``Hz``, ``dB``, ``LUFS``.
    """

    name: str
    type: str
    description: str
    unit: str | None = None


@dataclass(frozen=True)
class FeatureSet:
    """A feature set: one Dagster asset, one op, one table.

    Parameters
    ----------
    name : str
        Name of the asset (``features/<name>``), the op and the table.
    description : str
        What it measures and by which published algorithm.
    columns : sequence of Column
        The table's columns, without those every table carries.
    extract : callable
        Primary extractor: takes an `Audio`, returns a value for each column.
    extract_alternative : callable
        The same columns in the same units by another library.
    combine : callable
        Joins the rows of consecutive blocks of one file into the file's row, for analysis in
        bounded memory: takes the rows and the blocks' durations (s).
    headline : str
        The column shown in the view ``features.tracks``.
    plotted : sequence of str
        Numeric columns worth a plot in the Dagster UI.
    extractor, alternative : str
        Names of the libraries behind the two extractors, as written to the column ``extractor``.
    code_version : str
        Changes when the values it computes change; rows of another version are computed again.
    reads_pcm : bool
        Whether the extractors need decoded audio; False where they read the file itself.
    kinds : frozenset of str
        Kinds of the asset in the Dagster UI.
    picture : callable, optional
        Draws a row for the Dagster UI, with the functions of `audio_assets.pictures`; returns
        None where there is nothing to draw.
    """

    name: str
    description: str
    columns: Sequence[Column]
    extract: Callable[[Audio], Row]
    extract_alternative: Callable[[Audio], Row]
    combine: Callable[[Sequence[Row], Sequence[float]], Row]
    headline: str
    plotted: Sequence[str]
    extractor: str = "essentia"
    alternative: str = "librosa"
    code_version: str = "1"
    reads_pcm: bool = True
    kinds: frozenset[str] = field(default_factory=lambda: frozenset({"python", "essentia"}))
    picture: Callable[[Row], str | None] | None = None


def check_row(feature_set: FeatureSet, row: Mapping[str, Any]) -> None:
    """Raise if a row's names are not exactly the feature set's columns.

    Raises
    ------
    ValueError
        If a column is missing or unknown.
    """
    expected = {column.name for column in feature_set.columns}
    if set(row) != expected:
        missing, unknown = sorted(expected - set(row)), sorted(set(row) - expected)
        raise ValueError(
            f"extractor of {feature_set.name}: missing columns {missing}, unknown columns {unknown}"
        )
