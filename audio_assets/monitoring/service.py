"""What `audio-assets serve` serves: `/livez`, `/readyz`, `/metrics`, and pages."""

import hmac
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from audio_assets.monitoring.alerts import Alerts, command, webhook
from audio_assets.monitoring.findings import Health, health_of
from audio_assets.monitoring.metrics import ProductCollector
from audio_assets.monitoring.overview import observer
from audio_assets.monitoring.watcher import Watcher
from audio_assets.settings import get_settings

STUCK_S = 60.0
"""Without a round for longer than this the service counts as not alive (s)."""

_COOKIE = "audio_assets"


def service(pages: ASGIApp, token: str | None = None) -> Starlette:
    """Return the application.

    Parameters
    ----------
    pages : ASGI application
        What answers below all other paths.
    token : str, optional
        What a request must bear: ``Authorization: Bearer <token>``, or the cookie that ``/?token=``
        gives a browser. Without one, only requests to this machine by its own names are answered.
    """
    settings, watched = get_settings(), observer()
    # A damaged part would be named at each scrape; publishing names it.
    logging.getLogger("audio_assets.warehouse.ingest").setLevel(logging.CRITICAL)
    channels = {
        "command": settings.alert_command and command(settings.alert_command),
        "webhook": settings.alert_url and webhook(settings.alert_url),
    }
    watcher = Watcher(
        watched.store,
        [
            Alerts(channel, settings.dagster_home / f".incidents.{name}.json")
            for name, channel in channels.items()
            if channel
        ],
    )
    registry = CollectorRegistry()
    watched.findings = lambda: watcher.findings
    registry.register(ProductCollector(watched))

    async def livez(request: Request) -> Response:
        """Whether this process does what it is for."""
        stuck_s = time.monotonic() - watcher.ended_at
        if stuck_s > STUCK_S:
            return PlainTextResponse(f"no check has ended for {stuck_s:.0f} s\n", 503)
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        """Whether work goes on, and what is not well."""
        if watcher.findings is None:
            return JSONResponse({"health": "unknown", "findings": []}, 503)
        health = health_of(watcher.findings)
        body = {"health": health, "findings": [f.shown() for f in watcher.findings]}
        return JSONResponse(body, 503 if health is Health.BROKEN else 200)

    def metrics(request: Request) -> Response:
        """All metrics; Starlette calls it in a thread."""
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return Response(encode(registry), media_type=content_type)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watcher.start()
        yield
        watcher.stop()

    async def root(request: Request) -> Response:
        """Lead to the first page; relative, as a proxy may put all below a path."""
        return RedirectResponse("operations/")

    guard = (
        Middleware(_BearsToken, token=token)
        if token
        else Middleware(
            TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "::1", "[::1]"]
        )
    )
    return Starlette(
        routes=[
            Route("/", root),
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Mount("/", pages),
        ],
        middleware=[Middleware(_OwnPagesOnly), guard],
        lifespan=lifespan,
    )


def _refusal(scope: Scope, status: int, reason: str) -> ASGIApp:
    if scope["type"] == "websocket":
        return WebSocketClose(reason=reason)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return PlainTextResponse(f"{reason}\n", status, headers)


class _OwnPagesOnly:
    """Refuses what a page of another origin has a browser ask: requests and websockets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            origin = headers.get("Origin")
            if origin and origin.partition("://")[2] != headers.get("Host"):
                app = _refusal(scope, 403, "pages of other origins are not answered")
        await app(scope, receive, send)


class _BearsToken:
    """Answers only requests and websockets that bear a token, or a cookie made of it."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()
        self._header = f"Bearer {token}".encode()
        # A cookie cannot hold every character, and browsers keep it.
        self._cookie = hmac.new(self._token, _COOKIE.encode(), "sha256").hexdigest().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] in ("http", "websocket"):
            asked = HTTPConnection(scope)
            header = asked.headers.get("Authorization", "").encode("latin-1")
            cookie = asked.cookies.get(_COOKIE, "").encode()
            given = asked.query_params.get("token", "").encode()
            if scope["path"] == "/" and hmac.compare_digest(given, self._token):
                app = self._let_in(secure=scope["scheme"] == "https")
            elif not (
                hmac.compare_digest(header, self._header)
                or hmac.compare_digest(cookie, self._cookie)
            ):
                app = _refusal(
                    scope,
                    401,
                    "a token is needed: a browser gives it once, /?token=…, all others with each "
                    "request, Authorization: Bearer …",
                )
        await app(scope, receive, send)

    def _let_in(self, *, secure: bool) -> Response:
        # No redirect: after one that another site's link began, a browser sends no strict cookie.
        answer = HTMLResponse('<meta http-equiv="refresh" content="0; url=operations/">')
        answer.set_cookie(
            _COOKIE, self._cookie.decode(), httponly=True, samesite="strict", secure=secure
        )
        return answer
