"""Runs the page's server until it is asked to stop."""

import secrets
import socket
from typing import Any

from pipeline.serve.guard import PARAMETER, Guard, is_loopback


def choose_token(host: str, token: str | None) -> str | None:
    """The token of a server at an address: the given one, else a new one unless it is loopback.

    Raises:
        ValueError: one that could not be part of an address or a cookie.
    """
    if token is None:
        return None if is_loopback(host) else secrets.token_urlsafe(24)
    if not token or not all(c.isascii() and (c.isalnum() or c in "-_") for c in token):
        raise ValueError("--token must be of letters, digits, - and _")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one.

    Raises:
        ValueError: the address is taken, or not of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port}: {reason}") from None


def serve(app: Any, server: socket.socket, host: str, token: str | None) -> None:
    """Serves an application, guarded, and says at which address; returns when it was stopped.

    Raises:
        ValueError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise ValueError("the page needs uvicorn: pip install uvicorn") from None
    config = uvicorn.Config(Guard(app, token=token), log_level="warning", access_log=False)
    shown = f"[{host}]" if ":" in host else host
    query = f"?{PARAMETER}={token}" if token else ""
    print(f"open http://{shown}:{server.getsockname()[1]}/{query}", flush=True)
    uvicorn.Server(config).run(sockets=[server])
