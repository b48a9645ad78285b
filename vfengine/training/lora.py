"""Training of a LoRA: low-rank changes of a model's weights, which themselves stay as they are.

W + up @ down, down [rank, in · kernel] drawn at random, up [out, rank] zero at first: the training
begins at the model. The file is formats/lora.py's, in the names of our own checkpoints.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..files import write_tensors
from ..formats.checkpoint import CheckpointConfig, load_network
from .options import TrainingOptions
from .trainer import Trainer


class LowRank(nn.Module):
    """A weight's parametrization: forward(W) -> W + up @ down, in W's shape."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        like = {"device": weight.device, "dtype": torch.float32}
        fan_in = weight[0].numel()
        self.kernel = weight.shape[2:]
        self.down = nn.Parameter(torch.randn(rank, fan_in, **like) / fan_in**0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, **like))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)

    def matrices(self) -> dict[str, Tensor]:
        """As files have them: of a convolution, down has its kernel, and up is 1x1."""
        down = self.down.reshape(len(self.down), -1, *self.kernel)
        return {
            "lora_A.weight": down,
            "lora_B.weight": self.up.reshape(*self.up.shape, *(1 for _ in self.kernel)),
        }


class LoraTrainer(Trainer):
    """A `Trainer` of low-rank changes of the model in a folder.

    rank: of every change; at most that of its weight

    Raises FileNotFoundError or ValueError for a folder without a whole model.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        rank: int,
        options: TrainingOptions,
        *data: Any,
        **more: Any,
    ):
        self._folder, self._own, self._rank = folder, config, rank
        share = getattr(config, "clean_share", None)  # what the residual network was shown
        if share is not None and options.train != "residual":
            options = replace(options, clean_share=share)
        super().__init__(config, options, *data, **more)

    def _prepare(self) -> None:
        for name, network in self.networks.items():
            trained = load_network(self._folder, self._own, name)
            network.unet.load_state_dict(trained.unet.state_dict())
            network.requires_grad_(False)
            if name in self.objective.trained:
                for layer in _layers(network.unet).values():
                    rank = min(self._rank, *layer.weight.flatten(1).shape)
                    parametrize.register_parametrization(
                        layer, "weight", LowRank(layer.weight, rank)
                    )

    def export(self, file: Path) -> None:
        """Write the averaged changes as a file that `vfengine.generate --lora` takes."""
        tensors = {
            f"{name}.{layer.removesuffix('.parametrizations.weight.0')}.{part}": matrix
            for name in self.objective.trained
            for layer, change in self.averaged[name].unet.named_modules()
            if isinstance(change, LowRank)
            for part, matrix in change.matrices().items()
        }
        notes = {"model": self._own.fingerprint(), "rank": str(self._rank)}
        notes["steps"] = str(self.steps_done)
        self.team.of_first(lambda: write_tensors(file, tensors, notes))

    def _identity(self) -> str:
        named = (super()._identity(), self._rank, sorted(self._own.sha256.items()))
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def _layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that are changed, by name."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, kinds)}
