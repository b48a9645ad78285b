"""vf.sample and its phases: networks and noise to clips (VideoFusion, Algorithms 1 and 2).

This module checks the arguments and resolves them to what the driver takes: the solver's table, the
place of the noise that steps add, and the motion. two_phase.py says why two phases give the paper's
result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.decompose import Lam, Model, frame_weights
from ..diffusion.noise import NOISE_DTYPES, NoisePlace, check_seed
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import solver_table
from ..names import BASE_PATHS
from .driver import Driver
from .run import Callback, Run
from .two_phase import Motion

METHODS = ("two_phase", "interleaved")
_IMAGES, _CLIPS = "[B, C, H, W]", "[B, N, C, H, W]"


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
    timesteps: Sequence[int] | None = None,
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
                    The next step overwrites the inputs of both: a network that keeps its input
                    must keep a clone
    base_noise:     b [B, C, H, W], residual_noise: r [B, N, C, H, W]; fp32, fp16, bf16 or float64,
                    as `decomposed_noise` draws them
    lam:            λ, a number or [N]; the base frame's entry is 1 whatever is passed
    solver, eta:    see `solvers.solver_table`; spacing: see `NoiseSchedule.timesteps`
    timesteps:      the timesteps to visit, descending, in place of num_inference_steps and spacing
    method:         "two_phase", or "interleaved" for Algorithms 1 and 2 as printed
    base_path:      "stepwise" is the paper; "clean" finishes the base frame, then animates it
                    (d_t = √ᾱ_t x_m; two-phase only)
    base_seed, residual_seed: seeds of the noise that steps add where η > 0
    overlap_phases: run both phases at once, the residual phase one step behind; the bits are the
                    same. The base phase has its own thread on a CPU, its own stream or branch of
                    the graph on CUDA, or its own device if base_noise is on another one
                    (stepwise, two-phase only)
    capture:        on CUDA, replay each phase's step from a graph (vfengine/sampling/cuda_graph.py)
    backend:        backend of the step's ops (vfengine/ops); float64 runs their references
    callback:       called as callback(phase, steps done, steps in all), for progress bars; phase is
                    "base" or "residual", or "interleaved"

    Raises ValueError for shapes, names or ranges that do not fit, TypeError for a dtype,
    RuntimeError for a step that cannot be captured.
    """
    _check_choice("method", method, METHODS)
    _check_choice("base_path", base_path, BASE_PATHS)
    _check_pair("base_noise", base_noise, residual_noise)
    frame_weights(lam, residual_noise.shape[1])  # refused here, not after the base phase
    check_seed(base_seed, "base_seed")
    check_seed(residual_seed, "residual_seed")
    if base_path == "clean" and (overlap_phases or method == "interleaved"):
        what = "it is two_phase" if method == "interleaved" else "nothing can overlap it"
        raise ValueError(f"base_path='clean' finishes the base frame first: {what}")
    if overlap_phases and method == "interleaved":
        raise ValueError("overlap_phases=True is of two phases: method must be 'two_phase'")
    models, noises = (base_model, residual_model), (base_noise, residual_noise)
    table = solver_table(solver, schedule, num_inference_steps, eta, spacing, timesteps=timesteps)
    places, motion = (NoisePlace(base_seed), NoisePlace(residual_seed)), Motion(lam)
    driver, run = Driver(capture, backend), _run(callback)
    if method == "interleaved":
        return driver.interleaved(models, noises, table, motion, places, run)
    if overlap_phases:
        return driver.overlapped(models, noises, table, motion, places, run)[0]
    states = driver.base(base_model, base_noise, table, places[0], run)
    path = BaseTrajectory(states, table, schedule.fingerprint())
    path = path.clean() if base_path == "clean" else path
    return driver.residual(residual_model, residual_noise, path, motion, places[1], run)


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
    timesteps: Sequence[int] | None = None,
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
    _check_noise("base_noise", base_noise, _IMAGES)
    check_seed(base_seed, "base_seed")
    table = solver_table(solver, schedule, num_inference_steps, eta, spacing, timesteps=timesteps)
    place = NoisePlace(base_seed, sample_offset)
    states = Driver(capture, backend).base(base_model, base_noise, table, place, _run(callback))
    return BaseTrajectory(states, table, schedule.fingerprint(), metadata=dict(metadata or {}))


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
    loop: bool = False,
    schedule: NoiseSchedule | None = None,
    capture: bool = False,
    backend: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """The residual phase: all frames along a base path; returns [B, N, C, H, W].

    path:           from `sample_base`, `BaseTrajectory.load` or `.from_image`; the residual phase
                    takes its solver and steps. A path of one clip serves a batch of any size
    residual_noise: r [B, N, C, H, W]; the result has its dtype and device
    sample_offset, frame_offset: place of the first sample and frame, where the clips are part of
                    a larger batch or a longer clip (η > 0)
    window, window_overlap: frames in one call of the network, and frames that two neighbouring
                    windows share; for clips longer than it was trained on (sampling/windows.py)
    loop:           make a cycle, whose last and first frames are neighbours; windows go around it
                    (sampling/cycle.py). Without a window they are as long as the clip
    schedule:       refuse a path of any other schedule

    Frame m = N // 2 of the result is path.final, cast. All else as in `sample`, errors included.
    """
    if not isinstance(path, BaseTrajectory):
        raise TypeError(f"path must be a BaseTrajectory, got {type(path).__name__}")
    _check_pair("the base path", path.final, residual_noise, one_for_all=True)
    check_seed(residual_seed, "residual_seed")
    if schedule is not None:
        path.check_schedule(schedule)
    motion = Motion(lam, _windows(window, window_overlap), loop=loop)
    place = NoisePlace(residual_seed, sample_offset, frame_offset)
    driver = Driver(capture, backend)
    return driver.residual(residual_model, residual_noise, path, motion, place, _run(callback))


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
    timesteps: Sequence[int] | None = None,
    seed: int = 1,
    sample_offset: int = 0,
    window: int | None = None,
    window_overlap: int | None = None,
    loop: bool = False,
    capture: bool = False,
    backend: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """A plain video diffusion model (VDM), for comparison; returns [B, N, C, H, W] as noise.

    model: (z [B, N, C, H, W], t int64 [B]) -> ε̂; noise: [B, N, C, H, W], independent in every frame
    seed:  seed of the noise that steps add where η > 0; callback's phase is "video"
    window, window_overlap, loop: as in `sample_residual`; any overlap will do, None is half a
           window

    Everything else as in `sample`, and the same errors.
    """
    _check_noise("residual_noise", noise, _CLIPS)
    check_seed(seed, "seed")
    table = solver_table(solver, schedule, num_inference_steps, eta, spacing, timesteps=timesteps)
    place = NoisePlace(seed, sample_offset)
    windows = _windows(window, window_overlap)
    driver = Driver(capture, backend)
    return driver.video(model, noise, table, place, _run(callback), windows, loop)


def _windows(window: int | None, overlap: int | None) -> tuple[int | None, int | None] | None:
    """The windows of a `Motion`; None where none are asked for."""
    return None if (window, overlap) == (None, None) else (window, overlap)


def _run(callback: Callback | None) -> Run:
    """A run that reports finished steps and times nothing."""
    return Run(callback, timings=None, from_zero=False)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_noise(name: str, noise: Tensor, axes: str) -> None:
    """axes: the shape that the noise must have, such as "[B, C, H, W]"."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(noise).__name__}")
    if noise.ndim != axes.count(",") + 1 or noise.numel() == 0:
        raise ValueError(f"{name} must be {axes}, got {list(noise.shape)}")
    if noise.dtype not in NOISE_DTYPES:
        raise TypeError(f"{name} must be one of {NOISE_DTYPES}, got {noise.dtype}")


def _check_pair(name: str, base: Tensor, residual: Tensor, one_for_all: bool = False) -> None:
    """Checks base noise or base frames [B, C, H, W] against residual noise [B, N, C, H, W].

    one_for_all: whether a base of one sample serves any number of clips
    """
    _check_noise("base_noise", base, _IMAGES)
    _check_noise("residual_noise", residual, _CLIPS)
    batches = (1, residual.shape[0]) if one_for_all else residual.shape[:1]
    if base.shape[0] not in batches or base.shape[1:] != residual.shape[2:]:
        raise ValueError(
            f"{name} is [B, C, H, W] = {list(base.shape)}, which does not fit "
            f"residual_noise [B, N, C, H, W] = {list(residual.shape)}"
        )
