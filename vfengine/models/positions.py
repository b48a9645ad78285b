"""Embeddings of positions in time: sinusoids of a timestep or frame, a bias by distance."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(
    positions: Tensor, dim: int, *, sin_first: bool = False, shift: float | None = None
) -> Tensor:
    """positions [...] -> [..., dim] fp32: cos, then sin, at dim / 2 frequencies, 1 to 1/10000.

    sin_first: sin, then cos
    shift:     frequency k is 10000^(-k / (dim / 2 - shift)), rounded as diffusers does: at t = 1000
               the last bit of a frequency matters. None: no shift, and this family's own rounding
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=positions.device)
    if shift is None:
        exponents = k * (-math.log(10000.0) / half)
    else:
        exponents = k * -math.log(10000.0) / (half - shift)
    angles = positions[..., None].float() * exponents.exp()
    parts = (angles.sin(), angles.cos()) if sin_first else (angles.cos(), angles.sin())
    return torch.cat(parts, dim=-1)


class RelativePositionBias(nn.Module):
    """A learned number per head and bucket of the distance of two frames (T5, arXiv 1910.10683).

    Half of the buckets serve each direction; half of those hold exact distances, the rest grow
    logarithmically up to max_distance, so that any number of frames has a bias.
    """

    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)
        nn.init.zeros_(self.relative_attention_bias.weight)

    def buckets(self, num_frames: int, device: torch.device) -> Tensor:
        """int64 [N, N]: the bucket of (query frame, key frame)."""
        frames = torch.arange(num_frames, device=device, dtype=torch.int64)
        offset = frames[None, :] - frames[:, None]
        half = self.num_buckets // 2
        exact = half // 2
        distance = offset.abs()
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(
            self.max_distance / exact
        )
        far = (exact + growth * (half - exact)).long().clamp(max=half - 1)
        return (offset > 0).long() * half + torch.where(distance < exact, distance, far)

    def forward(self, num_frames: int, device: torch.device) -> Tensor:
        """[heads, N, N], added to the attention logits."""
        return self.relative_attention_bias(self.buckets(num_frames, device)).permute(2, 0, 1)
