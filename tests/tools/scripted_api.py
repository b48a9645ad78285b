"""The API of `vfengine serve` from memory, whose clips go on when a test says so."""

from __future__ import annotations

import asyncio
import io
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import vfengine
from vfengine.media.video import write_video

PAGE = Path(vfengine.__file__).parent / "serving" / "page"
MODEL = {
    **{"id": "vfengine", "object": "model", "kind": "decomposed", "labels": ["jump", "dance_a"]},
    **{"takes_prompts": True, "width": 32, "height": 32, "num_frames": 8, "fps": 8.0},
    **{"steps": 50, "guidance_scale": 2.0, "solver": "ddim", "solvers": ["ddim", "unipc"]},
    **{"base_paths": ["stepwise", "clean"], "base_path": "clean", "animates_pictures": True},
    **{"has_base": True, "max_scale": 4, "max_seconds": 12, "max_steps": 200},
}
CSP = "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob: data:"


class ScriptedApi:
    """A server on a free port of the loopback, in a thread.

    url:      of its page
    key:      the key that it asks for; None: none
    refusals: answers (status, body, headers) that the next requests for a clip get instead
    posts:    (path, fields) of the requests that made a clip
    """

    def __init__(self, folder: Path, model: dict | None = None) -> None:
        self.model = {**MODEL, **(model or {})}
        self.key: str | None = None
        self.refusals: list[tuple[int, dict, dict]] = []
        self.posts: list[tuple[str, dict]] = []
        self.keys_of_posts: list[str | None] = []
        self.videos: dict[str, dict] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.polls = 0
        self._folder = folder
        self._ids = itertools.count(1)
        routes = [
            Route("/", lambda request: self._page()),
            Mount("/static", StaticFiles(directory=PAGE)),
            Route("/v1/models", self._models),
            Route("/v1/videos", self._create, methods=["POST"]),
            Route("/v1/videos", self._list),
            Route("/v1/videos/extensions", self._create, methods=["POST"]),
            Route("/v1/videos/{id}", self._one),
            Route("/v1/videos/{id}", self._delete, methods=["DELETE"]),
            Route("/v1/videos/{id}/content", self._content),
            Route("/v1/videos/{id}/remix", self._create, methods=["POST"]),
        ]
        self._app = Starlette(routes=routes)
        self._start(0)
        self.url = f"http://127.0.0.1:{self.port}/"

    def _start(self, port: int) -> None:
        config = uvicorn.Config(
            self._app, port=port, log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def start_again(self) -> None:
        self._start(self.port)

    # -- the script --------------------------------------------------------------------------------

    def add(self, **values) -> str:
        """Puts a clip into the queue; returns its id."""
        id = f"video_{next(self._ids):032x}"
        fps = self.model["fps"]
        frames = int(values.get("num_frames", self.model["num_frames"]))
        video = {
            **{"id": id, "object": "video", "model": self.model["id"], "status": "queued"},
            **{"progress": 0, "phase": "", "created_at": int(time.time()), "error": None},
            **{"completed_at": None, "expires_at": None, "seconds": f"{frames / fps:g}"},
            **{"prompt": None, "label": None, "negative_prompt": "", "has_thumbnail": False},
            **{"queue_position": 0, "base_seed": 11, "residual_seed": 12, "fps": fps},
            **{"num_inference_steps": 50, "guidance_scale": 2.0, "solver": "ddim"},
            **{"base_path": self.model["base_path"], "format": "mp4", "picture": False},
            **{"size": "32x32", "remixed_from_video_id": None, **values, "num_frames": frames},
        }
        self.videos[id] = video
        return id

    def show_base(self, id: str, picture: bytes | None = None) -> None:
        """The base frame is there."""
        self.files[id, "thumbnail"] = picture or png()
        self.videos[id].update(status="in_progress", phase="base", progress=40, has_thumbnail=True)

    def go_on(self, id: str, phase: str, progress: int) -> None:
        self.videos[id].update(status="in_progress", phase=phase, progress=progress)

    def finish(self, id: str, clip: bytes | None = None) -> None:
        if not self.videos[id]["has_thumbnail"]:
            self.show_base(id)
        if clip is None:
            file = self._folder / f"{id}.{self.videos[id]['format']}"
            write_video(file, np.full((8, 32, 32, 3), 90, np.uint8), fps=8.0)
            clip = file.read_bytes()
        self.files[id, "video"] = clip
        now = int(time.time())
        self.videos[id].update(status="completed", phase="", progress=100, completed_at=now)
        self.videos[id].update(inference_time_s=2.61, expires_at=now + 86400)

    def fail(self, id: str, message: str) -> None:
        self.videos[id].update(status="failed", error={"code": "bad", "message": message})

    # -- the API -----------------------------------------------------------------------------------

    def _page(self) -> Response:
        html = (PAGE / "index.html").read_text(encoding="utf-8")
        return Response(html, media_type="text/html", headers={"content-security-policy": CSP})

    def _refused(self, request: Request) -> Response | None:
        given = request.headers.get("authorization")
        if self.key is None or given == f"Bearer {self.key}":
            return None
        return error(401, "no such key" if given else "this server asks for a key")

    def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"object": "list", "data": [self.model]})

    async def _create(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        if request.headers["content-type"] == "application/json":
            given = await request.json()
        else:
            given = dict(await request.form())
        self.keys_of_posts.append(request.headers.get("idempotency-key"))
        if self.refusals:
            status, body, headers = self.refusals.pop(0)
            return JSONResponse(body, status, headers)
        self.posts.append((request.url.path, given))
        values = {name: given[name] for name in given.keys() & self._kinds.keys()}
        values = {name: self._kinds[name](value) for name, value in values.items()}
        values["picture"] = "input_reference" in given
        source = self.videos.get(request.path_params.get("id"))
        if source is not None:
            same = (*self._kinds, "picture")
            values = {**{name: source[name] for name in same}, **values, "picture": False}
            values["remixed_from_video_id"] = source["id"]
        if request.url.path.endswith("extensions"):
            values["extends"] = given["video[id]"]
        return self._answer(self.videos[self.add(**values)])

    _kinds = {
        **{"prompt": str, "label": str, "negative_prompt": str, "solver": str, "size": str},
        **{"format": str, "base_path": str, "base_seed": int, "residual_seed": int},
        **{"num_frames": int, "num_inference_steps": int, "guidance_scale": float, "fps": float},
    }

    def _answer(self, value: dict) -> Response:
        return JSONResponse(value, headers={"openai-poll-after-ms": "50"})

    def _list(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        self.polls += 1
        found = sorted(self.videos.values(), key=lambda video: video["id"], reverse=True)
        if after := request.query_params.get("after"):
            found = [video for video in found if video["id"] < after]
        limit = int(request.query_params.get("limit", "20"))
        page, ids = found[:limit], [video["id"] for video in found[:limit]] or [None]
        more = {"first_id": ids[0], "last_id": ids[-1], "has_more": len(found) > limit}
        return self._answer({"object": "list", "data": page, **more})

    def _one(self, request: Request) -> Response:
        video = self.videos.get(request.path_params["id"])
        return self._refused(request) or (self._answer(video) if video else error(404, "no video"))

    def _delete(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        id = request.path_params["id"]
        if self.videos.pop(id, None) is None:
            return error(404, "no video")
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})

    async def _content(self, request: Request) -> Response:
        variant = request.query_params.get("variant", "video")
        content = self.files.get((request.path_params["id"], variant))
        if refused := self._refused(request):
            return refused
        await asyncio.sleep(0)
        return error(404, "not there yet") if content is None else Response(content)


def error(status: int, message: str, **more) -> Response:
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", **more}}, status
    )


def png(size: int = 32, colour: tuple[int, int, int] = (40, 120, 110)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()
