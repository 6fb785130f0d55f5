"""Small pictures of a cell's row, for the pages of Dagster's UI.

Dagster's UI shows images in Markdown that are ``data:`` URLs, in place if the Markdown has fewer
than `INLINE_CHARACTERS`, behind a button if not. So each picture is one path and a few words of
SVG.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from urllib.parse import quote
from xml.sax.saxutils import escape

INLINE_CHARACTERS = 1000

WIDTH, HEIGHT = 300, 72
_LINE_HEIGHT, _LABEL_WIDTH, _VALUE_WIDTH = 14, 100, 60
_POINTS = 65

# Colours that can be read on Dagster's light background and on its dark one.
_INK, _FILL = "gray", "royalblue"

# What a URL between < and > may hold as it is; SVG's quotes are single here.
_UNQUOTED = "/:;,=+-.()'? "


def markdown(svg: str, shown: str) -> str:
    """Return a picture as Markdown that Dagster's UI shows.

    Parameters
    ----------
    svg : str
        The picture, from one of the functions below.
    shown : str
        What it shows, in words and without brackets, for those who cannot see it.
    """
    return f"![{shown}](<{data_url(svg)}>)"


def data_url(svg: str) -> str:
    """Return the address of a picture, which is the picture itself."""
    return f"data:image/svg+xml,{quote(svg, _UNQUOTED)}"


def columns(values: Sequence[float] | None, labels: Sequence[str] = ()) -> str | None:
    """Draw values as columns up or down from zero.

    Parameters
    ----------
    values : sequence of float or None
        The values, from left to right; None draws nothing.
    labels : sequence of str
        One letter, or a blank, to stand under each column.
    """
    if not values:
        return None
    low, high = min(0.0, *values), max(0.0, *values)
    foot = HEIGHT - (_LINE_HEIGHT if labels else 0)
    step = WIDTH / len(values)
    scale = foot / ((high - low) or 1.0)
    zero = high * scale
    path = "".join(
        f"M{_short(i * step)} {_short(zero)}v{_short(-value * scale)}h{_short(step * 0.8)}"
        f"V{_short(zero)}"
        for i, value in enumerate(values)
    )
    places = " ".join(_short((i + 0.25) * step) for i in range(len(labels)))
    text = f"<text y='{HEIGHT - 3}' x='{places}'>{escape(''.join(labels))}</text>" if labels else ""
    return _svg(HEIGHT, f"<path fill='{_FILL}' d='{path}'/>{text}")


def bars(
    values: Mapping[str, float | None], unit: str | Mapping[str, str] = "", *, low: float = 0.0
) -> str | None:
    """Draw named values as bars from a common left edge, the largest over the whole width.

    Parameters
    ----------
    values : mapping of str to float or None
        The values by name, from top to bottom; what is None is left out.
    unit : str or mapping of str to str, optional
        Follows each number: the same for all, or by name.
    low : float, optional
        Value of the left edge.
    """
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return None
    span = max(max(known.values()) - low, 1e-9)
    scale = (WIDTH - _LABEL_WIDTH - _VALUE_WIDTH) / span
    path, text = "", ""
    for i, (name, value) in enumerate(known.items()):
        shown = _number(value) + (unit if isinstance(unit, str) else unit[name])
        top, length = i * _LINE_HEIGHT, max((value - low) * scale, 0.0)
        path += f"M{_LABEL_WIDTH} {top + 3}h{_short(length)}v9H{_LABEL_WIDTH}"
        text += f"<tspan x='0' y='{top + 11}'>{escape(name)}</tspan>"
        text += f"<tspan x='{_short(_LABEL_WIDTH + length + 4)}'>{escape(shown)}</tspan>"
    return _svg(len(known) * _LINE_HEIGHT, f"<path fill='{_FILL}' d='{path}'/><text>{text}</text>")


def curve(x: Sequence[float], y: Sequence[float], x_unit: str = "", y_unit: str = "") -> str | None:
    """Draw a curve above zero, with its ranges in numbers.

    Parameters
    ----------
    x, y : sequence of float
        The points, in the order of `x`; under two of them draw nothing. Of many points,
        neighbours are averaged.
    x_unit, y_unit : str, optional
        Follow the numbers.
    """
    if len(x) < 2:
        return None
    first, last = x[0], x[-1]
    x, y = _thinned(x), _thinned(y)
    foot = HEIGHT - _LINE_HEIGHT
    across = WIDTH / ((last - first) or 1.0)
    up = (foot - _LINE_HEIGHT) / (max(y) or 1.0)
    points = [
        (round((a - first) * across), round(foot - b * up)) for a, b in zip(x, y, strict=True)
    ]
    path = "M{} {}".format(*points[0]) + "".join(
        f"l{right - left} {lower - upper}" for (left, upper), (right, lower) in pairwise(points)
    )
    text = (
        f"<tspan y='10'>{_number(min(y))} to {_number(max(y))}{escape(y_unit)}</tspan>"
        f"<tspan x='0' y='{HEIGHT - 3}'>{_number(first)}</tspan>"
        f"<tspan x='{WIDTH}' text-anchor='end'>{_number(last)}{escape(x_unit)}</tspan>"
    )
    return _svg(HEIGHT, f"<path fill='none' stroke='{_FILL}' d='{path}'/><text>{text}</text>")


def _thinned(values: Sequence[float]) -> list[float]:
    size = -(-len(values) // _POINTS)
    chunks = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(chunk) / len(chunk) for chunk in chunks]


def _svg(height: int, content: str) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
        f"font-family='sans-serif' font-size='11' fill='{_INK}'>{content}</svg>"
    )


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
