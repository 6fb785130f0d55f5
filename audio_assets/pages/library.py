"""The page of the library: a marimo notebook, shown as an app."""

import marimo

app = marimo.App(width="full", app_title="audio-assets: library")

with app.setup(hide_code=True):
    from contextlib import suppress
    from html import escape
    from urllib.parse import quote

    import altair as alt
    import marimo as mo
    import pandas as pd
    from pandas.api.types import is_numeric_dtype

    from audio_assets.features.pictures import data_url
    from audio_assets.library.text import four_digits, printable
    from audio_assets.pages import charts, similar
    from audio_assets.pages.details import details
    from audio_assets.pages.navigation import heading
    from audio_assets.pages.saving import saved
    from audio_assets.pages.tracks import PLACE, present_tracks
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.queries import QueryError

    alt.renderers.set_embed_options(actions=False)
    warehouse = get_settings().warehouse


@app.function
def plain(text):
    """Show a text of any origin as it is."""
    return mo.Html(f'<div style="overflow-wrap: anywhere">{escape(printable(text))}</div>')


@app.function
def said(text, kind="neutral"):
    """Show a message."""
    return mo.callout(plain(text), kind=kind)


@app.function
def cell(value):
    """Return what a cell of a table shows."""
    if pd.isna(value):
        return ""
    return four_digits(value) if isinstance(value, float | int) else str(value)


@app.function
def table(frame, **options):
    """Show tracks, or what is known of one, a page at a time."""
    hidden = {"content_hash", *PLACE}
    if "missing" in frame and frame["missing"].isna().all():
        hidden.add("missing")
    return mo.ui.table(
        frame.reset_index(drop=True),
        format_mapping=dict.fromkeys(frame.columns, cell),
        show_column_summaries=False,
        show_data_types=False,
        show_download=False,
        show_search=False,
        hidden_columns=[name for name in frame.columns if name in hidden],
        **options,
    )


@app.function
def open_track(rows):
    """Go to the page of a track if it is the only one that was chosen."""
    # A cell that named this state would run again as it changes.
    if len(rows) == 1 and "file_key" in rows:
        mo.query_params()["track"] = rows["file_key"].iloc[0]


@app.function
def chart(frame, x, y, colour):
    """Show tracks by two columns; a click on a symbol opens its track."""
    return mo.ui.altair_chart(
        charts.scatter(frame, x, y, colour), legend_selection=False, on_change=open_track
    )


@app.function
def save_buttons(keys):
    """Offer to save tracks."""
    return mo.hstack(
        [
            mo.md(f"Tracks to save: {len(keys):,}"),
            *(
                mo.download(
                    lambda ending=ending: saved(warehouse, list(keys), ending),
                    filename=f"tracks.{ending}",
                    label=ending.upper(),
                )
                for ending in ("csv", "parquet", "m3u8")
            ),
        ],
        justify="start",
    )


@app.cell
def _():
    try:
        tracks = present_tracks(warehouse)
    except QueryError as error:
        mo.stop(True, mo.vstack([heading("library"), said(str(error), "warn")]))
    mo.stop(
        tracks.frame.empty,
        mo.vstack([heading("library"), said("The library is empty: no file was analysed yet.")]),
    )
    address = mo.query_params()
    return address, tracks


@app.cell
def _(tracks):
    search = mo.ui.text(
        placeholder="title, artist, album or file", label="Search", debounce=300, full_width=True
    )
    filtered_by = mo.ui.multiselect(
        [name for name in tracks.frame.columns if name in {*tracks.numbers, *tracks.texts}],
        label="Filter by",
    )
    colour = mo.ui.dropdown(
        [*tracks.texts, *tracks.numbers],
        value=next(n for n in ("top_tag", "genre", "folder") if n in tracks.frame),
        label="Colour",
    )
    return colour, filtered_by, search


@app.cell
def _(filtered_by, tracks):
    def filter_of(name):
        values = tracks.frame[name].dropna()
        if not is_numeric_dtype(values):
            return mo.ui.multiselect(list(values.value_counts().index[:1000]), label=name)
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
        return mo.ui.range_slider(
            low, high, (high - low) / 200 or 1, [low, high], label=name, show_value=True
        )

    filters = mo.ui.dictionary({name: filter_of(name) for name in filtered_by.value})
    return (filters,)


@app.cell
def _(filters, search, tracks):
    found = tracks.matching(search.value, filters.value)
    return (found,)


@app.cell
def _(colour, found, tracks):
    places = None
    if len(tracks.heard):
        places = chart(found, *PLACE, colour.value)
    return (places,)


@app.cell
def _(colour, found, places):
    on_map = found if places is None else charts.marked(found, *PLACE, places.selections)
    # What is a cell of a grid on the whole map is a symbol here.
    part = None
    if len(on_map) < len(found) and len(found) > charts.MOST_SYMBOLS:
        part = chart(on_map, *PLACE, colour.value)
    return on_map, part


@app.cell
def _(tracks):
    first, second = (
        name if name in tracks.numbers else "duration_s" for name in ("bpm", "integrated_lufs")
    )
    across = mo.ui.dropdown(tracks.numbers, value=first, label="Across")
    up = mo.ui.dropdown(tracks.numbers, value=second, label="Up")
    counted = mo.ui.dropdown([*tracks.numbers, *tracks.texts], value=first, label="Count by")
    return across, counted, up


@app.cell
def _(across, colour, on_map, up):
    plot = chart(on_map, across.value, up.value, colour.value)
    return (plot,)


@app.cell
def _(across, on_map, plot, up):
    chosen = charts.marked(on_map, across.value, up.value, plot.selections)
    return (chosen,)


@app.cell
def _(chosen, tracks):
    listed = table(
        chosen, page_size=15, header_tooltip=dict(tracks.descriptions), on_change=open_track
    )
    return (listed,)


@app.cell
def _():
    seek_duplicates = mo.ui.run_button(label="Look for duplicates")
    return (seek_duplicates,)


@app.cell
def _(seek_duplicates, tracks):
    alike = None
    if seek_duplicates.value:
        alike = table(similar.duplicates(tracks), selection="single", on_change=open_track)
    return (alike,)


@app.cell
def _(
    across,
    alike,
    chosen,
    colour,
    counted,
    filtered_by,
    filters,
    listed,
    on_map,
    part,
    places,
    plot,
    search,
    seek_duplicates,
    tracks,
    up,
):
    selected = listed.value if len(listed.value) else chosen
    the_map = said("There is no map: no track has an embedding of the feature set musicnn.")
    if places is not None:
        the_map = mo.vstack([places] if part is None else [places, part])
    of_plots = [
        mo.hstack([across, up], justify="start"),
        plot,
        counted,
        charts.histogram(on_map, counted.value),
    ]
    of_duplicates = [seek_duplicates] if alike is None else [seek_duplicates, alike]
    overview = mo.vstack(
        [
            heading("library"),
            mo.md(
                f"{len(tracks.frame):,} tracks · version {tracks.version}, published "
                f"{tracks.published_at:%Y-%m-%d %H:%M} UTC; reload the page for a newer one"
            ),
            mo.hstack([search, filtered_by, colour], widths=[2, 1, 1]),
            mo.hstack(list(filters.values()), justify="start", wrap=True),
            mo.ui.tabs(
                {
                    "Map": the_map,
                    "Plots": mo.vstack(of_plots),
                    "Duplicates": mo.vstack(of_duplicates),
                }
            ),
            listed,
            save_buttons(selected["file_key"]),
        ]
    )
    return (overview,)


@app.cell
def _(address, tracks):
    track = address.get("track")
    known = problem = None
    if track is None:
        problem = said("Click a track in the map or in the table to see more of it.")
    else:
        try:
            known = details(warehouse, track)
        except QueryError as error:
            problem = said(str(error), "warn")
        else:
            if known is None:
                problem = said(f"{track} is not in the library.", "warn")
    row = None
    if known is not None and track in tracks.row_of:
        row = tracks.frame.iloc[tracks.row_of[track]]
    return known, problem, row, track


@app.cell
def _(address, row, track, tracks):
    near = way = None
    begin = mo.ui.button(label="Start a path here", on_click=lambda _: address.set("from", track))
    if row is not None and pd.notna(row[PLACE[0]]):
        near = table(similar.neighbours(tracks, track), selection="single", on_change=open_track)
        start = address.get("from")
        if start is not None and start != track:
            with suppress(KeyError):  # one that is not on the map
                way = similar.path(tracks, start, track)
    return begin, near, way


@app.cell
def _(way):
    steps = None
    if way is not None:
        steps = table(way, selection="single", on_change=open_track)
    return (steps,)


@app.cell
def _(begin, known, near, problem, row, steps, track, way):
    page = problem
    if known is not None:
        names = [] if row is None else row.reindex(["artist", "title"]).dropna()
        parts = [plain(text) for text in (" - ".join(names), track, known.path)]
        if row is not None and pd.notna(row["content_hash"]):
            parts.append(mo.audio(f"../audio/{quote(row['content_hash'], safe='')}"))
        if len(known.beats) > 1:
            parts.append(charts.tempo(known.beats))
        tables = {
            "Values": known.values,
            "Tags": known.tags,
            "Attempts": known.attempts,
            "Missing": known.missing,
            "Degraded": known.degraded,
        }
        views = {}
        if near is not None:
            views["Neighbours"] = mo.vstack([begin, near])
        if way is not None:
            views["Path"] = mo.vstack([steps, save_buttons(way["file_key"])])
        # marimo puts the address between single quotes.
        pictures = [
            mo.image(data_url(svg).replace("'", "%27"), alt=name, caption=name)
            for name, svg in known.pictures.items()
        ]
        views["Pictures"] = mo.vstack(pictures, align="start")
        views |= {
            f"{name} ({len(frame)})": table(frame, selection=None) for name, frame in tables.items()
        }
        parts.append(mo.ui.tabs(views))
        page = mo.vstack(parts)
    return (page,)


@app.cell
def _(overview, page):
    mo.Html(
        '<div style="display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); '
        f'gap: 2rem; align-items: start">{overview}{page}</div>'
    )
    return


if __name__ == "__main__":
    app.run()
