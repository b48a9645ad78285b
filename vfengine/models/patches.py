"""Patches of pixels as channels, and back, in channels_last memory, with one copy each.

PyTorch's pixel_unshuffle gives another memory order, which a convolution then turns, number by
number. Here the pixels of a row of a patch, which stay neighbours, are moved as one word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WORDS = {4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by their bytes


def to_patches(x: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, C * size², H / size, W / size] in channels_last memory.

    Channels are in the order of F.pixel_unshuffle: C, then rows and columns of a patch.
    """
    if size > 1 and size * x.element_size() in _WORDS:
        return _ToPatches.apply(x, size)
    return F.pixel_unshuffle(x, size).contiguous(memory_format=torch.channels_last)


def from_patches(x: Tensor, size: int) -> Tensor:
    """The inverse of `to_patches`: [B, C * size², h, w] -> [B, C, h * size, w * size]."""
    if size > 1 and size * x.element_size() in _WORDS:
        return _FromPatches.apply(x, size)
    return F.pixel_shuffle(x, size)


class _ToPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return _gathered(x, size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return from_patches(grad, ctx.size), None


class _FromPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return _scattered(x, size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return to_patches(grad, ctx.size), None


def _gathered(x: Tensor, size: int) -> Tensor:
    batch, channels, height, width = x.shape
    words = x.contiguous().view(_WORDS[size * x.element_size()])
    words = words.view(batch, channels, height // size, size, width // size)
    rows = words.permute(0, 2, 4, 1, 3).contiguous().view(x.dtype)
    shape = (batch, height // size, width // size, channels * size**2)
    return rows.view(shape).permute(0, 3, 1, 2)


def _scattered(x: Tensor, size: int) -> Tensor:
    batch, folded, rows, columns = x.shape
    words = x.permute(0, 2, 3, 1).contiguous().view(_WORDS[size * x.element_size()])
    words = words.view(batch, rows, columns, folded // size**2, size)
    pixels = words.permute(0, 3, 1, 4, 2).contiguous().view(x.dtype)
    return pixels.view(batch, folded // size**2, rows * size, columns * size)
