"""The head of every page."""

import marimo as mo

from audio_assets.pages import PAGES


def heading(page: str, *controls: object) -> mo.Html:
    """Return the name of a page, links to the others, and its controls."""
    links = (f"[{other.title()}](../{other}/)" for other in PAGES if other != page)
    head = [mo.md(text) for text in (f"# {page.title()}", *links)]
    return mo.hstack([*head, *controls], justify="start", align="center", gap=2)
