"""What a feature set is: its columns, its two extractors, what it shows in the UI."""

import keyword
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

if TYPE_CHECKING:
    from audio_assets.audio.pcm import Audio

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""One cell's values by column name: plain Python numbers, strings, lists, dicts, or None."""

Reads = Literal["pcm", "file", "decoding"]

_ROUNDING = 1e-5
"""By how much a number of 32 bits may leave its range, of a bound over 1 by this share."""

_NUMBERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE"}
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")

RESERVED_NAMES = frozenset(
    {
        *(
            "files",
            "missing",
            "degraded",
            "tracks",
            "acousticbrainz",
            "spotify",
        ),  # of the warehouse
        *("identify", "inspect", "hash", "duration", "decode"),  # stages
        *("published_tables", "robustness_tables"),  # other ops; then what Dagster reserves
        *("arg_dict", "bool", "conf", "config", "context", "dict", "float", "input"),
        *("input_arg_dict", "int", "meta", "output", "output_arg_dict", "str", "type"),
        *keyword.kwlist,
    }
)
"""Names that no feature set may have."""


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
        What it is, without its unit and range.
    unit : str, optional
        Unit, for instance ``s``, ``Hz``, ``dB``, ``LUFS``.
    low, high : float, optional
        Range of its numbers, or of those in its lists and maps. Default: all that are finite.
    """

    name: str
    type: str
    description: str
    unit: str | None = None
    low: float | None = None
    high: float | None = None

    @property
    def range(self) -> str | None:
        """Its range in words, for instance ``0 to 1``."""
        match self.low, self.high:
            case None, None:
                return None
            case low, None:
                return f"≥ {low:g}"
            case None, high:
                return f"≤ {high:g}"
            case low, high:
                return f"{low:g} to {high:g}"

    @property
    def comment(self) -> str:
        """Its description with its range and unit."""
        values = " ".join(filter(None, (self.range, self.unit)))
        return f"{self.description} ({values})" if values else self.description

    def has(self, number: float) -> bool:
        """Return whether a number is finite and, but for rounding, in the range."""
        low = -math.inf if self.low is None else self.low - _ROUNDING * max(1, abs(self.low))
        high = math.inf if self.high is None else self.high + _ROUNDING * max(1, abs(self.high))
        return math.isfinite(number) and low <= number <= high


COMMON_COLUMNS = (
    Column("file_key", "VARCHAR", "The file: name of its root and path below it, escaped"),
    Column("content_hash", "VARCHAR", "Hash of the file's content when the row was computed"),
    Column("extractor", "VARCHAR", "Library that made the row"),
    Column("computed_at", "TIMESTAMPTZ", "When the row was computed, or taken from a copy's"),
    Column("run_id", "VARCHAR", "Dagster run that computed the row, or took it from a copy's"),
    Column("code_version", "VARCHAR", "Version of the feature set's code"),
    Column(
        "complete_share",
        "DOUBLE",
        "Share of the length the file states that was analysed; NULL if it states none",
        low=0,
        high=1,
    ),
    Column("degraded", "VARCHAR", "Why the values may differ from those of a sound file and run"),
    Column("degraded_since", "TIMESTAMPTZ", "Since when they may; NULL if they do not"),
    Column(
        "retry_after",
        "TIMESTAMPTZ",
        "When the row is computed again, as its file is not the cause; NULL if it is final",
    ),
)
"""What every feature table carries before its own columns."""


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """A feature set: one Dagster asset, one op, one table.

    Parameters
    ----------
    name : str
        Name of the asset (``features/<name>``), the op and the table: lower-case letters, digits
        and ``_``.
    description : str
        What it measures and by which published algorithm.
    columns : sequence of Column
        The table's columns, without `COMMON_COLUMNS`.
    licence : str
        Licences of the libraries behind the two extractors, and of trained weights.
    citation : str
        The publications or standards that define the algorithm.
    extract : callable
        Primary extractor: takes an `Audio`, returns a value for each column.
    extract_alternative : callable
        The same columns in the same units by another library.
    combine : callable
        Joins the rows of consecutive blocks of one file into the file's row, for analysis in
        bounded memory: takes the rows and the blocks' durations (s). Only called if `reads` is
        ``pcm``.
    picture : callable, optional
        Draws a row for the Dagster UI, with the functions of `audio_assets.features.pictures`;
        returns None where there is nothing to draw.
    contradiction : callable, optional
        Takes a row and the length of the audio (s), and says what in the row cannot be so, or None.
    headline : str
        The column shown in the view ``features.tracks``.
    plotted : sequence of str
        Numeric columns worth a plot in the Dagster UI.
    extractor, alternative : str
        Names of the libraries behind the two extractors, as written to the column ``extractor``.
    reads : {'pcm', 'file', 'decoding'}
        What the extractors need: decoded audio; the file itself; or the file and the result of its
        decoding, which is then `Audio.source` or, if it failed, `Audio.decode_error`. The last
        come after all others, whether the file could be decoded or not.
    shortest_s : float
        The shortest audio (s) that its values mean something for; the view ``features.tracks``
        names it in ``too_short`` for files that are shorter. Default: any length.
    position : int
        The order in which a file's cells are computed and tables are listed, lowest first, then by
        name. The built-in feature sets have 10 to 90.
    code_version : str
        Changes when the values it computes change; rows of another version are computed again.
    kinds : frozenset of str
        Kinds of the asset in the Dagster UI.

    Raises
    ------
    ValueError
        If a name is not allowed, a column is named twice, `headline` is no column, a plotted one
        is no number, `shortest_s` is no length, or `reads` is unknown.
    """

    name: str
    description: str
    columns: Sequence[Column]
    licence: str
    citation: str
    extract: "Callable[[Audio], Row]"
    extract_alternative: "Callable[[Audio], Row]"
    combine: Callable[[Sequence[Row], Sequence[float]], Row]
    picture: Callable[[Row], str | None] | None = None
    contradiction: Callable[[Mapping[str, Any], float | None], str | None] | None = None
    headline: str
    plotted: Sequence[str] = ()
    extractor: str = "essentia"
    alternative: str = "librosa"
    reads: Reads = "pcm"
    shortest_s: float = 0.0
    position: int = 100
    code_version: str = "1"
    kinds: frozenset[str] = field(default_factory=lambda: frozenset({"python", "essentia"}))

    def __post_init__(self) -> None:
        if not _IDENTIFIER.fullmatch(self.name) or self.name in RESERVED_NAMES:
            raise ValueError(f"{self.name!r} cannot be the name of a feature set")
        types: dict[str, str] = {}
        taken = {column.name for column in COMMON_COLUMNS}
        for column in self.columns:
            if not _IDENTIFIER.fullmatch(column.name) or column.name in taken | types.keys():
                raise ValueError(
                    f"{column.name!r} cannot be the name of a column, or is one already"
                )
            types[column.name] = column.type
        if self.headline not in types:
            raise ValueError(f"its headline {self.headline!r} is not one of its columns")
        if wrong := [name for name in self.plotted if types.get(name) not in _NUMBERS]:
            raise ValueError(f"only columns of numbers can be plotted, not {', '.join(wrong)}")
        if not 0 <= self.shortest_s < math.inf:
            raise ValueError(f"shortest_s must be 0 s or more, not {self.shortest_s}")
        if self.reads not in get_args(Reads):
            raise ValueError(f"reads must be one of {', '.join(get_args(Reads))}")

    @property
    def reads_pcm(self) -> bool:
        """Whether the extractors need decoded audio."""
        return self.reads == "pcm"

    def draw(self, row: Row) -> str | None:
        """Return the picture of a row, as SVG.

        None if there is nothing to draw, or drawing it failed, which is logged.
        """
        try:
            return self.picture(row) if self.picture else None
        except Exception:  # the values count without it
            logger.warning("The picture of %s failed", self.name, exc_info=True)
            return None

    @property
    def empty_row(self) -> Row:
        """A row in which every column is None."""
        return dict.fromkeys(column.name for column in self.columns)


class ImplausibleValueError(ValueError):
    """An extractor's value is none that the column can have."""

    error_type: ClassVar[str] = "AUDIO_PROCESSING"
    systemic: ClassVar[bool] = False


def check_row(feature_set: FeatureSet, row: Mapping[str, Any], duration_s: float | None) -> None:
    """Check a row before it is stored.

    Parameters
    ----------
    feature_set : FeatureSet
        What it is of.
    row : mapping
        The extractor's values.
    duration_s : float or None
        Length of the audio (s), if it was decoded.

    Raises
    ------
    ImplausibleValueError
        If a number is NaN, infinite or outside its column's range, or the row contradicts itself or
        the audio.
    ValueError
        If a column is missing or unknown.
    """
    expected = {column.name for column in feature_set.columns}
    if set(row) != expected:
        missing, unknown = sorted(expected - set(row)), sorted(set(row) - expected)
        raise ValueError(
            f"extractor of {feature_set.name}: missing columns {missing}, unknown columns {unknown}"
        )
    for column in feature_set.columns:
        for number in _numbers(row[column.name]):
            if not column.has(number):
                raise ImplausibleValueError(
                    f"{feature_set.name} is implausible: {column.name} is {number:.6g}, its range "
                    f"is {column.range or 'all finite numbers'}"
                )
    if feature_set.contradiction and (found := feature_set.contradiction(row, duration_s)):
        raise ImplausibleValueError(f"{feature_set.name} is implausible: {found}")


def _numbers(value: object) -> Iterator[float]:
    match value:
        case str() | bytes() | bool():
            return
        case Real():
            yield float(value)
        case Mapping():
            yield from _numbers(value.values())
        case Iterable():
            for element in value:
                yield from _numbers(element)
