"""The charts of the library page."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from audio_assets.pages.tracks import PLACE

MOST_SYMBOLS = 4000
"""Of more tracks a chart shows how many there are in each part of it."""

_ACROSS, _DOWN = 80, 60
_BARS = 50
_GROUPS = 15
_NAMES = ("title", "artist", "file_key")
_MARKED = "marked"


def scatter(frame: pd.DataFrame, x: str, y: str, colour: str) -> alt.Chart:
    """Draw tracks by two columns of numbers, coloured by a column of numbers or texts.

    An area can be marked, see `marked`. Up to `MOST_SYMBOLS` tracks are symbols, of which one can
    be picked. Of more tracks, each cell of a grid has the colour of their mean number
    or most frequent text, the stronger the more they are.
    """
    frame = frame[frame[x].notna() & frame[y].notna()]
    data = pd.DataFrame(
        {
            "x": frame[x].astype(float),
            "y": frame[y].astype(float),
            colour: frame[colour] if is_numeric_dtype(frame[colour]) else _grouped(frame[colour]),
        }
    )
    is_grid = len(frame) > MOST_SYMBOLS
    if is_grid:
        data = _cells(data, colour)
        density = alt.Opacity("tracks:Q", scale=alt.Scale(type="log", range=[0.3, 1]), legend=None)
        chart = (
            alt.Chart(data)
            .mark_rect()
            .encode(x2="x_end", y2="y_end", opacity=density, tooltip=["tracks", colour])
        )
    else:
        names = [name for name in _NAMES if name in frame]
        data = data.assign(**{name: frame[name] for name in names if name != colour})
        chart = alt.Chart(data).mark_circle(size=50, opacity=0.8).encode(tooltip=[*names, colour])
    scale = alt.Scale(zero=False)
    axis: Any = None if (x, y) == PLACE else alt.Undefined
    chart = chart.encode(
        x=alt.X("x:Q", scale=scale, title=x, axis=axis),
        y=alt.Y("y:Q", scale=scale, title=y, axis=axis),
        color=_coloured(data[colour]),
    )
    # Both kinds have both: marimo listens to the same as one takes the other's place.
    picking = alt.selection_point(name="picked", fields=["x"] if is_grid else ["file_key"])
    marking = alt.selection_interval(name=_MARKED, encodings=["x", "y"])
    drawn: alt.Chart = chart.add_params(marking, picking)
    return drawn.properties(width="container", height=460)


def marked(
    frame: pd.DataFrame, x: str, y: str, selections: Mapping[str, Mapping[str, Any]]
) -> pd.DataFrame:
    """Return the tracks in the area that is marked in a chart of `scatter`; all if none is."""
    area = selections.get(_MARKED) or {}
    for name, axis in ((x, "x"), (y, "y")):
        if axis in area:
            frame = frame[frame[name].between(*sorted(area[axis])).fillna(value=False)]
    return frame


def histogram(frame: pd.DataFrame, column: str) -> alt.Chart:
    """Draw how many tracks have which number, or each of the most frequent texts."""
    values = frame[column].dropna()
    if not is_numeric_dtype(values):
        counts = values.value_counts().head(_BARS).rename_axis(column).reset_index(name="tracks")
        bars = alt.Chart(counts).encode(x="tracks:Q", y=alt.Y(f"{column}:N", sort="-x"))
    else:
        tracks, edges = np.histogram(values.astype(float), _BARS)
        data = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "tracks": tracks})
        bars = alt.Chart(data).encode(
            x=alt.X("from:Q", title=column, bin="binned"), x2="to", y="tracks:Q"
        )
    drawn: alt.Chart = bars.mark_bar().encode(tooltip="tracks:Q")
    return drawn.properties(width="container")


def tempo(beats: Sequence[float]) -> alt.Chart:
    """Draw the tempo from beat to beat (1/min) over time (s)."""
    times = np.array(beats)
    steps = np.diff(times)
    data = pd.DataFrame({"time": times[:-1], "tempo": 60 / np.where(steps > 0, steps, np.nan)})
    thinned = data.groupby(np.arange(len(data)) * MOST_SYMBOLS // max(len(data), MOST_SYMBOLS))
    line: alt.Chart = alt.Chart(thinned.median()).mark_line(point=True)
    line = line.encode(
        x=alt.X("time:Q", title="time (s)"),
        y=alt.Y("tempo:Q", title="tempo (1/min)", scale=alt.Scale(zero=False)),
        tooltip=["time:Q", "tempo:Q"],
    )
    return line.properties(width="container", height=140)


def _cells(data: pd.DataFrame, colour: str) -> pd.DataFrame:
    """Return the cells of a grid that hold tracks: their edges, ``tracks``, and the colour."""
    edges = {"x": np.histogram_bin_edges(data["x"], _ACROSS)}
    edges["y"] = np.histogram_bin_edges(data["y"], _DOWN)
    places = [
        np.clip(np.searchsorted(edges[axis], data[axis], "right") - 1, 0, len(edges[axis]) - 2)
        for axis in ("x", "y")
    ]
    cells = data[colour].groupby(places)
    if is_numeric_dtype(data[colour]):
        shades = cells.mean()
    else:
        counts = data[colour].groupby([*places, data[colour]]).size().sort_values()
        by_count = counts.index.to_frame(index=False)
        shades = by_count.drop_duplicates([0, 1], keep="last").set_index([0, 1])[colour]
    found = pd.DataFrame({"tracks": cells.size(), colour: shades})
    for level, axis in enumerate(("x", "y")):
        place = found.index.get_level_values(level)
        found[axis], found[f"{axis}_end"] = edges[axis][place], edges[axis][place + 1]
    return found.reset_index(drop=True)


def _grouped(texts: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return texts with the rare ones, and none, as one."""
    frequent = texts.value_counts().index[:_GROUPS]
    return texts.where(texts.isin(frequent), "others")


def _coloured(shades: "pd.Series[Any]") -> alt.Color:
    if is_numeric_dtype(shades):
        return alt.Color(f"{shades.name}:Q", scale=alt.Scale(scheme="viridis"))
    order = list(shades.value_counts().index)
    return alt.Color(f"{shades.name}:N", sort=order, scale=alt.Scale(scheme="tableau20"))
