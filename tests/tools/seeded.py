"""Tensors and weights that a seed decides."""

import torch
from torch import nn


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Weights everywhere, in biases and layers that start at zero too; norms about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * gain / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(drawn * 0.3 + ("norm" in name and name.endswith("weight")))
    return module.eval()
