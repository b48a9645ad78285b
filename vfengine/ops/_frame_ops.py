"""What residual_step, decomposed_step and remove_base share: checks and calls of their kernels.

    out_i = w.x x_i + w.base g + w.base_noise b + w.residual r_i + w.noise ξ_i

x, r: [B, N, C, H, W], g: [B, C, H, W]; csrc/common/frames.h has the rest.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPES,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_tensor,
    choose_backend,
    cuda_place,
    native,
)


class FramesOp:
    """One of the three ops.

    name:      of the op, of its kernels and of their files
    names:     of x, g and coeffs in its public function
    columns:   of coeffs
    residual:  whether r is there
    reference: (x, g, lam, coeffs, step, **options) -> new tensor; options as of kernels/frames.py
    """

    def __init__(
        self,
        name: str,
        names: tuple[str, str, str],
        columns: int,
        residual: bool,
        reference: Callable[..., Tensor],
    ) -> None:
        self.name, self.names, self.columns = name, names, columns
        self.residual, self.reference = residual, reference

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
        increment_version(out)  # as torch's own ops do, so that autograd sees the write
        self._check_overlap(out, x, g, lam, coeffs, step, r, r_uncond, xi)
        backend = choose_backend(self.name, backend, x.device)
        addresses = (
            x.data_ptr(),
            g.data_ptr(),
            0 if r is None else r.data_ptr(),
            0 if r_uncond is None else r_uncond.data_ptr(),
            0 if xi is None else xi.data_ptr(),
            lam.data_ptr(),
            coeffs.data_ptr(),
            step.data_ptr(),
            out.data_ptr(),
        )
        if backend in ("cpu", "cuda"):
            kernel = getattr(native(), f"{self.name}_{backend}")
            where = cuda_place(x) if backend == "cuda" else (torch.get_num_threads(),)
            batch, frames, c, h, w = x.shape
            kernel(
                *addresses,
                batch,
                frames,
                c * h * w,
                coeffs.shape[0],
                guidance_scale,
                seeds is not None,
                *(seeds or _NO_SEEDS),
                sample_offset,
                frame_offset,
                DTYPES[x.dtype],
                *where,
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
        if any(t is None for t in (x, g, lam, coeffs, step, out)) or (self.residual and r is None):
            self.check_kinds(x, g, lam, coeffs, step, out, r)  # an op lets None through
        if x.dtype not in DTYPES:
            raise TypeError(f"{op}: {x_name} must be fp32, fp16 or bf16, got {x.dtype}")
        if x.ndim != 5 or x.numel() == 0:
            raise ValueError(
                f"{op}: {x_name} must be [B, N, C, H, W] and not empty, got {list(x.shape)}"
            )
        (batch, frames, *image), place = x.shape, (x.dtype, x.device)
        clips = ((x_name, x), ("r", r), ("r_uncond", r_uncond), ("xi", xi), ("out", out))
        for name, tensor in clips:
            if tensor is not None:
                check_tensor(op, name, tensor, x.shape, *place)
        check_tensor(op, g_name, g, (batch, *image), *place)
        check_tensor(op, "lam", lam, (frames,), torch.float32, x.device)
        expected = self._coeffs_shape(coeffs)
        check_tensor(op, coeffs_name, coeffs, expected, torch.float32, x.device)
        check_tensor(op, "step", step, (1,), torch.int32, x.device)
        check_no_grad(op, x, g, r, r_uncond, xi, lam, coeffs, out)

    def check_kinds(self, x, g, lam, coeffs, step, out, r=None, **optional_or_numbers) -> None:
        """Raise TypeError for what is no tensor, or no number; tensors that may be None by name."""
        x_name, g_name, coeffs_name = self.names
        tensors = {x_name: x, g_name: g, "lam": lam, coeffs_name: coeffs, "step": step, "out": out}
        if self.residual:
            tensors["r"] = r
        numbers = dict(optional_or_numbers)
        for name in ("r_uncond", "xi"):
            if (tensor := numbers.pop(name, None)) is not None:
                tensors[name] = tensor
        check_kinds(self.name, tensors, **numbers)

    def _check_overlap(self, out, x, g, lam, coeffs, step, r, r_uncond, xi) -> None:
        """Raise where out shares memory with an input, x as a whole excepted."""
        x_name, g_name, coeffs_name = self.names
        inputs = {g_name: g, coeffs_name: coeffs, "lam": lam, "step": step}
        inputs |= {"r": r, "r_uncond": r_uncond, "xi": xi}
        if x.data_ptr() != out.data_ptr():
            inputs[x_name] = x
        check_overlap(self.name, out, inputs)

    def _coeffs_shape(self, coeffs: Tensor) -> tuple[int, ...]:
        rows = coeffs.shape[0] if coeffs.ndim else 0
        return (rows, self.columns) if self.columns > 1 else (rows,)

    @functools.cached_property
    def plain(self) -> Callable[..., bool]:
        """The short way for ordinary CPU tensors (csrc/bindings.cpp); says whether it was taken.

        Arguments: backend, x, g, r, r_uncond, xi, lam, coeffs, step, out, guidance_scale, seeds,
        sample_offset, frame_offset, number of threads.
        """
        return getattr(native(), f"{self.name}_plain")


_NO_SEEDS = (0, 0)


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
