"""Sampling a decomposed model, in two phases or interleaved (VideoFusion, Algorithms 1 and 2).

Interleaved is the paper: per step, the base network, then the residual network, on one clip z.
The base frame's path never sees a residual, so it can be walked first and alone, at the cost of one
image. In u_i = z'_i, the residual network's own input, what is left is one line per step:

    u_i <- c1 u_i + √λ_i g_t + √(1-λ_i) (c2 r̂_i + σ ξ_i),     g_t = d_p - c1 d_t

with d_t the base path of vfengine/trajectory.py. The two forms are equal for every solver that is a
table (vfengine/solvers.py), up to rounding; the base frame is equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from . import ops
from .decompose import Lam, Model, base_index, combine, frame_weights
from .noise import base_noise as draw_base_noise
from .noise import check_seed
from .schedule import NoiseSchedule
from .solvers import SolverTable, solver_table
from .trajectory import BASE_PATHS, BaseTrajectory

METHODS = ("two_phase", "interleaved")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Callback = Callable[[str, int, int], None]


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
    backend: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """Sample clips from their initial noise; returns [B, N, C, H, W] in residual_noise's dtype.

    base_model:     (z_m [B, C, H, W], t int64 [B]) -> b̂, called once per step on base frames alone
    residual_model: (z' [B, N, C, H, W], t int64 [B]) -> r̂; z' is a buffer that the next step
                    overwrites, a network that keeps it keeps a clone
    base_noise:     b [B, C, H, W], residual_noise: r [B, N, C, H, W]; fp32, fp16, bf16 or float64,
                    as of `decomposed_noise`
    lam:            λ, a number or [N]; the base frame's entry is 1 whatever is passed
    solver, eta:    see `solvers.solver_table`; spacing: see `NoiseSchedule.timesteps`
    method:         "two_phase", or "interleaved" for Algorithms 1 and 2 as printed
    base_path:      "stepwise" is the paper; "clean" finishes the base frame, then animates it
                    (d_t = √ᾱ_t x_m; two-phase only)
    base_seed, residual_seed: of the noise that η > 0 adds on the way
    backend:        of the ops that step (vfengine/ops); float64 runs their references
    callback:       called as callback(phase, steps done, steps in all), for progress bars; phase is
                    "base" or "residual", or "interleaved"

    Raises ValueError for shapes, names or ranges that do not fit, TypeError for a dtype.
    """
    _check_choice("method", method, METHODS)
    _check_choice("base_path", base_path, BASE_PATHS)
    _check_noise(base_noise, residual_noise)
    frame_weights(lam, residual_noise.shape[1])  # refused here, not after the base phase
    check_seed(base_seed, "base_seed")
    check_seed(residual_seed, "residual_seed")
    walk = {"num_inference_steps": num_inference_steps, "eta": eta, "spacing": spacing}
    if method == "interleaved":
        if base_path == "clean":
            raise ValueError("base_path='clean' finishes the base frame first: it is two_phase")
        return _sample_interleaved(
            base_model,
            residual_model,
            base_noise,
            residual_noise,
            table=solver_table(solver, schedule, **walk),
            lam=lam,
            base_seed=base_seed,
            residual_seed=residual_seed,
            backend=backend,
            callback=callback,
        )
    path = sample_base(
        base_model,
        base_noise,
        schedule=schedule,
        solver=solver,
        base_seed=base_seed,
        callback=callback,
        **walk,
    )
    return sample_residual(
        residual_model,
        path.clean() if base_path == "clean" else path,
        residual_noise,
        lam=lam,
        residual_seed=residual_seed,
        backend=backend,
        callback=callback,
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
    noise_levels = (1.0 - table.alphas_cumprod).sqrt().tolist()

    z = base_noise.to(_at_least_fp32(base_noise))  # z_m <- b
    states, estimate = [], _Extrapolation(table)
    for k, t in enumerate(_timesteps(table, z)):
        b_hat = _call("base_model", base_model, z.to(base_noise.dtype), t).to(z.dtype)
        states.append(z - noise_levels[k] * b_hat)  # d_t
        xi = None
        if table.coeffs[k, 2] > 0:
            place = {"step": k + 1, "sample_offset": sample_offset}
            xi = draw_base_noise(z.shape, base_seed, **place, dtype=z.dtype, device=z.device)
        z = _step(table, k, z, estimate(k, b_hat), xi)
        if callback is not None:
            callback("base", k + 1, len(table))
    return BaseTrajectory(
        torch.stack([*states, z]), table, schedule.fingerprint(), "stepwise", dict(metadata or {})
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
    schedule: NoiseSchedule | None = None,
    backend: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """The residual phase: all frames along a base path; returns [B, N, C, H, W].

    path:           of `sample_base`, `BaseTrajectory.load` or `.from_image`; its solver leads.
                    A path of one clip serves every sample of a larger batch
    residual_noise: r [B, N, C, H, W]; the result has its dtype and device
    sample_offset, frame_offset: place of the first sample and frame, where the clips are part of
                    a larger batch or a longer clip (η > 0)
    schedule:       refuse a path of any other schedule

    Frame m = N // 2 of the result is path.final, cast. All else as in `sample`, errors included.
    """
    _check_noise(path.final, residual_noise, path_batch=True)
    check_seed(residual_seed, "residual_seed")
    if schedule is not None:
        path.check_schedule(schedule)
    dtype, device = residual_noise.dtype, residual_noise.device
    batch, frames = residual_noise.shape[:2]
    m, table = base_index(frames), path.table
    lam = frame_weights(lam, frames, device=device)
    coeffs = table.coeffs.to(device, _at_least_fp32(residual_noise))
    steps = torch.arange(len(table), dtype=torch.int32, device=device).split(1)
    d = _expanded(path.states, batch, device)  # [S+1, B, C, H, W]
    g = _expanded(path.base_terms(), batch, device).to(dtype)

    # z'_i at z_i = √λ_i b + √(1-λ_i) r_i is √λ_i d + √(1-λ_i) r_i
    u = combine(d[0], residual_noise.to(d.dtype), lam).to(dtype).contiguous()
    estimate = _Extrapolation(table)
    place = {"sample_offset": sample_offset, "frame_offset": frame_offset}
    for k, t in enumerate(_timesteps(table, u)):
        r_hat = estimate(k, _call("residual_model", residual_model, u, t).to(dtype))
        if r_hat.untyped_storage().data_ptr() == u.untyped_storage().data_ptr():
            r_hat = r_hat.clone()  # the network gave its input back, which is about to be written
        arguments = (u, r_hat.contiguous(), g[k], lam, coeffs, steps[k])
        _run(ops.residual_step, *arguments, seed=residual_seed, **place, out=u, backend=backend)
        u[:, m] = d[k + 1]  # λ_m = 1 makes it so up to rounding; written, it is so bit for bit
        if callback is not None:
            callback("residual", k + 1, len(table))
    return u


def _run(op: Callable[..., Tensor], *arguments: Tensor, out: Tensor, backend: str, **options):
    """An op of vfengine/ops: its kernel, or its reference for float64."""
    if out.dtype != torch.float64:
        op(*arguments, **options, out=out, backend=backend)
    elif backend in ("auto", "reference"):
        out.copy_(getattr(ops, f"{op.__name__}_reference")(*arguments, **options))
    else:
        raise ValueError(f"float64 clips run backend='reference', got {backend!r}")


def _sample_interleaved(
    base_model: Model,
    residual_model: Model,
    base_noise: Tensor,
    residual_noise: Tensor,
    *,
    table: SolverTable,
    lam: Lam,
    base_seed: int,
    residual_seed: int,
    backend: str,
    callback: Callback | None,
) -> Tensor:
    """Algorithm 2, and with σ > 0 Algorithm 1, line by line."""
    dtype, state = residual_noise.dtype, _at_least_fp32(residual_noise)
    device, frames = residual_noise.device, residual_noise.shape[1]
    m, lam = base_index(frames), frame_weights(lam, frames, device=device)
    coeffs = table.coeffs.to(device, state)
    noise_levels = (1.0 - table.alphas_cumprod).sqrt().to(device, state)
    steps = torch.arange(len(table), dtype=torch.int32, device=device).split(1)
    seeds = {"base_seed": base_seed, "residual_seed": residual_seed}

    # Sampling b, r^i;  z^m <- b;  z^i = √λ^i b + √(1-λ^i) r^i
    z = combine(base_noise.to(state), residual_noise.to(state), lam)
    z_removed = torch.empty_like(z)
    base_estimate, residual_estimate = _Extrapolation(table), _Extrapolation(table)
    # for t = T to 1 do
    for k, t in enumerate(_timesteps(table, z)):
        # b <- z_φ(z^m, t)
        z_m = z[:, m].to(base_noise.dtype, copy=True).contiguous()  # z is about to be written
        b = _call("base_model", base_model, z_m, t).to(state).contiguous()
        # z'^i <- z^i - √λ^i √(1-ᾱ_t) b
        place = {"lam": lam, "step": steps[k], "backend": backend}
        _run(ops.remove_base, z, b, noise_levels=noise_levels, **place, out=z_removed)
        # r^i <- z_ψ(z'^i, t, i)
        r = _call("residual_model", residual_model, z_removed.to(dtype), t).to(state).contiguous()
        # ε^m <- b;  ε^i <- √λ^i b + √(1-λ^i) r^i
        # Algorithm 1: sampling b, r^i;  ξ^m = b, ξ^i = √λ^i b + √(1-λ^i) r^i
        # z^i <- √ᾱ_p (z^i - √(1-ᾱ_t) ε^i) / √ᾱ_t + √(1-ᾱ_p-σ²) ε^i + σ ξ^i
        #      = c1 z^i + c2 ε^i + σ ξ^i
        b, r = base_estimate(k, b), residual_estimate(k, r)
        _run(ops.decomposed_step, z, b, r, coeffs=coeffs, **place, **seeds, out=z)
        if callback is not None:
            callback("interleaved", k + 1, len(table))
    # return z^i
    return z.to(dtype)


def _step(table: SolverTable, k: int, z: Tensor, eps: Tensor, xi: Tensor | None) -> Tensor:
    """z_p = c1 z_t + c2 ε + σ ξ, at step k of the table."""
    c1, c2, sigma = table.coeffs[k].tolist()
    z = c1 * z + c2 * eps
    return z if xi is None else z + sigma * xi


class _Extrapolation:
    """ε̃_t = ε_t + w (ε_t - ε_prev): remembers the last estimate where the solver asks for it."""

    def __init__(self, table: SolverTable) -> None:
        self.weights = table.extrapolation.tolist()
        self.multistep = any(self.weights)
        self.previous: Tensor | None = None

    def __call__(self, k: int, eps: Tensor) -> Tensor:
        if not self.multistep:
            return eps
        # A clone: a network replayed from a graph writes every estimate to the same memory.
        previous, self.previous = self.previous, eps.clone()
        return eps if self.weights[k] == 0.0 else eps + self.weights[k] * (eps - previous)


def _call(name: str, model: Model, z: Tensor, t: Tensor) -> Tensor:
    """The model's estimate; ValueError when it does not have the shape of its input."""
    out = model(z, t)
    if not isinstance(out, Tensor) or out.shape != z.shape:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name} must return noise of its input's shape {list(z.shape)}, got {got}"
        )
    return out


def _timesteps(table: SolverTable, like: Tensor) -> Tensor:
    """t of every step for every sample, int64 [S, B] on like's device."""
    return table.timesteps.to(like.device)[:, None].repeat(1, like.shape[0])


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _expanded(states: Tensor, batch: int, device: torch.device) -> Tensor:
    """A path [S, B or 1, C, H, W] for all samples of the batch, contiguous."""
    return states.to(device).expand(-1, batch, -1, -1, -1).contiguous()


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_noise(base: Tensor, residual: Tensor | None = None, path_batch: bool = False) -> None:
    """base [B, C, H, W] and residual [B, N, C, H, W]; path_batch lets base have one sample only."""
    for name, noise, ndim in (("base_noise", base, 4), ("residual_noise", residual, 5)):
        if noise is None:
            continue
        if noise.ndim != ndim or noise.numel() == 0:
            axes = "[B, C, H, W]" if ndim == 4 else "[B, N, C, H, W]"
            raise ValueError(f"{name} must be {axes}, got {list(noise.shape)}")
        if noise.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {DTYPES}, got {noise.dtype}")
    if residual is None:
        return
    name = "the base path" if path_batch else "base_noise"
    samples = (1, residual.shape[0]) if path_batch else (residual.shape[0],)
    if base.shape[0] not in samples or base.shape[1:] != residual.shape[2:]:
        raise ValueError(
            f"{name} is [B, C, H, W] = {list(base.shape)}, which does not fit "
            f"residual_noise [B, N, C, H, W] = {list(residual.shape)}"
        )
