"""Finds the feature sets of all installed packages, this one's included, by their entry points."""

import io
import logging
import pickle
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from audio_assets.features.base import FeatureSet

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

GROUP = "audio_assets.feature_sets"
"""Entry point group: each entry point leads to a `FeatureSet`."""

OWN_DISTRIBUTION = "audio-assets"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokenFeatureSet:
    """A feature set that is left out.

    Parameters
    ----------
    name : str
        Name of its entry point.
    distribution : str
        The installed package that declares it.
    reason : str
        What is wrong with it.
    """

    name: str
    distribution: str
    reason: str


class NoFeatureSetsError(RuntimeError):
    """The built-in feature sets are not declared: audio-assets is not installed, or outdated."""


def load_feature_sets() -> tuple[dict[str, FeatureSet], list[BrokenFeatureSet]]:
    """Load the feature sets of all installed packages.

    One that cannot be imported or is not valid is logged and left out. Of two with one name the
    built-in one stays, or that of the package whose name sorts first.

    Returns
    -------
    (dict of str to FeatureSet, list of BrokenFeatureSet)
        The feature sets by name, in the order in which a file's cells are computed: by position
        and name, those that read what decoding found last; and those left out.

    Raises
    ------
    NoFeatureSetsError
        If the built-in ones are not among them.
    """
    from audio_assets.warehouse.schema import in_memory

    found: dict[str, FeatureSet] = {}
    broken: list[BrokenFeatureSet] = []
    declared = sorted(entry_points(group=GROUP), key=_precedence)
    if not declared or _distribution(declared[0]) != OWN_DISTRIBUTION:
        raise NoFeatureSetsError(
            f"{OWN_DISTRIBUTION} is not installed, or was before it declared its feature sets: "
            "install it again (make run, or pip install -e .)"
        )
    with in_memory() as connection:
        for entry_point in declared:
            try:
                feature_set = _load(entry_point, connection)
                if feature_set.name in found:
                    raise ValueError(f"there is another feature set {feature_set.name!r}")
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it may raise anything
                reason = f"{type(error).__name__}: {error}"
                broken.append(
                    BrokenFeatureSet(entry_point.name, _distribution(entry_point), reason)
                )
                logger.warning(
                    "Feature set %r of the package %s is left out: %s",
                    *(entry_point.name, _distribution(entry_point), reason),
                )
            else:
                found[feature_set.name] = feature_set
    in_order = sorted(found.values(), key=lambda s: (s.reads == "decoding", s.position, s.name))
    return {feature_set.name: feature_set for feature_set in in_order}, broken


def import_feature_sets() -> None:
    """Import what the feature sets of all installed packages need, except what is broken."""
    for entry_point in entry_points(group=GROUP):
        with suppress(Exception, SystemExit):
            entry_point.load()


def _load(entry_point: EntryPoint, connection: "DuckDBPyConnection") -> FeatureSet:
    feature_set = entry_point.load()
    if not isinstance(feature_set, FeatureSet):
        raise TypeError(f"{entry_point.value} is not a FeatureSet")
    pickle.dumps(feature_set)  # workers get it so: its functions must be importable
    _check_types([column.type for column in feature_set.columns], connection)
    return feature_set


def _check_types(types: Sequence[str], connection: "DuckDBPyConnection") -> None:
    """Raise if DuckDB does not know one of the types, or Parquet has none for it."""
    from pyarrow import parquet

    values = ", ".join(f"NULL::{type_} AS c{i}" for i, type_ in enumerate(types))
    rows = connection.sql(f"SELECT {values}").to_arrow_table()
    parquet.write_table(rows, io.BytesIO())


def _precedence(entry_point: EntryPoint) -> tuple[bool, str, str]:
    distribution = _distribution(entry_point)
    return distribution != OWN_DISTRIBUTION, distribution, entry_point.name


def _distribution(entry_point: EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else "unknown"
