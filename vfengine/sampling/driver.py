"""The driver: the one place where loops are made, started, stepped and, on CUDA, captured.

vf.sample* (api.py) drive the networks that they are given; a pipeline (pipelines/session.py) drives
its own, and keeps their loops between calls (reuse.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Model
from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from .guidance import ModelSpec
from .interleaved import InterleavedLoop, InterleavedSpec
from .loop import Loop, LoopSpec
from .overlap import run_overlapped
from .reuse import KeptLoops
from .run import Run
from .two_phase import BaseSpec, Motion, PathSpec, ResidualSpec


class Driver:
    """Runs each phase from its noise to its result, with models (z, t int64 [B]) -> ε̂.

    capture: on CUDA, replay each phase's step from a graph (cuda_graph.py)
    backend: backend of the step's ops (vfengine/ops)
    loops:   keeps loops between calls: models are then given as `ModelSpec`s, and results are
             copies of the loops' buffers. None: every call makes its loops

    In pairs, the base phase's comes first. Raises what the networks raise; ValueError for λ,
    windows or estimates that do not fit; RuntimeError for a step that cannot be captured.
    """

    def __init__(
        self, capture: bool = False, backend: str = "auto", loops: KeptLoops | None = None
    ) -> None:
        self.capture, self.backend, self.loops = capture, backend, loops

    def base(
        self,
        model: Model | ModelSpec,
        noise: Tensor,
        table: SolverTable,
        place: NoisePlace,
        run: Run,
    ) -> Tensor:
        """The base phase on b [B, C, H, W]: its states [S+1, B, C, H, W]."""
        spec = BaseSpec.of(noise, table, place, self.backend)
        with self._loop(spec, model) as loop:
            self._run(loop, run, noise)
            return self._result(loop.states)

    def residual(
        self,
        model: Model | ModelSpec,
        noise: Tensor,
        path: BaseTrajectory,
        motion: Motion,
        place: NoisePlace,
        run: Run,
    ) -> Tensor:
        """The residual phase on r [B, N, C, H, W] along a base path, stepwise or clean: clips."""
        states = path.states.to(noise.device)
        spec = ResidualSpec.of(
            noise,
            path.table,
            place,
            self.backend,
            motion=replace(motion, clean=path.base_path == "clean"),
            path=PathSpec.of(states, shared=self.loops is None),
        )
        with self._loop(spec, model) as loop:
            if loop.states is not states:
                with torch.inference_mode():
                    loop.states.copy_(states)
            self._run(loop, run, noise)
            return self._result(loop.u)

    def overlapped(
        self,
        models: tuple[Model | ModelSpec, Model | ModelSpec],
        noises: tuple[Tensor, Tensor],
        table: SolverTable,
        motion: Motion,
        places: tuple[NoisePlace, NoisePlace],
        run: Run,
    ) -> tuple[Tensor, Tensor]:
        """Both phases at once (overlap.py): the clips, and the base path's states."""
        base_spec = BaseSpec.of(noises[0], table, places[0], self.backend)
        with self._loop(base_spec, models[0]) as base:
            path = PathSpec.of(base.states, shared=noises[0].device == noises[1].device)
            spec = ResidualSpec.of(
                noises[1], table, places[1], self.backend, motion=motion, path=path
            )
            with self._loop(spec, models[1]) as residual:
                with run.phase(residual.phase, residual.device), torch.inference_mode():
                    run.report("base", 0, len(table))
                    run_overlapped(base, residual, *noises, self.capture, run.report)
                return self._result(residual.u), self._result(base.states)

    def interleaved(
        self,
        models: tuple[Model, Model],
        noises: tuple[Tensor, Tensor],
        table: SolverTable,
        motion: Motion,
        places: tuple[NoisePlace, NoisePlace],
        run: Run,
    ) -> Tensor:
        """Both networks at every step, as the paper prints it: clips [B, N, C, H, W]."""
        spec = InterleavedSpec.of(
            noises[1],
            table,
            places[1],
            self.backend,
            base=LoopSpec.of(noises[0], table, places[0]),
            lam=motion.lam,
        )
        loop = InterleavedLoop(*models, spec)
        self._run(loop, run, *noises)
        return loop.z.to(spec.dtype)

    def video(
        self,
        model: Model | ModelSpec,
        noise: Tensor,
        table: SolverTable,
        place: NoisePlace,
        run: Run,
        windows: tuple[int | None, int | None] | None = None,
        loop: bool = False,
    ) -> Tensor:
        """A plain video model on noise [B, N, C, H, W]: clips.

        windows, loop: as in `Motion`
        """
        motion = Motion(lam=0.0, windows=windows, loop=loop)
        spec = ResidualSpec.of(noise, table, place, self.backend, motion=motion)
        with self._loop(spec, model) as loop:
            self._run(loop, run, noise)
            return self._result(loop.u)

    @contextmanager
    def _loop(self, spec: BaseSpec | ResidualSpec, model: Model | ModelSpec) -> Iterator[Any]:
        """A loop for one run: a kept one, or a new one."""
        if self.loops is not None:
            with self.loops.borrow(spec, model) as loop:
                yield loop
            return
        with torch.inference_mode():
            loop = spec.build(model)
        yield loop

    def _run(self, loop: Loop, run: Run, *noise: Tensor) -> None:
        """All steps of a loop, from its noise."""
        with run.phase(loop.phase, loop.device), torch.inference_mode():
            stepper = loop.stepper(self.capture)
            loop.start(*noise)
            run.report(loop.phase, 0, len(loop))
            loop.run(stepper, run.report)

    def _result(self, buffer: Tensor) -> Tensor:
        """The buffer, or a copy of it if the loop is kept: its next run would overwrite it."""
        return buffer if self.loops is None else buffer.clone()
