"""Deep features of a UNet, kept from one step for the next ones (DeepCache, arXiv 2312.00858).

What lies deep in a UNet changes slowly from step to step (Ma, Fang and Wang 2023). On every N-th
step the whole network runs, and the features that enter its shallow part are kept. On the steps
between, that part alone runs (vfengine/models/topology.py).
"""

from __future__ import annotations

from torch import Tensor

from ..arguments import as_int


def check_reuse_every(value: int, name: str = "reuse_every") -> int:
    """N as an int; ValueError unless it is one of at least 1, with which nothing is reused."""
    number = as_int(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return number


class Kept:
    """A place for the features of one call a step, which a loop hands to its network.

    shallow: whether the next call reads them and runs the shallow part alone, or makes them anew
    deep:    the features in the network's layout; None before the first call. They stay in the same
             memory, which a CUDA graph reads
    """

    def __init__(self) -> None:
        self.deep: Tensor | None = None
        self.shallow = False
        self._parts: dict[int, Kept] = {}

    def part(self, number: int) -> Kept:
        """The place of one of several calls a step, such as that of a window."""
        part = self._parts.setdefault(number, Kept())
        part.shallow = self.shallow
        return part

    def exchange(self, deep: Tensor) -> Tensor:
        """The features that go on from the border: `deep`, which is kept, or the kept ones."""
        if not self.shallow:
            if self.deep is None:
                self.deep = deep.clone()
            else:
                self.deep.copy_(deep)
            return deep
        return self.deep
