"""The server of the API with an engine that goes on when a test says so."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from api_server import INFO, serving
from PIL import Image
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vfengine.media.video import write_video
from vfengine.serving.gate import GateOptions
from vfengine.serving.jobs import Job, JobSettings, new_id
from vfengine.serving.model_info import ModelInfo
from vfengine.serving.store import Store

SHIPPED = replace(
    INFO,
    name="vfengine",
    labels=("jump", "dance_a"),
    takes_prompts=True,
    width=32,
    height=32,
    num_frames=8,
)
TEXT = replace(
    SHIPPED,
    kind="text",
    labels=(),
    base_path=None,
    base_paths=(),
    animates_pictures=False,
    has_base=False,
)
_ENGINE = "scripted"
_BUSY = {"error": {"message": "The queue is full.", "type": "rate", "param": None, "code": None}}


class ScriptedApi:
    """A running server, whose clips are made as a test says.

    url:      of the page
    refusals: so many of the next requests for a clip are told that the queue is full
    asked:    (method, path) of every request to the API
    names:    the Idempotency-Key of each request for a clip
    """

    def __init__(self, store: Store, info: ModelInfo) -> None:
        self.store, self.info = store, info
        self.refusals = 0
        self.asked: list[tuple[str, str]] = []
        self.names: list[str | None] = []
        self.url = ""

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Notes requests, and refuses some."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"].startswith("/v1/"):
                self.asked.append((scope["method"], scope["path"]))
                if scope["method"] == "POST":
                    headers = dict(scope["headers"])
                    self.names.append(headers.get(b"idempotency-key", b"").decode())
                    if self.refusals > 0:
                        self.refusals -= 1
                        refused = JSONResponse(_BUSY, 429, {"retry-after-ms": "300"})
                        await refused(scope, receive, send)
                        return
            await app(scope, receive, send)

        return wrapped

    def polls(self) -> int:
        """How many times the list was asked for."""
        return self.asked.count(("GET", "/v1/videos"))

    def jobs(self) -> list[Job]:
        """The newest first."""
        return self.store.list(limit=100)[0]

    def newest(self, count: int) -> Job:
        """The newest job of so many."""
        jobs = self.jobs()
        assert len(jobs) == count
        return jobs[0]

    # -- the script --------------------------------------------------------------------------------

    def add(self, **settings) -> str:
        """Puts a clip into the queue; returns its id."""
        info = self.info
        values = {
            **{"num_frames": info.num_frames, "num_inference_steps": info.steps},
            **{"guidance_scale": info.guidance_scale, "base_seed": 11, "residual_seed": 12},
            **{"solver": info.solver, "base_path": info.base_path, "fps": info.fps},
            **{"height": info.height, "width": info.width, **settings},
        }
        decided = JobSettings(**values)
        job = Job(
            id=new_id(),
            settings=decided,
            model=info.name,
            seconds=f"{decided.num_frames / decided.fps:g}",
            size=f"{decided.width * decided.scale}x{decided.height * decided.scale}",
            created_at=time.time(),
        )
        return self.store.add(job, max_queue=1000).id

    def begin(self, id: str, picture: bytes | None = None) -> None:
        """Claims a clip, and makes its base frame."""
        while (job := self.store.get(id)).status == "queued":
            self.store.claim(_ENGINE, 1)
        self.store.folder_of(job.id).mkdir(exist_ok=True)
        if self.info.has_base:
            self.store.file(id, "thumbnail.png").write_bytes(picture or png())
        self.go_on(id, "base", 40, self.info.has_base)

    def go_on(self, id: str, phase: str, progress: int, has_base: bool | None = None) -> None:
        assert self.store.report(id, _ENGINE, phase, progress, has_base)

    def finish(self, id: str, clip: bytes | None = None) -> None:
        if self.store.get(id).status == "queued":
            self.begin(id)
        settings = self.store.get(id).settings
        file = self.store.file(id, settings.video_file)
        if clip is None:
            write_video(file, np.full((8, 32, 32, 3), 90, np.uint8), fps=8.0)
        else:
            file.write_bytes(clip)
        self.store.file(id, "spritesheet.png").write_bytes(png())
        result = {"inference_time_s": 2.61, "num_frames": settings.num_frames}
        assert self.store.finish(id, _ENGINE, result, time.time() + 86400)

    def fail(self, id: str, message: str) -> None:
        self.begin(id)
        assert self.store.fail(id, _ENGINE, "bad", message, time.time() + 86400)


@contextmanager
def scripted(
    folder: Path, info: ModelInfo = SHIPPED, keys: tuple[str, ...] = ()
) -> Iterator[ScriptedApi]:
    """A server with a store in this folder, while the block runs."""
    store = Store(folder, durable=False)
    api = ScriptedApi(store, info)
    gate = GateOptions(keys=keys)
    with serving(store, info, paused=True, gate=gate, wrap=api.wrap) as server:
        api.url = f"{server.url}/"
        yield api
    store.close()


def png(size: int = 32, colour: tuple[int, int, int] = (40, 120, 110)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()
