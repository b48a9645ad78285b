"""Weights as a `CudaBuilder` takes them (vfengine/plan/cuda.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 16  # channels of an input row: whole 16-byte vectors, and a product's least depth


@dataclass(frozen=True)
class Joined:
    """Weights that are used together, one below the other, with their biases in fp32."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *layers: nn.Linear) -> Joined:
        """The layers' weights; from now on each layer's own are a view of its part."""
        weight, bias = torch.cat([layer.weight for layer in layers]), None
        sizes = [layer.out_features for layer in layers]
        for layer, part in zip(layers, weight.split(sizes), strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
        if layers[0].bias is not None:
            bias = torch.cat([layer.bias for layer in layers])
        return cls(weight, bias)


class Preparer:
    """Makes the layers that a network's plan names ready for a `CudaBuilder`.

    Norms' parameters and biases become fp32, other weights `dtype`, those of convolutions in
    channels_last memory.
    """

    any = object()  # stands for every feature map and context

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.attentions: dict[nn.Module, tuple[Joined, Joined | None]] = {}
        self.projections: list[nn.Linear] = []

    def cat(self, x: Any, y: Any) -> Any:
        return x

    def conv(self, x: Any, conv: nn.Conv2d, *, shift=None, plus=None, padded=False, fp32=False):
        self._layer(conv)
        if padded:
            conv.weight = _frozen(_padded(conv.weight))
        if shift is not None:
            self._project(shift)
        if plus is not None and not isinstance(plus[0], nn.Identity):
            self._layer(plus[0])
        return x

    def conv_over_frames(self, x: Any, conv: nn.Conv2d, residual: Any = None) -> Any:
        return self._layer(conv)

    def upsampled_conv(self, x: Any, conv: nn.Conv2d, skip: Any = None) -> Any:
        return self._layer(conv)

    def group_norm(self, x: Any, norm: nn.GroupNorm, *, silu=False, modulation=None, **_: Any):
        cast(norm, torch.float32)
        if modulation is not None:
            self._project(modulation)
        return x

    def layer_norm(self, x: Any, norm: nn.LayerNorm) -> Any:
        cast(norm, torch.float32)
        return x

    def geglu(self, x: Any, layer: nn.Linear) -> Any:
        return self._layer(layer)

    def linear(self, x: Any, layer: nn.Linear, *, residual: Any = None, then: Any = None) -> Any:
        self._layer(layer)
        if layer.in_features < ALIGNED:
            layer.weight = _frozen(_padded(layer.weight))
        return x if then is None else self._layer(then[0])

    def attention(self, x: Any, norm: nn.Module, attention: nn.Module, context=None, **_: Any):
        cast(norm, torch.float32)
        q, k, v = attention.to_q, attention.to_k, attention.to_v
        for layer in (q, k, v, attention.to_out):
            self._layer(layer)
        crossed = context is not None
        joined = (Joined.of(q), Joined.of(k, v)) if crossed else (Joined.of(q, k, v), None)
        self.attentions[attention] = joined
        return x

    def runs_in_tiles(self, x: Any, transformer: nn.Module) -> bool:
        return False

    def _project(self, projection: nn.Linear) -> None:
        self._layer(projection)
        self.projections.append(projection)

    def _layer(self, layer: nn.Conv2d | nn.Linear) -> Any:
        form = torch.channels_last if layer.weight.dim() == 4 else torch.contiguous_format
        layer.weight = _frozen(layer.weight.to(self.dtype).contiguous(memory_format=form))
        if layer.bias is not None:
            layer.bias = _frozen(layer.bias.float())
        return self.any


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """`module.to(dtype)`, which cannot be had of fake tensors."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = _frozen(parameter.to(dtype))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _padded(weight: Tensor) -> Tensor:
    """A weight [D, C] or [D, C, kh, kw] with input channels of zeros, up to whole vectors."""
    padding = -weight.shape[1] % ALIGNED
    padded = F.pad(weight, (0, 0) * (weight.dim() - 2) + (0, padding))
    return padded.to(memory_format=torch.channels_last) if weight.dim() == 4 else padded
