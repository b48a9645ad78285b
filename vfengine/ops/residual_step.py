"""residual_step: one two-phase step of all frames in two reads and one write of the clip.

    u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i)

Kernels: csrc/cpu/residual_step.cpp, csrc/cuda/residual_step.cu, kernels/residual_step.py.
"""

import torch
from torch import Tensor

from vfengine.noise import residual_noise
from vfengine.ops._dispatch import (
    DTYPES,
    check_no_grad,
    check_tensor,
    choose_backend,
    overlap,
    register,
)


def residual_step(
    u: Tensor,
    r: Tensor,
    g: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    step: Tensor,
    *,
    r_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    seed: int | None = None,
    xi: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i) for all frames (VideoFusion, Algorithm 2).

    u is the clip less its base noise, u_i = z_i - √λ_i √(1-ᾱ_t) b̂. This is the solver's step from
    t to p with the removal of p's base noise in one; the last step leaves the finished clip.

    u:              [B, N, C, H, W], fp32, fp16 or bf16, contiguous; written unless `out` is given
    r:              like u, the residual network's estimate r̂
    g:              [B, C, H, W], same dtype: d_p - c1 d_t of the base path
    lam:            fp32 [N], λ_i in [0, 1]
    coeffs:         fp32 [T, 3], a row (c1, c2, σ) per step
    step:           int32 [1], the row; read on the device, so that a CUDA graph can replay it
    r_uncond:       like r; r is then r_uncond + guidance_scale (r - r_uncond)
    seed:           residual seed of ξ where σ > 0: residual_noise(u.shape, seed, step=step + 1);
                    reads step on the host
    xi:             like u, ξ itself in place of a seed
    out:            like u; u itself, or memory that no argument shares
    backend:        "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns the tensor that was written. Sums are in fp32 and rounded once. The CPU kernel returns
    the same bits on any number of threads.

    Raises TypeError for a dtype; ValueError for a shape, stride, device, overlap or backend it
    cannot take, for tensors that autograd records, for λ outside [0, 1], a step outside coeffs, and
    σ > 0 with neither seed nor xi. On CUDA these last three cannot be seen without waiting for the
    device: there such a step writes NaN.
    """
    if seed is not None:
        if xi is not None:
            raise ValueError("residual_step: expected seed or xi, got both")
        xi = _draw(u, coeffs, step, seed)
    rest = (lam, coeffs, step, r_uncond, xi, guidance_scale, backend)
    if out is None or out is u:
        _OP_IN_PLACE(u, r, g, *rest)
        return u
    _OP(u, r, g, *rest, out)
    return out


def residual_step_reference(
    u: Tensor,
    r: Tensor,
    g: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    step: Tensor,
    *,
    r_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    xi: Tensor | None = None,
) -> Tensor:
    """The formula of `residual_step` in plain PyTorch, in fp32, or in fp64 for fp64 clips.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    _check_step(coeffs, step)
    if not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"residual_step: lam must lie in [0, 1], got {lam.tolist()}")
    c1, c2, sigma = coeffs[int(step)].to(dtype)
    lam = lam.to(dtype).view(-1, 1, 1, 1)
    r = r.to(dtype)
    if r_uncond is not None:
        r = r_uncond.to(dtype) + guidance_scale * (r - r_uncond.to(dtype))
    residual = c2 * r
    if sigma != 0:
        if xi is None:
            raise ValueError("residual_step: sigma > 0 at this step needs seed or xi")
        residual = residual + sigma * xi.to(dtype)
    base = lam.sqrt() * g.to(dtype).unsqueeze(1)
    return c1 * u.to(dtype) + base + (1 - lam).sqrt() * residual


def _residual_step(u, r, g, lam, coeffs, step, r_uncond, xi, guidance_scale, backend, out):
    _check(u, r, g, lam, coeffs, step, r_uncond, xi, guidance_scale, backend, out)
    _check_overlap(u, r, g, r_uncond, xi, out)
    backend = choose_backend("residual_step", backend, u.device)
    if backend == "reference":
        options = {"r_uncond": r_uncond, "guidance_scale": guidance_scale, "xi": xi}
        out.copy_(residual_step_reference(u, r, g, lam, coeffs, step, **options))
    elif backend == "triton":
        from vfengine.kernels.residual_step import launch

        launch(u, r, g, lam, coeffs, step, r_uncond, xi, guidance_scale, out)
    else:
        _launch_native(u, r, g, lam, coeffs, step, r_uncond, xi, guidance_scale, out)


def _launch_native(u, r, g, lam, coeffs, step, r_uncond, xi, guidance_scale, out):
    from vfengine.native import vfengine_native

    batch, frames = u.shape[:2]
    args = vfengine_native.ResidualStepArgs(
        u=u.data_ptr(),
        r=r.data_ptr(),
        r_uncond=0 if r_uncond is None else r_uncond.data_ptr(),
        xi=0 if xi is None else xi.data_ptr(),
        g=g.data_ptr(),
        lam=lam.data_ptr(),
        coeffs=coeffs.data_ptr(),
        step=step.data_ptr(),
        out=out.data_ptr(),
        batch=batch,
        frames=frames,
        pixels=u.numel() // (batch * frames),
        num_steps=coeffs.shape[0],
        guidance_scale=guidance_scale,
        dtype=DTYPES[u.dtype],
    )
    if u.is_cuda:
        stream = torch.cuda.current_stream(u.device).cuda_stream
        vfengine_native.residual_step_cuda(args, u.device.index, stream)
    else:
        vfengine_native.residual_step_cpu(args, torch.get_num_threads())


def _draw(u: Tensor, coeffs: Tensor, step: Tensor, seed: int) -> Tensor | None:
    """ξ of this step, or None where σ = 0."""
    _check_table(coeffs, step, u.device)
    _check_step(coeffs, step)
    k = int(step)
    if coeffs[k, 2] == 0:
        return None
    return residual_noise(u.shape, seed, step=k + 1, dtype=u.dtype, device=u.device)


def _check(u, r, g, lam, coeffs, step, r_uncond, xi, guidance_scale, backend, out):
    op = "residual_step"
    if u.dtype not in DTYPES:
        raise TypeError(f"{op}: u must be fp32, fp16 or bf16, got {u.dtype}")
    if u.ndim != 5 or u.numel() == 0:
        raise ValueError(f"{op}: u must be [B, N, C, H, W] and not empty, got {list(u.shape)}")
    shape, dtype, device = u.shape, u.dtype, u.device
    inputs = (("u", u), ("r", r), ("r_uncond", r_uncond), ("xi", xi), ("g", g))
    for name, tensor in (*inputs, ("out", out)):
        if tensor is not None:
            expected = shape[:1] + shape[2:] if name == "g" else shape
            check_tensor(op, name, tensor, expected, dtype, device)
    check_tensor(op, "lam", lam, shape[1:2], torch.float32, device)
    _check_table(coeffs, step, device)
    check_no_grad(op, u, r, g, r_uncond, xi, out)


def _check_overlap(u, r, g, r_uncond, xi, out):
    for name, tensor in (("u", u), ("r", r), ("g", g), ("r_uncond", r_uncond), ("xi", xi)):
        in_place = name == "u" and u.data_ptr() == out.data_ptr()
        if tensor is not None and not in_place and overlap(tensor, out):
            raise ValueError(f"residual_step: out shares memory with {name}")


def _check_table(coeffs, step, device):
    op = "residual_step"
    num_steps = coeffs.shape[0] if coeffs.ndim else 0
    check_tensor(op, "coeffs", coeffs, (num_steps, 3), torch.float32, device)
    check_tensor(op, "step", step, (1,), torch.int32, device)


def _check_step(coeffs, step):
    if not 0 <= int(step) < coeffs.shape[0]:
        raise ValueError(
            f"residual_step: step {int(step)} lies outside coeffs, which has {coeffs.shape[0]} rows"
        )


_ARGUMENTS = (
    "Tensor r, Tensor g, Tensor lam, Tensor coeffs, Tensor step, Tensor? r_uncond, Tensor? xi, "
    "float guidance_scale, str backend"
)
register(f"residual_step(Tensor u, {_ARGUMENTS}, Tensor(a!) out) -> ()", _residual_step, _check)
register(
    f"residual_step_(Tensor(a!) u, {_ARGUMENTS}) -> ()",
    lambda u, *rest: _residual_step(u, *rest, out=u),
    lambda u, *rest: _check(u, *rest, out=u),
)
_OP = torch.ops.vfengine.residual_step.default
_OP_IN_PLACE = torch.ops.vfengine.residual_step_.default
