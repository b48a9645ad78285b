"""path_step: a step of the residual phase along its base path, in one launch.

    u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i)       g = d_p - c1 d_t
    u_m <- d_p

Kernels: csrc/path_step.h, csrc/cuda/frames.cuh, kernels/frames.py. On a CPU, and in float64, it is
made of residual_step and PyTorch.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._clock import Clock, check_clock
from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    address,
    check_dtype,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_tensor,
    choose_backend,
    native,
    register,
    run_native,
    step_op,
)
from vfengine.ops.decomposed_noise import check_place, check_seed, signed_seed, unsigned_seed
from vfengine.ops.residual_step import residual_step, residual_step_reference

_NAME = "path_step"


def path_step(
    u: Tensor,
    r: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    clock: Clock,
    *,
    states: Tensor | None = None,
    c1: Tensor | None = None,
    base_frame: int = 0,
    seed: int | None = None,
    sample_offset: int = 0,
    frame_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The step `clock.counter` of the residual phase (vfengine/sampling/two_phase.py), in place.

    It is `residual_step` with g = d_p - c1 d_t, d_t and d_p being the rows `counter` and
    `counter + 1` of the base path. The base frame follows the path itself. Then the clock moves on.

    u:          [B, N, C, H, W], fp32, fp16 or bf16, contiguous; written
    r:          like u, the residual network's estimate r̂
    lam:        fp32 [N], λ_i in [0, 1]
    coeffs:     fp32 [S, 3], a row (c1, c2, σ) per step
    clock:      the loop's, of S steps and B samples
    states:     fp32 [S+1, B or 1, C, H, W], the base path d; None: no path, g = 0 and no base frame
    c1:         float64 [S], for g, a small difference; None: g = 0, as on a clean path
    base_frame: m, the frame that is d_p
    seed, sample_offset, frame_offset: as of `residual_step`
    backend:    "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Clips of float64, all but lam being float64, run the reference: backend "auto" or "reference".
    A path of float64 is read by PyTorch, on any device.

    Returns u, with the same bits from every kernel. Raises as `residual_step` does; on CUDA a step
    outside coeffs, λ outside [0, 1], and σ > 0 without a seed write NaN.
    """
    check_clock(_NAME, clock)
    tensors = {"u": u, "r": r, "lam": lam, "coeffs": coeffs, **clock._asdict()}
    optional = {"states": states, "c1": c1}
    given = tensors | {k: v for k, v in optional.items() if v is not None}
    base_frame, backend = check_kinds(_NAME, given, base_frame=base_frame, backend=backend)
    place = {"sample_offset": sample_offset, "frame_offset": frame_offset}
    place = check_place(_NAME, **place)
    key = None if seed is None else signed_seed(check_seed(seed, "seed"))
    exact = torch.float64 in (u.dtype, None if states is None else states.dtype)
    kernel = "reference" if exact else choose_backend(_NAME, backend, u.device)
    if kernel in ("cpu", "reference"):
        _check(u, r, lam, coeffs, *clock, states, c1, base_frame, exact=exact)
        _check_overlap(u, r, lam, coeffs, states)
        step = step_op(residual_step, residual_step_reference, u.dtype, backend)
        noise = {"seed": seed, **place}
        return _composed(step, u, r, lam, coeffs, clock, states, c1, base_frame, noise)
    _OP(u, r, lam, coeffs, *clock, states, c1, base_frame, key, *place.values(), kernel)
    return u


def path_step_reference(u: Tensor, *arguments: object, **options: object) -> Tensor:
    """`path_step` in PyTorch, in place."""
    return path_step(u, *arguments, **options, backend="reference")


def _composed(
    step, u, r, lam, coeffs, clock, states, c1, base_frame, noise
) -> Tensor:  # arguments as of path_step
    row, g = clock.counter, torch.zeros_like(u[:, 0])
    if states is not None:
        d_p = states.index_select(0, row + 1)[0]
        if c1 is not None:
            d_t = states.index_select(0, row)[0]
            g.copy_(d_p.double() - c1.index_select(0, row) * d_t.double())
    step(u, r, g, lam, coeffs, row, **noise, out=u)
    if states is not None:
        u[:, base_frame].copy_(d_p)  # already equal up to rounding, as λ_m = 1; now bit for bit
    clock.move_on()
    return u


def _run(
    u,
    r,
    lam,
    coeffs,
    counter,
    ticket,
    timesteps,
    t,
    states,
    c1,
    base_frame,
    seed,
    sample_offset,
    frame_offset,
    backend,
) -> None:
    clock = Clock(counter, ticket, timesteps, t)
    _check(u, r, lam, coeffs, *clock, states, c1, base_frame)
    increment_version((u, counter, ticket, t))
    _check_overlap(u, r, lam, coeffs, states)
    seed = None if seed is None else unsigned_seed(seed)
    place = {"sample_offset": sample_offset, "frame_offset": frame_offset}
    if backend == "triton":
        from vfengine.kernels.frames import BasePath, launch_frames
        from vfengine.kernels.path_step import RULE

        clip = {"x": u, "g": u, "r": r, "lam": lam, "coeffs": coeffs, "step": counter, "out": u}
        path = BasePath(clock, states, c1, base_frame)
        launch_frames(RULE, **clip, residual_seed=seed, **place, path=path)
        return
    batch, frames, c, h, w = u.shape
    clip = native().FrameArgs(
        x=address(u),
        g=0,
        r=address(r),
        lam=address(lam),
        coeffs=address(coeffs),
        step=address(counter),
        out=address(u),
        batch=batch,
        frames=frames,
        pixels=c * h * w,
        num_steps=coeffs.shape[0],
        draw=seed is not None,
        residual_seed=seed or 0,
        **place,
        dtype=DTYPE_NUMBERS[u.dtype],
    )
    path = native().BasePath(
        states=address(states),
        c1=address(c1),
        path_batch=1 if states is None else states.shape[1],
        base_frame=base_frame,
    )
    run_native(_NAME, backend, u, clip=clip, path=path, clock=clock.args())


def _check_overlap(u: Tensor, r: Tensor, lam: Tensor, coeffs: Tensor, states: Tensor | None):
    check_overlap(_NAME, u, {"r": r, "lam": lam, "coeffs": coeffs, "states": states})


def _check(
    u,
    r,
    lam,
    coeffs,
    counter,
    ticket,
    timesteps,
    t,
    states,
    c1,
    base_frame,
    *_,
    exact=False,
) -> None:
    """Raise unless dtypes, shapes, strides and devices fit; looks at no memory.

    exact: whether u, or the path, may be float64, and then coeffs as u
    """
    wide = exact and u.dtype == torch.float64
    if not wide:
        check_dtype(_NAME, "u", u)
    if u.ndim != 5 or u.numel() == 0:
        raise ValueError(f"{_NAME}: u must be [B, N, C, H, W] and not empty, got {list(u.shape)}")
    (batch, frames, *image), device = u.shape, u.device
    clock, num_steps = Clock(counter, ticket, timesteps, t), timesteps.numel()
    clock.check(_NAME, batch, device)
    check_tensor(_NAME, "u", u, u.shape, u.dtype, device)
    check_tensor(_NAME, "r", r, u.shape, u.dtype, device)
    check_tensor(_NAME, "lam", lam, (frames,), torch.float32, device)
    solver = torch.float64 if wide else torch.float32
    check_tensor(_NAME, "coeffs", coeffs, (num_steps, 3), solver, device)
    if states is not None:
        path_batch = states.shape[1] if states.ndim == 5 and states.shape[1] == 1 else batch
        shape = (num_steps + 1, path_batch, *image)
        path = states.dtype if exact and states.dtype == torch.float64 else torch.float32
        check_tensor(_NAME, "states", states, shape, path, device)
    if c1 is not None:
        check_tensor(_NAME, "c1", c1, (num_steps,), torch.float64, device)
    if not 0 <= base_frame < frames:
        raise ValueError(f"{_NAME}: base_frame must lie in [0, {frames}), got {base_frame}")
    check_no_grad(_NAME, u, r, lam, coeffs, states, c1)


_OP = register(
    f"{_NAME}(Tensor(a!) u, Tensor r, Tensor lam, Tensor coeffs, Tensor(b!) counter, "
    "Tensor(c!) ticket, Tensor timesteps, Tensor(d!) t, Tensor? states, Tensor? c1, "
    "int base_frame, int? seed, int sample_offset, int frame_offset, str backend) -> ()",
    _run,
    _check,
)
