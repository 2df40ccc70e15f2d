"""Who may talk to the server: this machine's own pages, or who has the token."""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

COOKIE, PARAMETER = "maskpath_token", "token"
SAFE_METHODS = ("GET", "HEAD")
# Nothing from elsewhere, no other page around ours, and no address (with its token) for others.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Message = MutableMapping[str, Any]
Application = Callable[..., Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether a name or address of a host is this machine, seen from itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Wraps an ASGI application; refuses requests that are not from its own page.

    Without a token, the host that a request names must be a loopback one: the pages of a domain
    that was pointed at this machine (DNS rebinding) name that domain. With a token, every request
    must have it: as ?token=, which sets a cookie, as that cookie, or as `Authorization: Bearer`.
    What changes something must not come from another site's page.
    """

    def __init__(self, app: Application, *, token: str | None = None):
        self.app, self.token = app, token

    async def __call__(self, scope: Message, receive: Callable, send: Callable) -> None:
        """As ASGI 3.0 has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        given = parse_qs(scope["query_string"].decode("latin-1")).get(PARAMETER, [""])[-1]
        extra = dict(HEADERS)
        if self.token and self._is_token(given):
            extra["Set-Cookie"] = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *map(_encode, extra.items())]
            await send(message)

        if problem := self._problem(scope["method"], headers, given):
            await _refuse(send_guarded, problem)
        else:
            await self.app(scope, receive, send_guarded)

    def _problem(self, method: str, headers: dict[str, str], given: str) -> str:
        """Why a request is refused; empty if it is not."""
        host = headers.get("host", "")
        if self.token is None and not is_loopback(_host_name(host)):
            return "this server answers to localhost only"
        if self.token is not None and not any(
            map(self._is_token, (given, _bearer(headers), _cookie(headers)))
        ):
            return "open the address that tools/serve.py printed: it ends in ?token=..."
        origin = headers.get("origin")
        if method not in SAFE_METHODS and origin is not None and urlsplit(origin).netloc != host:
            return "this request comes from another site's page"
        return ""

    def _is_token(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())


def _host_name(host: str) -> str:
    """Of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _bearer(headers: dict[str, str]) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value if scheme.lower() == "bearer" else ""


def _cookie(headers: dict[str, str]) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _encode(header: tuple[str, str]) -> tuple[bytes, bytes]:
    return header[0].lower().encode("latin-1"), header[1].encode("latin-1")


async def _refuse(send: Callable, problem: str) -> None:
    body = f'{{"error": "{problem}"}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
