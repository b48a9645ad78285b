"""Memory of plans: the layout of an arena, its huge pages, and memory returned to the system."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64


@dataclass(frozen=True)
class Block:
    """Memory that is needed from one call to another, both included, by their numbers."""

    nbytes: int
    first: int
    last: float  # infinity: also after the last call

    def meets(self, other: Block) -> bool:
        """Whether some call needs both."""
        return self.first <= other.last and other.first <= self.last


def arrange(blocks: Sequence[Block]) -> tuple[list[int], int]:
    """The offset of each block, and the size of an arena that holds them.

    Blocks that one call needs lie apart. Large blocks are placed first, each in the lowest gap
    between those that it meets (Pisarchyk and Lee 2020, arXiv 2001.03288, greedy by size).
    """
    placed: list[tuple[int, int, Block]] = []  # (offset, end, block)
    offsets = [0] * len(blocks)
    for index in sorted(range(len(blocks)), key=lambda i: (-blocks[i].nbytes, blocks[i].first)):
        block, offset = blocks[index], 0
        size = math.ceil(block.nbytes / _ALIGNMENT) * _ALIGNMENT
        met = sorted((start, end) for start, end, other in placed if block.meets(other))
        for start, end in met:
            if start - offset >= size:
                break
            offset = max(offset, end)
        placed.append((offset, offset + size, block))
        offsets[index] = offset
    return offsets, max((end for _, end, _ in placed), default=0)


def huge_pages(size: int) -> Tensor:
    """uint8 [size] of zeros in pages of 2 MiB where the system has them.

    Temporal layers read one pixel in all frames, and its rows lie on as many small pages as there
    are frames.
    """
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def return_memory() -> None:
    """Returns freed memory to the system; glibc would keep it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
