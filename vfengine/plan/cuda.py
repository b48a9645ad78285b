"""Inference of networks on CUDA: one walk of the network, whose calls are ops.

A `CudaUNet` takes a UNet's place, `CudaImages` that of an autoencoder's decoder or encoder. They
walk the same `plan` as the CPU's builders do (vfengine/plan/walk.py), with a builder that runs each
call at once: a launch or two, so that a step's time is arithmetic rather than launches. Activations
are rows `[images, H, W, C]` of one dtype, which is what channels_last memory is. A CUDA graph keeps
the launches (vfengine/sampling/cuda_graph.py), so nothing is planned ahead.

What does not change between steps is computed once: q, k and v weights lie side by side, and so do
all projections of the embedding; parameters of norms and biases are in fp32, as they are used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._dispatch import MAX_HEAD_DIM
from ..ops._tuning import choose
from ..ops.attention import attend
from ..ops.temporal_attention import MAX_FRAMES
from .cuda_weights import Joined, Preparer, cast

if TYPE_CHECKING:
    from ..sampling.features import Kept


class CudaNetwork(nn.Module):
    """The common part of networks on CUDA: layers made ready, and what a `CudaBuilder` asks.

    network: consumed: its weights stay where they are, but its forward runs no more
    dtype:   of weights and activations: float32, bfloat16 or float16
    inputs:  what `network.plan` takes besides the images, in terms of a Preparer
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, **inputs: object) -> None:
        super().__init__()
        self.config, self.dtype = network.config, dtype
        prepare = Preparer(dtype)
        with torch.no_grad():
            network.plan(prepare, prepare.any, **inputs)
        self.attentions, self.projected = prepare.attentions, prepare.projections
        self.device = network.conv_in.weight.device

    def _apply(self, fn, recurse=True):
        """Accepts only its own dtype: what was joined and rounded for it cannot be cast."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            raise RuntimeError(
                f"{type(self).__name__}: made for {self.dtype} on {self.device}; load the network "
                f"anew for {probe.dtype} on {probe.device}"
            )
        return self


class CudaImages(CudaNetwork):
    """forward(x [B, C, H, W]) as an autoencoder's `Decoder` or `Encoder`, on CUDA.

    Without a gradient; the result is in x's dtype.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(network, dtype)
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        into, out_of = self.network.patches
        with torch.no_grad():
            folded = F.pixel_unshuffle(x, into) if into > 1 else x
            rows = Features(folded.to(self.dtype).permute(0, 2, 3, 1).contiguous())
            out = self.network.plan(CudaBuilder(self, len(x)), rows).x.permute(0, 3, 1, 2)
        out = out[:, : self.network.out_channels]
        out = F.pixel_shuffle(out, out_of) if out_of > 1 else out
        return out.to(x.dtype, memory_format=torch.contiguous_format)


class CudaUNet(CudaNetwork):
    """forward(x, t, context, class_labels, guidance, kept) as `UNet`, without a gradient, on CUDA.

    unet:  a `UNet`, consumed: its weights stay where they are, but its forward runs no more
    dtype: of weights and activations: float32, bfloat16 or float16

    `modulation` and `rows` are the two halves of a forward pass: what depends on timestep, class
    and frame alone, and the layers. A sampling loop computes the first for all its steps ahead.

    Raises ValueError where UNet does.
    """

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(unet, dtype, context=Preparer.any if unet.config.context_dim else None)
        self.unet = unet.eval().requires_grad_(False)
        self.check_inputs = unet.check_inputs
        self.input_width = unet.conv_in.weight.shape[1]
        layers = self.projected
        self.projections = Joined.of(*layers)
        ends = list(accumulate(layer.out_features for layer in layers))
        self.columns = dict(zip(layers, [0, *ends[:-1]], strict=True))
        # Embeddings in float64: once rounded, they do not depend on the order of sums.
        self.embeddings = unet.embeddings()
        cast(self.embeddings, torch.float64)
        self._biases: dict[tuple[nn.Module, int], Tensor] = {}  # of positions

    @property
    def class_embedding(self) -> nn.Module | None:
        return self.unet.class_embedding

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance: Tensor | float | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """The network's prediction, of the shape of x but with out_channels, in x's dtype."""
        t = self.check_inputs(x, t, context, class_labels)
        frames = x.shape[1] if self.config.is_video else 1
        images = x.flatten(0, 1) if self.config.is_video else x
        with torch.no_grad():
            folded = F.pixel_unshuffle(images.to(self.dtype), self.config.patch_size)
            padded = F.pad(folded.permute(0, 2, 3, 1), (0, self.input_width - folded.shape[1]))
            modulation = self.modulation(t, class_labels, frames, guidance)
            out = self.rows(padded.contiguous(), modulation, frames, context, kept)
            out = F.pixel_shuffle(out.permute(0, 3, 1, 2), self.config.patch_size)
        out = out.to(x.dtype, memory_format=torch.contiguous_format)
        return out.unflatten(0, (-1, frames)) if self.config.is_video else out

    def modulation(
        self,
        t: Tensor,
        class_labels: Tensor | None,
        num_frames: int,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """All layers' projections of the embedding: fp32 [rows, columns].

        t, class_labels, guidance: [S] as in `forward`

        A row for each of the S and each of its frames, if frames have an embedding of their own;
        else one for each of the S.
        """
        frames = num_frames if self.config.frame_embedding else 1
        embedding = F.silu(self.embeddings.embed(t, class_labels, frames, guidance)).to(self.dtype)
        return _linear(embedding, self.projections, out_dtype=torch.float32)

    def rows(
        self,
        x: Tensor,
        modulation: Tensor,
        num_frames: int,
        context: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """The layers alone: fp32 [B*N, h, w, out_channels * patch²].

        x:          [B*N, h, w, input_width] in the network's dtype, contiguous: patches with their
                    pixels in the order of F.pixel_unshuffle, then zeros
        modulation: of `modulation`, for B samples
        context:    [B, M, C'] or None
        kept:       as in `UNet.forward`
        """
        build = CudaBuilder(self, x.shape[0] // num_frames, num_frames, modulation)
        if context is not None:
            context = context.to(self.dtype)
        border = None if kept is None else _Border(kept)
        return self.unet.plan(build, Features(x), context, border).x

    def position_bias(self, layer: nn.Module, num_frames: int) -> Tensor:
        """fp32 [heads, N, N], kept for further calls."""
        key = (layer, num_frames)
        if key not in self._biases:
            bias = layer(num_frames, self.device)
            self._biases[key] = bias.float().contiguous()
        return self._biases[key]


@dataclass(frozen=True)
class Features:
    """A feature map [images, H, W, C], whose last channels may lie in a tensor of their own."""

    first: Tensor
    second: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """All channels, for what takes no second tensor; of two tensors, a copy at every call."""
        return self.first if self.second is None else torch.cat([self.first, self.second], dim=-1)


@dataclass(frozen=True)
class _Border:
    """Kept features, as a plan on CUDA exchanges them."""

    kept: Kept

    @property
    def shallow(self) -> bool:
        return self.kept.shallow

    def exchange(self, h: Features) -> Features:
        return Features(self.kept.exchange(h.x))


@dataclass
class CudaBuilder:
    """Runs the calls of a network's plan on CUDA (vfengine/plan/walk.py lists them).

    modulation: fp32 rows of all projections of the embedding, one an image or one a sample; None
                for networks without one
    """

    network: CudaNetwork
    batch: int
    frames: int = 1
    modulation: Tensor | None = None

    def cat(self, x: Features, y: Features) -> Features:
        return Features(x.x, y.x)

    def conv(
        self,
        x: Features,
        conv: nn.Conv2d,
        *,
        shift: nn.Linear | None = None,
        plus: tuple[nn.Module, Features] | None = None,
        padded: bool = False,
        fp32: bool = False,
    ) -> Features:
        first, residual = x.first, None
        if x.second is None:
            first = _widened(first, conv)
        if conv.stride == (2, 2) and conv.padding == (0, 0):
            first = F.pad(first, (0, 0, 0, 1, 0, 1))  # below and to the right
        if plus is not None:
            shortcut, residual = plus
            if not isinstance(shortcut, nn.Identity):
                residual = self.conv(residual, shortcut)
        return Features(
            _conv(
                first,
                conv,
                second=x.second,
                stride=conv.stride[0],
                shift=None if shift is None else self._table(shift),
                residual=None if residual is None else residual.x,
                out_dtype=torch.float32 if fp32 else None,
            )
        )

    def conv_over_frames(
        self, x: Features, conv: nn.Conv2d, residual: Features | None = None
    ) -> Features:
        h = x.x
        clips = (self.batch, self.frames, -1, h.shape[-1])
        added = None if residual is None else residual.x.view(clips)
        return Features(_conv(h.view(clips), conv, residual=added).view(*h.shape[:3], -1))

    def upsampled_conv(
        self, x: Features, conv: nn.Conv2d, skip: Features | None = None
    ) -> Features:
        h, upsample = x.x, 2
        height, width = h.shape[1:3]
        size = (2 * height, 2 * width) if skip is None else tuple(skip.first.shape[1:3])
        if size != (2 * height, 2 * width):  # an odd size, rounded up by downsampling
            images = F.interpolate(h.permute(0, 3, 1, 2), size=size, mode="nearest")
            h, upsample = images.permute(0, 2, 3, 1).contiguous(), 1
        return Features(_conv(h, conv, upsample=upsample))

    def group_norm(
        self,
        x: Features,
        norm: nn.GroupNorm,
        *,
        silu: bool = False,
        modulation: nn.Linear | None = None,
        over_frames: bool = False,
    ) -> Features:
        scale = shift = None
        if modulation is not None:
            scale, shift = self._table(modulation).chunk(2, dim=1)
        out = ops.group_norm_silu(
            x.first.permute(0, 3, 1, 2),
            norm.num_groups,
            norm.weight,
            norm.bias,
            second=None if x.second is None else x.second.permute(0, 3, 1, 2),
            eps=norm.eps,
            num_frames=self.frames if over_frames else 1,
            scale=scale,
            shift=shift,
            silu=silu,
        )
        return Features(out.permute(0, 2, 3, 1))

    def layer_norm(self, x: Features, norm: nn.LayerNorm) -> Features:
        return Features(ops.layer_norm(x.x, norm.weight, norm.bias, eps=norm.eps))

    def geglu(self, x: Features, layer: nn.Linear) -> Features:
        return Features(_linear(x.x, layer, gated=True))

    def linear(
        self,
        x: Features,
        layer: nn.Linear,
        *,
        residual: Features | None = None,
        then: tuple[nn.Linear, Features] | None = None,
    ) -> Features:
        added = None if residual is None else residual.x
        h = Features(_linear(_widened(x.x, layer), layer, residual=added))
        return h if then is None else self.linear(h, then[0], residual=then[1])

    def attention(
        self,
        x: Features,
        norm: nn.LayerNorm | nn.GroupNorm,
        attention: nn.Module,
        context: Tensor | None = None,
        *,
        bias: nn.Module | None = None,
        over_frames: bool = False,
    ) -> Features:
        """x + attention(norm(x)): an image's pixels attend to each other, or to a context's rows.

        over_frames: a pixel's frames attend to each other, with a `bias(frames, device)`
        """
        normed = (self.group_norm if isinstance(norm, nn.GroupNorm) else self.layer_norm)(x, norm)
        into, from_context = self.network.attentions[attention]
        h = _linear(normed.x, into)
        if over_frames:
            out = self._over_frames(h, attention, bias)
        else:
            q = h.flatten(1, 2)  # [images, H*W, C], or q, k and v beside each other
            if from_context is None:
                q, k, v = q.chunk(3, dim=-1)
            else:
                rows = _linear(context, from_context)
                if self.batch > 1 and self.frames > 1:
                    rows = rows.repeat_interleave(self.frames, dim=0)
                k, v = rows.chunk(2, dim=-1)
            out = _spatial(q, k, v, attention.heads)
        out = out.view(*normed.x.shape[:3], -1)
        return Features(_linear(out, attention.to_out, residual=x.x))

    def _over_frames(self, qkv: Tensor, attention: nn.Module, bias: nn.Module | None) -> Tensor:
        heads = attention.heads
        table = None if bias is None else self.network.position_bias(bias, self.frames)
        qkv = qkv.view(self.batch, self.frames, -1, qkv.shape[-1])  # [B, N, H*W, 3 C]
        if self.frames <= MAX_FRAMES and _fits(attention.head_dim):
            return ops.temporal_attention(qkv, heads, table)
        split = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 2, 4, 1, 5)  # [3, B, P, H, N, D]
        return attend(*split.unbind(), table).permute(0, 3, 1, 2, 4).contiguous()

    def runs_in_tiles(self, x: Features, transformer: nn.Module) -> bool:
        return False

    def _table(self, projection: nn.Linear) -> Tensor:
        """The columns of a layer's projection of the embedding."""
        first = self.network.columns[projection]
        return self.modulation[:, first : first + projection.out_features]


def _widened(x: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Rows [..., C] with zeros up to the width of a weight that was padded."""
    missing = layer.weight.shape[1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _conv(x: Tensor, conv: nn.Conv2d, **options: Any) -> Tensor:
    """x [B, H, W, C] by a layer's weight, in channels_last memory -> [B, Ho, Wo, D]."""
    weight = conv.weight.permute(0, 2, 3, 1)
    return ops.implicit_gemm(x, weight, conv.bias, padding=conv.padding, **options)


def _linear(x: Tensor, layer: nn.Linear | Joined, **options: Any) -> Tensor:
    """x [..., C] by a layer's weight [D, C] -> [..., D]; a residual is like the result."""
    rows = x.view(1, -1, 1, x.shape[-1])
    if (residual := options.get("residual")) is not None:
        options["residual"] = residual.view(1, -1, 1, residual.shape[-1])
    out = ops.implicit_gemm(rows, layer.weight[:, None, None], layer.bias, **options)
    return out.view(*x.shape[:-1], -1)


def _spatial(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of rows q [F, Sq, C], k and v [F or 1, Sk, C]: [F, Sq, C], the faster way."""

    def library() -> Tensor:
        split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        q_, k_, v_ = (t.expand(len(q), -1, -1, -1) for t in split)
        return attend(q_, k_, v_).transpose(1, 2).reshape(q.shape)

    asked = os.environ.get("VFENGINE_ATTENTION_BACKEND") or "auto"
    if asked != "auto" or not _fits(q.shape[-1] // heads):
        return library()
    ways = {"ours": lambda: ops.spatial_attention(q, k, v, heads), "library": library}
    if k.shape[1] > 256:  # where nothing can be measured, what was fastest on an H100
        ways = {name: ways[name] for name in ("library", "ours")}
    key = ("spatial attention", q.dtype, tuple(q.shape), tuple(k.shape), heads)
    return ways[choose(key, ways)]()


def _fits(head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM
