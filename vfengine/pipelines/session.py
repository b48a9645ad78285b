"""The engine of a pipeline: networks in memory, guidance, and the loops that are used again.

Networks are read when first asked for and can be let go. A loop, with its buffers and on CUDA its
graph, is kept until a call needs another: for other shapes, scales, solvers or weights, not for
other noise or labels. One loop a phase, so memory does not grow from call to call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Lam, Model, frame_weights
from ..diffusion.solvers import SolverTable
from ..formats.checkpoint import CheckpointConfig, load_network
from ..models import UNet, for_inference
from ..plan.packing import return_memory
from ..sampling.cuda_graph import empty_cache, surroundings_key, weights_key
from ..sampling.loop import BaseLoop, Callback, Loop, ResidualLoop, VideoLoop
from ..sampling.overlap import run_overlapped
from ..sampling.windows import windowed
from .base_unet import PretrainedBase


@dataclass(frozen=True)
class Asked:
    """What the networks are conditioned on: classes int64 [B] on the device, guidance scale."""

    classes: Tensor
    guidance_scale: float


@dataclass(frozen=True, eq=False)
class _Held:
    """A loop between runs: what it was made for, and where its network reads the labels."""

    key: object
    loop: Loop
    labels: Tensor


class Engine:
    """Runs the phases of one checkpoint on one device.

    capture: on CUDA, replay steps from graphs
    base:    in place of the checkpoint's own base network

    Methods take `timings`, {"load", "base", "residual"}, and add their seconds.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        capture: bool,
        base: PretrainedBase | None = None,
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.dtype, self.capture, self.pretrained = dtype, capture, base
        self.networks: dict[str, nn.Module] = {}
        self.loops: dict[str, _Held] = {}

    # -- phases --------------------------------------------------------------------------------

    def base(
        self,
        noise: Tensor,
        asked: Asked,
        table: SolverTable,
        callback: Callback | None,
        timings: dict[str, float],
        **place: int,
    ) -> Tensor:
        """The base phase on b [B, C, H, W]: its states [S+1, B, C, H, W].

        place: seed and sample_offset of the noise on the way
        """
        with self._base_loop(noise, asked, table, place, timings) as loop:
            self._run(loop, noise, callback, timings)
            return loop.states.clone()

    def residual(
        self,
        noise: Tensor,
        asked: Asked,
        path: BaseTrajectory,
        callback: Callback | None,
        timings: dict[str, float],
        *,
        lam: Lam,
        windows: tuple[int, int] | None,
        **place: int,
    ) -> Tensor:
        """The residual phase on r [B, N, C, H, W] along a path: the clips.

        windows: (window, overlap) of vfengine/sampling/windows.py, or None
        """
        states = path.states.to(self.device)
        motion = {"lam": lam, "windows": windows, "clean": path.base_path == "clean"}
        with self._residual_loop(
            noise, asked, path.table, place, timings, states=states, follow=False, **motion
        ) as loop:
            with torch.inference_mode():
                loop.states.copy_(states)
            self._run(loop, noise, callback, timings)
            return loop.u.clone()

    def overlapped(
        self,
        base_noise: Tensor,
        residual_noise: Tensor,
        asked: tuple[Asked, Asked],
        table: SolverTable,
        callback: Callback | None,
        timings: dict[str, float],
        *,
        lam: Lam,
        windows: tuple[int, int] | None,
        places: tuple[dict[str, int], dict[str, int]],
    ) -> tuple[Tensor, Tensor]:
        """Both phases at once: the clips, and the base path's states.

        asked, places: of the base and of the residual phase
        """
        with (
            self._base_loop(base_noise, asked[0], table, places[0], timings) as base,
            self._residual_loop(
                residual_noise, asked[1], table, places[1], timings,
                lam=lam, windows=windows, clean=False, states=base.states, follow=True,
            ) as residual,
        ):  # fmt: skip
            with self._timed("residual", timings), torch.inference_mode():
                if callback is not None:
                    callback("base", 0, len(table))
                run_overlapped(base, residual, base_noise, residual_noise, self.capture, callback)
            return residual.u.clone(), base.states.clone()

    def video(
        self,
        noise: Tensor,
        asked: Asked,
        table: SolverTable,
        callback: Callback | None,
        timings: dict[str, float],
        **place: int,
    ) -> Tensor:
        """All frames of [B, N, C, H, W] by the one network of a plain video model."""

        def build(model: Model) -> Loop:
            return VideoLoop(model, noise, table, **place)

        how = (noise.shape, self._key(table, place))
        with self._loop("video", asked, how, build, timings) as loop:
            self._run(loop, noise, callback, timings)
            return loop.u.clone()

    def _run(
        self, loop: Loop, noise: Tensor, callback: Callback | None, timings: dict[str, float]
    ) -> None:
        phase = "base" if loop.phase == "base" else "residual"
        with self._timed(phase, timings), torch.inference_mode():
            step = loop.stepper(self.capture)
            loop.start(noise)
            if callback is not None:
                callback(loop.phase, 0, len(loop))
            loop.run(step, callback)

    # -- loops ---------------------------------------------------------------------------------

    def _base_loop(self, noise, asked, table, place, timings) -> AbstractContextManager[BaseLoop]:
        def build(model: Model) -> Loop:
            return BaseLoop(model, noise, table, **place)

        how = (noise.shape, self._key(table, place))
        return self._loop("base", asked, how, build, timings)

    def _residual_loop(
        self, noise, asked, table, place, timings, *, lam: Lam,
        windows: tuple[int, int] | None, clean: bool, states: Tensor, follow: bool,
    ) -> AbstractContextManager[ResidualLoop]:  # fmt: skip
        """follow: read the states where they lie, as they come; otherwise in memory of its own."""
        frames = noise.shape[1]
        whole = windows is None or frames <= windows[0]
        seen = frames if whole else windows[0]
        weights = frame_weights(lam if whole else float(torch.as_tensor(lam)), seen)

        def build(model: Model) -> Loop:
            if not whole:
                model = windowed(model, frames, *windows, lam=lam, device=self.device)
            own = states if follow else torch.empty_like(states)
            return ResidualLoop(model, noise, own, table, clean=clean, lam=lam, **place)

        how = (
            noise.shape, states.shape, states.dtype, states.data_ptr() if follow else None, clean,
            windows, tuple(frame_weights(lam, frames).tolist()), self._key(table, place),
        )  # fmt: skip
        weights = weights.to(self.device)
        return self._loop("residual", asked, how, build, timings, lam=weights)

    def _key(self, table: SolverTable, place: dict[str, int]) -> tuple:
        """What a loop was made for, where shapes do not say it; seeds only if noise is added."""
        rows = (table.timesteps, table.alphas_cumprod, table.coeffs, table.mixing)
        return (
            tuple(row.numpy().tobytes() for row in rows),
            tuple(place.values()) if table.stochastic else None,
            surroundings_key(self.device),
        )

    @contextmanager
    def _loop(
        self, name: str, asked: Asked, how: tuple, build: Callable[[Model], Loop],
        timings: dict[str, float], **conditions: Any,
    ) -> Iterator[Any]:  # fmt: skip
        """The phase's loop for one run: the last one if it was made for the same, or a new one.

        Meanwhile it is out of reach, so that a call inside a callback or in another thread makes
        its own; after an error it is not used again.
        """
        network = self._network(name, timings)
        null = torch.full_like(asked.classes, self.config.null_class)
        guided = asked.guidance_scale != 1.0 and not torch.equal(asked.classes, null)
        guided = guided and self.config.labels != () and network.takes_labels
        scale = asked.guidance_scale if guided else 1.0
        labels = torch.cat([asked.classes, null]) if guided else asked.classes
        key = (how, scale, labels.shape, weights_key(network))
        held = self.loops.pop(name, None)
        if held is None or held.key != key:
            held = None  # its buffers go before the new ones come
            own = labels.clone()
            with torch.inference_mode():
                held = _Held(key, build(self._guided(network, own, scale, **conditions)), own)
        held.labels.copy_(labels)
        yield held.loop
        self.loops[name] = held

    # -- networks ------------------------------------------------------------------------------

    def _network(self, name: str, timings: dict[str, float]) -> nn.Module:
        if (network := self.networks.get(name)) is None:
            with self._timed("load", timings):
                if name == "base" and self.pretrained is not None:
                    schedule = self.config.noise_schedule()
                    network = self.pretrained.load(schedule, self.device, self.dtype)
                else:
                    network = load_network(self.folder, self.config, name, self.device, self.dtype)
                if isinstance(network.unet, UNet):
                    network.unet = for_inference(network.unet, self.dtype, self.device)
            self.networks[name] = network
        return network

    def _guided(self, network: nn.Module, labels: Tensor, scale: float, **conditions: Any) -> Model:
        """The network as (z, t) -> ε = ε_u + s (ε_c - ε_u)   (Ho & Salimans 2022, eq. 6).

        labels: a buffer, read at every call: [B], or [2 B], with and without condition, where both
                estimates come from one call on a doubled batch (scale is not 1)
        """
        if self.config.labels == ():
            return lambda z, t: network(z, t, **conditions)
        if scale == 1.0:
            return lambda z, t: network(z, t, class_labels=labels, **conditions)

        def guided(z: Tensor, t: Tensor) -> Tensor:
            conditional, unconditional = network(
                torch.cat([z, z]), torch.cat([t, t]), class_labels=labels, **conditions
            ).chunk(2)
            return torch.lerp(unconditional, conditional, scale)

        return guided

    def release(self, name: str) -> None:
        """Lets a network go, with the loop that holds it, and gives its memory back."""
        if self.networks.pop(name, None) is None:
            return
        self.loops.pop(name, None)
        if self.device.type == "cuda":
            empty_cache()
        else:
            return_memory()

    def lets_base_go(self, needed_again: bool) -> bool:
        """What offload_base=None means: whether the base network goes before the residual phase.

        needed_again: by this call's or the command's later batches

        On a CPU it goes unless it is needed again. On CUDA, where to read and capture it anew takes
        longer than to sample, only where the weights that are still to come, and as much again to
        work in, find no room.
        """
        if self.device.type != "cuda":
            return not needed_again
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        room = torch.cuda.mem_get_info(self.device)[0] + idle
        weights = 0
        for name in ("base", "residual"):
            file = self.folder / f"{name}.safetensors"
            if name not in self.networks and file.is_file():
                with safe_open(str(file), framework="pt") as read:
                    tensors = [read.get_slice(key) for key in list(read.keys())]
                    weights += sum(math.prod(tensor.get_shape()) for tensor in tensors)
        return 2 * weights * self.dtype.itemsize > room

    def check_complete(self, name: str) -> None:
        """Finds a missing or cut-off weight file before the other network works for nothing."""
        if name in self.networks:
            return
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"checkpoint {self.folder} has no {file.name}")
        try:
            with safe_open(str(file), framework="pt"):  # compares the header with the file's length
                return
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error

    # -- time ----------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, name: str, timings: dict[str, float]) -> Iterator[None]:
        """Adds the seconds of the `with` block to timings[name], the device's work included."""
        started = self._now()
        yield
        timings[name] = timings.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            # torch.cuda.synchronize would wait for other threads too, and break their captures
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()


def no_time() -> dict[str, float]:
    """Timings of a call that has not begun."""
    return {"load": 0.0, "base": 0.0, "residual": 0.0}
