"""The HTTP API: /v1/videos as the openai client speaks it, the page, health and metrics.

The store is all that it knows: it adds jobs, shows and deletes them. Whoever makes them is another
process. Nothing here imports torch.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from .. import __version__
from ..files import is_of_the_machine
from . import request_forms, views
from .errors import ApiError, disk_full, shown
from .gate import Gate, GateOptions
from .log import log_error
from .metrics import CONTENT_TYPE, Metrics
from .model_info import ModelInfo
from .openapi import openapi
from .request_forms import Bounds
from .store import Store
from .videos import Engines, Videos

_PAGE_FOLDER = Path(__file__).parent / "page"
_PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_PAGE_TYPES |= {".svg": "image/svg+xml", ".png": "image/png", ".json": "application/json"}
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob: data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class AppOptions:
    """gate: what is let in; bounds: of a request; max_queue: jobs that may wait."""

    gate: GateOptions = field(default_factory=GateOptions)
    bounds: Bounds = field(default_factory=Bounds)
    max_queue: int = 100


def create_app(
    store: Store,
    info: ModelInfo,
    workers: Engines,
    options: AppOptions | None = None,
    metrics: Metrics | None = None,
) -> ASGIApp:
    """The app of a store whose jobs are made by workers, which run one model."""
    options = options or AppOptions()
    metrics = metrics or Metrics(store.count)
    api = _Api(store, info, workers, options, metrics)
    app = Starlette(
        routes=api.routes(),
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            OSError: _disk,
            sqlite3.Error: _disk,
            Exception: _failure,
        },
    )
    app.router.redirect_slashes = False
    return Gate(app, options.gate, metrics)


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own answers: to unknown paths and methods."""
    path = shown(request.url.path)
    message, code = f"there is nothing at {path}", "not_found"
    if error.status_code == 405:
        message, code = f"{request.method[:20]} has no meaning for {path}", "method_not_allowed"
    return ApiError(error.status_code, message, code, headers=error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    """For a client that has hung up, whom it does not reach; the log and the metrics have it."""
    return Response(status_code=499)


async def _disk(request: Request, error: Exception) -> Response:
    """An error of a disk, said in one line; raises what is another's."""
    if not is_of_the_machine(error):
        raise error
    log_error(error)
    return disk_full().response()


async def _failure(request: Request, error: Exception) -> Response:
    """An error of ours, which Starlette raises once more, for the gate to print it."""
    return ApiError(500, "this server failed; its log says why", "server_error").response()


class _Api:
    """The endpoints beside /v1/videos."""

    def __init__(
        self,
        store: Store,
        info: ModelInfo,
        workers: Engines,
        options: AppOptions,
        metrics: Metrics,
    ) -> None:
        self._store, self._info, self._workers = store, info, workers
        self._options, self._metrics = options, metrics
        limits = (options.bounds, options.max_queue, options.gate.max_body)
        self._videos = Videos(store, info, workers, *limits)
        self._started = time.time()
        self._document = openapi(info, options.bounds, bool(options.gate.keys))
        self._page = {file.name: file for file in _PAGE_FOLDER.glob("*") if file.is_file()}

    def routes(self) -> list[Route]:
        def route(method: str, path: str, endpoint: Callable) -> Route:
            return Route(path, endpoint, methods=[method])

        return [
            *self._videos.routes(),
            route("GET", "/v1/models", self.models),
            route("GET", "/v1/models/{model:path}", self.model),
            route("GET", "/health", self.health),
            route("GET", "/metrics", self.metrics),
            route("GET", "/openapi.json", self.openapi),
            route("GET", "/", self.index),
            route("GET", "/static/{name}", self.static),
        ]

    def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self._info.name:
            raise request_forms.no_model(name, self._info)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return views.model(self._info, self._options.bounds, self._started)

    def health(self, request: Request) -> Response:
        """GET /health: 503 while no engine runs."""
        alive = self._workers.alive
        state = {
            "status": "ok" if alive else "no engine",
            "version": __version__,
            "model": self._info.name,
            "engines": int(alive),
            "queued": self._store.count("queued"),
            "in_progress": self._store.count("in_progress"),
        }
        return JSONResponse(state, 200 if alive else 503)

    def metrics(self, request: Request) -> Response:
        return Response(self._metrics.page(), headers={"content-type": CONTENT_TYPE})

    def openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    def index(self, request: Request) -> Response:
        return self._page_file("index.html")

    def static(self, request: Request) -> Response:
        return self._page_file(request.path_params["name"])

    def _page_file(self, name: str) -> Response:
        """A file of the page. Only names that were there at the start are looked up."""
        file = self._page.get(name)
        kind = _PAGE_TYPES.get(Path(name).suffix)
        if file is None or kind is None:
            raise ApiError(404, f"there is no page {shown(name)}", "not_found")
        headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
        return Response(file.read_bytes(), media_type=kind, headers=headers)
