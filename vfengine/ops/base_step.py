"""base_step: a step of the base phase that keeps its path, in one launch.

    d_t = z - √(1-ᾱ_t) b                states[k] <- d_t
    z <- c1 z + c2 b̃ + σ ξ_b            states[k+1] <- z

Kernels: csrc/base_step.h, csrc/cuda/base_step.cu, kernels/base_step.py. On a CPU, and in float64,
it is made of remove_base, decomposed_step and PyTorch.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._clock import Clock, check_clock
from vfengine.ops._dispatch import (
    address,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_tensor,
    choose_backend,
    register,
    run_native,
    step_op,
)
from vfengine.ops.decomposed_noise import check_place, check_seed, signed_seed, unsigned_seed
from vfengine.ops.decomposed_step import decomposed_step, decomposed_step_reference
from vfengine.ops.remove_base import remove_base, remove_base_reference

_NAME = "base_step"


def base_step(
    z: Tensor,
    b: Tensor,
    states: Tensor,
    noise_levels: Tensor,
    coeffs: Tensor,
    clock: Clock,
    *,
    mixed: Tensor | None = None,
    seed: int | None = None,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The step k = `clock.counter` of the base phase (vfengine/sampling/two_phase.py), in place.

    It is `remove_base` and `decomposed_step` of a clip of one frame, λ = 1. Then the clock moves
    on.

    z:            fp32 [B, C, H, W], contiguous: z_m; written
    b:            like z, the base network's estimate b̂
    states:       fp32 [S+1, B, C, H, W], the base path: rows k and k+1 are written
    noise_levels: fp32 [S], √(1-ᾱ_t) of every step
    coeffs:       fp32 [S, 3], a row (c1, c2, σ) per step
    clock:        the loop's, of S steps and B samples
    mixed:        like z, a multistep solver's mixture of estimates for the second line; None: b
    seed:         base seed of ξ where σ > 0; sample_offset: as of `decomposed_step`
    backend:      "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    z of float64, with everything in float64, runs the references; backend "auto" or "reference".

    Returns z, with the same bits from every kernel. Raises as `decomposed_step` does; on CUDA a
    step outside coeffs, and σ > 0 without a seed, write NaN into z.
    """
    mixed = b if mixed is None else mixed
    check_clock(_NAME, clock)
    tensors = {"z": z, "b": b, "states": states, "noise_levels": noise_levels, "coeffs": coeffs}
    check_kinds(_NAME, {**tensors, "mixed": mixed, **clock._asdict()}, backend=backend)
    sample_offset = check_place(_NAME, sample_offset=sample_offset)["sample_offset"]
    key = None if seed is None else signed_seed(check_seed(seed, "seed"))
    exact = z.dtype == torch.float64
    kernel = "reference" if exact else choose_backend(_NAME, backend, z.device)
    if kernel in ("cpu", "reference"):
        _check(*tensors.values(), *clock, mixed, dtype=torch.float64 if exact else torch.float32)
        _check_overlap(z, b, mixed, states)
        ops = (
            step_op(remove_base, remove_base_reference, z.dtype, backend),
            step_op(decomposed_step, decomposed_step_reference, z.dtype, backend),
        )
        return _composed(ops, z, b, states, noise_levels, coeffs, clock, mixed, seed, sample_offset)
    _OP(*tensors.values(), *clock, mixed, key, sample_offset, kernel)
    return z


def base_step_reference(z: Tensor, *arguments: object, **options: object) -> Tensor:
    """`base_step` in PyTorch, in place."""
    return base_step(z, *arguments, **options, backend="reference")


def _composed(
    ops, z, b, states, noise_levels, coeffs, clock, mixed, seed, sample_offset
) -> Tensor:  # arguments as of base_step
    remove, advance = ops
    row, clip = clock.counter, z.unsqueeze(1)
    lam = torch.ones(1, dtype=torch.float32, device=z.device)
    d = remove(clip, b, lam, noise_levels, row, out=torch.empty_like(clip))
    states.index_copy_(0, row.long(), d.transpose(0, 1))
    noise = {"sample_offset": sample_offset}
    if seed is not None:
        noise |= {"base_seed": seed, "residual_seed": 0}
    advance(clip, mixed, mixed.unsqueeze(1), lam, coeffs, row, **noise, out=clip)
    states.index_copy_(0, row.long() + 1, z.unsqueeze(0))  # replaced by the next step's d_t
    clock.move_on()
    return z


def _run(
    z,
    b,
    states,
    noise_levels,
    coeffs,
    counter,
    ticket,
    timesteps,
    t,
    mixed,
    seed,
    sample_offset,
    backend,
) -> None:
    clock = Clock(counter, ticket, timesteps, t)
    _check(z, b, states, noise_levels, coeffs, *clock, mixed)
    increment_version((z, states, counter, ticket, t))
    _check_overlap(z, b, mixed, states)
    seed = None if seed is None else unsigned_seed(seed)
    if backend == "triton":
        from vfengine.kernels.base_step import launch_base_step

        launch_base_step(z, b, mixed, states, noise_levels, coeffs, clock, seed, sample_offset)
        return
    run_native(
        _NAME,
        backend,
        z,
        z=address(z),
        b=address(b),
        mixed=address(mixed),
        states=address(states),
        noise_levels=address(noise_levels),
        coeffs=address(coeffs),
        batch=z.shape[0],
        pixels=z[0].numel(),
        draw=seed is not None,
        seed=seed or 0,
        sample_offset=sample_offset,
        clock=clock.args(),
    )


def _check_overlap(z: Tensor, b: Tensor, mixed: Tensor, states: Tensor) -> None:
    check_overlap(_NAME, z, {"b": b, "mixed": mixed, "states": states})
    check_overlap(_NAME, states, {"b": b, "mixed": mixed})


def _check(
    z,
    b,
    states,
    noise_levels,
    coeffs,
    counter,
    ticket,
    timesteps,
    t,
    mixed,
    *_,
    dtype=torch.float32,
) -> None:
    """Raise unless dtypes, shapes, strides and devices fit; looks at no memory."""
    if z.ndim != 4 or z.numel() == 0:
        raise ValueError(f"{_NAME}: z must be [B, C, H, W] and not empty, got {list(z.shape)}")
    shape, device, num_steps = tuple(z.shape), z.device, timesteps.numel()
    Clock(counter, ticket, timesteps, t).check(_NAME, shape[0], device)
    for name, tensor, expected in (
        ("z", z, shape),
        ("b", b, shape),
        ("mixed", mixed, shape),
        ("states", states, (num_steps + 1, *shape)),
        ("noise_levels", noise_levels, (num_steps,)),
        ("coeffs", coeffs, (num_steps, 3)),
    ):
        check_tensor(_NAME, name, tensor, expected, dtype, device)
    check_no_grad(_NAME, z, b, states, noise_levels, coeffs, mixed)


_OP = register(
    f"{_NAME}(Tensor(a!) z, Tensor b, Tensor(b!) states, Tensor noise_levels, Tensor coeffs, "
    "Tensor(c!) counter, Tensor(d!) ticket, Tensor timesteps, Tensor(e!) t, Tensor mixed, "
    "int? seed, int sample_offset, str backend) -> ()",
    _run,
    _check,
)
