"""A published network on disk: found and checked, then read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .lora import Updates, merged
from .weights import StoredWeights, check_weights


@dataclass(frozen=True)
class StoredNetwork:
    """A network whose weights are known by name and shape, and not yet read.

    file:    the first of its files of weights, for error texts
    network: our own, on the meta device
    names:   the file's names of its weights, by ours
    weights: all that the files hold of it

    Raises ValueError unless the files hold its weights, in their shapes, and no others.
    """

    file: Path
    network: nn.Module
    names: Mapping[str, str]
    weights: StoredWeights

    def __post_init__(self) -> None:
        check_weights(self.file, self._shapes(), self.names, self.weights.shapes)
        for name in self.names.values():
            if name in self.weights.others:
                kind = self.weights.others[name]
                raise ValueError(f"{self.file}: {name} holds {kind}, not weights")

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.network.config

    @property
    def num_weights(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def read(
        self, dtype: torch.dtype, device: torch.device | str, updates: Updates | None = None
    ) -> nn.Module:
        """The network with its weights, in eval mode, without gradients; once.

        updates: of LoRA, added to the weights

        Weights are cast one by one: memory holds the network once. Raises ValueError for entries
        that are no weights.
        """
        shapes, state = self._shapes(), {}
        for ours, theirs in self.names.items():
            tensor = self.weights.read(theirs)
            if not tensor.is_floating_point():
                raise ValueError(f"{self.file}: {theirs} holds {tensor.dtype}, not weights")
            tensor = merged(tensor.reshape(shapes[ours]), (updates or {}).get(ours, ()))
            form = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
            state[ours] = tensor.to(device, dtype, copy=True, memory_format=form)
        self.network.load_state_dict(state, assign=True)
        return self.network.eval().requires_grad_(False)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.network.state_dict().items()}
