"""A server of the API without a model: fake engines, and an HTTP server in a thread."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from vfengine.serving.app import AppOptions, create_app
from vfengine.serving.gate import GateOptions
from vfengine.serving.http_server import Limits, ThreadServer, listen
from vfengine.serving.jobs import Job
from vfengine.serving.model_info import ModelInfo
from vfengine.serving.store import Store

INFO = ModelInfo(
    name="tiny",
    kind="decomposed",
    labels=("cartwheel", "jump", "walk"),
    takes_prompts=False,
    width=16,
    height=16,
    num_frames=4,
    fps=8.0,
    steps=20,
    guidance_scale=2.0,
    solver="ddim",
    solvers=("ddim", "ddpm", "dpmsolver++"),
    base_paths=("stepwise", "clean"),
    base_path="clean",
    animates_pictures=True,
    has_base=True,
    least_loop=4,
    max_batch=4,
    fingerprint="0" * 64,
    device="cpu",
    dtype="float32",
)
PROMPTED = replace(INFO, labels=(), takes_prompts=True)
VIDEO = bytes(range(256)) * 40  # the "clip" of every job
PICTURES = {"thumbnail.png": b"\x89PNG thumbnail", "spritesheet.png": b"\x89PNG sheet"}


class FakeEngines:
    """Makes clips in a thread, at once; a paused one makes those that a test tells it to."""

    alive = 1

    def __init__(self, store: Store, info: ModelInfo, paused: bool = False) -> None:
        self.store, self.info, self.paused = store, info, paused
        self.made: list[str] = []
        self.events: list[dict] = []
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        self._stopped.set()
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while self._wake.wait() and not self._stopped.is_set():
            self._wake.clear()
            while not self.paused and (jobs := self.store.claim("fake", self.info.max_batch)):
                for job in jobs:
                    self.begin(job)
                    self.finish(job)

    def frames(self, job: Job) -> int:
        old = self.store.get(job.settings.extends) if job.settings.extends else None
        return job.settings.num_frames + (0 if old is None else self.frames(old))

    def claim(self) -> list[Job]:
        return self.store.claim("fake", self.info.max_batch)

    def begin(self, job: Job) -> None:
        """Makes the base frame."""
        self.store.folder_of(job.id).mkdir(exist_ok=True)
        self.store.file(job.id, "thumbnail.png").write_bytes(PICTURES["thumbnail.png"])
        self.store.report(job.id, "fake", "residual", 40, has_base=True)

    def finish(self, job: Job) -> None:
        """Makes the clip."""
        self.made.append(job.id)
        if not self.store.exists(job.id):
            return
        self.store.file(job.id, f"video.{job.settings.format}").write_bytes(VIDEO)
        self.store.file(job.id, "spritesheet.png").write_bytes(PICTURES["spritesheet.png"])
        result = {"inference_time_s": 0.1, "num_frames": self.frames(job)}
        self.store.finish(job.id, "fake", result, None)


class RunningServer:
    """url: of the server; api: what clients of openai call base_url."""

    def __init__(self, url: str, store: Store, engines: FakeEngines) -> None:
        self.url, self.api = url, f"{url}/v1"
        self.port = int(url.rpartition(":")[2])
        self.store, self.engines = store, engines

    def rows(self) -> int:
        """How many jobs there are."""
        return len(self.store.list(limit=1000)[0])


@contextmanager
def serving(
    store: Store,
    info: ModelInfo = INFO,
    *,
    paused: bool = False,
    limits: Limits | None = None,
    gate: GateOptions | None = None,
    wrap=lambda app: app,
    **options,
) -> Iterator[RunningServer]:
    """A server of this store on loopback, while the block runs; wrap: an ASGI app around its."""
    engines = FakeEngines(store, info, paused)
    app = create_app(store, info, engines, AppOptions(gate=gate or GateOptions(), **options))
    taking = threading.Event()
    server = ThreadServer(wrap(app), limits or Limits(stop_seconds=1), taking.set)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    try:
        assert taking.wait(20)
        yield RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", store, engines)
    finally:
        server.should_exit = True
        thread.join(20)
        engines.stop()
        listener.close()
