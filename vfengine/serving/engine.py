"""An engine: a process that reads a model, and makes the jobs of a store one batch after another.

`python -m vfengine.serving.engine` is started by the server (workers.py). A line on its stdin says
that there may be work; the end of stdin, that it is to stop, as does SIGTERM. It then gives back
what it was at. Its stdout is one JSON object a line:

    {"event": "ready", "model": …}      once: a `ModelInfo`
    {"event": "batch", "clips": 2, "walked": 1, "found": 1, "seconds": {"base": …}, …}
    {"event": "failed", "code": …}      a job that could not be made
    {"event": "error", "message": …}    before "ready": the model cannot be used; exit status 2
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..files import is_of_the_machine
from ..formats.lora_files import parse_lora
from .log import log, log_error
from .model_info import ModelInfo
from .store import Store

if TYPE_CHECKING:
    from ..pipelines.pipeline import Pipeline
    from .jobs import Job
    from .making import Maker, Prepared

T = TypeVar("T")
_POLL = 5.0  # seconds after which an engine that was not woken looks for work
_GRACE = 20  # seconds after which the system ends an engine that was told to


class Engine:
    """Makes the jobs of a store, until it is told to stop.

    say:        gets what happens, as JSON values
    batch_size: clips of a batch, at most
    """

    def __init__(
        self,
        pipe: Pipeline,
        store: Store,
        worker: str = "engine",
        *,
        batch_size: int = 1,
        keep: float | None = None,
        say: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        from .making import Maker

        self.store, self.worker, self.batch_size, self.say = store, worker, batch_size, say
        self.stop, self.woken = threading.Event(), threading.Event()
        self.maker: Maker = Maker(pipe, store, worker, keep, self.stop)

    def run(self) -> None:
        """Makes what is queued, and waits for more, until `stop` is set."""
        while not self.stop.is_set():
            self.woken.clear()
            if not self.run_once():
                self.woken.wait(_POLL)

    def run_once(self) -> bool:
        """Makes one batch, and returns whether there was one."""
        from .watch import Deleted, Stopping

        most = self.batch_size if self.maker.together(()) else 1
        jobs = self._patiently(lambda: self.store.claim(self.worker, most))
        if not jobs:
            return False
        try:
            batch = []
            for job in jobs:
                try:
                    batch.append(self.maker.prepared(job))
                except Stopping:
                    raise
                except Deleted:
                    self.store.sweep(job.id)
                except Exception as error:
                    self._failed(job, error)
            if self.maker.together([one.job for one in batch]):
                self._made(batch)
            else:
                for one in batch:
                    self._made([one])
        except Stopping:
            self._give_back(jobs)
        except (OSError, sqlite3.Error) as error:  # of the store
            if not is_of_the_machine(error):
                raise
            self._give_back(jobs)
        return True

    def _give_back(self, jobs: Sequence[Job]) -> None:
        self._patiently(lambda: self.store.requeue([job.id for job in jobs], self.worker))

    def _patiently(self, use_store: Callable[[], T]) -> T | None:
        """Does something with the store. While its disk is full, says so, and tries again.

        None: the engine was told to stop meanwhile.
        """
        said = False
        while True:
            try:
                return use_store()
            except (OSError, sqlite3.Error) as error:
                if not is_of_the_machine(error):
                    raise
                if not said:
                    log_error(error)
                    log("vfengine: the engine waits, and tries again")
                said = True
            if self.stop.wait(_POLL):
                return None

    def _made(self, batch: list[Prepared]) -> None:
        """Makes a batch. Where it cannot be made, its jobs are tried one by one."""
        from .making import is_out_of_memory
        from .watch import Deleted, Stopping

        batch = [one for one in batch if self.store.holds(one.job.id, self.worker)]
        if not batch:
            return
        failed = False
        try:
            self.say(self.maker.make(batch))
        except Stopping:
            raise
        except Deleted:
            pass
        except Exception as error:
            if len(batch) == 1:
                self._failed(batch[0].job, error)
                return
            if is_out_of_memory(error):
                self.batch_size = max(1, len(batch) // 2)
            else:
                log_error(error)
            failed = True  # here the error still holds what was in memory
        finally:
            for one in batch:
                self.store.sweep(one.job.id)
        if failed:
            for one in batch:
                self._made([one])

    def _failed(self, job: Any, error: Exception) -> None:
        code = self.maker.fail(job, error)
        if code is not None:
            self.say({"event": "failed", "code": code})


def model_info(pipe: Pipeline, name: str, batch_size: int) -> ModelInfo:
    """What a server must know of a pipeline; ValueError for one whose clips are no RGB pictures."""
    from ..names import BASE_PATHS
    from ..pipelines.request import SamplingRequest, TextRequest
    from ..sampling.cycle import least_cycle

    config, request = pipe.config, pipe.request_type
    decomposed, text = issubclass(request, SamplingRequest), issubclass(request, TextRequest)
    if text:
        height, width = (side * config.scale for side in config.sample_size)
        channels = config.channels
    else:
        (height, width), channels = config.picture_size, config.picture_channels
    if channels != 3:
        raise ValueError(f"{pipe.folder}: clips of {channels} channels are not RGB")
    return ModelInfo(
        name=name,
        kind="decomposed" if decomposed else "text" if text else "plain",
        labels=tuple(pipe.labels),
        takes_prompts=text or config.text_encoder is not None,
        width=width,
        height=height,
        num_frames=config.num_frames,
        fps=config.fps,
        guidance_scale=request.guidance_scale,
        **_sampling(pipe),
        base_paths=BASE_PATHS if decomposed else (),
        base_path=config.base_path if decomposed else None,
        animates_pictures=decomposed and config.animates_pictures,
        has_base=decomposed,
        least_loop=least_cycle(base=decomposed) if decomposed or text else None,
        max_batch=batch_size if decomposed else 1,
        fingerprint=pipe.fingerprint or "",
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
    )


def _sampling(pipe: Pipeline) -> dict[str, Any]:
    """How a model can be sampled: any model, or one that was distilled."""
    from ..names import DEFAULT_STEPS, SOLVERS
    from ..pipelines.few_steps import chosen_steps
    from ..pipelines.request import TextRequest

    if issubclass(pipe.request_type, TextRequest):
        return {"steps": DEFAULT_STEPS, "solver": TextRequest.solver, "solvers": SOLVERS}
    usual = chosen_steps(pipe.config, pipe.config.networks)
    found = pipe.config.distilled or {}
    if not found:
        steps = {"steps": usual.num_inference_steps, "solver": usual.solver}
        return {**steps, "solvers": SOLVERS}
    names, ranges = pipe.config.networks, [few.guidance for few in found.values()]
    steps = {len(few.timesteps) for few in found.values()} if len(found) == len(names) else ()
    return {
        "steps": usual.num_inference_steps,
        "solver": usual.solver,
        "only_steps": tuple(sorted(steps)),
        "guidance_range": (max(least for least, _ in ranges), min(most for _, most in ranges)),
        "takes_negatives": False,
        "solvers": (usual.solver,),
    }


def default_batch_size(pipe: Pipeline) -> int:
    """How many clips of equal shape are made at once unless the user says it.

    On a CPU a batch saves nothing: its clips take as long as one after the other, and the first is
    finished as late as the last.
    """
    return 4 if pipe.device.type == "cuda" else 1


# -- the process -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an engine until it is told to stop; returns the exit status, 2 for a bad model."""
    options = _parser().parse_args(argv)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever else is printed must not mix with events
    lock = threading.Lock()

    def say(event: dict[str, Any]) -> None:
        try:
            with lock:
                out.write(json.dumps(event) + "\n")
        except OSError:
            return  # the server has gone; the end of stdin says so too

    ended = threading.Event()
    engines: list[Engine] = []

    def end(*_: object) -> None:
        signal.alarm(_GRACE)  # by the system, whatever this process is at
        ended.set()
        for engine in engines:
            engine.stop.set()
            engine.woken.set()

    def listen() -> None:
        for _ in sys.stdin:
            for engine in engines:
                engine.woken.set()
        end()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server will say it
    threading.Thread(target=listen, name="stdin", daemon=True).start()
    try:
        pipe = _opened(options)
        batch_size = options.batch_size or default_batch_size(pipe)
        info = model_info(pipe, options.name, batch_size)
        store = Store(options.store, durable=False)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):  # which say what is wrong in one line
            log_error(error)
        message = " ".join(str(error).split()) or type(error).__name__
        say({"event": "error", "message": message})
        return 2
    engine = Engine(pipe, store, options.worker, batch_size=batch_size, keep=options.keep, say=say)
    engines.append(engine)
    if ended.is_set():  # while the model was read
        return 0
    say({"event": "ready", "model": asdict(info)})
    engine.run()
    store.close()
    return 0


def _opened(options: argparse.Namespace) -> Pipeline:
    """The pipeline, its weights in memory."""
    import torch

    from ..pipelines.load import load_pipeline
    from ..pipelines.pipeline import CheckpointPipeline
    from ..pipelines.together import keep_networks

    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    pipe = load_pipeline(
        options.model,
        device=options.device,
        dtype=dtype,
        capture=not options.no_capture,
        base_unet=options.base_unet,
        lora=options.lora,
        base_device=options.base_device,
        residual_device=options.residual_device,
    )
    if isinstance(pipe, CheckpointPipeline):  # a published model may be too large for memory
        keep_networks(pipe)
    return pipe


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vfengine.serving.engine", allow_abbrev=False)
    parser.add_argument("--store", type=Path, required=True, help="folder of the jobs")
    parser.add_argument("--model", help="folder of a model; without it, the shipped one")
    parser.add_argument("--name", default="vfengine", help="the model's name in requests")
    parser.add_argument("--worker", default=f"engine-{os.getpid()}", help="name in the store")
    parser.add_argument("--batch-size", type=int, help="clips of a batch, at most")
    parser.add_argument("--keep", type=float, help="seconds for which a finished clip is kept")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--base-device", help="of the base phase, in place of --device")
    parser.add_argument("--residual-device", help="of the residual phase, in place of --device")
    parser.add_argument("--dtype", default="auto", help="a name in torch, or auto")
    parser.add_argument("--base-unet", help="an image UNet in place of the base network")
    parser.add_argument("--lora", action="append", type=parse_lora, help="LoRA, as FILE:SCALE")
    parser.add_argument("--no-capture", action="store_true", help="no graphs on CUDA")
    return parser


if __name__ == "__main__":
    sys.exit(main())
