"""Who may talk to the proxy, and what is written down about it: method, path, status and seconds, nothing else.

On loopback the danger is a web page in the same user's browser: it can send requests to 127.0.0.1, and by pointing a
name of its own there (DNS rebinding) read the answers too. So the Host header must name this machine, and a request
that changes or costs something must not come from another origin. Elsewhere a token is required.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpcinfer.client.proxy.failures import TokenError, refusal
from mpcinfer.client.proxy.metrics import Clock, Meter
from mpcinfer.client.proxy.streaming import CallerGone
from mpcinfer.errors import ForbiddenError

_log = logging.getLogger(__name__)

PATHS = (
    "/",
    "/healthz",
    "/metrics",
    "/api/parties",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
)
# the page itself holds no secret and asks for the token; whether the proxy lives is none either
_OPEN = ("/", "/healthz")
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")
_HERE = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE)
_CLIENT_CLOSED = 499


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """An ASGI application around another: lets in who may come in, and keeps the log and the count."""

    def __init__(self, app: ASGIApp, meter: Meter, *, loopback: bool, token: str | None) -> None:
        self._app, self._meter = app, meter
        self._loopback = loopback
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        clock, status = Clock(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._admit(scope["method"], scope["path"], Headers(scope=scope))
            await self._app(scope, receive, sending)
        except CallerGone:
            status = _CLIENT_CLOSED
        except Exception as error:
            if not status:
                await refusal(error)(scope, receive, sending)
        finally:
            path = route(scope["path"])
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            self._meter.request(path, status or _CLIENT_CLOSED, clock())
            _log.info("%s %s %d %.3f s", method, path, status or _CLIENT_CLOSED, clock())

    def _admit(self, method: str, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._loopback and not _HERE.fullmatch(host):
            raise ForbiddenError("the Host header must be localhost, 127.0.0.1 or [::1]: use one of these as address")
        if method not in ("GET", "HEAD"):
            same = origin is None or origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
            if not same or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                raise ForbiddenError("another web page sent this request; only the proxy's own page may")
        if self._token is not None and path not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                raise TokenError("send the proxy's token as `Authorization: Bearer TOKEN` (the API key of clients)")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send JSON, with Content-Type: application/json")


def route(path: str) -> str:
    """The path as it may be logged: those that there are. Any other could say anything."""
    if path in PATHS:
        return path
    return next((f"{each}{{id}}" for each in ("/v1/models/", "/v1/receipts/") if path.startswith(each)), "other")
