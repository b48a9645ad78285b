"""The form in which a layer runs: its packed weights, and the calls that they are packed for.

A form is chosen once, from the layer alone, when its weights are packed. Its `emit` records the
calls for one shape, so that packing and planning cannot disagree. `plan` is the `Planner` of
walk.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfengine.native import vfengine_native

from . import gather
from .builder import Builder, Source
from .packing import Weights, conv_weight, in_tiles, is_light, pack, pack_winograd, takes_winograd
from .program import Rows

# Tiles of a clip, from which on it pays to transform heavy weights in every call.
_FEWEST_TILES = 32


@dataclass(frozen=True)
class FeatureMap:
    """Activations [images, height, width]: buffers with a row per pixel, concatenated."""

    parts: tuple[Rows, ...]
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def rows(self) -> Rows:
        """Its only buffer. Raises ValueError if there are several, which few kernels take."""
        if len(self.parts) > 1:
            widths = [part.width for part in self.parts]
            raise ValueError(f"plan: expected one buffer, got buffers of {widths} channels")
        return self.parts[0]


@dataclass(frozen=True, eq=False)
class MatMul:
    """A linear layer: rows times a matrix."""

    weights: tuple[Weights]

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype, epilogue: str | None = None) -> MatMul:
        return cls((pack(layer.weight, layer.bias, dtype, epilogue),))

    def emit(self, build: Builder, x: Rows, residual: Rows | None = None) -> Rows:
        return build.matmul(x, self.weights[0], residual=residual)


@dataclass(frozen=True, eq=False)
class FusedMatMul:
    """out(h + last(g)) = out h + (out last) g: one matrix product in place of two."""

    weights: tuple[Weights]

    @staticmethod
    def takes(last: nn.Linear, out: nn.Linear) -> bool:
        """Whether it pays: not for wide layers, where the longer sum costs more than it saves."""
        return out.out_features <= out.in_features <= 512

    @classmethod
    def of(cls, last: nn.Linear, out: nn.Linear, dtype: torch.dtype) -> FusedMatMul:
        outer, bias = out.weight.float(), out.bias.float()
        if last.bias is not None:
            bias = bias + outer @ last.bias.float()
        return cls((pack(torch.cat([outer, outer @ last.weight.float()], 1), bias, dtype),))

    def emit(self, build: Builder, h: Rows, g: Rows, residual: Rows) -> Rows:
        return build.matmul([Source(h), Source(g)], self.weights[0], residual=residual)


@dataclass(frozen=True, eq=False)
class ImplicitGemm:
    """A convolution as one matrix product: its taps read rows by tables (gather.py).

    reads:        "same" (3x3), "halved" (3x3, stride 2), "halved_after" (the same, padded at one
                  side) or "frames" (3 taps along frames)
    has_shortcut: the 1x1 convolution of a shortcut is a part of the product
    """

    weights: tuple[Weights]
    reads: str
    has_shortcut: bool = False

    @classmethod
    def of(cls, conv: nn.Conv2d, dtype: torch.dtype, padded: bool = False) -> ImplicitGemm:
        reads = "frames" if conv.kernel_size == (3, 1) else "same"
        if conv.stride == (2, 2):
            reads = "halved" if conv.padding == (1, 1) else "halved_after"
        return cls((pack(conv_weight(conv, dtype, padded), conv.bias, dtype),), reads)

    @classmethod
    def with_shortcut(
        cls, conv: nn.Conv2d, shortcut: nn.Conv2d, dtype: torch.dtype
    ) -> ImplicitGemm:
        both = [conv_weight(conv, dtype), shortcut.weight.flatten(1).to(dtype)]
        bias = conv.bias.float() + shortcut.bias.float()
        return cls((pack(torch.cat(both, 1), bias, dtype),), "same", has_shortcut=True)

    def emit(
        self,
        plan,
        x: FeatureMap,
        *,
        plus: FeatureMap | None = None,
        bias: tuple[Rows, int, int] | None = None,
        fp32: bool = False,
    ) -> FeatureMap:
        size, rows = (x.height, x.width), x.pixels
        if self.reads == "frames":
            rows *= plan.frames
            table = gather.neighbours(plan.frames, x.pixels)
        elif self.reads == "halved":
            table = gather.halved(*size)
            size = (x.height + 1) // 2, (x.width + 1) // 2
        elif self.reads == "halved_after":
            table = gather.halved_after(*size)
            size = x.height // 2, x.width // 2
        else:
            table = gather.same(*size)
        sources = [Source(x.rows, table, rows)]
        if self.has_shortcut:
            sources += [Source(part) for part in plus.parts]
        out = plan.build.matmul(
            sources,
            self.weights[0],
            items=(x.rows.count // rows, table.shape[1]),
            bias=bias,
            residual=None if plus is None or self.has_shortcut else plus.rows,
            out_dtype=torch.float32 if fp32 else None,
        )
        return replace(x, parts=(out,), height=size[0], width=size[1])


@dataclass(frozen=True, eq=False)
class Winograd:
    """A convolution by Winograd's algorithm, added to the product of a shortcut, if it has one.

    Light weights are transformed once. Heavy ones stay as they are, and each call transforms them
    anew. That takes as long as the products of a few tiles: for fewest tiles a direct product is
    faster. A clip's own tiles count, so that results do not depend on the batch.

    weights:     of the shortcut, if there is one; of the convolution
    flat:        3 taps along frames in place of 3x3
    transformed: whether the convolution's weights are
    """

    weights: tuple[Weights, ...]
    flat: bool
    transformed: bool

    @classmethod
    def of(cls, conv: nn.Conv2d, dtype: torch.dtype, shortcut: nn.Conv2d | None = None) -> Winograd:
        first, transformed = (), is_light(conv)
        if shortcut is not None:
            first = (pack(shortcut.weight.flatten(1), shortcut.bias, dtype),)
        if transformed:
            weights = pack_winograd(conv.weight, conv.bias, dtype)
        else:
            weights = pack(conv_weight(conv, dtype), conv.bias, dtype)
        return cls((*first, weights), conv.kernel_size == (3, 1), transformed)

    def emit(
        self,
        plan,
        x: FeatureMap,
        *,
        plus: FeatureMap | None = None,
        bias: tuple[Rows, int, int] | None = None,
    ) -> FeatureMap:
        *shortcut, weights = self.weights
        if shortcut:
            sources = [Source(part) for part in plus.parts]
            plus = replace(x, parts=(plan.build.matmul(sources, shortcut[0]),))
        if not self.transformed and self._tiles(plan.frames, x) < _FEWEST_TILES:
            direct = ImplicitGemm((weights,), "frames" if self.flat else "same")
            return direct.emit(plan, x, plus=plus, bias=bias)
        shape = (plan.images, x.height, x.width)
        if self.flat:
            shape = (plan.batch, plan.frames, x.pixels)
        out = plan.build.winograd(
            x.rows,
            weights,
            shape,
            flat=self.flat,
            transformed=self.transformed,
            bias=bias,
            residual=None if plus is None else plus.rows,
        )
        return replace(x, parts=(out,))

    def _tiles(self, frames: int, x: FeatureMap) -> int:
        """Of a clip: 2x2 pixels, or a pixel in two frames."""
        if self.flat:
            return (frames + 1) // 2 * x.pixels
        return frames * ((x.height + 1) // 2) * ((x.width + 1) // 2)


@dataclass(frozen=True, eq=False)
class UpsampledConv:
    """3x3 after nearest-neighbour upsampling: in one product, or at twice the size in quarters.

    A quarter, such as the pixels of even rows and odd columns, is a 2x2 convolution of the input:
    taps that fall on the same pixel are summed.

    whole:    weights for any size; None where the quarters are enough
    quarters: weights for each of `gather.QUARTERS`; none where they would cost too much memory
    """

    whole: Weights | None
    quarters: tuple[Weights, ...]

    @property
    def weights(self) -> tuple[Weights, ...]:
        return self.quarters if self.whole is None else (self.whole, *self.quarters)

    @classmethod
    def of(cls, conv: nn.Conv2d, dtype: torch.dtype) -> UpsampledConv:
        """conv.any_size: weights for other factors than 2 are needed as well"""
        whole, light = None, is_light(conv)
        if conv.any_size or not light:
            whole = pack(conv_weight(conv, dtype), conv.bias, dtype)
        return cls(whole, tuple(_quarters(conv, dtype)) if light else ())

    def emit(self, plan, x: FeatureMap, height: int, width: int) -> FeatureMap:
        if not self.quarters or (height, width) != (2 * x.height, 2 * x.width):
            table = gather.upsampled(x.height, x.width, height, width)
            out = plan.build.matmul(
                [Source(x.rows, table, x.pixels)],
                self.whole,
                items=(plan.images, height * width),
            )
            return replace(x, parts=(out,), height=height, width=width)
        out = plan.build.rows(4 * x.rows.count, self.quarters[0].columns)
        for corner, weights in zip(gather.QUARTERS, self.quarters, strict=True):
            table, places = gather.quarter(x.height, x.width, *corner)
            plan.build.matmul(
                [Source(x.rows, table, x.pixels)],
                weights,
                items=(plan.images, x.pixels),
                out=out,
                scatter=(places, 4 * x.pixels),
            )
        return replace(x, parts=(out,), height=height, width=width)


def _quarters(conv: nn.Conv2d, dtype: torch.dtype):
    weight = conv.weight.float()  # [C', C, 3, 3]
    # taps that fall on the same pixel, for an even and for an odd position
    same = torch.tensor(
        [[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device="cpu"
    )
    for y, x in gather.QUARTERS:
        folded = torch.einsum("ai,bj,ocij->oabc", same[y], same[x], weight)
        yield pack(folded.flatten(1), conv.bias, dtype)


@dataclass(frozen=True, eq=False)
class AttentionForm:
    """Attention: projection to q, k and v, the heads, and the projection back.

    The dimension of a head is padded to a multiple of 8, the step of the kernels.

    into:  weights of q, k and v together; of q alone, where a context gives k and v
    kv:    weights of k and v of a context, else None
    heads: number, padded dimension, scale
    """

    into: Weights
    kv: Weights | None
    out: Weights
    heads: tuple[int, int, float]

    @property
    def weights(self) -> tuple[Weights, ...]:
        return (self.into, self.out) if self.kv is None else (self.into, self.kv, self.out)

    @classmethod
    def of(cls, attention: nn.Module, dtype: torch.dtype, crossed: bool) -> AttentionForm:
        heads, dim = attention.heads, attention.head_dim
        most = vfengine_native.MAX_HEAD_DIM
        if dim > most:
            raise ValueError(f"PlannedUNet: heads may have up to {most} dimensions, got {dim}")
        padded = -dim % 8

        def rows(layer: nn.Linear) -> tuple[Tensor, Tensor]:
            weight = layer.weight.to(dtype).unflatten(0, (heads, dim))
            bias = (
                torch.zeros(heads * dim, dtype=torch.float32, device="cpu")
                if layer.bias is None
                else layer.bias.float()
            )
            bias = F.pad(bias.unflatten(0, (heads, dim)), (0, padded))
            return F.pad(weight, (0, 0, 0, padded)).flatten(0, 1), bias.flatten()

        def together(*layers: nn.Linear) -> Weights:
            weight, bias = zip(*(rows(layer) for layer in layers), strict=True)
            return pack(torch.cat(weight), torch.cat(bias), dtype)

        q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out
        into, kv = (together(q), together(k, v)) if crossed else (together(q, k, v), None)
        weight = F.pad(out.weight.to(dtype).unflatten(1, (heads, dim)), (0, padded))
        back = pack(weight.flatten(1), out.bias, dtype)
        return cls(into, kv, back, (heads, dim + padded, dim**-0.5))

    def keys(self, build: Builder, context: Rows | None) -> Rows | None:
        """k and v of a context; None in self-attention."""
        return None if self.kv is None else build.matmul(context, self.kv)

    def emit(
        self,
        plan,
        x: Rows,
        kv: Rows | None,
        residual: Rows,
        over_frames: bool,
        bias: Tensor | None,
    ) -> Rows:
        build = plan.build
        q = build.matmul(x, self.into)
        if over_frames:
            shape = (plan.batch, plan.frames, x.count // plan.images)
            out = build.temporal_attention(q, shape, self.heads, bias)
        elif kv is not None:
            out = build.spatial_attention(q, kv, plan.images, self.heads, plan.batch)
        else:
            out = build.spatial_attention(q, q, plan.images, self.heads, plan.images)
        return build.matmul(out, self.out, residual=residual)


Form = MatMul | FusedMatMul | ImplicitGemm | Winograd | UpsampledConv | AttentionForm


def convolution(
    conv: nn.Conv2d,
    dtype: torch.dtype,
    shortcut: nn.Conv2d | None = None,
    padded: bool = False,
    fp32: bool = False,
) -> ImplicitGemm | Winograd:
    """The fastest form. Winograd takes no padded rows, and writes no fp32 from bf16.

    It saves products, which a matrix unit makes so fast that its transforms would take longer.

    Raises ValueError for a convolution that is neither 3x3 nor 3 taps along frames.
    """
    kind = (conv.kernel_size, conv.stride, conv.padding)
    if kind not in _KINDS or conv.dilation != (1, 1) or conv.groups != 1:
        raise ValueError(f"plans have convolutions of 3x3 or 3 frames, padded by 1, got {conv}")
    direct = padded or fp32 or in_tiles(dtype)
    if conv.stride == (1, 1) and not direct and takes_winograd(conv):
        return Winograd.of(conv, dtype, shortcut)
    if shortcut is not None:
        return ImplicitGemm.with_shortcut(conv, shortcut, dtype)
    return ImplicitGemm.of(conv, dtype, padded)


_KINDS = (
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 3), (2, 2), (0, 0)),
    ((3, 1), (1, 1), (1, 0)),
)
