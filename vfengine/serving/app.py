"""The HTTP API: /v1/videos as the openai client speaks it, the page, health and metrics.

The store is all that it knows: it adds jobs, shows and deletes them. Whoever makes them is another
process. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from . import request_forms, uploads, views
from .bodies import Body, read_body
from .errors import ApiError, bad, no_video, not_yet, queue_full, shown
from .gate import Gate, GateOptions
from .jobs import SOURCE, SPRITESHEET, THUMBNAIL, UPLOAD, Job, new_id
from .metrics import CONTENT_TYPE, Metrics
from .model_info import ModelInfo
from .openapi import openapi
from .request_forms import Bounds, Draft
from .store import QueueFull, Store

POLL_MS = 250  # how soon a client is to ask again for a video that is not done
_PAGE_FOLDER = Path(__file__).parent / "page"
_PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_PAGE_TYPES |= {".svg": "image/svg+xml", ".png": "image/png", ".json": "application/json"}
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob: data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_EDIT = (
    "this server edits no videos: POST /v1/videos/{id}/remix makes another motion of a look, "
    "POST /v1/videos/extensions goes on from a last frame"
)
_CHARACTERS = (
    "this server keeps no characters: input_reference animates a picture, and "
    "POST /v1/videos/{id}/remix keeps the look of a video"
)


class Engines(Protocol):
    """What the API needs of those who make clips (`Workers`)."""

    @property
    def alive(self) -> int: ...

    def wake(self) -> None: ...


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
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
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


class _Api:
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
        self._started = time.time()
        self._document = openapi(info, options.bounds, bool(options.gate.keys))
        self._page = {file.name: file for file in _PAGE_FOLDER.glob("*") if file.is_file()}

    def routes(self) -> list[Route]:
        def route(method: str, path: str, endpoint: Callable) -> Route:
            return Route(path, endpoint, methods=[method])

        return [
            route("POST", "/v1/videos", self.create),
            route("GET", "/v1/videos", self.list),
            route("POST", "/v1/videos/extensions", self.extend),
            route("POST", "/v1/videos/edits", self.edit),
            route("POST", "/v1/videos/characters", self.characters),
            route("GET", "/v1/videos/characters/{character_id}", self.characters),
            route("GET", "/v1/videos/{video_id}", self.retrieve),
            route("DELETE", "/v1/videos/{video_id}", self.delete),
            route("GET", "/v1/videos/{video_id}/content", self.content),
            route("POST", "/v1/videos/{video_id}/remix", self.remix),
            route("GET", "/v1/models", self.models),
            route("GET", "/v1/models/{model}", self.model),
            route("GET", "/health", self.health),
            route("GET", "/metrics", self.metrics),
            route("GET", "/openapi.json", self.openapi),
            route("GET", "/", self.index),
            route("GET", "/static/{name}", self.static),
        ]

    # -- videos ------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        """POST /v1/videos"""

        def accept(body: Body) -> Job:
            picture = uploads.picture_source(body)
            _only_file(body, "input_reference")
            draft = request_forms.create(body.values, picture is not None, *self._limits)
            writers = {}
            if picture is not None:
                writers[UPLOAD] = lambda file: uploads.store_picture(picture, self._info, file)
            return self._accept(draft, request, writers)

        return await self._with_body(request, accept)

    async def remix(self, request: Request) -> Response:
        """POST /v1/videos/{id}/remix"""

        def accept(body: Body) -> Job:
            _only_file(body, None)
            source = self._job(request)
            draft = request_forms.remix(body.values, source, *self._limits)
            return self._accept(draft, request, self._copies(source, (UPLOAD, SOURCE)))

        return await self._with_body(request, accept)

    async def extend(self, request: Request) -> Response:
        """POST /v1/videos/extensions"""

        def accept(body: Body) -> Job:
            _only_file(body, "video")
            source_id = uploads.video_id(body)
            upload = body.files.get("video")
            if source_id is None and upload is None:
                raise bad("video is missing: the one to go on from", "video", "missing_parameter")
            source = None if source_id is None else self._find(source_id)
            draft = request_forms.extend(body.values, source, *self._limits)
            if source is None:
                writers = {SOURCE: lambda file: uploads.store_video(upload.file, file)}
            else:
                writers = self._copies(source, (SPRITESHEET,), SOURCE)  # its exact frames
            return self._accept(draft, request, writers)

        return await self._with_body(request, accept)

    @property
    def _limits(self) -> tuple[ModelInfo, Bounds]:
        return self._info, self._options.bounds

    async def _with_body(self, request: Request, accept: Callable[[Body], Job]) -> Response:
        body = await read_body(request, self._options.gate.max_body)
        try:
            return await run_in_threadpool(self._accepted, accept, body)
        finally:
            await body.close()

    def _accepted(self, accept: Callable[[Body], Job], body: Body) -> Response:
        job = accept(body)
        self._workers.wake()
        return self._video(job)

    def _accept(
        self, draft: Draft, request: Request, writers: dict[str, Callable[[Path], None]]
    ) -> Job:
        """Writes a job's files, then adds it, so that an accepted job is complete."""
        name = _request_name(request)
        waiting = self._store.count("queued")
        if waiting >= self._options.max_queue and name is None:
            raise queue_full(waiting)  # before anything is decoded
        job = Job(
            id=new_id(),
            settings=draft.settings,
            model=self._info.name,
            seconds=draft.seconds,
            size=draft.size,
            created_at=time.time(),
            remixed_from=draft.remixed_from,
        )
        folder = self._store.folder_of(job.id)
        kept = None
        try:
            if writers:
                folder.mkdir()
            for file, write in writers.items():
                write(folder / file)
            kept = self._store.add(job, self._options.max_queue, name, tuple(writers))
        except QueueFull as error:
            raise queue_full(self._options.max_queue) from error
        finally:
            if kept is None or kept.id != job.id:
                shutil.rmtree(folder, ignore_errors=True)
        return kept

    def _copies(
        self, source: Job, names: tuple[str, ...], name: str | None = None
    ) -> dict[str, Callable[[Path], None]]:
        """Writers of those of a job's files that are there, under their names or this one."""

        def writer(old: Path) -> Callable[[Path], None]:
            def copy(new: Path) -> None:
                try:
                    os.link(old, new)  # files are never written to once they have their name
                except FileNotFoundError as error:
                    raise no_video(source.id) from error  # deleted at this moment
                except OSError:
                    shutil.copyfile(old, new)

            return copy

        files = {file: self._store.file(source.id, file) for file in names}
        return {name or file: writer(old) for file, old in files.items() if name or old.exists()}

    def retrieve(self, request: Request) -> Response:
        """GET /v1/videos/{id}"""
        return self._video(self._job(request))

    def list(self, request: Request) -> Response:
        """GET /v1/videos"""
        query = request.query_params
        limit, order, after = query.get("limit", "20"), query.get("order"), query.get("after")
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= 100):
            raise bad(f"limit must be from 1 to 100, got {shown(limit)}", "limit")
        if order not in (None, "asc", "desc"):
            raise bad(f"order must be asc or desc, got {shown(order)}", "order")
        try:
            jobs, more = self._store.list(after or None, int(limit), order or "desc")
        except KeyError as error:
            raise bad(f"there is no video {shown(after)}", "after", "video_not_found") from error
        page = {
            "object": "list",
            "data": [views.video(job, self._store) for job in jobs],
            "first_id": jobs[0].id if jobs else None,
            "last_id": jobs[-1].id if jobs else None,
            "has_more": more,
        }
        return JSONResponse(page)

    def delete(self, request: Request) -> Response:
        """DELETE /v1/videos/{id}: a running job stops."""
        job_id = request.path_params["video_id"]
        job = self._find(job_id)
        if not self._store.delete(job.id):
            raise no_video(job_id)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    def content(self, request: Request) -> Response:
        """GET /v1/videos/{id}/content"""
        variant = request.query_params.get("variant", "video")
        if variant not in ("video", "thumbnail", "spritesheet"):
            raise bad(
                f"variant must be video, thumbnail or spritesheet, got {shown(variant)}", "variant"
            )
        job = self._job(request)
        if variant == "thumbnail":
            ready, name = job.has_base, THUMBNAIL
        else:
            ready = job.status == "completed"
            name = SPRITESHEET if variant == "spritesheet" else job.settings.video_file
        if not ready:
            raise not_yet(f"the {variant} of {job.id} is not there: it is {_state(job)}")
        kind = "image/png" if variant != "video" else views.MEDIA_TYPES[job.settings.format]
        file = self._store.file(job.id, name)
        try:
            status = file.stat()
        except FileNotFoundError as error:
            raise not_yet(f"the {variant} of {job.id} is not there any more") from error
        ending = name.rpartition(".")[2]
        return _File(
            file,
            media_type=kind,
            filename=f"{job.id}.{ending}",
            stat_result=status,
            content_disposition_type="inline",
            headers={"cache-control": "private, max-age=3600, immutable"},
        )

    def edit(self, request: Request) -> Response:
        raise bad(_EDIT, None, "unsupported")

    def characters(self, request: Request) -> Response:
        raise bad(_CHARACTERS, None, "unsupported")

    def _find(self, job_id: str) -> Job:
        """The job with this id. Only ids of the store's own form are looked for."""
        try:
            self._store.folder_of(job_id)
        except ValueError as error:
            raise no_video(job_id) from error
        job = self._store.get(job_id)
        if job is None:
            raise no_video(job_id)
        return job

    def _job(self, request: Request) -> Job:
        return self._find(request.path_params["video_id"])

    def _video(self, job: Job) -> Response:
        headers = {}
        if job.status in ("queued", "in_progress"):
            headers["openai-poll-after-ms"] = str(POLL_MS)
        return JSONResponse(views.video(job, self._store), headers=headers)

    # -- the rest ----------------------------------------------------------------------------------

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


class _File(FileResponse):
    """A file, whose errors have the form of the others."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def in_form(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                raise _bad_range(message["status"], message)
            await send(message)

        await super().__call__(scope, receive, in_form)


def _bad_range(status: int, message: Message) -> ApiError:
    length = Headers(raw=message["headers"]).get("content-range")
    headers = {} if length is None else {"content-range": length}
    return ApiError(status, "the range is not one of this file", "invalid_range", "Range", headers)


def _only_file(body: Body, name: str | None) -> None:
    for other in body.files:
        if other != name:
            raise bad(f"{shown(other)} cannot be a file", other[:80], "unknown_parameter")


def _state(job: Job) -> str:
    message = f": {job.error['message']}" if job.error else ""
    phase = f", {job.progress} %" if job.status == "in_progress" else ""
    return f"{job.status.replace('_', ' ')}{phase}{message}"


def _request_name(request: Request) -> str | None:
    """The name that a client gave its request, so that it is not done twice; each key has its own.

    The path is part of it, as what is made twice by mistake is made in the same place.
    """
    name = request.headers.get("idempotency-key")
    if name is None:
        return None
    if not 1 <= len(name) <= 255:
        raise bad("Idempotency-Key must have 1 to 255 characters", "Idempotency-Key")
    whole = "\n".join((request.state.key, request.url.path, name))
    return hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()
