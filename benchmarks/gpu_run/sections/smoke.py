"""Each kernel once, C++ and Triton, on an odd shape against its reference; NaN is never right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lib.clips import check, clip_of
from torch import Tensor

from gpu_run.sections import BACKENDS, DEVICE, guarded, verdict
from vfengine import ops

SHAPE = (2, 5, 3, 10, 14)  # no whole number of vectors, frames or blocks
NOT_IN_CPP = {  # network ops without a kernel of this backend
    "cpu": ("implicit_gemm",),
    "cuda": ("implicit_gemm", "spatial_attention", "layer_norm", "geglu"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def roughly(name: str, out: Tensor, exact: Tensor) -> None:
    """ValueError beyond 16 roundings of the largest value: no order of sums explains that."""
    error = (out.to(exact.dtype) - exact).abs().max()
    if not error <= 16 * exact.abs().max() * torch.finfo(out.dtype).eps:
        raise ValueError(f"{name} is off by {error:.3g}")


def step_ops(dtype: torch.dtype, backend: str) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Calls with their exact results."""
    clip = clip_of(SHAPE, dtype)
    z, r, b = clip.z.float(), clip.r.float(), clip.b.float()
    seeds = {"base_seed": 1, "residual_seed": 2}
    levels = (clip.lam, clip.noise_levels, clip.quiet)
    return {
        "residual_step": (
            lambda: ops.residual_step(
                clip.z.clone(), clip.r, clip.b, *clip.table, clip.noisy, seed=1, backend=backend
            ),
            ops.residual_step_reference(z, r, b, *clip.table, clip.noisy, seed=1),
        ),
        "decomposed_step": (
            lambda: ops.decomposed_step(
                clip.z.clone(), clip.b, clip.r, *clip.table, clip.noisy, **seeds, backend=backend
            ),
            ops.decomposed_step_reference(z, b, r, *clip.table, clip.noisy, **seeds),
        ),
        "remove_base": (
            lambda: ops.remove_base(clip.z.clone(), clip.b, *levels, backend=backend),
            ops.remove_base_reference(z, b, *levels),
        ),
        "decomposed_noise": (
            lambda: ops.decomposed_noise(
                torch.empty_like(clip.z), residual_seed=1, backend=backend
            ),
            ops.decomposed_noise_reference(SHAPE, residual_seed=1).to(DEVICE),
        ),
    }


def network_ops(dtype: torch.dtype, backend: str) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """The same; those that have a kernel of this backend."""
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=random, device=DEVICE).to(dtype)

    x = normal(6, 24, 5, 7).contiguous(memory_format=torch.channels_last)
    norm = {"weight": normal(24, dtype=torch.float32), "bias": normal(24, dtype=torch.float32)}
    qkv, wide = normal(2, 5, 7, 3 * 2 * 16), normal(9, 48)
    q, k, v = normal(3, 35, 3 * 32).chunk(3, -1)
    weight, bias = normal(48, dtype=torch.float32), normal(48, dtype=torch.float32)
    pictures, kernels = normal(3, 10, 14, 24), normal(48, 3, 3, 24)
    terms = {"padding": (1, 1), "shift": normal(3, 48, dtype=torch.float32)}
    calls = {
        "group_norm_silu": (
            lambda: ops.group_norm_silu(x, 4, **norm, num_frames=3, backend=backend),
            ops.group_norm_silu_reference(x.float(), 4, **norm, num_frames=3),
        ),
        "temporal_attention": (
            lambda: ops.temporal_attention(qkv, 2, backend=backend),
            ops.temporal_attention_reference(qkv.float(), 2),
        ),
        "spatial_attention": (
            lambda: ops.spatial_attention(q, k, v, 2, backend=backend),
            ops.spatial_attention_reference(q.float(), k.float(), v.float(), 2),
        ),
        "layer_norm": (
            lambda: ops.layer_norm(wide, weight, bias, backend=backend),
            ops.layer_norm_reference(wide.float(), weight, bias),
        ),
        "geglu": (
            lambda: ops.geglu(wide, backend=backend),
            ops.geglu_reference(wide.float()),
        ),
        "implicit_gemm": (
            lambda: ops.implicit_gemm(pictures, kernels, weight, **terms, backend=backend),
            ops.implicit_gemm_reference(pictures.float(), kernels.float(), weight, **terms),
        ),
    }
    return {name: call for name, call in calls.items() if name not in NOT_IN_CPP.get(backend, ())}


def generator_ops(
    dtype: torch.dtype, backend: str
) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """The same of the ops around a network's layers, which are in Triton alone."""
    if backend != "triton":
        return {}
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=DEVICE)

    z, predicted, coeffs = normal(*SHAPE).to(dtype), normal(20, 5, 7, 24), normal(3, 5, 5)
    step = torch.ones(1, dtype=torch.int32, device=DEVICE)
    rows = torch.empty_like(predicted, dtype=dtype)
    numbers = {"coeffs": coeffs, "step": step}
    guided = {**numbers, "guidance_scale": 2.0}
    seen = ops.model_input_reference(z.float(), **numbers, patch_size=2, conditioned=True)
    return {
        "model_input": (
            lambda: ops.model_input(z, **numbers, out=rows, conditioned=True, backend=backend),
            seen.repeat(2, 1, 1, 1),
        ),
        "noise_estimate": (
            lambda: ops.noise_estimate(z, predicted, **guided, backend=backend),
            ops.noise_estimate_reference(z.float(), predicted, **guided),
        ),
    }


@torch.inference_mode()
def main() -> None:
    for name, dtype in DTYPES.items():
        for backend in BACKENDS:
            place = {"contender": backend, "dtype": name}
            for make, right in (
                (step_ops, check),
                (network_ops, roughly),
                (generator_ops, roughly),
            ):
                with guarded(make.__name__, **place):
                    for op, (call, exact) in make(dtype, backend).items():
                        with guarded(op, **place):
                            right(op, call(), exact)
                            verdict(op, True, **place)


if __name__ == "__main__":
    main()
