"""implicit_gemm: a convolution or linear layer and all that comes before and after, in one launch.

Kernel: kernels/implicit_gemm.py.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.arguments import as_int
from vfengine.devices import matmul_in_tf32
from vfengine.ops._dispatch import (
    asked_backend,
    check_dtype,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_table,
    check_tensor,
    choose_backend,
    register,
)
from vfengine.ops._tuning import choose

_NAME = "implicit_gemm"
_KERNELS = ("triton",)
_KERNEL_SIZES = ((3, 3), (1, 1), (3, 1))


def implicit_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    upsample: int = 1,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    coefficients: Tensor | None = None,
    silu: bool = False,
    gated: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """conv(x̃, weight) + bias + shift + residual of channels-last pictures, zeros around them.

    x:            [B, H, W, C] fp32, fp16 or bf16, contiguous
    weight:       [N, kh, kw, C + C2], same dtype, contiguous, which is the memory of a
                  channels_last nn.Conv2d weight; kernels of 3x3, 1x1 and 3x1. A convolution over
                  frames is 3x1 on [B, frames, H W, C], a linear layer 1x1 on [1, rows, 1, C]
    bias:         fp32 [N]
    second:       [B, H, W, C2], same dtype, contiguous: channels that follow those of x
    stride:       1 or 2, both ways
    padding:      rows of zeros above and below, columns of zeros at both sides
    upsample:     2 doubles every pixel both ways before the convolution
    shift:        fp32 [R, N], rows may lie apart; row r is added to B / R pictures, the first
                  to the first
    residual:     [B, Ho, Wo, N], dtype of x, contiguous; added
    coefficients: fp32 [R, C + C2, 2], contiguous: (a, b) of x̃ = a x + b, R as in shift; None: x̃ = x
    silu:         x̃ = SiLU(a x + b); needs coefficients
    gated:        GEGLU: weight is [2 N, 1, 1, C + C2], bias [2 N] and the product
                  (x̃ w₁ + b₁) gelu(x̃ w₂ + b₂), with the exact gelu (Shazeer 2020)
    out:          [B, Ho, Wo, N] of out_dtype, memory that no argument shares; None: allocated
    out_dtype:    fp32, fp16 or bf16; None: that of out, else that of x
    backend:      "auto", "triton" or "reference" (vfengine/ops/_dispatch.py). "triton" takes the
                  tile that is likely the fastest; "auto" measures a few, and torch's own product
                  where there is one, at the first call of a shape (vfengine/ops/_tuning.py). On CPU
                  tensors there is no kernel: say "reference"

    Returns out. x̃ is rounded to the dtype of x. Sums are in fp32, in an order that depends on the
    shape and the tile alone, and rounded once. Products of fp32 are exact unless torch multiplies
    fp32 matrices in TF32.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernel cannot take, and under autograd: the op has no derivative.
    """
    tensors = {"bias": bias, "second": second, "shift": shift, "residual": residual}
    tensors |= {"coefficients": coefficients, "out": out}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    others = {"stride": stride, "upsample": upsample, "silu": silu, "gated": gated}
    given |= {"x": x, "weight": weight}
    plain = check_kinds(_NAME, given, **others, backend=backend)
    stride, upsample, silu, gated, backend = plain
    pads = [as_int(n) for n in padding] if isinstance(padding, (tuple, list)) else []
    if len(pads) != 2 or None in pads:
        raise TypeError(f"{_NAME}: padding must be two ints, got {padding!r}")
    if out is None:
        shape = _out_shape(x, weight, stride, pads, upsample, gated)
        out = x.new_empty(shape, dtype=x.dtype if out_dtype is None else out_dtype)
    elif out_dtype not in (None, out.dtype):
        raise TypeError(f"{_NAME}: out must be {out_dtype}, got {out.dtype}")
    terms = (second, stride, pads, upsample, shift, residual, coefficients, silu, gated)
    _OP(x, weight, bias, *terms, backend, out)
    return out


def implicit_gemm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    upsample: int = 1,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    coefficients: Tensor | None = None,
    silu: bool = False,
    gated: bool = False,
) -> Tensor:
    """The formula of `implicit_gemm` in plain PyTorch, in fp32, or in fp64 for fp64 pictures.

    Returns a new tensor [B, Ho, Wo, N] in the dtype it was computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = (x if second is None else torch.cat([x, second], -1)).to(dtype)
    if coefficients is not None:
        scale, offset = _of_pictures(coefficients.to(dtype), len(x)).unbind(-1)
        v = scale * v + offset
        v = F.silu(v) if silu else v
    v = v.repeat_interleave(upsample, 1).repeat_interleave(upsample, 2)
    y = F.conv2d(
        v.permute(0, 3, 1, 2),
        weight.to(dtype).permute(0, 3, 1, 2),
        None if bias is None else bias.to(dtype),
        stride,
        tuple(padding),
    ).permute(0, 2, 3, 1)
    if gated:
        value, gate = y.chunk(2, -1)
        y = value * F.gelu(gate)
    y = y if shift is None else y + _of_pictures(shift.to(dtype), len(x))
    return (y if residual is None else y + residual.to(dtype)).contiguous()


def _of_pictures(rows: Tensor, pictures: int) -> Tensor:
    """Rows [R, N, …] of runs of pictures as [pictures, 1, 1, N, …]."""
    return rows.repeat_interleave(pictures // len(rows), 0)[:, None, None]


@dataclass(frozen=True)
class Size:
    """What the choice of a tile depends on."""

    device: torch.device
    dtype: torch.dtype
    rows: int  # output pixels
    sets: int  # runs of pictures, each with one row of shift and one of coefficients
    columns: int  # output channels
    channels: tuple[int, int]  # of x and of second
    taps: int
    gated: bool
    normed: bool


@dataclass(frozen=True)
class Product:
    """The arguments of a call, checked, as the kernel and its choice of tiles read them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    second: Tensor | None
    stride: int
    padding: tuple[int, int]
    upsample: int
    shift: Tensor | None
    residual: Tensor | None
    coefficients: Tensor | None
    silu: bool
    gated: bool
    out: Tensor

    @cached_property
    def rows(self) -> int:
        """Output pixels."""
        return self.out.numel() // self.columns

    @cached_property
    def columns(self) -> int:
        """Output channels."""
        return self.out.shape[-1]

    @cached_property
    def channels(self) -> tuple[int, int]:
        """Those of x and of second."""
        return self.x.shape[-1], 0 if self.second is None else self.second.shape[-1]

    @cached_property
    def taps(self) -> int:
        return self.weight.shape[1] * self.weight.shape[2]

    @property
    def terms(self) -> tuple[Tensor | None, ...]:
        """What is added to the product."""
        return self.bias, self.shift, self.residual

    @property
    def linear(self) -> bool:
        return self.taps == 1 and self.stride == 1 and self.padding == (0, 0)

    @property
    def suits_torch(self) -> bool:
        """Whether torch has this product, with nothing before it, and as exact."""
        plain = self.second is None and self.coefficients is None and not self.gated
        exact = self.x.itemsize == 2 or self.linear or matmul_in_tf32()
        return plain and self.upsample == 1 and exact

    @cached_property
    def size(self) -> Size:
        return Size(
            self.x.device,
            self.x.dtype,
            self.rows,
            self.sets,
            self.columns,
            self.channels,
            self.taps,
            self.gated,
            self.coefficients is not None,
        )

    @property
    def key(self) -> Hashable:
        """All that the time of a call depends on."""
        shapes = (self.x.shape, self.weight.shape, self.out.dtype)
        options = (self.stride, self.padding, self.upsample, self.silu, matmul_in_tf32())
        return (_NAME, self.size, shapes, options, tuple(term is not None for term in self.terms))

    @cached_property
    def sets(self) -> int:
        """Runs of pictures, each with one row of shift and one of coefficients."""
        tables = (self.shift, self.coefficients)
        return math.lcm(*(1 if table is None else len(table) for table in tables))


def _out_shape(
    x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], upsample: int, gated: bool
) -> tuple[int, int, int, int]:
    """[B, Ho, Wo, N], once the shapes of x and weight are known to go together."""
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"{_NAME}: x must be [B, H, W, C] and not empty, got {list(x.shape)}")
    if weight.ndim != 4 or weight.numel() == 0 or tuple(weight.shape[1:3]) not in _KERNEL_SIZES:
        raise ValueError(
            f"{_NAME}: weight must be [N, kh, kw, C] of a kernel 3x3, 1x1 or 3x1 and not empty, "
            f"got {list(weight.shape)}"
        )
    if stride not in (1, 2) or upsample not in (1, 2):
        raise ValueError(
            f"{_NAME}: stride and upsample must be 1 or 2, got {stride} and {upsample}"
        )
    if len(padding) != 2 or not all(0 <= pad <= 1 for pad in padding):
        raise ValueError(f"{_NAME}: padding must be two of 0 and 1, got {tuple(padding)}")
    if gated and (weight.shape[1:3] != (1, 1) or len(weight) % 2):
        raise ValueError(f"{_NAME}: gated takes weight [2 N, 1, 1, C], got {list(weight.shape)}")
    sizes = [
        (size * upsample + 2 * pad - taps) // stride + 1
        for size, pad, taps in zip(x.shape[1:3], padding, weight.shape[1:3], strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"{_NAME}: the kernel is larger than x, padded: {list(weight.shape)}, {list(x.shape)}"
        )
    return (x.shape[0], *sizes, len(weight) // (2 if gated else 1))


def _run(
    x,
    weight,
    bias,
    second,
    stride,
    padding,
    upsample,
    shift,
    residual,
    coefficients,
    silu,
    gated,
    backend,
    out,
):
    terms = (second, stride, tuple(padding), upsample, shift, residual, coefficients, silu, gated)
    _check(x, weight, bias, *terms, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    product = Product(x, weight, bias, *terms, out)
    given = {name: t for name, t in vars(product).items() if isinstance(t, Tensor)}
    del given["out"]
    check_overlap(_NAME, out, given)
    measured = asked_backend(backend) == "auto"
    backend = choose_backend(_NAME, backend, x.device, _KERNELS)
    if backend == "triton":
        _run_triton(product, measured)
    else:
        given |= {"padding": padding, "stride": stride, "upsample": upsample}
        out.copy_(implicit_gemm_reference(**given, silu=silu, gated=gated))


def _run_triton(product: Product, measured: bool) -> None:
    """Run the likely fastest tile, or what is the fastest by measurement: torch may be so, too."""
    from vfengine.kernels.gemm_tiles import tiles_for
    from vfengine.kernels.implicit_gemm import launch

    tiles = tiles_for(product.size)
    if not measured:
        return launch(product, tiles[0])
    ways = {str(tile): partial(launch, product, tile) for tile in tiles}
    if product.suits_torch:
        ways["torch"] = partial(_run_torch, product)
    return ways[choose(product.key, ways)]()


def _run_torch(product: Product) -> None:
    """The product by cuBLAS or cuDNN, and one launch for what they leave out.

    They round their sums to the dtype of x before it.
    """
    from vfengine.kernels.gemm_terms import launch

    x, weight, out = product.x, product.weight, product.out
    if product.linear:
        y = out if out.dtype is x.dtype else out.new_empty(out.shape, dtype=x.dtype)
        torch.mm(x.flatten(0, 2), weight.flatten(1).t(), out=y.flatten(0, 2))
    else:
        picture, kernel = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
        y = F.conv2d(picture, kernel, None, product.stride, product.padding)
        y = y.permute(0, 2, 3, 1).contiguous()  # as it is, if cuDNN kept channels last
    if y is not out or any(term is not None for term in product.terms):
        launch(product, y)


def _check(
    x,
    weight,
    bias,
    second,
    stride,
    padding,
    upsample,
    shift,
    residual,
    coefficients,
    silu,
    gated,
    backend,
    out,
):
    check_dtype(_NAME, "x", x)
    check_dtype(_NAME, "out", out)
    shape = _out_shape(x, weight, stride, padding, upsample, gated)
    check_tensor(_NAME, "x", x, x.shape, x.dtype, x.device)
    channels = x.shape[-1]
    if second is not None:
        if second.ndim != 4 or second.numel() == 0:
            raise ValueError(
                f"{_NAME}: second must be [B, H, W, C2] and not empty, got {list(second.shape)}"
            )
        channels += second.shape[-1]
        size = (*x.shape[:3], second.shape[-1])
        check_tensor(_NAME, "second", second, size, x.dtype, x.device)
    check_tensor(_NAME, "weight", weight, (*weight.shape[:3], channels), x.dtype, x.device)
    check_tensor(_NAME, "out", out, shape, out.dtype, x.device)
    check_table(_NAME, "bias", bias, (len(weight),), x)
    if residual is not None:
        check_tensor(_NAME, "residual", residual, shape, x.dtype, x.device)
    if coefficients is not None:
        _check_rows("coefficients", coefficients, (channels, 2), x)
        check_table(_NAME, "coefficients", coefficients, coefficients.shape, x)
    elif silu:
        raise ValueError(f"{_NAME}: silu needs coefficients")
    if shift is not None:
        _check_rows("shift", shift, shape[-1:], x)
    largest = max(x.shape[:3].numel(), out.shape[:3].numel())
    if largest >= 2**31:
        raise ValueError(f"{_NAME}: at most 2**31 - 1 pixels, got {largest}")
    check_no_grad(_NAME, x, weight, bias, second, shift, residual, coefficients, out)


def _check_rows(name: str, rows: Tensor, row: tuple[int, ...], x: Tensor) -> None:
    """Raise unless `rows` is fp32 [R, *row] where x is, of contiguous rows, and R divides B."""
    if rows.dtype is not torch.float32:
        raise TypeError(f"{_NAME}: {name} must be torch.float32, got {rows.dtype}")
    if rows.device != x.device:
        raise ValueError(f"{_NAME}: {name} must be on {x.device}, got {rows.device}")
    if rows.ndim != 1 + len(row) or rows.shape[1:] != row or not len(rows) or len(x) % len(rows):
        raise ValueError(
            f"{_NAME}: {name} must be [R, {', '.join(map(str, row))}] where R divides {len(x)}, "
            f"got {list(rows.shape)}"
        )
    if not rows[0].is_contiguous() or rows.stride(0) < 0:
        raise ValueError(f"{_NAME}: rows of {name} must be contiguous, got strides {rows.stride()}")


_OP = register(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor? second, int stride, int[] padding, "
    "int upsample, Tensor? shift, Tensor? residual, Tensor? coefficients, bool silu, bool gated, "
    "str backend, Tensor(a!) out) -> ()",
    _run,
    _check,
)
