"""The store as an engine on another machine sees it: the jobs that it was handed, and their files.

`serving.engine.Engine` works on it as on a `serving.store.Store`. What it notes there is an event
that travels to the server, which alone has the database and the folder of jobs. An event is a tuple
whose first value is its kind:

    ("report", id, phase, progress, thumbnail)   the last is bytes once the job has its base frame
    ("finish", id, result, {name: bytes})
    ("fail", id, code, message)
    ("say", event)                               what the engine says (serving/engine.py)

Nothing here imports torch.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..serving.jobs import SOURCE, THUMBNAIL, UPLOAD, Job

SENT = (UPLOAD, SOURCE)  # files of a job that an engine reads
_UNUSED_PATHS = 86400.0  # seconds after which a base path goes that was not used here


class Desk:
    """Jobs of one batch at a time, in a folder of this machine.

    tell: gets the events
    """

    def __init__(self, folder: Path, tell: Callable[[tuple], None]) -> None:
        self.folder, self.tell = folder, tell
        self.base_paths = folder / "base_paths"
        self._jobs = folder / "jobs"
        self._waiting: list[Job] = []
        self._held: set[str] = set()

    def lay(self, jobs: Sequence[Job], files: Mapping[tuple[str, str], bytes]) -> None:
        """Hands over a batch, and the files that its jobs start from."""
        shutil.rmtree(self._jobs, ignore_errors=True)
        self._expire_paths()
        for (job_id, name), content in files.items():
            self.folder_of(job_id).mkdir(parents=True, exist_ok=True)
            self.file(job_id, name).write_bytes(content)
        self._waiting, self._held = list(jobs), {job.id for job in jobs}

    def drop(self) -> None:
        """Nobody wants the batch any longer."""
        self._waiting, self._held = [], set()

    def _expire_paths(self) -> None:
        for file in self.base_paths.glob("*.safetensors"):
            if time.time() - file.stat().st_mtime > _UNUSED_PATHS:
                file.unlink(missing_ok=True)

    # -- what an engine and its maker ask of a store -----------------------------------------------

    def folder_of(self, job_id: str) -> Path:
        return self._jobs / job_id

    def file(self, job_id: str, name: str) -> Path:
        return self.folder_of(job_id) / name

    def claim(self, worker: str, most: int = 1) -> list[Job]:
        jobs, self._waiting = self._waiting, []
        return jobs

    def holds(self, job_id: str, worker: str) -> bool:
        return job_id in self._held

    def report(
        self,
        job_id: str,
        worker: str,
        phase: str,
        progress: int,
        has_base: bool | None = None,
    ) -> bool:
        held = job_id in self._held
        if held:
            thumbnail = self.file(job_id, THUMBNAIL).read_bytes() if has_base else None
            self.tell(("report", job_id, phase, progress, thumbnail))
        return held

    def finish(self, job_id: str, worker: str, result: dict, expires_at: float | None) -> bool:
        """expires_at: of this machine's clock; the server has its own"""
        held = job_id in self._held
        if held:
            self._held.discard(job_id)
            made = [file for file in self.folder_of(job_id).iterdir() if file.name not in SENT]
            files = {file.name: file.read_bytes() for file in made if file.is_file()}
            self.tell(("finish", job_id, result, files))
        return held

    def fail(
        self, job_id: str, worker: str, code: str, message: str, expires_at: float | None
    ) -> bool:
        held = job_id in self._held
        if held:
            self._held.discard(job_id)
            self.tell(("fail", job_id, code, message))
        return held

    def sweep(self, job_id: str) -> None:
        if job_id not in self._held:
            shutil.rmtree(self.folder_of(job_id), ignore_errors=True)

    def requeue(self, job_ids: Iterable[str], worker: str) -> None:
        """The server gives back what it is not told of."""
        self.drop()


class ServedEngine:
    """An engine as a replica of Ray Serve: it is handed batches, and streams what becomes of them.

    model:   what it opens; sent: the references of the files of sources that a machine may lack
    name:    the model's in requests
    """

    def __init__(
        self,
        model: Any,
        sent: Mapping[str, Mapping[str, Any]],
        name: str,
        batch_size: int | None,
        threads: int,
    ) -> None:
        import tempfile

        self._error, self._info = "", None
        self._folder = tempfile.TemporaryDirectory(prefix="vfengine-engine-")
        try:
            self._open(model, sent, name, batch_size, threads)
        except (ValueError, OSError) as error:  # of the model: no other replica could open it
            self._error = " ".join(str(error).split())

    def _open(
        self,
        model: Any,
        sent: Mapping[str, Mapping[str, Any]],
        name: str,
        batch_size: int | None,
        threads: int,
    ) -> None:
        import torch

        from ..pipelines.pipeline import CheckpointPipeline
        from ..pipelines.together import keep_networks
        from ..serving.engine import Engine, default_batch_size, model_info

        torch.set_num_threads(threads)
        pipe = model.fetched(sent).open()
        if isinstance(pipe, CheckpointPipeline):  # a published model may be too large for memory
            keep_networks(pipe)
        batch_size = batch_size or default_batch_size(pipe)
        self._info = model_info(pipe, name, batch_size)
        self._desk = Desk(Path(self._folder.name), lambda event: None)
        say = lambda event: self._desk.tell(("say", event))  # noqa: E731
        self._engine = Engine(pipe, self._desk, batch_size=batch_size, say=say)

    def info(self) -> tuple[Any, str]:
        """The `ModelInfo`, or why there is none."""
        return self._info, self._error

    async def make(self, jobs: Sequence[Job], files: Mapping[tuple[str, str], bytes]) -> Any:
        """Makes a batch; yields events. Whoever stops listening no longer wants it."""
        import asyncio

        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        self._desk.tell = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
        self._desk.lay(jobs, files)
        made = loop.run_in_executor(None, self._engine.run_once)
        made.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await made  # raises what the engine has
        finally:
            self._desk.drop()
            await asyncio.wait([made])
