"""The operations page: how it goes, what each worker is at, what fails, and when all is done."""

import marimo

app = marimo.App(width="full", app_title="Operations: audio-assets")


@app.cell
def _():
    import marimo as mo

    from audio_assets.monitoring.overview import observer
    from audio_assets.pages import parts
    from audio_assets.pages.navigation import heading

    return heading, mo, observer, parts


@app.cell
def _(mo):
    refresh = mo.ui.refresh(options=["3s", "15s", "60s"], default_interval="3s")
    return (refresh,)


@app.cell
def _(observer, refresh):
    _ = refresh.value
    overview = observer().overview()
    part = overview.parts
    return overview, part


@app.cell
def _(heading, mo, overview, parts, refresh):
    mo.vstack([heading("operations", refresh), parts.headline(overview), *parts.unknown(overview)])
    return


@app.cell
def _(part, parts):
    parts.table(part["findings"], "All is well.", "Findings")
    return


@app.cell
def _(mo, part, parts):
    mo.vstack(
        [
            mo.md("### Throughput"),
            parts.throughput(part["history"]),
            parts.table(part["throughput"], ""),
        ]
    )
    return


@app.cell
def _(mo, part, parts):
    mo.vstack(
        [
            parts.table(part["workers"], "No worker has a task.", "Workers"),
            parts.table(part["runs"], "No run is active."),
        ]
    )
    return


@app.cell
def _(mo, overview, part, parts):
    mo.hstack(
        [
            mo.vstack([mo.md("### Errors of the last day"), parts.errors(part["errors"])]),
            mo.vstack(
                [
                    mo.md("### Breakers"),
                    parts.table(part["breakers"], "All breakers are closed."),
                    parts.breakers(part["transitions"], overview.taken_at),
                ]
            ),
        ],
        widths="equal",
        gap=1,
    )
    return


@app.cell
def _(part, parts):
    parts.table(part["failing"], "No cell failed in the last day.", "Failing, the latest first")
    return


@app.cell
def _(part, parts):
    parts.table(part["slowest"], "Nothing was computed in the last day.", "Slowest of the last day")
    return


@app.cell
def _(mo, part, parts):
    mo.hstack(
        [
            mo.vstack([mo.md("### Timeouts"), parts.timeouts(part["timeouts"])]),
            mo.vstack([mo.md("### Memory"), parts.memory(part["memory"])]),
        ],
        widths="equal",
        gap=1,
    )
    return


if __name__ == "__main__":
    app.run()
