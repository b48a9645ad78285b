"""The row that each tap of a convolution reads: tables for implicit GEMM (csrc/row_matmul.h).

A table is int32 [taps, pixels of the result]: a row of the same image or clip, -1 for padding.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def _taps(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """int32 [taps, pixels] from each tap's coordinates; -1 outside of the image."""
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return torch.where(inside, rows * width + columns, -1).flatten(1).to(torch.int32).contiguous()


@functools.lru_cache(maxsize=64)
def _table(
    height: int, width: int, out_height: int, out_width: int, step: float, before: int = 1
) -> Tensor:
    """3x3 taps on the grid of out_height x out_width, `step` apart, `before` of them before it.

    step 1: the same grid; 2: every other pixel; 0.5: the image is upsampled to the grid first, by
    nearest neighbours.
    """
    offsets = torch.arange(3, dtype=torch.int64, device="cpu") - before
    y = torch.arange(out_height, dtype=torch.int64, device="cpu")[None, None, :, None] * max(
        1, int(step)
    )
    x = torch.arange(out_width, dtype=torch.int64, device="cpu")[None, None, None, :] * max(
        1, int(step)
    )
    y, x = (y + offsets[:, None, None, None]), (x + offsets[None, :, None, None])
    y, x = (part.expand(3, 3, out_height, out_width).flatten(0, 1) for part in (y, x))
    if step >= 1:
        return _taps(y, x, height, width)
    inside = (y >= 0) & (y < out_height) & (x >= 0) & (x < out_width)
    y = torch.where(inside, y * height // out_height, -1)
    return _taps(y, torch.where(inside, x * width // out_width, -1), height, width)


def same(height: int, width: int) -> Tensor:
    """3x3, stride 1."""
    return _table(height, width, height, width, 1)


def halved(height: int, width: int) -> Tensor:
    """3x3, stride 2."""
    return _table(height, width, (height + 1) // 2, (width + 1) // 2, 2)


def halved_after(height: int, width: int) -> Tensor:
    """3x3, stride 2, with padding below and to the right alone; of even sizes."""
    return _table(height, width, height // 2, width // 2, 2, 0)


def upsampled(height: int, width: int, out_height: int, out_width: int) -> Tensor:
    """3x3 on the image upsampled to out_height x out_width by nearest neighbours."""
    return _table(height, width, out_height, out_width, 0.5)


QUARTERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # even and odd rows and columns


@functools.lru_cache(maxsize=64)
def quarter(height: int, width: int, y: int, x: int) -> tuple[Tensor, Tensor]:
    """A quarter of the image at twice the size: the table of its 2x2 taps, and its pixels there."""
    rows, columns = (
        torch.arange(height, dtype=torch.int64, device="cpu"),
        torch.arange(width, dtype=torch.int64, device="cpu"),
    )
    at = torch.arange(2, dtype=torch.int64, device="cpu")
    from_rows = (rows + at[:, None] - 1 + y)[:, None, :, None].expand(2, 2, height, width)
    from_columns = (columns + at[:, None] - 1 + x)[None, :, None, :].expand(2, 2, height, width)
    table = _taps(from_rows.flatten(0, 1), from_columns.flatten(0, 1), height, width)
    places = (2 * rows + y)[:, None] * 2 * width + 2 * columns + x
    return table, places.flatten().to(torch.int32).contiguous()


@functools.lru_cache(maxsize=64)
def neighbours(frames: int, pixels: int) -> Tensor:
    """A pixel in the frame before, in its own and in the next: int32 [3, frames * pixels]."""
    frame = (
        torch.arange(frames, dtype=torch.int64, device="cpu")
        + (torch.arange(3, dtype=torch.int64, device="cpu") - 1)[:, None]
    )  # [3, frames]
    inside = ((frame >= 0) & (frame < frames))[..., None]
    rows = frame[..., None] * pixels + torch.arange(pixels, dtype=torch.int64, device="cpu")
    return torch.where(inside, rows, -1).flatten(1).to(torch.int32).contiguous()
