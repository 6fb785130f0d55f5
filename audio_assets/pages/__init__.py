"""The pages of `audio-assets serve`, each a marimo notebook that is shown as an app.

Nothing of marimo is imported before a page is asked for: it holds as much memory as all else.
"""

import asyncio
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGES = ("operations", "library")
"""The notebooks in this directory."""

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'self'; frame-ancestors 'self'"
)
"""What a browser lets a page load: nothing of any other host. Vega compiles its expressions."""


class Pages:
    """Serves each page below its name; an ASGI application."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._importing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or a websocket."""
        async with self._importing:
            if self._app is None:
                self._app = await asyncio.to_thread(_imported)

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _imported() -> ASGIApp:
    import marimo

    from audio_assets.pages.player import audio

    apps = marimo.create_asgi_app(quiet=True)
    for page in PAGES:
        apps = apps.with_app(path=f"/{page}", root=str(Path(__file__).with_name(f"{page}.py")))
    return Starlette(
        routes=[Route("/audio/{content_hash}", audio), Mount("/", apps.build())],
    )
