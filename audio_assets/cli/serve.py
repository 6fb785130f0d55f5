"""`audio-assets serve`."""

import gc
import ipaddress
import socket
from typing import Annotated

import typer

from audio_assets.cli.endings import ExitCode, UserError
from audio_assets.cli.printing import console


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any.", min=0, max=65535)] = 3001,
) -> None:
    """Serve pages, health and metrics by HTTP, and send alerts."""
    from audio_assets.settings import get_settings

    token = get_settings().token
    if not token and not _is_loopback(host):
        raise UserError(
            f"{host} can be reached by others: set AUDIO_ASSETS_TOKEN to a secret that each "
            "request must bear, or listen on 127.0.0.1."
        )
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Name another --port.",
            ExitCode.FAILED,
        ) from None

    import uvicorn

    from audio_assets.monitoring.service import service
    from audio_assets.pages import Pages

    name, port = listener.getsockname()[:2]
    url = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    console.print(
        f"Pages on {url}, health on {url}/readyz, metrics on {url}/metrics",
        highlight=False,
    )
    gc.set_threshold(50_000)  # all is imported
    config = uvicorn.Config(service(Pages(), token), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
