"""The page of the library."""

import marimo

app = marimo.App(width="full", app_title="audio-assets: library")


@app.cell
def _():
    import marimo as mo

    mo.md("# Library")
    return (mo,)


if __name__ == "__main__":
    app.run()
