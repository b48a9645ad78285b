"""The driver: the one place where loops are made, started, stepped and, on CUDA, captured.

vf.sample* (api.py) drive the networks that they are given; a pipeline (pipelines/session.py) drives
its own, and keeps their loops between calls (reuse.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Model
from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from .finite import NotFinite, check_given
from .guidance import ModelSpec
from .interleaved import InterleavedLoop, InterleavedSpec
from .loop import Loop, LoopSpec
from .overlap import run_overlapped
from .reuse import KeptLoops
from .run import Callback, Run
from .two_phase import BaseSpec, Motion, PathSpec, ResidualSpec


class Driver:
    """Runs each phase from its noise to its result, with models (z, t int64 [B]) -> ε̂.

    capture: on CUDA, replay each phase's step from a graph (cuda_graph.py)
    backend: backend of the step's ops (vfengine/ops)
    loops:   keeps loops between calls: models are then given as `ModelSpec`s, and results are
             copies of the loops' buffers. None: every call makes its loops
    dtype:   of the networks, for errors; None: that of the noise

    reuse_every, of a phase, is as in `LoopSpec`: more than 1 needs a model that takes `kept`. In
    pairs, the base phase's comes first. Raises what the networks raise; ValueError for λ,
    windows or estimates that do not fit, and for noise or a base path that is not finite;
    RuntimeError for a step that cannot be captured, and `NotFinite`, which is one, for a phase
    whose numbers are not finite. A CPU's phase ends at that step. CUDA's is taken to its end, so
    that nothing waits for the device before.
    """

    def __init__(
        self,
        capture: bool = False,
        backend: str = "auto",
        loops: KeptLoops | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.capture, self.backend, self.loops, self.dtype = capture, backend, loops, dtype

    def base(
        self,
        model: Model | ModelSpec,
        noise: Tensor,
        table: SolverTable,
        place: NoisePlace,
        run: Run,
        reuse_every: int = 1,
    ) -> Tensor:
        """The base phase on b [B, C, H, W]: its states [S+1, B, C, H, W]."""
        spec = BaseSpec.of(noise, table, place, self.backend, reuse_every=reuse_every)
        with self._loop(spec, model) as loop:
            self._run(loop, run, base_noise=noise)
            return self._result(loop.states)

    def residual(
        self,
        model: Model | ModelSpec,
        noise: Tensor,
        path: BaseTrajectory,
        motion: Motion,
        place: NoisePlace,
        run: Run,
        reuse_every: int = 1,
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
            reuse_every=reuse_every,
        )
        with self._loop(spec, model) as loop:
            if loop.states is not states:
                with torch.inference_mode():
                    loop.states.copy_(states)
            self._run(loop, run, {"base path": states}, residual_noise=noise)
            return self._result(loop.u)

    def overlapped(
        self,
        models: tuple[Model | ModelSpec, Model | ModelSpec],
        noises: tuple[Tensor, Tensor],
        table: SolverTable,
        motion: Motion,
        places: tuple[NoisePlace, NoisePlace],
        run: Run,
        reuse_every: tuple[int, int] = (1, 1),
    ) -> tuple[Tensor, Tensor]:
        """Both phases at once (overlap.py): the clips, and the base path's states beside them."""
        each = [{"backend": self.backend, "reuse_every": every} for every in reuse_every]
        base_spec = BaseSpec.of(noises[0], table, places[0], **each[0])
        with self._loop(base_spec, models[0]) as base:
            path = PathSpec.of(base.states, shared=noises[0].device == noises[1].device)
            spec = ResidualSpec.of(noises[1], table, places[1], motion=motion, path=path, **each[1])
            with self._loop(spec, models[1]) as residual:
                with run.phase(residual.phase, residual.device), torch.inference_mode():
                    run.report("base", 0, len(table))
                    given = {"base_noise": noises[0], "residual_noise": noises[1]}
                    with self._watched(run, (base, residual), **given) as report:
                        run_overlapped(base, residual, *noises, self.capture, report)
                return self._result(residual.u), self._result(residual.states)

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
        self._run(loop, run, base_noise=noises[0], residual_noise=noises[1])
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
        reuse_every: int = 1,
    ) -> Tensor:
        """A plain video model on noise [B, N, C, H, W]: clips.

        windows, loop: as in `Motion`
        """
        how = {"motion": Motion(lam=0.0, windows=windows, loop=loop), "reuse_every": reuse_every}
        spec = ResidualSpec.of(noise, table, place, self.backend, **how)
        with self._loop(spec, model) as loop:
            self._run(loop, run, noise=noise)
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

    def _run(
        self, loop: Loop, run: Run, path: dict[str, Tensor] | None = None, **noise: Tensor
    ) -> None:
        """All steps of a loop, from its noise; path: what else it reads, by name."""
        with run.phase(loop.phase, loop.device), torch.inference_mode():
            stepper = loop.stepper(self.capture)
            loop.start(*noise.values())
            run.report(loop.phase, 0, len(loop))
            with self._watched(run, (loop,), **(path or {}), **noise) as report:
                loop.run(stepper, report)

    @contextmanager
    def _watched(self, run: Run, loops: tuple[Loop, ...], **given: Tensor) -> Iterator[Callback]:
        """What tells of the loops' steps, for the `with` block that takes them all.

        given: what the loops begin with, to be named if it was not finite itself
        """
        on_cpu = [loop for loop in loops if loop.device.type == "cpu"]

        def report(phase: str, done: int, total: int) -> None:
            self._check(on_cpu, given)
            run.report(phase, done, total)

        yield report
        self._check(loops, given)

    def _check(self, loops: Sequence[Loop], given: dict[str, Tensor]) -> None:
        """`NotFinite` for the first loop that is not; ValueError if it began so."""
        for loop in loops:
            if (step := loop.first_not_finite()) is not None:
                check_given(**given)
                where = f"{loop.phase} phase, step {step} of {len(loop)}"
                raise NotFinite(where, self.dtype or loop.dtype)

    def _result(self, buffer: Tensor) -> Tensor:
        """The buffer, or a copy of it if the loop is kept: its next run would overwrite it."""
        return buffer if self.loops is None else buffer.clone()
