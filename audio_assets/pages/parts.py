"""The parts of the operations page: tables and charts of an overview."""

import html
from datetime import datetime
from functools import lru_cache
from typing import Any

import altair as alt
import marimo as mo
import pandas as pd

from audio_assets.library.text import four_digits
from audio_assets.monitoring.overview import Overview, Part, as_text

STATES = {"CLOSED": "#2e7d32", "HALF_OPEN": "#f9a825", "OPEN": "#c62828"}
STATES |= {"FORCED_OPEN": "#6a1b9a", "DISABLED": "#757575"}
HEALTH = {"well": "✓ well", "degraded": "! degraded", "broken": "✗ broken", "unknown": "…"}
HEIGHT = 160
"""Of a chart (px)."""


def headline(overview: Overview) -> mo.Html:
    """Return the figures that tell how it goes."""
    throughput, workers = overview.parts["throughput"], overview.parts["workers"]
    speed, compared = "?", ""
    if throughput.rows:
        *_, audio_rate, of_usual = throughput.rows[0]
        speed = f"{four_digits(audio_rate)} s/s"
        compared = "audio per time" + (f", {of_usual} of the usual" if of_usual else "")
    left = "?" if overview.cells_left is None else f"{overview.cells_left:,}"
    end, interval = overview.end_shown
    busy = "?" if workers.unknown else str(len(workers.rows))
    return mo.hstack(
        [
            mo.stat(HEALTH[overview.health], label="Health", bordered=True),
            mo.stat(end, label="All done", caption=interval, bordered=True),
            mo.stat(left, label="Cells left", bordered=True),
            mo.stat(speed, label="Speed now", caption=compared, bordered=True),
            mo.stat(busy, label="Workers busy", bordered=True),
        ],
        widths="equal",
        gap=1,
    )


def unknown(overview: Overview) -> list[mo.Html]:
    """Return why parts are not known."""
    return [mo.callout(_text(reason), kind="warn") for reason in overview.unknown]


def table(part: Part, nothing: str, title: str = "") -> mo.Html:
    """Return a part as a table; `nothing` says what it means that it has no rows."""
    if part.unknown or not part.rows:
        return _titled(title, _said(part, nothing))
    frame = pd.DataFrame([map(as_text, row) for row in part.rows], columns=part.columns)
    with pd.option_context("display.max_colwidth", None):
        return _titled(title, mo.Html(frame.to_html(index=False, escape=True, border=0)))


@lru_cache(maxsize=1)
def throughput(part: Part) -> mo.Html:
    """Return the throughput of each minute as a chart."""
    if part.unknown:
        return _said(part, "")
    frame = _frame(part)
    charts = [
        alt.Chart(frame, height=HEIGHT, width="container")
        .mark_area(opacity=0.6, line=True, interpolate="step-after")
        .encode(alt.X("time:T", title=None), alt.Y(f"{name}:Q", title=name))
        for name in part.columns[1:]
    ]
    return mo.hstack(charts, widths="equal", gap=1)


@lru_cache(maxsize=1)
def errors(part: Part) -> mo.Html:
    """Return the errors of each quarter of an hour by type, as a chart."""
    return _charted(
        part,
        "No attempt failed in the last day.",
        lambda chart: chart.mark_bar(width=8).encode(
            alt.X("time:T", title=None),
            alt.Y("sum(attempts):Q", title="failed attempts"),
            alt.Color("error:N", title=None),
            alt.Tooltip(["time:T", "error:N", "attempts:Q"]),
        ),
    )


def breakers(part: Part, now: datetime) -> mo.Html:
    """Return the states of the breakers on a time line."""
    rows = []
    until: dict[str, datetime] = {}
    for name, _, state, time, why in reversed(part.rows):
        rows.append((name, state, time, until.get(name, now), why))
        until[name] = time
    return _charted(
        Part(("breaker", "state", "time", "until", "why"), tuple(rows), part.unknown),
        "No breaker changed its state in the last day.",
        lambda chart: chart.mark_bar().encode(
            alt.X("time:T", title=None),
            alt.X2("until:T"),
            alt.Y("breaker:N", title=None),
            alt.Color(
                "state:N",
                title=None,
                scale=alt.Scale(domain=list(STATES), range=list(STATES.values())),
            ),
            alt.Tooltip(["breaker:N", "state:N", "time:T", "until:T", "why:N"]),
        ),
    )


@lru_cache(maxsize=1)
def timeouts(part: Part) -> mo.Html:
    """Return how much of the timeouts was used, by feature set, as a chart."""
    return _ranges(part, slice(4, 7), "share of the timeout that was used", 1)


@lru_cache(maxsize=1)
def memory(part: Part) -> mo.Html:
    """Return how much of their budget workers used, by feature set, as a chart."""
    budget = part.rows[0][4] if part.rows else 0
    return _ranges(part, slice(1, 4), "memory of a worker, up to its budget (MiB)", budget)


def _ranges(part: Part, columns: slice, title: str, limit: float) -> mo.Html:
    """Return a chart of three columns: medians, 95 % quantiles and maxima, up to a limit."""
    if part.unknown or not part.rows:
        return _said(part, "Nothing was computed in the last day.")
    long = _frame(part).melt("feature set", part.columns[columns], "of attempts", "value")
    chart = alt.Chart(long, height=HEIGHT, width="container").mark_tick(thickness=3)
    return mo.as_html(
        chart.encode(
            alt.X("value:Q", title=title, scale=alt.Scale(domainMax=max(limit, long.value.max()))),
            alt.Y("feature set:N", title=None),
            alt.Color("of attempts:N", title=None, sort=None),
            tooltip=["feature set:N", "of attempts:N", "value:Q"],
        )
    )


def _charted(part: Part, nothing: str, draw: Any) -> mo.Html:
    if part.unknown or not part.rows:
        return _said(part, nothing)
    return mo.as_html(draw(alt.Chart(_frame(part), height=HEIGHT, width="container")))


def _frame(part: Part) -> pd.DataFrame:
    return pd.DataFrame(part.rows, columns=part.columns)


def _said(part: Part, nothing: str) -> mo.Html:
    """Return the text of a part without rows; the top of the page says why it is not known."""
    return _text("Not known." if part.unknown else nothing)


def _text(text: str) -> mo.Html:
    return mo.Html(f"<span>{html.escape(text)}</span>")


def _titled(title: str, content: mo.Html) -> mo.Html:
    return mo.vstack([mo.md(f"### {title}"), content]) if title else content
