"""Sampling a decomposed model, in two phases or interleaved (VideoFusion, Algorithms 1 and 2).

Interleaved is the paper: per step, the base network, then the residual network, on one clip z.
The base frame's path never sees a residual, so it can be walked first and alone, at the cost of one
image. In u_i = z'_i, the residual network's own input, what is left is one line per step:

    u_i <- c1 u_i + √λ_i g_t + √(1-λ_i) (c2 r̂_i + σ ξ_i),     g_t = d_p - c1 d_t

with d_t the base path of diffusion/base_path.py. The two forms are equal for every solver that is a
table (diffusion/solvers.py), up to rounding; the base frame is equal bit for bit. sampling/loop.py
holds the steps; here they are started and run: one phase after the other, overlapped, or captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Lam, Model, frame_weights
from ..diffusion.noise import NOISE_DTYPES, check_seed
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import solver_table
from ..names import BASE_PATHS
from .loop import BaseLoop, Callback, InterleavedLoop, ResidualLoop, VideoLoop
from .overlap import run_overlapped
from .windows import windowed

METHODS = ("two_phase", "interleaved")


@torch.inference_mode()
def sample(
    base_model: Model,
    residual_model: Model,
    base_noise: Tensor,
    residual_noise: Tensor,
    *,
    schedule: NoiseSchedule,
    num_inference_steps: int = 50,
    lam: Lam = 0.5,
    solver: str = "ddim",
    eta: float = 0.0,
    spacing: str = "leading",
    method: str = "two_phase",
    base_path: str = "stepwise",
    base_seed: int = 0,
    residual_seed: int = 1,
    overlap_phases: bool = False,
    capture: bool = False,
    backend: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """Sample clips from their initial noise; returns [B, N, C, H, W] in residual_noise's dtype.

    base_model:     (z_m [B, C, H, W], t int64 [B]) -> b̂, called once per step on base frames alone
    residual_model: (z' [B, N, C, H, W], t int64 [B]) -> r̂
                    Both are given buffers that the next step overwrites: a network that keeps its
                    input keeps a clone
    base_noise:     b [B, C, H, W], residual_noise: r [B, N, C, H, W]; fp32, fp16, bf16 or float64,
                    as of `decomposed_noise`
    lam:            λ, a number or [N]; the base frame's entry is 1 whatever is passed
    solver, eta:    see `solvers.solver_table`; spacing: see `NoiseSchedule.timesteps`
    method:         "two_phase", or "interleaved" for Algorithms 1 and 2 as printed
    base_path:      "stepwise" is the paper; "clean" finishes the base frame, then animates it
                    (d_t = √ᾱ_t x_m; two-phase only)
    base_seed, residual_seed: of the noise that η > 0 adds on the way
    overlap_phases: the residual phase follows the base phase a step behind, which runs in a thread
                    of its own on a CPU, on a stream of its own on CUDA, or on another device if
                    base_noise lies there; the same bits (stepwise, two-phase only)
    capture:        on CUDA, replay each phase's step from a graph (vfengine/sampling/cuda_graph.py)
    backend:        of the ops that step (vfengine/ops); float64 runs their references
    callback:       called as callback(phase, steps done, steps in all), for progress bars; phase is
                    "base" or "residual", or "interleaved"

    Raises ValueError for shapes, names or ranges that do not fit, TypeError for a dtype,
    RuntimeError for a step that cannot be captured.
    """
    _check_choice("method", method, METHODS)
    _check_choice("base_path", base_path, BASE_PATHS)
    _check_noise(base_noise, residual_noise)
    frame_weights(lam, residual_noise.shape[1])  # refused here, not after the base phase
    check_seed(base_seed, "base_seed")
    check_seed(residual_seed, "residual_seed")
    if base_path == "clean" and (overlap_phases or method == "interleaved"):
        what = "it is two_phase" if method == "interleaved" else "nothing can overlap it"
        raise ValueError(f"base_path='clean' finishes the base frame first: {what}")
    if overlap_phases and method == "interleaved":
        raise ValueError("overlap_phases=True is of two phases: method must be 'two_phase'")
    walk = {"num_inference_steps": num_inference_steps, "eta": eta, "spacing": spacing}
    how = {"backend": backend, "callback": callback, "capture": capture}
    if overlap_phases or method == "interleaved":
        table = solver_table(solver, schedule, **walk)
    if method == "interleaved":
        loop = InterleavedLoop(
            base_model, residual_model, base_noise, residual_noise, table,
            lam=lam, base_seed=base_seed, residual_seed=residual_seed, backend=backend,
        )  # fmt: skip
        step = loop.stepper(capture)
        loop.start(base_noise, residual_noise)
        loop.run(step, callback)
        return loop.z.to(residual_noise.dtype)
    if overlap_phases:
        base = BaseLoop(base_model, base_noise, table, seed=base_seed, backend=backend)
        states = base.states.to(residual_noise.device)
        residual = ResidualLoop(
            residual_model, residual_noise, states, table,
            clean=False, lam=lam, seed=residual_seed, backend=backend,
        )  # fmt: skip
        run_overlapped(base, residual, base_noise, residual_noise, capture, callback)
        return residual.u
    path = sample_base(
        base_model, base_noise, schedule=schedule, solver=solver, base_seed=base_seed, **walk, **how
    )
    return sample_residual(
        residual_model,
        path.clean() if base_path == "clean" else path,
        residual_noise,
        lam=lam,
        residual_seed=residual_seed,
        **how,
    )


@torch.inference_mode()
def sample_base(
    base_model: Model,
    base_noise: Tensor,
    *,
    schedule: NoiseSchedule,
    num_inference_steps: int = 50,
    solver: str = "ddim",
    eta: float = 0.0,
    spacing: str = "leading",
    base_seed: int = 0,
    sample_offset: int = 0,
    metadata: Mapping[str, str] | None = None,
    capture: bool = False,
    backend: str = "auto",
    callback: Callback | None = None,
) -> BaseTrajectory:
    """The base phase: plain image sampling of the base frame, keeping d_t = z_m - √(1-ᾱ_t) b̂.

    base_noise:    b [B, C, H, W]; the path is kept in fp32 (float64 for float64), the network is
                   called in base_noise's dtype
    sample_offset: index of the first sample, where the batch is part of a larger one (η > 0)
    metadata:      notes to keep with the path, str -> str

    Everything else as in `sample`, and the same errors.
    """
    _check_noise(base_noise)
    check_seed(base_seed, "base_seed")
    table = solver_table(solver, schedule, num_inference_steps, eta, spacing)
    loop = BaseLoop(
        base_model, base_noise, table, seed=base_seed, sample_offset=sample_offset, backend=backend
    )
    step = loop.stepper(capture)
    loop.start(base_noise)
    loop.run(step, callback)
    return BaseTrajectory(
        loop.states, table, schedule.fingerprint(), "stepwise", dict(metadata or {})
    )


@torch.inference_mode()
def sample_residual(
    residual_model: Model,
    path: BaseTrajectory,
    residual_noise: Tensor,
    *,
    lam: Lam = 0.5,
    residual_seed: int = 1,
    sample_offset: int = 0,
    frame_offset: int = 0,
    window: int | None = None,
    window_overlap: int | None = None,
    schedule: NoiseSchedule | None = None,
    capture: bool = False,
    backend: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """The residual phase: all frames along a base path; returns [B, N, C, H, W].

    path:           of `sample_base`, `BaseTrajectory.load` or `.from_image`; its solver leads.
                    A path of one clip serves every sample of a larger batch
    residual_noise: r [B, N, C, H, W]; the result has its dtype and device
    sample_offset, frame_offset: place of the first sample and frame, where the clips are part of
                    a larger batch or a longer clip (η > 0)
    window, window_overlap: call the network on so many frames at a time, for clips longer than it
                    was trained on (vfengine/sampling/windows.py)
    schedule:       refuse a path of any other schedule

    Frame m = N // 2 of the result is path.final, cast. All else as in `sample`, errors included.
    """
    _check_noise(path.final, residual_noise, path_batch=True)
    check_seed(residual_seed, "residual_seed")
    if schedule is not None:
        path.check_schedule(schedule)
    if window is not None or window_overlap is not None:
        residual_model = windowed(
            residual_model, residual_noise.shape[1], window, window_overlap,
            lam=lam, device=residual_noise.device,
        )  # fmt: skip
    loop = ResidualLoop(
        residual_model, residual_noise, path.states.to(residual_noise.device), path.table,
        clean=path.base_path == "clean", lam=lam, seed=residual_seed,
        sample_offset=sample_offset, frame_offset=frame_offset, backend=backend,
    )  # fmt: skip
    step = loop.stepper(capture)
    loop.start(residual_noise)
    loop.run(step, callback)
    return loop.u


@torch.inference_mode()
def sample_video(
    model: Model,
    noise: Tensor,
    *,
    schedule: NoiseSchedule,
    num_inference_steps: int = 50,
    solver: str = "ddim",
    eta: float = 0.0,
    spacing: str = "leading",
    seed: int = 1,
    sample_offset: int = 0,
    capture: bool = False,
    backend: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """A plain video diffusion model (VDM), for comparison; returns [B, N, C, H, W] as noise.

    model: (z [B, N, C, H, W], t int64 [B]) -> ε̂; noise: [B, N, C, H, W], every frame its own
    seed:  of the noise that η > 0 adds on the way; callback's phase is "video"

    Everything else as in `sample`, and the same errors.
    """
    _check_noise(None, noise)
    check_seed(seed, "seed")
    table = solver_table(solver, schedule, num_inference_steps, eta, spacing)
    loop = VideoLoop(model, noise, table, seed=seed, sample_offset=sample_offset, backend=backend)
    step = loop.stepper(capture)
    loop.start(noise)
    loop.run(step, callback)
    return loop.u


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_noise(
    base: Tensor | None, residual: Tensor | None = None, path_batch: bool = False
) -> None:
    """base [B, C, H, W] and residual [B, N, C, H, W]; path_batch lets base have one sample only."""
    for name, noise, ndim in (("base_noise", base, 4), ("residual_noise", residual, 5)):
        if noise is None:
            continue
        if noise.ndim != ndim or noise.numel() == 0:
            axes = "[B, C, H, W]" if ndim == 4 else "[B, N, C, H, W]"
            raise ValueError(f"{name} must be {axes}, got {list(noise.shape)}")
        if noise.dtype not in NOISE_DTYPES:
            raise TypeError(f"{name} must be one of {NOISE_DTYPES}, got {noise.dtype}")
    if base is None or residual is None:
        return
    name = "the base path" if path_batch else "base_noise"
    samples = (1, residual.shape[0]) if path_batch else (residual.shape[0],)
    if base.shape[0] not in samples or base.shape[1:] != residual.shape[2:]:
        raise ValueError(
            f"{name} is [B, C, H, W] = {list(base.shape)}, which does not fit "
            f"residual_noise [B, N, C, H, W] = {list(residual.shape)}"
        )
