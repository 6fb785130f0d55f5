"""The page of the operations."""

import marimo

app = marimo.App(width="full", app_title="audio-assets: operations")


@app.cell
def _():
    import marimo as mo

    mo.md("# Operations")
    return (mo,)


if __name__ == "__main__":
    app.run()
