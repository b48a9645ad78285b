"""The two builders that a network's `plan` calls: a `Packer` once, a `Planner` per shape.

Both have the same methods. A layer calls them in the order of its formula, and passes their results
on. The Packer chooses each layer's form (forms.py), packs its weights and frees the layer's own, so
that memory holds the network once; its results mean nothing. The Planner records the kernel calls
for one shape, in the chosen forms; its results are `FeatureMap`s, and a context is `Rows`.

    cat(x, y)                      channels side by side, without a copy
    conv(x, layer, …)              3x3, of stride 1 or 2; + shift(embedding), + shortcut(x)
    conv_over_frames(x, layer, …)  3 taps along frames; + residual
    upsampled_conv(x, layer, skip) 3x3 on x upsampled to the size of skip; None: to twice its own
    group_norm(x, layer, …)        with SiLU, with scale and shift by the embedding
    layer_norm(x, layer)           geglu(x, layer)       linear(x, layer, …)
    activated(x, layer, name)      the activation of this name of linear(x, layer)
    attention(x, norm, layer, …)   x + attention(norm(x))
    runs_in_tiles(x, layer)        whether transformer(x, layer, context) is the faster way
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .builder import Builder, TransformerLayers
from .forms import (
    AttentionForm,
    FeatureMap,
    Form,
    FusedMatMul,
    MatMul,
    UpsampledConv,
    convolution,
)
from .memory import return_memory
from .packing import Weights, pack
from .program import Rows

_LARGE = 2**22  # bytes; the memory of larger layers is returned to the system at once


@dataclass
class Packed:
    """A network's layers in their forms.

    columns:   the first column of each layer's projection of the embedding; all are one product
    embedding: the weights of that product
    """

    forms: dict[nn.Module, Form] = field(default_factory=dict)
    columns: dict[nn.Linear, int] = field(default_factory=dict)
    embedding: Weights | None = None


class Packer:
    """Packs the layers that a network's plan names, one by one."""

    any = object()  # stands for every feature map and context

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._made = Packed()
        self._projections: list[Tensor] = []
        self._biases: list[Tensor] = []

    def packed(self) -> Packed:
        """The packed layers, with all projections of the embedding as one product."""
        if self._projections:
            weight, bias = torch.cat(self._projections), torch.cat(self._biases)
            self._projections.clear()  # frees them before `pack` copies them
            self._made.embedding = pack(weight, bias, self.dtype)
        return self._made

    def cat(self, x: Any, y: Any) -> Any:
        return x

    def conv(
        self,
        x: Any,
        conv: nn.Conv2d,
        *,
        shift: nn.Linear | None = None,
        plus: tuple[nn.Module, Any] | None = None,
        padded: bool = False,
        fp32: bool = False,
    ) -> Any:
        if shift is not None:  # its bias includes the convolution's
            self._project(shift, conv.bias)
        shortcut = None if plus is None or isinstance(plus[0], nn.Identity) else plus[0]
        form = convolution(conv, self.dtype, shortcut, padded, fp32)
        self._add(conv, form, *(() if shortcut is None else (shortcut,)))
        return x

    def conv_over_frames(self, x: Any, conv: nn.Conv2d, residual: Any = None) -> Any:
        self._add(conv, convolution(conv, self.dtype))
        return x

    def upsampled_conv(self, x: Any, conv: nn.Conv2d, skip: Any = None) -> Any:
        self._add(conv, UpsampledConv.of(conv, self.dtype))
        return x

    def group_norm(
        self,
        x: Any,
        norm: nn.GroupNorm,
        *,
        silu: bool = False,
        modulation: nn.Linear | None = None,
        over_frames: bool = False,
    ) -> Any:
        norm.float()
        if modulation is not None:
            self._project(modulation)
        return x

    def layer_norm(self, x: Any, norm: nn.LayerNorm) -> Any:
        norm.float()
        return x

    def geglu(self, x: Any, layer: nn.Linear) -> Any:
        self._add(layer, MatMul.of(layer, self.dtype, "geglu"))
        return x

    def activated(self, x: Any, layer: nn.Linear, activation: str) -> Any:
        self._add(layer, MatMul.of(layer, self.dtype, activation))
        return x

    def linear(
        self,
        x: Any,
        layer: nn.Linear,
        *,
        residual: Any = None,
        then: tuple[nn.Linear, Any] | None = None,
    ) -> Any:
        if then is not None and FusedMatMul.takes(layer, then[0]):
            self._add(then[0], FusedMatMul.of(layer, then[0], self.dtype), layer)
            return x
        self._add(layer, MatMul.of(layer, self.dtype))
        return x if then is None else self.linear(x, then[0])

    def attention(
        self,
        x: Any,
        norm: nn.LayerNorm | nn.GroupNorm,
        attention: nn.Module,
        context: Any = None,
        *,
        bias: nn.Module | None = None,
        over_frames: bool = False,
    ) -> Any:
        norm.float()
        self._add(attention, AttentionForm.of(attention, self.dtype, crossed=context is not None))
        return x

    def runs_in_tiles(self, x: Any, transformer: nn.Module) -> bool:
        return False

    def _project(self, projection: nn.Linear, added: Tensor | None = None) -> None:
        self._made.columns[projection] = sum(len(bias) for bias in self._biases)
        bias = projection.bias.detach().float()
        self._biases.append(bias if added is None else bias + added.detach().float())
        self._projections.append(projection.weight.detach().to(self.dtype))
        _free(projection)

    def _add(self, layer: nn.Module, form: Form, *more: nn.Module) -> None:
        """more: other layers whose weights the form includes"""
        self._made.forms[layer] = form
        _free(layer, *more)


def _free(*layers: nn.Module) -> None:
    """Frees the layers' own weights before the next layer's are packed."""
    freed = 0
    for layer in layers:
        for parameter in layer.parameters():
            freed += parameter.nbytes
            parameter.data = parameter.data.new_empty(0)
    if freed > _LARGE:
        return_memory()


@dataclass
class Planner:
    """Records the calls of a network's plan for one shape.

    images:     batch * frames
    packed:     the layers' forms
    modulation: fp32 rows of all projections of the embedding, where there is one: with `per_image`
                one an image, else one a sample
    tiled:      least number of rows with which transformers run in tiles
    """

    build: Builder
    packed: Packed
    batch: int
    frames: int = 1
    modulation: Rows | None = None
    per_image: bool = False
    tiled: int = 0

    @property
    def images(self) -> int:
        return self.batch * self.frames

    def cat(self, x: FeatureMap, y: FeatureMap) -> FeatureMap:
        return replace(x, parts=(*x.parts, *y.parts))

    def conv(
        self,
        x: FeatureMap,
        conv: nn.Conv2d,
        *,
        shift: nn.Linear | None = None,
        plus: tuple[nn.Module, FeatureMap] | None = None,
        padded: bool = False,
        fp32: bool = False,
    ) -> FeatureMap:
        options = {"plus": None if plus is None else plus[1]}
        if shift is not None:
            shared = x.pixels * (1 if self.per_image else self.frames)
            options["bias"] = (self.modulation, self.packed.columns[shift], shared)
        if fp32:
            options["fp32"] = True
        return self.packed.forms[conv].emit(self, x, **options)

    def conv_over_frames(
        self, x: FeatureMap, conv: nn.Conv2d, residual: FeatureMap | None = None
    ) -> FeatureMap:
        return self.packed.forms[conv].emit(self, x, plus=residual)

    def upsampled_conv(
        self, x: FeatureMap, conv: nn.Conv2d, skip: FeatureMap | None = None
    ) -> FeatureMap:
        size = (2 * x.height, 2 * x.width) if skip is None else (skip.height, skip.width)
        return self.packed.forms[conv].emit(self, x, *size)

    def group_norm(
        self,
        x: FeatureMap,
        norm: nn.GroupNorm,
        *,
        silu: bool = False,
        modulation: nn.Linear | None = None,
        over_frames: bool = False,
    ) -> FeatureMap:
        table = None
        if modulation is not None:
            column = self.packed.columns[modulation]
            table = (self.modulation, column, column + norm.num_channels)
        frames = self.frames if over_frames else 1
        out = self.build.group_norm(
            x.parts, norm, self.images, num_frames=frames, silu=silu, modulation=table
        )
        return replace(x, parts=(out,))

    def layer_norm(self, x: FeatureMap, norm: nn.LayerNorm) -> FeatureMap:
        return replace(x, parts=(self.build.layer_norm(x.rows, norm),))

    def geglu(self, x: FeatureMap, layer: nn.Linear) -> FeatureMap:
        return replace(x, parts=(self.packed.forms[layer].emit(self.build, x.rows),))

    def activated(self, x: FeatureMap, layer: nn.Linear, activation: str) -> FeatureMap:
        return replace(x, parts=(self.packed.forms[layer].emit(self.build, x.rows),))

    def linear(
        self,
        x: FeatureMap,
        layer: nn.Linear,
        *,
        residual: FeatureMap | None = None,
        then: tuple[nn.Linear, FeatureMap] | None = None,
    ) -> FeatureMap:
        """residual + layer(x); with then = (another layer, added): another(that) + added.

        A builder may fuse the two layers.
        """
        forms = self.packed.forms
        added = None if residual is None else residual.rows
        if then is not None and layer not in forms:
            out = forms[then[0]].emit(self.build, added, x.rows, then[1].rows)
            return replace(x, parts=(out,))
        h = replace(x, parts=(forms[layer].emit(self.build, x.rows, added),))
        return h if then is None else self.linear(h, then[0], residual=then[1])

    def attention(
        self,
        x: FeatureMap,
        norm: nn.LayerNorm | nn.GroupNorm,
        attention: nn.Module,
        context: Rows | None = None,
        *,
        bias: nn.Module | None = None,
        over_frames: bool = False,
    ) -> FeatureMap:
        """x + attention(norm(x)): an image's pixels attend to each other, or to a context's rows.

        over_frames: a pixel's frames attend to each other, with a `bias(frames, device)`
        """
        form, h = self.packed.forms[attention], x.rows
        kv = form.keys(self.build, context)
        normed = (self.group_norm if isinstance(norm, nn.GroupNorm) else self.layer_norm)(x, norm)
        out = form.emit(self, normed.rows, kv, h, over_frames, self._position_bias(bias))
        return replace(x, parts=(out,))

    def runs_in_tiles(self, x: FeatureMap, transformer: nn.Module) -> bool:
        return not len(transformer.rest) and x.rows.count >= self.tiled

    def transformer(
        self, x: FeatureMap, transformer: nn.Module, context: Rows | None = None
    ) -> FeatureMap:
        """A whole transformer of one block in one kernel, a tile of rows at a time."""
        forms, ff = self.packed.forms, transformer.ff
        feed_forward = None
        if ff is not None:
            last = None if ff.out not in forms else forms[ff.out].weights[0]
            feed_forward = (transformer.norm3, forms[ff.proj].weights[0], last)
        attentions = []
        for norm, attention, source, bias in transformer.attentions(context):
            form = forms[attention]
            kv = form.keys(self.build, source)
            attentions.append((norm, form.into, form.out, kv, self._position_bias(bias)))
        proj_in, proj_out = (
            forms[layer].weights[0] for layer in (transformer.proj_in, transformer.proj_out)
        )
        out = self.build.transformer(
            x.rows,
            TransformerLayers(transformer.norm, proj_in, attentions, feed_forward, proj_out),
            (self.batch, self.frames, x.pixels),
            forms[transformer.attn1].heads,
            time=transformer.axis == "time",
            norm_frames=self.frames if transformer.norm_over_frames else 1,
        )
        return replace(x, parts=(out,))

    def _position_bias(self, bias: nn.Module | None) -> Tensor | None:
        """fp32 [heads, frames, frames]"""
        if bias is None:
            return None
        return bias(self.frames, torch.device("cpu")).float().contiguous()
