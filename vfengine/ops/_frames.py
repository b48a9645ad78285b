"""What residual_step, decomposed_step and remove_base share: checks and calls of their kernels.

    out_i = w.x x_i + w.base g + w.base_noise b + w.residual r_i + w.noise ξ_i

x, r: [B, N, C, H, W], g: [B, C, H, W]; csrc/common/frames.h has the rest.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfengine.ops._dispatch import (
    DTYPES,
    check_no_grad,
    check_overlap,
    check_tensor,
    choose_backend,
    run_native,
)


@dataclass(frozen=True)
class FramesOp:
    """One of the three ops.

    names:     of x, g and coeffs in its public function
    columns:   of coeffs
    reference: (x, r, g, lam, coeffs, step, **options) -> new tensor
    """

    name: str
    names: tuple[str, str, str]
    columns: int
    reference: Callable[..., Tensor]

    def run(
        self,
        x: Tensor,
        g: Tensor,
        lam: Tensor,
        coeffs: Tensor,
        step: Tensor,
        out: Tensor,
        backend: str,
        r: Tensor | None = None,
        r_uncond: Tensor | None = None,
        xi: Tensor | None = None,
        guidance_scale: float = 1.0,
        seeds: tuple[int, int] | None = None,
        sample_offset: int = 0,
        frame_offset: int = 0,
    ) -> None:
        """Check everything, then write the result into out."""
        self.check(x, g, lam, coeffs, step, out, r, r_uncond, xi)
        inputs = dict(zip(self.names, (x, g, coeffs), strict=True))
        inputs |= {"r": r, "r_uncond": r_uncond, "xi": xi, "lam": lam, "step": step}
        check_overlap(self.name, out, inputs, may_be=x)
        backend = choose_backend(self.name, backend, x.device)
        batch, frames = x.shape[:2]
        if backend in ("cpu", "cuda"):
            run_native(
                *(self.name, backend, x.device),
                *(x.data_ptr(), g.data_ptr(), _address(r), _address(r_uncond), _address(xi)),
                *(lam.data_ptr(), coeffs.data_ptr(), step.data_ptr(), out.data_ptr()),
                *(batch, frames, x.numel() // (batch * frames), coeffs.shape[0]),
                *(guidance_scale, seeds is not None, *(seeds or (0, 0))),
                *(sample_offset, frame_offset, DTYPES[x.dtype]),
            )
            return
        options = {
            "r": r,
            "r_uncond": r_uncond,
            "xi": xi,
            "guidance_scale": guidance_scale,
            "seeds": seeds,
            "sample_offset": sample_offset,
            "frame_offset": frame_offset,
        }
        if backend == "triton":
            from vfengine.kernels.frames import launch_frames

            rule = importlib.import_module(f"vfengine.kernels.{self.name}").RULE
            launch_frames(rule, x, g, lam, coeffs, step, out, **options)
        else:
            out.copy_(self.reference(x, g, lam, coeffs, step, **options))

    def check(
        self,
        x: Tensor,
        g: Tensor,
        lam: Tensor,
        coeffs: Tensor,
        step: Tensor,
        out: Tensor,
        r: Tensor | None = None,
        r_uncond: Tensor | None = None,
        xi: Tensor | None = None,
    ) -> None:
        """Raise unless dtypes, shapes, strides and devices fit; looks at no memory."""
        op, (x_name, g_name, coeffs_name) = self.name, self.names
        shape, dtype, device = x.shape, x.dtype, x.device
        if dtype not in DTYPES:
            raise TypeError(f"{op}: {x_name} must be fp32, fp16 or bf16, got {dtype}")
        if len(shape) != 5 or 0 in shape:
            raise ValueError(
                f"{op}: {x_name} must be [B, N, C, H, W] and not empty, got {list(shape)}"
            )
        num_steps = coeffs.shape[0] if coeffs.ndim else 0
        _check_all(op, (x_name, "r", "r_uncond", "xi", "out"), (x, r, r_uncond, xi, out), x)
        check_tensor(op, g_name, g, shape[:1] + shape[2:], dtype, device)
        check_tensor(op, "lam", lam, shape[1:2], torch.float32, device)
        check_tensor(op, coeffs_name, coeffs, self.coeffs_shape(num_steps), torch.float32, device)
        check_tensor(op, "step", step, (1,), torch.int32, device)
        check_no_grad(op, x, g, r, r_uncond, xi, out)

    def coeffs_shape(self, num_steps: int) -> tuple[int, ...]:
        return (num_steps, self.columns) if self.columns > 1 else (num_steps,)


def row_of(op: str, coeffs: Tensor, step: Tensor) -> Tensor:
    """The row of this step, for references; ValueError where it lies outside."""
    if not 0 <= int(step) < coeffs.shape[0]:
        raise ValueError(
            f"{op}: step {int(step)} lies outside coeffs, which has {coeffs.shape[0]} rows"
        )
    return coeffs[int(step)]


def shares(op: str, lam: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """√λ and √(1-λ), [N, 1, 1, 1], for references; ValueError for λ outside [0, 1]."""
    if not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"{op}: lam must lie in [0, 1], got {lam.tolist()}")
    lam = lam.to(dtype).view(-1, 1, 1, 1)
    return lam.sqrt(), (1 - lam).sqrt()


def guided(r: Tensor, r_uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """The residual estimate in dtype, for references."""
    if r_uncond is None:
        return r.to(dtype)
    return r_uncond.to(dtype) + guidance_scale * (r.to(dtype) - r_uncond.to(dtype))


def _check_all(op: str, names: Sequence[str], tensors: Sequence[Tensor | None], like: Tensor):
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor is not like:
            check_tensor(op, name, tensor, like.shape, like.dtype, like.device)
    check_tensor(op, names[0], like, like.shape, like.dtype, like.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
