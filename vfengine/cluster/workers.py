"""The two kinds of workers, as Ray's actors: they walk base paths, and follow them.

A `BaseWorker` holds the base network, and the text encoder of a model that has one. A
`ResidualWorker` holds the residual network and the decoder, and makes files. Between them a base
path lies in Ray's object store. Neither knows the user's files: what they need comes with an order,
and what they make goes back as bytes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model import Model

if TYPE_CHECKING:
    from ..diffusion.base_path import BaseTrajectory
    from ..pipelines.request import TextRequest, VideoRequest


@dataclass(frozen=True)
class Order:
    """What a worker needs to know of a line: a request with its defaults filled in, and its files.

    walks:    whether a base worker walks its base path
    suffix:   of the files, ".mp4"
    texts:    what each clip's file is to carry
    encoding: of `write_video`; fps, scale and scale_filter as the command line has them
    """

    request: VideoRequest | TextRequest
    batch_size: int
    walks: bool
    suffix: str
    texts: Sequence[str | None]
    encoding: Mapping[str, Any]
    fps: float
    scale: int
    scale_filter: str


@dataclass
class Made:
    """The clips of an order.

    files:   the bytes of each clip's file
    timings: seconds, by phase
    facts:   of the process that made them, as `generate --json` tells them
    path:    the base path that was walked, where the driver asked for it
    """

    files: list[bytes]
    timings: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    path: BaseTrajectory | None = None


class _Worker:
    """A process with the model.

    threads: of a CPU
    """

    def __init__(self, model: Model, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._model, self._pipe = model, None

    def missing(self) -> list[str]:
        """What must be sent here before `open`; its answer also says that the worker is there."""
        return self._model.missing()

    def take(self, name: str, files: Sequence[str], *contents: bytes) -> None:
        """Keeps one of the model's sources on this machine."""
        self._model.sources[name].keep(dict(zip(files, contents, strict=True)))

    def open(self) -> str:
        """Opens the model, whose weights are read when they are needed; the version of vfengine."""
        from .. import __version__

        if self._pipe is None:
            self._pipe = self._model.open()
            self._pipe.keep_parts()
        return __version__


class BaseWorker(_Worker):
    """Walks base paths."""

    def walk(self, order: Order) -> tuple[dict[str, float], BaseTrajectory]:
        """Seconds by phase, and the base path of all clips of an order, on the CPU."""
        import torch

        from ..pipelines.batches import Batches

        batches, timings, paths = Batches(self._pipe, order.request, order.batch_size), {}, []
        for part in batches.parts():
            paths.append(self._pipe.base_path_of(part, timings=timings).to("cpu"))
            if order.request.shares_path:
                break
        states = torch.cat([path.states for path in paths], dim=1)
        return timings, replace(paths[0], states=states)


class ResidualWorker(_Worker):
    """Makes clips along base paths, or all of the clips of a model without them."""

    def follow(self, order: Order, path: BaseTrajectory | None = None) -> Made:
        """The clips of an order; path: the one that was walked for it."""
        import torch

        from ..media.pictures import enlarge, to_uint8
        from ..media.video import write_video
        from ..pipelines.batches import Batches

        request = order.request
        given = getattr(request, "trajectory", None) if path is None else path
        if given is not None:
            request = request.along(given.to(self._pipe.device))
        batches, made = Batches(self._pipe, request, order.batch_size, True), Made([], {})
        with tempfile.TemporaryDirectory(prefix="vfengine-") as folder:
            file = Path(folder) / f"clip{order.suffix}"
            for batch in batches.run():
                _add(made.timings, batch.output.timings)
                started = time.perf_counter()
                for number, frames in enumerate(to_uint8(batch.output.frames), batch.first):
                    frames = enlarge(frames, order.scale, order.scale_filter)
                    how = {"metadata": order.texts[number], **order.encoding}
                    write_video(file, frames, order.fps, **how)
                    made.files.append(file.read_bytes())
                _add(made.timings, {"write": time.perf_counter() - started})
        made.facts = {"threads": torch.get_num_threads(), "peak_memory": _peak(self._pipe.device)}
        return made


def _add(sums: dict[str, float], timings: Mapping[str, float]) -> None:
    for name, seconds in timings.items():
        sums[name] = sums.get(name, 0.0) + seconds


def _peak(device: Any) -> dict[str, int | None]:
    """Bytes of memory, at most, of this process and of its GPU."""
    import resource

    import torch

    cuda = device.type == "cuda"
    return {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cuda": torch.cuda.max_memory_allocated(device) if cuda else None,
        "cuda_reserved": torch.cuda.max_memory_reserved(device) if cuda else None,
    }
