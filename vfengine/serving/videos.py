"""/v1/videos: jobs as the openai client asks for them, shows them, deletes and fetches them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from . import request_forms, uploads, views
from .bodies import Body, read_body
from .errors import ApiError, bad, no_video, not_yet, queue_full, shown
from .jobs import SOURCE, SPRITESHEET, THUMBNAIL, UPLOAD, Job, new_id
from .model_info import ModelInfo
from .request_forms import REQUEST_NAME, Bounds, Draft
from .store import QueueFull, Store

POLL_MS = 250  # how soon a client is to ask again for a video that is not done
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
class Videos:
    """The endpoints of a store's videos.

    max_queue: jobs that may wait;  max_body: bytes of a request
    """

    store: Store
    info: ModelInfo
    workers: Engines
    bounds: Bounds
    max_queue: int
    max_body: int

    def routes(self) -> list[Route]:
        def route(method: str, path: str, endpoint: Callable) -> Route:
            return Route(f"/v1/videos{path}", endpoint, methods=[method])

        return [
            route("POST", "", self.create),
            route("GET", "", self.list),
            route("POST", "/extensions", self.extend),
            route("POST", "/edits", self.edit),
            route("POST", "/characters", self.characters),
            route("GET", "/characters/{character_id}", self.characters),
            route("GET", "/{video_id}", self.retrieve),
            route("DELETE", "/{video_id}", self.delete),
            route("GET", "/{video_id}/content", self.content),
            route("POST", "/{video_id}/remix", self.remix),
        ]

    async def create(self, request: Request) -> Response:
        """POST /v1/videos"""

        def accept(body: Body) -> Job:
            picture = uploads.picture_source(body)
            _only_file(body, "input_reference")
            draft = request_forms.create(body.values, picture is not None, *self._limits)
            writers = {}
            if picture is not None:
                writers[UPLOAD] = lambda file: uploads.store_picture(picture, self.info, file)
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
        return self.info, self.bounds

    async def _with_body(self, request: Request, accept: Callable[[Body], Job]) -> Response:
        body = await read_body(request, self.max_body)
        try:
            return await run_in_threadpool(self._accepted, accept, body)
        finally:
            await body.close()

    def _accepted(self, accept: Callable[[Body], Job], body: Body) -> Response:
        job = accept(body)
        self.workers.wake()
        return self._video(job)

    def _accept(
        self, draft: Draft, request: Request, writers: dict[str, Callable[[Path], None]]
    ) -> Job:
        """Writes a job's files, then adds it, so that an accepted job is complete."""
        name = _request_name(request)
        waiting = self.store.count("queued")
        if waiting >= self.max_queue and name is None:
            raise queue_full(waiting)  # before anything is decoded
        job = Job(
            id=new_id(),
            settings=draft.settings,
            model=self.info.name,
            seconds=draft.seconds,
            size=draft.size,
            created_at=time.time(),
            remixed_from=draft.remixed_from,
        )
        folder = self.store.folder_of(job.id)
        kept = None
        try:
            if writers:
                folder.mkdir()
            for file, write in writers.items():
                write(folder / file)
            kept = self.store.add(job, self.max_queue, name)
        except QueueFull as error:
            raise queue_full(self.max_queue) from error
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

        files = {file: self.store.file(source.id, file) for file in names}
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
            jobs, more = self.store.list(after, int(limit), order or "desc")
        except KeyError as error:
            raise bad(f"there is no video {shown(after)}", "after", "video_not_found") from error
        page = {
            "object": "list",
            "data": [views.video(job, self.store) for job in jobs],
            "first_id": jobs[0].id if jobs else None,
            "last_id": jobs[-1].id if jobs else None,
            "has_more": more,
        }
        return JSONResponse(page, headers=_poll(*jobs))

    def delete(self, request: Request) -> Response:
        """DELETE /v1/videos/{id}: a running job stops."""
        job_id = request.path_params["video_id"]
        job = self._find(job_id)
        if not self.store.delete(job.id):
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
        file = self.store.file(job.id, name)
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
            self.store.folder_of(job_id)
        except ValueError as error:
            raise no_video(job_id) from error
        job = self.store.get(job_id)
        if job is None:
            raise no_video(job_id)
        return job

    def _job(self, request: Request) -> Job:
        return self._find(request.path_params["video_id"])

    def _video(self, job: Job) -> Response:
        return JSONResponse(views.video(job, self.store), headers=_poll(job))


class _File(FileResponse):
    """A file, whose errors have the form of the others."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def in_form(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                raise _bad_range(message["status"], message)
            await send(message)

        await super().__call__(scope, receive, in_form)


def _poll(*jobs: Job) -> dict[str, str]:
    """Headers that say when to ask again, where one of the jobs is not done."""
    waiting = any(job.status in ("queued", "in_progress") for job in jobs)
    return {"openai-poll-after-ms": str(POLL_MS)} if waiting else {}


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
    if len(name) > 255 or not re.fullmatch(REQUEST_NAME, name):
        raise bad("Idempotency-Key must have 1 to 255 characters of ASCII", "Idempotency-Key")
    whole = "\n".join((request.state.key, request.url.path, name))
    return hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()
