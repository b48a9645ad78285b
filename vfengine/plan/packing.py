"""Weights in the order in which this machine's kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfengine.native import vfengine_native
from vfengine.ops._dispatch import DTYPE_NUMBERS

# Input times output channels, above which a convolution holds no weights but its own.
_LIGHT = 640 * 640


@dataclass(frozen=True, eq=False)
class Weights:
    """Packed weights of a matrix product (csrc/cpu/gemm/vector.h) and its bias.

    packed:  int32 words, in the order that this machine's kernel reads
    bias:    fp32 [columns], with geglu [2 columns]; None: none
    columns: of the result
    """

    packed: Tensor
    bias: Tensor | None
    columns: int
    epilogue: str | None = None


def pack(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, epilogue: str | None = None
) -> Weights:
    """weight [columns, depth] in any dtype; with geglu [2 columns, depth], values then gates."""
    weight = weight.to(dtype).contiguous()
    geglu = epilogue == "geglu"
    columns, depth = weight.shape[0] // (2 if geglu else 1), weight.shape[1]
    number = DTYPE_NUMBERS[dtype]
    if dtype is torch.bfloat16 and depth % 2:
        raise ValueError(f"bfloat16 products take rows of even width, got {depth}; take float32")
    words = vfengine_native.packed_words(columns, depth, geglu, number)
    packed = torch.empty(words, dtype=torch.int32, device="cpu")
    args = vfengine_native.PackWeightsArgs(
        weights=weight.data_ptr(),
        out=packed.data_ptr(),
        columns=columns,
        depth=depth,
        geglu=geglu,
        dtype=number,
    )
    vfengine_native.pack_weights_cpu(args, 1)
    bias = None if bias is None else bias.detach().float().contiguous()
    return Weights(packed, bias, columns, epilogue)


def pack_winograd(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Weights:
    """weight [columns, channels, 3, 3] or [columns, channels, 3, 1], for `Builder.winograd`.

    The taps transformed for F(2, 3) (Lavin and Gray 2016), in fp32: 16 or 4 packed products.
    """
    half = torch.tensor(
        [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float32, device="cpu"
    )
    parts = []
    for row in torch.einsum("ai,ocij->aocj", half, weight.float()):  # a row in memory at a time
        taps = row[None, ..., 0]
        if weight.shape[-1] == 3:
            taps = torch.einsum("bj,ocj->boc", half, row)
        parts += [pack(tap, None, dtype).packed for tap in taps]
    bias = None if bias is None else bias.detach().float().contiguous()
    return Weights(torch.cat(parts), bias, weight.shape[0])


def conv_weight(conv: nn.Conv2d, dtype: torch.dtype, even: bool = False) -> Tensor:
    """[C', taps * C], with the channels of a tap side by side; even: padded to an even number."""
    weight = conv.weight.detach().to(dtype).permute(0, 2, 3, 1)
    return F.pad(weight, (0, weight.shape[-1] % 2 if even else 0)).flatten(1)


def in_tiles(dtype: torch.dtype) -> bool:
    """Whether a matrix unit multiplies rows of this dtype (csrc/cpu/gemm/tile.h)."""
    return dtype is torch.bfloat16 and vfengine_native.cpu_has_tiles()


def is_light(conv: nn.Conv2d) -> bool:
    """Whether it may hold 16/9 of the weights to be faster (Winograd's, an upsampler's)."""
    return conv.in_channels * conv.out_channels <= _LIGHT


def takes_winograd(conv: nn.Conv2d) -> bool:
    """Whether Winograd's form is faster: not for few channels, where the transforms dominate."""
    least = 128 if conv.kernel_size == (3, 1) else 32
    return min(conv.in_channels, conv.out_channels) >= least
