"""The HTTP server itself: uvicorn, with limits that it does not have of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .errors import too_busy


@dataclass(frozen=True)
class Limits:
    """Of connections.

    connections:    at a time; more are answered with 503
    header_seconds: within which the head of a request must have come
    unread:         bytes of a refused body that are thrown away before the connection is cut, so
                    that a client which sends all of it first sees the answer
    stop_seconds:   that requests have to end once the server stops
    """

    connections: int = 256
    header_seconds: float = 20.0
    unread: int = 64 * 2**20
    stop_seconds: float = 5.0


class Protocol(H11Protocol):
    """A connection that may not be idle in the middle of a request's head, nor send for ever."""

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._unread = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._between_requests and self.conn.their_state is h11.SEND_BODY:
            self._unread += len(data)
            if self._unread > self.limits.unread:
                self.transport.abort()
                return
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        """Sets the clock of the next request's head, or stops it once the head is there."""
        if not self._between_requests:
            self._stop_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self._between_requests:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in the form of the API's errors."""
        error = {"message": msg, "type": "invalid_request_error", "param": None}
        body = json.dumps({"error": {**error, "code": "invalid_http"}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", _new_id().encode()),
            (b"connection", b"close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer was begun already
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            self.transport.write(self.conn.send(response))
            self.transport.write(self.conn.send(h11.Data(data=body)))
            self.transport.write(self.conn.send(h11.EndOfMessage()))
        self.transport.close()


class Server(uvicorn.Server):
    """A uvicorn server that tells when it takes requests, and which signal ended it.

    ready: called once requests are taken
    """

    def __init__(
        self, app: ASGIApp, limits: Limits | None = None, ready: Callable[[], None] | None = None
    ) -> None:
        limits = limits or Limits()
        protocol = type("Protocol", (Protocol,), {"limits": limits})
        config = uvicorn.Config(
            self._unless_crowded,
            interface="asgi3",
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(limits.stop_seconds),
        )
        super().__init__(config)
        self._app, self._most = app, limits.connections
        self.stopped_by: int | None = None
        self._ready = ready

    async def _unless_crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app, unless too many connections are open. uvicorn's own answer has no form."""
        state: ServerState = self.server_state
        crowded = max(len(state.connections), len(state.tasks)) >= self._most
        if scope["type"] != "http" or not crowded:
            await self._app(scope, receive, send)
            return
        answer = too_busy().response()
        answer.headers["x-request-id"] = _new_id()
        await answer(scope, receive, send)

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C that ended it."""
        return self.stopped_by == signal.SIGINT

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None and not self.should_exit:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Notes signals, which end the server, where uvicorn raises them again afterwards."""
        with contextlib.ExitStack() as stack:
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is by nohup
                numbers.append(signal.SIGHUP)
            for number in numbers:
                stack.callback(signal.signal, number, signal.signal(number, self._note_signal))
            yield

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # the second one does not wait for requests
        self.should_exit = True
        self.stopped_by = number


class ThreadServer(Server):
    """A server that runs in a thread other than the main one, which gets the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def share_heap() -> None:
    """Has all threads of this process share one heap, where glibc would give each its own.

    None of these would be given back: a server's memory would grow with its threads' largest needs.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-8, 1)  # M_ARENA_MAX


def _new_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises OSError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay where a socket says that it is TCP's; else each answer takes 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.set_inheritable(False)
    except BaseException:
        listener.close()
        raise
    return listener
