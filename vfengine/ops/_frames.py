"""What residual_step, decomposed_step and remove_base share: checks and calls of their kernels.

    out_i = w.x x_i + w.base g + w.base_noise b + w.residual r_i + w.noise ξ_i

x, r: [B, N, C, H, W], g: [B, C, H, W]; csrc/common/frames.h has the rest.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from vfengine.ops._dispatch import (
    DTYPES,
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
    reference: (x, g, lam, coeffs, step, **options) -> new tensor; options as of kernels/frames.py
    """

    def __init__(
        self, name: str, names: tuple[str, str, str], columns: int, reference: Callable[..., Tensor]
    ) -> None:
        self.name, self.names, self.columns, self.reference = name, names, columns, reference

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
        inputs = (x, g, lam, coeffs, step, r, r_uncond, xi)
        self._check_overlap(addresses, out, *inputs)
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
        shape, dtype, device, on_cpu = x.shape, x.dtype, x.device, x.is_cpu
        fits = dtype in DTYPES and len(shape) == 5 and 0 not in shape
        if fits:
            batch, frames, *image = shape
            for tensor, expected in (
                (x, shape),
                (r, shape),
                (g, (batch, *image)),
                (r_uncond, shape),
                (xi, shape),
                (out, shape),
            ):
                if tensor is not None and not (
                    tensor.dtype is dtype
                    and tensor.shape == expected
                    and (tensor.is_cpu if on_cpu else tensor.device == device)
                    and tensor.is_contiguous()
                ):
                    fits = False
            for tensor, kind, expected in (
                (lam, torch.float32, (frames,)),
                (coeffs, torch.float32, self._coeffs_shape(coeffs)),
                (step, torch.int32, (1,)),
            ):
                if not (
                    tensor.dtype is kind
                    and tensor.shape == expected
                    and (tensor.is_cpu if on_cpu else tensor.device == device)
                    and tensor.is_contiguous()
                ):
                    fits = False
        if not fits:
            self._explain(x, g, lam, coeffs, step, out, r, r_uncond, xi)
        if torch.is_grad_enabled():
            check_no_grad(self.name, x, g, r, r_uncond, xi, out)

    def _explain(self, x, g, lam, coeffs, step, out, r, r_uncond, xi) -> None:
        """Raise for the first argument that does not fit."""
        op, (x_name, g_name, coeffs_name) = self.name, self.names
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

    def _check_overlap(self, addresses, out, x, g, lam, coeffs, step, r, r_uncond, xi) -> None:
        """Raise where out shares memory with an input, x as a whole excepted."""
        start, nbytes = addresses[-1], out.nbytes
        reach = max(nbytes, coeffs.nbytes, lam.nbytes, step.nbytes)  # no input is larger
        first, end = start - reach, start + nbytes
        in_place = addresses[0] == start
        if not any(first < address < end for address in addresses[in_place:-1]):
            return
        inputs = dict(zip(self.names, (x, g, coeffs), strict=True))
        inputs |= {"r": r, "r_uncond": r_uncond, "xi": xi, "lam": lam, "step": step}
        check_overlap(self.name, out, inputs, may_be=x)

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
