"""From jobs to clips: requests of a pipeline, what it makes of them, and the files.

One `Maker` belongs to one engine, and makes one batch at a time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..devices import is_out_of_memory
from ..diffusion.base_path import BaseTrajectory
from ..media.codecs import check_encoding
from ..media.metadata import MAX_BYTES
from ..media.pictures import enlarge, read_picture, to_uint8
from ..media.video import write_video
from ..pipelines.clip_settings import clip_settings, file_record, settings_text
from ..pipelines.pipeline import CheckpointPipeline, Pipeline
from ..pipelines.request import SamplingRequest, TextRequest, VideoRequest
from ..pipelines.together import base_frame, sample_together
from ..sampling.finite import NotFinite
from .frames import read_source, reduced, write_png, write_sheet
from .jobs import SOURCE, SPRITESHEET, THUMBNAIL, UPLOAD, Job, JobSettings
from .log import log_error
from .store import Store
from .watch import Deleted, Rates, Stopping, Watch


@dataclass(frozen=True)
class Prepared:
    """A job, and what it asks of the pipeline.

    look:   the request whose base path the clip follows, where it is not its own
    source: frames before the new ones, uint8 [N, H, W, 3], enlarged; None: the clip is new
    """

    job: Job
    request: VideoRequest | TextRequest
    look: SamplingRequest | None = None
    source: np.ndarray | None = None


class Maker:
    """Makes jobs of a store with a pipeline.

    worker: the engine's name in the store
    keep:   seconds for which a finished clip is kept; None: until it is deleted
    stop:   set once the engine is to end
    """

    def __init__(
        self, pipe: Pipeline, store: Store, worker: str, keep: float | None, stop: threading.Event
    ) -> None:
        self.pipe, self.store, self.worker = pipe, store, worker
        self.keep, self.stop = keep, stop
        self.rates = Rates()
        self._paths: dict[str, int] = {}  # of the batch, by how they were had
        recorded = isinstance(pipe, CheckpointPipeline) and bool(pipe.fingerprint)
        self.base_cache: Path | None = store.base_paths if recorded else None

    def expiry(self) -> float | None:
        return None if self.keep is None else time.time() + self.keep

    # -- from a job to a request -------------------------------------------------------------------

    def prepared(self, job: Job) -> Prepared:
        """What a job asks for, its files read.

        Raises ValueError, in words for the sender, for files that cannot be read and for settings
        that the model cannot take; Stopping or Deleted while a long file is read.
        """
        settings = job.settings
        values = _common(settings)
        if not issubclass(self.pipe.request_type, SamplingRequest):
            if settings.picture or settings.extends is not None or settings.look is not None:
                raise ValueError("this model has no base frame that something could be made of")
        if issubclass(self.pipe.request_type, TextRequest):
            sizes = {name: getattr(settings, name) or None for name in ("height", "width")}
            request = TextRequest(
                **values,
                **sizes,
                seed=settings.residual_seed,
                num_frames=settings.num_frames,
                loop=settings.loop,
            )
            self.pipe.fill_defaults(request)
            return Prepared(job, request)
        values |= {"label": settings.label, "residual_seed": settings.residual_seed}
        if not issubclass(self.pipe.request_type, SamplingRequest):
            if settings.loop:
                raise ValueError("a plain video model makes no loops")
            request = VideoRequest(**values, num_frames=settings.num_frames)
            self.pipe.fill_defaults(request)
            return Prepared(job, request)
        source, picture, frames = None, None, settings.num_frames
        if settings.extends is not None:
            if settings.loop:
                raise ValueError("a clip that goes on from another is no loop")
            source = self._source(job)
            picture = Image.fromarray(reduced(source[-1], settings.scale))
            frames = 2 * settings.num_frames + 1  # of which the later half is new
            if frames == self.pipe.config.num_frames + 1:
                values["window"] = 0  # one frame more than the network knows, not two windows
        elif settings.picture:
            picture = self._picture(job)
        base = {"base_path": settings.base_path, "loop": settings.loop}
        if picture is None:
            base["base_seed"] = settings.base_seed
        elif settings.base_path == "stepwise":
            raise ValueError("a picture is animated with base_path clean, got stepwise")
        request = SamplingRequest(
            **values, **base, num_frames=frames, image=picture, offload_base=False
        )
        look = None
        if settings.look is not None:
            nothing = {"label": None, "prompt": None, "negative_prompt": ""}
            look = replace(request, **{**nothing, **settings.look})
        self.pipe.fill_defaults(request)
        return Prepared(job, request, look, source)

    def _picture(self, job: Job) -> Image.Image:
        try:
            return read_picture(self.store.file(job.id, UPLOAD))
        except (OSError, ValueError) as error:
            raise ValueError("input_reference: not a picture that can be read") from error

    def _source(self, job: Job) -> np.ndarray:
        settings = job.settings
        height, width = (side * settings.scale for side in self.pipe.config.picture_size)

        def check() -> None:
            if self.stop.is_set():
                raise Stopping
            if not self.store.holds(job.id, self.worker):
                raise Deleted

        try:
            file = self.store.file(job.id, SOURCE)
            return read_source(file, width, height, settings.fps, check)
        except ValueError as error:
            raise ValueError(f"video: {error}") from error

    # -- from requests to files --------------------------------------------------------------------

    def together(self, jobs: Sequence[Job]) -> bool:
        """Whether jobs of one shape can be made in one batch."""
        decomposed = issubclass(self.pipe.request_type, SamplingRequest)
        return decomposed and all(job.settings.eta == 0.0 for job in jobs)

    def make(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """Makes a batch and finishes its jobs; returns what the engine says of it.

        Raises Stopping, Deleted, and what the pipeline and the files raise.
        """
        started = time.perf_counter()
        units = self._units(batch)
        ids = [one.job.id for one in batch]
        for job_id in ids:
            self.store.folder_of(job_id).mkdir(parents=True, exist_ok=True)
        watch = Watch(self.store, self.worker, ids, self.rates.seconds(units), self.stop)
        memory = Memory(self.pipe)
        self._paths = {"walked": 0, "found": 0}
        sample = self._sampled_together if self.together([b.job for b in batch]) else self._sampled
        clips, timings = sample(batch, watch)
        writing = time.perf_counter()
        finished = []
        for done, (one, clip) in enumerate(zip(batch, clips, strict=True)):
            watch("write", done, len(batch))
            if clip is None or one.job.id not in watch.job_ids:
                continue
            try:
                result = self._written(one, to_uint8(clip))
            except (OSError, ValueError) as error:
                self.fail(one.job, error)
                continue
            now = time.perf_counter()
            seconds = {**timings, "write": now - writing}
            result |= {
                "inference_time_s": round(now - started, 4),
                "timings": {name: round(value, 4) for name, value in seconds.items()},
                "peak_memory_mb": memory.peak(),
                "batch": len(batch),
            }
            finished.append((one.job.id, result))
            if not self.store.finish(one.job.id, self.worker, result, self.expiry()):
                finished.pop()
        timings["write"] = time.perf_counter() - writing
        for phase, count in units.items():
            named = "residual" if phase == "video" and "video" not in timings else phase
            self.rates.learn(phase, count, timings.get(named, 0.0))
        return {
            "event": "batch",
            "clips": len(finished),
            **self._paths,
            "seconds": {name: round(value, 4) for name, value in timings.items()},
            "total_seconds": round(time.perf_counter() - started, 4),
            "peak_memory_mb": memory.peak(),
            "process_memory_mb": memory.process(),
        }

    def fail(self, job: Job, error: Exception) -> str | None:
        """Notes that a job cannot be made; returns the code, None for a job that was deleted."""
        self.store.sweep(job.id)
        if not self.store.holds(job.id, self.worker):
            return None
        code, message = explained(error)
        if code == "server_error":
            log_error(error)
        self.store.fail(job.id, self.worker, code, message, self.expiry())
        return code

    def _units(self, batch: Sequence[Prepared]) -> dict[str, float]:
        """Work of each phase, in order: clips, steps or frames, whatever its time grows with."""
        units: dict[str, float] = {}
        for one in batch:
            request = self.pipe.fill_defaults(one.request)
            for phase, steps in self.pipe.work(request).items():
                frames = request.num_frames if phase in ("residual", "video") else 1
                units[phase] = units.get(phase, 0) + steps * frames
        return {**units, "write": sum(one.job.settings.num_frames for one in batch)}

    def _sampled_together(
        self, batch: Sequence[Prepared], watch: Watch
    ) -> tuple[list[np.ndarray | None], dict[str, float]]:
        timings: dict[str, float] = {}

        def on_base(index: int, path: BaseTrajectory) -> bool:
            return self._show_base(batch[index], path, watch)

        outputs = sample_together(
            self.pipe,
            [one.request for one in batch],
            looks=[one.look or one.request for one in batch],
            base_cache=self.base_cache,
            on_base=on_base,
            on_paths=self._count_paths,
            callback=watch,
        )
        for output in outputs:
            timings = timings if output is None else output.timings
        return [None if output is None else output.frames[0] for output in outputs], dict(timings)

    def _sampled(
        self, batch: Sequence[Prepared], watch: Watch
    ) -> tuple[list[np.ndarray | None], dict[str, float]]:
        """One clip, of a pipeline or with settings that allow no more."""
        (one,) = batch
        request, timings = one.request, {}
        if isinstance(request, SamplingRequest):
            path = self._walked(one, watch, timings)
            if not self._show_base(one, path, watch):
                return [None], timings
            request = replace(request, image=None, trajectory=path)
        output = self.pipe.sample(request, watch)
        for name, seconds in output.timings.items():
            timings[name] = timings.get(name, 0.0) + seconds
        return [output.frames[0]], timings

    def _walked(self, one: Prepared, watch: Watch, timings: dict[str, float]) -> BaseTrajectory:
        request = one.look or one.request
        names = ("num_inference_steps", "solver", "eta")
        settings = {name: getattr(request, name) for name in names}
        if request.image is not None:
            return self.pipe.image_path(request.image, **settings)
        path = self.pipe.walk_base(
            request.label,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            guidance_scale=request.guidance_scale,
            base_seed=request.base_seed,
            base_cache=self.base_cache,
            callback=watch,
            timings=timings,
            **settings,
        )
        walked = timings.get("base", 0.0) > 0.0
        self._count_paths(int(walked), int(not walked))
        return path

    def _count_paths(self, walked: int, found: int) -> None:
        self._paths = {"walked": walked, "found": found}

    def _show_base(self, one: Prepared, path: BaseTrajectory, watch: Watch) -> bool:
        """Writes the base frame; False: nobody wants the clip."""
        if not self.store.holds(one.job.id, self.worker):
            return False
        pixels = base_frame(self.pipe, path)
        self._write_thumbnail(one, pixels[None])
        return watch.has_base(one.job.id)

    def _write_thumbnail(self, one: Prepared, frame: np.ndarray) -> None:
        """frame: uint8 [1, H, W, 3]"""
        pixels = enlarge(frame, one.job.settings.scale)[0]
        file = self.store.file(one.job.id, THUMBNAIL)
        write_png(file, pixels, _look_record(self.pipe, file, one))

    def _written(self, one: Prepared, frames: np.ndarray) -> dict[str, Any]:
        """Writes a clip and its sheet, frames uint8 [N, H, W, 3]; what is to be said of them."""
        job, settings = one.job, one.job.settings
        if not isinstance(one.request, SamplingRequest):
            middle = len(frames) // 2
            self._write_thumbnail(one, frames[middle : middle + 1])
            self.store.report(job.id, self.worker, "write", 0, has_base=True)
        if one.source is not None:
            frames = frames[len(frames) - settings.num_frames :]
        frames = enlarge(frames, settings.scale)
        if one.source is not None:
            frames = np.concatenate([one.source, frames])
        file = self.store.file(job.id, SPRITESHEET)
        write_sheet(file, frames, settings.fps, _record(self.pipe, file, one))
        file = self.store.file(job.id, settings.video_file)
        record, encoding = _record(self.pipe, file, one), check_encoding(file.suffix)
        write_video(file, frames, settings.fps, metadata=record, **encoding._asdict())
        return {
            "num_frames": len(frames),
            "seconds": round(len(frames) / settings.fps, 3),
            "bytes": file.stat().st_size,
        }


def explained(error: Exception) -> tuple[str, str]:
    """A code and a message, for the one who sent the job, of an error that its clip made."""
    if is_out_of_memory(error):
        return "out_of_memory", "not enough memory: try fewer frames"
    if isinstance(error, (ValueError, TypeError)):
        return "invalid_request", " ".join(str(error).split())
    if isinstance(error, NotFinite):
        return "server_error", str(error)
    return "server_error", f"the clip could not be made ({type(error).__name__})"


class Memory:
    """Memory of a batch, from the making of this on, in MiB; None where the system does not say."""

    def __init__(self, pipe: Pipeline) -> None:
        self._device = pipe.device if pipe.device.type == "cuda" else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> float | None:
        """The most that was in use: of the GPU's, or of the process since it began."""
        if self._device is not None:
            return round(torch.cuda.max_memory_allocated(self._device) / 2**20, 1)
        if sys.platform == "win32":
            return None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10, 1)

    @staticmethod
    def process() -> float | None:
        """What the process has now."""
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except OSError:
            return None
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _record(pipe: Pipeline, file: Path, one: Prepared) -> str | None:
    """What a file of a job says of how its clip was made; None of a prompt that no file can carry.

    What the settings alone do not make again, the record says to be beyond them: the look of
    another prompt, and a clip that goes on from another.
    """
    settings = one.job.settings
    upload = file.with_name(UPLOAD)
    files = {"image": file_record(upload)} if settings.picture else {}
    written = {"fps": settings.fps, "scale": settings.scale}
    encoding = check_encoding(file.suffix)._asdict()
    record = clip_settings(pipe, one.request, files=files, **written, **encoding)
    beyond = {} if settings.look is None else {"look": settings.look}
    if one.source is not None:
        beyond["source"] = {"frames": len(one.source)}
    if beyond:
        record["beyond"] = {**record.get("beyond", {}), **beyond}
    text = settings_text(record)
    return text if len(text) <= MAX_BYTES else None


def _look_record(pipe: Pipeline, file: Path, one: Prepared) -> str | None:
    """What a thumbnail says of how it was made: equal for clips of one base frame.

    None where the base frame is a picture that was sent, or the last frame of a clip.
    """
    request = one.request if one.look is None else one.look
    if not isinstance(request, SamplingRequest):
        return _record(pipe, file, one)
    if request.image is not None:
        return None
    names = ("label", "prompt", "negative_prompt", "num_inference_steps", "guidance_scale")
    values = {name: getattr(request, name) for name in (*names, "solver", "eta", "base_seed")}
    preview = SamplingRequest(**values, preview=True)
    text = settings_text(clip_settings(pipe, preview, scale=one.job.settings.scale))
    return text if len(text) <= MAX_BYTES else None


def _common(settings: JobSettings) -> dict[str, Any]:
    """What requests of all kinds of models have."""
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "solver", "eta")
    return {name: getattr(settings, name) for name in names}
