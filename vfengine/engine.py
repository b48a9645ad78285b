"""The engine of a pipeline: networks in memory, guidance, and the loops that are used again.

Networks are read when first asked for and can be let go. A loop, with its buffers and on CUDA its
graph, is kept until a call needs another: other shapes, conditions, solver or weights. One loop a
phase, so memory does not grow from call to call.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .capture import weights_key
from .checkpoint import CheckpointConfig, load_base, load_residual, load_video
from .decompose import Lam, Model, frame_weights
from .loops import BaseLoop, Callback, Loop, ResidualLoop, VideoLoop
from .overlap import run_overlapped
from .solvers import SolverTable
from .trajectory import BaseTrajectory
from .windows import windowed


class Engine:
    """Runs the phases of one checkpoint on one device.

    timings: seconds so far, {"load", "base", "residual"}; `take_timings` starts anew
    capture: on CUDA, replay steps from graphs
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        capture: bool,
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.dtype, self.capture = dtype, capture
        self.networks: dict[str, nn.Module] = {}
        self.loops: dict[str, tuple[object, Loop]] = {}  # by phase: what it was made for, and it
        self.timings = _no_time()

    # -- phases --------------------------------------------------------------------------------

    def base(
        self,
        noise: Tensor,
        classes: Tensor,
        guidance_scale: float,
        table: SolverTable,
        callback: Callback | None,
        **place: int,
    ) -> Tensor:
        """The base phase on b [B, C, H, W]: its states [S+1, B, C, H, W].

        classes: int64 [B], on the device; place: seed and sample_offset of the noise on the way
        """
        model = self._guided("base", classes, guidance_scale)
        loop = self._base_loop(model, noise, classes, guidance_scale, table, place)
        self._run(loop, noise, callback)
        return loop.states.clone()

    def residual(
        self,
        noise: Tensor,
        classes: Tensor,
        guidance_scale: float,
        path: BaseTrajectory,
        callback: Callback | None,
        *,
        lam: Lam,
        windows: tuple[int, int] | None,
        **place: int,
    ) -> Tensor:
        """The residual phase on r [B, N, C, H, W] along a path: the clips, in the loop's memory.

        windows: (window, overlap) of vfengine/windows.py, or None
        """
        states = path.states.to(self.device)
        model = self._motion(noise, classes, guidance_scale, lam, windows)
        loop = self._residual_loop(
            model, noise, classes, guidance_scale, path.table, lam, windows, place,
            clean=path.base_path == "clean", states=states, follow=False,
        )  # fmt: skip
        with torch.inference_mode():
            loop.states.copy_(states)
        self._run(loop, noise, callback)
        return loop.u

    def overlapped(
        self,
        base_noise: Tensor,
        residual_noise: Tensor,
        classes: tuple[Tensor, Tensor],
        guidance_scale: float,
        table: SolverTable,
        callback: Callback | None,
        *,
        lam: Lam,
        windows: tuple[int, int] | None,
        base_seed: int,
        seed: int,
        sample_offset: int,
    ) -> tuple[Tensor, Tensor]:
        """Both phases at once: the clips, and the base path's states; classes: of either phase."""
        models = (
            self._guided("base", classes[0], guidance_scale),
            self._motion(residual_noise, classes[1], guidance_scale, lam, windows),
        )
        place = {"seed": base_seed, "sample_offset": sample_offset}
        base = self._base_loop(models[0], base_noise, classes[0], guidance_scale, table, place)
        place["seed"] = seed
        residual = self._residual_loop(
            models[1], residual_noise, classes[1], guidance_scale, table, lam, windows, place,
            clean=False, states=base.states, follow=True,
        )  # fmt: skip
        with self._timed("residual"), torch.inference_mode():
            if callback is not None:
                callback("base", 0, len(table))
            run_overlapped(base, residual, base_noise, residual_noise, self.capture, callback)
        return residual.u, base.states.clone()

    def video(
        self,
        noise: Tensor,
        classes: Tensor,
        guidance_scale: float,
        table: SolverTable,
        callback: Callback | None,
        **place: int,
    ) -> Tensor:
        """All frames of [B, N, C, H, W] by the one network of a plain video model."""
        model = self._guided("video", classes, guidance_scale)
        key = (noise.shape, self._key("video", classes, guidance_scale, table, place))
        loop = self._loop("video", key, lambda: VideoLoop(model, noise, table, **place))
        self._run(loop, noise, callback)
        return loop.u

    def _run(self, loop: Loop, noise: Tensor, callback: Callback | None) -> None:
        with self._timed("base" if loop.phase == "base" else "residual"), torch.inference_mode():
            step = loop.stepper(self.capture)
            loop.start(noise)
            if callback is not None:
                callback(loop.phase, 0, len(loop))
            loop.run(step, callback)

    # -- loops ---------------------------------------------------------------------------------

    def _base_loop(self, model, noise, classes, guidance_scale, table, place) -> BaseLoop:
        key = (noise.shape, self._key("base", classes, guidance_scale, table, place))
        return self._loop("base", key, lambda: BaseLoop(model, noise, table, **place))

    def _residual_loop(
        self, model, noise, classes, guidance_scale, table, lam, windows, place, *,
        clean: bool, states: Tensor, follow: bool,
    ) -> ResidualLoop:  # fmt: skip
        """follow: read the states where they lie, as they come; otherwise in memory of its own."""
        key = (
            noise.shape, states.shape, states.data_ptr() if follow else None, clean, windows,
            tuple(frame_weights(lam, noise.shape[1]).tolist()),
            self._key("residual", classes, guidance_scale, table, place),
        )  # fmt: skip

        def build() -> ResidualLoop:
            own = states if follow else torch.empty_like(states)
            return ResidualLoop(model, noise, own, table, clean=clean, lam=lam, **place)

        return self._loop("residual", key, build)

    def _key(self, name: str, classes: Tensor, scale: float, table: SolverTable, place: dict):
        """What a loop of this network was made for, where shapes do not say it."""
        rows = (table.timesteps, table.alphas_cumprod, table.coeffs, table.mixing)
        return (
            tuple(classes.tolist()), scale, tuple(r.numpy().tobytes() for r in rows),
            tuple(place.values()) if table.stochastic else None,
            weights_key(self.networks[name]),
        )  # fmt: skip

    def _loop(self, phase: str, key: object, build: Callable[[], Loop]) -> Any:
        """The loop of the last call if it was made for the same, a new one otherwise."""
        held, loop = self.loops.pop(phase, (None, None))
        if held != key:
            loop = None  # its buffers go before the new ones come
            with torch.inference_mode():
                loop = build()
        self.loops[phase] = (key, loop)
        return loop

    # -- networks ------------------------------------------------------------------------------

    def _guided(self, name: str, classes: Tensor, scale: float, **conditions: Any) -> Model:
        """The named network as (z, t) -> ε = ε_u + s (ε_c - ε_u)   (Ho & Salimans 2022, eq. 6).

        Both estimates come from one call on a doubled batch; where they are the same, or s = 1, the
        second is left out.
        """
        if name not in self.networks:
            load = {"base": load_base, "residual": load_residual, "video": load_video}[name]
            with self._timed("load"):
                self.networks[name] = load(self.folder, self.config, self.device, self.dtype)
        network = self.networks[name]
        null = torch.full_like(classes, self.config.null_class)
        if self.config.labels == ():
            return lambda z, t: network(z, t, **conditions)
        if scale == 1.0 or torch.equal(classes, null):
            return lambda z, t: network(z, t, class_labels=classes, **conditions)
        both = torch.cat([classes, null])

        def guided(z: Tensor, t: Tensor) -> Tensor:
            conditional, unconditional = network(
                torch.cat([z, z]), torch.cat([t, t]), class_labels=both, **conditions
            ).chunk(2)
            return torch.lerp(unconditional, conditional, scale)

        return guided

    def _motion(self, noise, classes, guidance_scale, lam, windows) -> Model:
        """The residual network, guided, for clips like noise, whole or window by window."""
        frames = noise.shape[1]
        seen = frames if windows is None else min(frames, windows[0])
        weights = lam if windows is None or seen == frames else float(torch.as_tensor(lam))
        weights = frame_weights(weights, seen, device=self.device)
        model = self._guided("residual", classes, guidance_scale, lam=weights)
        if windows is None:
            return model
        return windowed(model, frames, *windows, lam=lam, device=self.device)

    def release(self, name: str) -> None:
        """Lets a network go, with the loop that holds it, and gives its memory back."""
        if self.networks.pop(name, None) is None:
            return
        self.loops.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc would keep it
            if trim is not None:
                trim(0)

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

    def take_timings(self) -> dict[str, float]:
        """The seconds since this was last called."""
        timings, self.timings = self.timings, _no_time()
        return timings

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of the `with` block to timings[name], the device's work included."""
        started = self._now()
        yield
        self.timings[name] += self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _no_time() -> dict[str, float]:
    return {"load": 0.0, "base": 0.0, "residual": 0.0}


def usable_device(device: torch.device | str) -> torch.device:
    """The device, once it is known to be there; ValueError when it is not."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {device!r}, expected cpu, cuda or cuda:<index>"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported, expected cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA devices" if count else "no CUDA device"
            raise ValueError(f"device {str(device)!r} asked for, but torch finds {found} here")
    return device
