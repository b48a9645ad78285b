"""What every request passes before the app answers it, and every answer on its way out.

Hosts and origins of browsers, keys, sizes and times of bodies; ids, headers, metrics and the log.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, shown, too_large, too_slow
from .log import log, log_error
from .metrics import Metrics

_OPEN = ("/", "/health", "/openapi.json", "/favicon.ico")  # without a key, as are static files
_HEADERS = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own; [::1] as in URLs, too."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def read_keys(file: str | Path) -> tuple[str, ...]:
    """The keys of a file, one a line. Raises OSError, or ValueError for a file without any."""
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: keys must be of ASCII characters") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ValueError(f"{file}: expected a key on each line, found none")
    return keys


@dataclass(frozen=True)
class GateOptions:
    """What is let in.

    keys:         one of which a request must name; none: it need not
    any_host:     whether requests may call this server by any name, as where it has an address
                  of its own; otherwise by a loopback one, so that no page of another name gets in
    max_body:     bytes
    body_seconds: within which a body must have arrived
    log:          whether changes and errors are printed, a line each, on stderr
    """

    keys: tuple[str, ...] = ()
    any_host: bool = False
    max_body: int = 32 * 2**20
    body_seconds: float = 60.0
    log: bool = False


class Gate:
    """An ASGI app around another."""

    def __init__(self, app: ASGIApp, options: GateOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._keys = [_digest(key.encode()) for key in options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._options)
        try:
            self._check(scope)
            await self._app(scope, exchange.receive, exchange.send)
        except ApiError as error:
            if not exchange.started:
                await error.response()(scope, exchange.receive, exchange.send)
        except Exception as error:  # which was answered, unless a file broke off
            log_error(error)
            if not exchange.complete:
                raise  # so that the connection is cut
        finally:
            self._note(scope, exchange)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if not self._options.any_host and not is_loopback(name.lower()):
            message = f"this server is not called {shown(host)}: call it localhost or 127.0.0.1"
            raise ApiError(403, message, "unknown_host")
        self._check_origin(scope, headers, host)
        state = scope.setdefault("state", {})
        state["key"] = ""
        path = scope["path"]
        if not self._keys or path in _OPEN or path.startswith("/static/"):
            return
        state["key"] = self._check_key(headers).hex()

    def _check_origin(self, scope: Scope, headers: Headers, host: str) -> None:
        """Pages of other servers are kept out, whatever their browser would let them do."""
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, f"pages of {shown(origin)} have no business here", "foreign_origin")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
            raise ApiError(403, "pages of other sites have no business here", "foreign_origin")

    def _check_key(self, headers: Headers) -> bytes:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        equal = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, always
        if scheme.lower() == "bearer" and any(equal):
            return given
        said = "a wrong key" if key else "no key"
        message = f"this server asks for a key (Authorization: Bearer KEY), and got {said}"
        raise ApiError(401, message, "invalid_api_key", None, {"www-authenticate": "Bearer"})

    def _note(self, scope: Scope, exchange: _Exchange) -> None:
        route = getattr(scope.get("endpoint"), "__name__", "none")
        self._metrics.request(scope["method"], route, exchange.status)
        if self._options.log and (scope["method"] not in ("GET", "HEAD") or exchange.status >= 400):
            path = ascii(scope["path"])[1:-1][:120]
            took = (time.perf_counter() - exchange.began) * 1e3
            line = f"{scope['method'][:10]} {path} {exchange.status} {took:.0f} ms {exchange.id}"
            log(line)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, options: GateOptions) -> None:
        self.id = "req_" + secrets.token_hex(12)
        self.began = time.perf_counter()
        self.status = 0  # none was sent
        self.complete = False  # whether all of the answer was sent
        self._scope, self._receive, self._send, self._options = scope, receive, send, options
        self._bytes = 0
        self._ended = False

    @property
    def started(self) -> bool:
        return self.status != 0

    async def receive(self) -> Message:
        if self._ended or self.started:
            return await self._receive()
        options = self._options
        if not self._bytes:
            self._check_length()
        left = options.body_seconds - (time.perf_counter() - self.began)
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except asyncio.TimeoutError as error:
            raise too_slow(options.body_seconds) from error
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
            if self._bytes > options.max_body:
                raise too_large(options.max_body)
        return message

    def _check_length(self) -> None:
        """Refuses a body by the length that it announces, before any of it is read."""
        length = Headers(scope=self._scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._options.max_body:
            raise too_large(self._options.max_body)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
