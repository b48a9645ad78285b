"""A pipeline's session: its networks in memory, and the phases run with them.

Networks are read when first asked for and can be let go. A loop, with its buffers and on CUDA its
graph, is kept until a call needs another: for other shapes, scales, solvers or weights, not for
other noise or labels. One loop a phase, so memory does not grow from call to call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Model, frame_weights
from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from ..formats.checkpoint import CheckpointConfig, load_network
from ..models import UNet, for_inference
from ..plan.packing import return_memory
from ..sampling.cuda_graph import empty_cache, surroundings_key, weights_key
from ..sampling.guidance import Condition
from ..sampling.loop import BaseLoop, Loop, ResidualLoop, VideoLoop
from ..sampling.overlap import run_overlapped
from ..sampling.run import Run
from ..sampling.two_phase import Motion
from ..sampling.windows import windowed
from .base_unet import PretrainedBase


@dataclass(frozen=True, eq=False)
class _Held:
    """A loop between runs: what it was made for, and where its network reads the labels."""

    key: object
    loop: Loop
    labels: Tensor


class Session:
    """The networks of one checkpoint on one device, and the phases that they run.

    capture: on CUDA, replay steps from graphs
    base:    in place of the checkpoint's own base network
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
        self, noise: Tensor, condition: Condition, table: SolverTable, place: NoisePlace, run: Run
    ) -> Tensor:
        """The base phase on b [B, C, H, W]: its states [S+1, B, C, H, W]."""
        with self._base_loop(noise, condition, table, place, run) as loop:
            self._run(loop, noise, run)
            return loop.states.clone()

    def residual(
        self,
        noise: Tensor,
        condition: Condition,
        path: BaseTrajectory,
        motion: Motion,
        place: NoisePlace,
        run: Run,
    ) -> Tensor:
        """The residual phase on r [B, N, C, H, W] along a path, clean or not as it says: clips."""
        states = path.states.to(self.device)
        motion = replace(motion, clean=path.base_path == "clean")
        with self._residual_loop(
            noise, condition, path.table, place, run, motion, states=states, follow=False
        ) as loop:
            with torch.inference_mode():
                loop.states.copy_(states)
            self._run(loop, noise, run)
            return loop.u.clone()

    def overlapped(
        self,
        noises: tuple[Tensor, Tensor],
        conditions: tuple[Condition, Condition],
        table: SolverTable,
        motion: Motion,
        places: tuple[NoisePlace, NoisePlace],
        run: Run,
    ) -> tuple[Tensor, Tensor]:
        """Both phases at once: the clips, and the base path's states.

        noises, conditions, places: of the base and of the residual phase
        """
        with (
            self._base_loop(noises[0], conditions[0], table, places[0], run) as base,
            self._residual_loop(
                noises[1], conditions[1], table, places[1], run, motion,
                states=base.states, follow=True,
            ) as residual,
        ):  # fmt: skip
            with run.timed("residual", self.device), torch.inference_mode():
                run.report("base", 0, len(table))
                run_overlapped(base, residual, *noises, self.capture, run.report)
            return residual.u.clone(), base.states.clone()

    def video(
        self, noise: Tensor, condition: Condition, table: SolverTable, place: NoisePlace, run: Run
    ) -> Tensor:
        """All frames of [B, N, C, H, W] by the one network of a plain video model."""

        def build(model: Model) -> Loop:
            where = {"seed": place.seed, "sample_offset": place.sample_offset}
            return VideoLoop(model, noise, table, **where)

        how = (noise.shape, self._key(table, place))
        with self._loop("video", condition, how, build, run) as loop:
            self._run(loop, noise, run)
            return loop.u.clone()

    def _run(self, loop: Loop, noise: Tensor, run: Run) -> None:
        with (
            run.phase(loop.phase, len(loop), self.device) as report,
            torch.inference_mode(),
        ):
            step = loop.stepper(self.capture)
            loop.start(noise)
            report(0)
            loop.run(step, run.report)

    # -- loops ---------------------------------------------------------------------------------

    def _base_loop(self, noise, condition, table, place, run) -> AbstractContextManager[BaseLoop]:
        def build(model: Model) -> Loop:
            where = {"seed": place.seed, "sample_offset": place.sample_offset}
            return BaseLoop(model, noise, table, **where)

        how = (noise.shape, self._key(table, place))
        return self._loop("base", condition, how, build, run)

    def _residual_loop(
        self, noise, condition, table, place, run, motion: Motion, *, states: Tensor, follow: bool
    ) -> AbstractContextManager[ResidualLoop]:
        """follow: read the states where they lie, as they come; otherwise in memory of its own."""
        lam, windows, frames = motion.lam, motion.windows, noise.shape[1]
        whole = windows is None or frames <= windows[0]
        seen = frames if whole else windows[0]
        weights = frame_weights(lam if whole else float(torch.as_tensor(lam)), seen)

        def build(model: Model) -> Loop:
            if not whole:
                model = windowed(model, frames, *windows, lam=lam, device=self.device)
            own = states if follow else torch.empty_like(states)
            where = {"clean": motion.clean, "lam": lam, **asdict(place)}
            return ResidualLoop(model, noise, own, table, **where)

        how = (
            noise.shape, states.shape, states.dtype, states.data_ptr() if follow else None, motion,
            self._key(table, place),
        )  # fmt: skip
        weights = weights.to(self.device)
        return self._loop("residual", condition, how, build, run, lam=weights)

    def _key(self, table: SolverTable, place: NoisePlace) -> tuple:
        """What a loop was made for, where shapes do not say it; seeds only if noise is added."""
        rows = (table.timesteps, table.alphas_cumprod, table.coeffs, table.mixing)
        return (
            tuple(row.numpy().tobytes() for row in rows),
            place if table.stochastic else None,
            surroundings_key(self.device),
        )

    @contextmanager
    def _loop(
        self, name: str, condition: Condition, how: tuple, build: Callable[[Model], Loop],
        run: Run, **conditions: Any,
    ) -> Iterator[Any]:  # fmt: skip
        """The phase's loop for one run: the last one if it was made for the same, or a new one.

        Meanwhile it is out of reach, so that a call inside a callback or in another thread makes
        its own; after an error it is not used again.
        """
        network = self._network(name, run)
        null = torch.full_like(condition.classes, self.config.null_class)
        guided = condition.guidance_scale != 1.0 and not torch.equal(condition.classes, null)
        guided = guided and self.config.labels != () and network.takes_labels
        scale = condition.guidance_scale if guided else 1.0
        labels = torch.cat([condition.classes, null]) if guided else condition.classes
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

    def _network(self, name: str, run: Run) -> nn.Module:
        if (network := self.networks.get(name)) is None:
            with run.timed("load", self.device):
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
