"""What both sessions share: networks in memory on one device, and the loops that hold them."""

from __future__ import annotations

import torch
from torch import nn

from ..plan.memory import return_memory
from ..sampling.cuda_graph import empty_cache
from ..sampling.driver import Driver
from ..sampling.reuse import KeptLoops


class Networks:
    """Networks by name, each with the loop of its phase.

    capture: on CUDA, replay steps from graphs
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, capture: bool) -> None:
        self.device, self.dtype = device, dtype
        self.networks: dict[str, nn.Module] = {}
        self.loops = KeptLoops()
        self.driver = Driver(capture, loops=self.loops)

    def release(self, name: str) -> None:
        """Frees a network and the loop that holds it."""
        if self.networks.pop(name, None) is None:
            return
        self.loops.release(name)
        if self.device.type == "cuda":
            empty_cache()
        else:
            return_memory()

    def has_room(self, weights: int) -> bool:
        """Whether CUDA's memory has room for twice so many weights.

        For themselves, and as much again to work in; what torch caches is room too.
        """
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        room = torch.cuda.mem_get_info(self.device)[0] + idle
        return 2 * weights * self.dtype.itemsize <= room
