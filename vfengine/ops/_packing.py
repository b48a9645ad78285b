"""Weights in the order in which this machine's products read them (csrc/cpu/gemm)."""

from __future__ import annotations

import torch
from torch import Tensor

from vfengine.ops._dispatch import DTYPE_NUMBERS, native


def packed_words(weight: Tensor, dtype: torch.dtype, geglu: bool = False) -> Tensor:
    """weight [columns, depth] in any dtype, as int32 words of fp32 or bf16 numbers.

    geglu: [2 columns, depth], values then gates
    """
    weight = weight.to(dtype).contiguous()
    columns, depth = weight.shape[0] // (2 if geglu else 1), weight.shape[1]
    number = DTYPE_NUMBERS[dtype]
    if dtype is torch.bfloat16 and depth % 2:
        raise ValueError(f"bfloat16 products take rows of even width, got {depth}; take float32")
    words = native().packed_words(columns, depth, geglu, number)
    packed = torch.empty(words, dtype=torch.int32, device="cpu")
    args = native().PackWeightsArgs(
        weights=weight.data_ptr(),
        out=packed.data_ptr(),
        columns=columns,
        depth=depth,
        geglu=geglu,
        dtype=number,
    )
    native().pack_weights_cpu(args, 1)
    return packed
