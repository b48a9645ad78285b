"""Makes the program of a network's forward for one shape.

A `Builder` is told the calls in the order in which they will run. Which calls name a buffer says
how long it is needed: two buffers share a place wherever no call needs both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vfengine.native import vfengine_native as native
from vfengine.ops._dispatch import DTYPE_NUMBERS

from .memory import Block, arrange
from .packing import Weights
from .program import Program, Rows, Struct, buffers_of

_EPILOGUES = {None: 0, "geglu": 1, "gelu": 2, "quick_gelu": 3}


@dataclass(frozen=True)
class Source:
    """A source of a matrix product: rows, and for convolutions which row each tap reads.

    table:     int32 [taps, rows of an item of the result], -1 for padding; None: row by row
    item_rows: rows of an item in `rows`
    """

    rows: Rows
    table: Tensor | None = None
    item_rows: int = 0


@dataclass(frozen=True, eq=False)
class TransformerLayers:
    """The layers of a transformer of one block.

    norm:         its GroupNorm
    attentions:   (layer norm, q k v or q, out, rows of a context's k and v, position bias)
    feed_forward: (layer norm, gate, out); out None: multiplied into proj_out
    """

    norm: nn.Module
    proj_in: Weights
    attentions: Sequence[tuple[nn.Module, Weights, Weights, Rows | None, Tensor | None]]
    feed_forward: tuple[nn.Module, Weights, Weights | None] | None
    proj_out: Weights


class Builder:
    """Takes kernel calls in order; `program` makes them runnable."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._number = DTYPE_NUMBERS[dtype]
        self._calls: list[tuple[str, Struct]] = []
        self._kept: list[Tensor] = []  # what calls hold addresses of
        self._made: dict[Rows, int] = {}  # buffers, and how many calls came before
        self._over: dict[Rows, Rows] = {}  # what a buffer may be written over, element by element

    def rows(
        self,
        count: int,
        width: int,
        dtype: torch.dtype | None = None,
        over: Rows | None = None,
    ) -> Rows:
        """A buffer, whose contents last from here to the last call that names it.

        over: takes the place of these rows, if the call that comes next is their last
        """
        rows = Rows(count, width, dtype or self.dtype)
        self._made[rows] = len(self._calls)
        if over is not None and over.nbytes == rows.nbytes:
            self._over[rows] = over
        return rows

    # -- calls ---------------------------------------------------------------------------------

    def matmul(
        self,
        sources: Rows | Sequence[Source],
        weights: Weights,
        *,
        items: tuple[int, int] | None = None,
        bias: tuple[Rows, int, int] | None = None,
        residual: Rows | None = None,
        out: Rows | None = None,
        out_dtype: torch.dtype | None = None,
        scatter: tuple[Tensor, int] | None = None,
    ) -> Rows:
        """epilogue(sources x weights + bias) + residual.

        items: how many the result has, and rows of each; one item of the only source's by default
        bias: (fp32 rows, first column, rows of the result that share one) in place of the weights'
        out: where to write, possibly the residual itself; by default new rows, or the residual's
            where nothing else reads it
        scatter: (int32 [item_rows], rows of an item of `out`): the row of its item in `out` that
            each row becomes
        """
        if isinstance(sources, Rows):
            sources = [Source(sources)]
        count, item_rows = items or (1, sources[0].rows.count)
        rows = count * item_rows
        out = out or self.rows(rows, weights.columns, out_dtype, over=residual)
        places, item_rows_out = (None, 0) if scatter is None else scatter
        self._call(
            "row_matmul",
            sources=tuple(self._source(source) for source in sources),
            weights=self._keep(weights.packed),
            **self._bias(weights, bias),
            residual=residual or 0,
            residual_stride=0 if residual is None else residual.width,
            out=out,
            out_stride=out.width,
            rows=rows,
            item_rows=item_rows,
            columns=weights.columns,
            out_table=self._keep(places),
            item_rows_out=item_rows_out,
            epilogue=_EPILOGUES[weights.epilogue],
            out_f32=out.dtype is not self.dtype,
        )
        return out

    def winograd(
        self,
        x: Rows,
        weights: Weights,
        shape: tuple[int, int, int],
        *,
        flat: bool = False,
        transformed: bool = False,
        bias: tuple[Rows, int, int] | None = None,
        residual: Rows | None = None,
        out: Rows | None = None,
    ) -> Rows:
        """A convolution; shape: (items, height, width).

        weights: of `conv_weight`, or with `transformed` of `pack_winograd`
        flat: 3 taps along height; bias, residual, out: as in `matmul`
        """
        out = out or self.rows(x.count, weights.columns, over=residual)
        items, height, width = shape
        self._call(
            "winograd",
            x=x,
            weights=self._keep(weights.packed),
            **self._bias(weights, bias),
            residual=residual or 0,
            out=out,
            items=items,
            height=height,
            width=width,
            channels=x.width,
            columns=weights.columns,
            flat=flat,
            transformed=transformed,
        )
        return out

    def group_norm(
        self,
        sources: Sequence[Rows],
        norm,
        images: int,
        *,
        num_frames: int = 1,
        silu: bool = True,
        modulation: tuple[Rows, int, int] | None = None,
    ) -> Rows:
        """norm (its groups, eps, weight, bias) of one or two sources side by side.

        num_frames: images whose statistics are shared
        modulation: (fp32 rows [images], column of the scale, of the shift)
        """
        x, second = sources[0], sources[1] if len(sources) > 1 else None
        out = self.rows(x.count, sum(source.width for source in sources))
        fields = {} if second is None else {"x2": second, "channels2": second.width}
        if modulation is not None:
            table, scale, shift = modulation
            fields |= {"scale": table.at(scale), "shift": table.at(shift)}
            fields |= {"modulation_stride": table.width}
        self._group_norm(x, norm, images, num_frames, out=out, silu=silu, **fields)
        return out

    def _group_norm(self, x: Rows, norm, images: int, num_frames: int, **fields: object) -> None:
        sizes = {"images": images, "rows": x.count // images, "groups": norm.num_groups}
        sizes |= {"channels": x.width, "num_frames": num_frames}
        size = native.group_norm_workspace(channels2=fields.get("channels2", 0), **sizes)
        workspace = self.rows(1, size, torch.float32)
        self._call(
            "group_norm_silu", x=x, **self._norm(norm), workspace=workspace, **sizes, **fields
        )

    def layer_norm(self, x: Rows, norm) -> Rows:
        out = self.rows(x.count, x.width)
        self._call(
            "layer_norm",
            x=x,
            **self._norm(norm),
            out=out,
            rows=x.count,
            channels=x.width,
        )
        return out

    def spatial_attention(
        self, q: Rows, kv: Rows, frames: int, heads: tuple[int, int, float], kv_frames: int
    ) -> Rows:
        """heads: (number, dimension, scale). The same buffer twice: q, k, v packed in it."""
        number, dim, scale = heads
        inner = number * dim
        first = inner if q is kv else 0
        out = self.rows(q.count, inner)
        self._call(
            "spatial_attention",
            q=q,
            k=kv.at(first),
            v=kv.at(first + inner),
            out=out,
            frames=frames,
            q_len=q.count // frames,
            k_len=kv.count // kv_frames,
            heads=number,
            head_dim=dim,
            q_stride=q.width,
            kv_stride=kv.width,
            kv_frames=kv_frames,
            scale=scale,
        )
        return out

    def temporal_attention(
        self,
        qkv: Rows,
        shape: tuple[int, int, int],
        heads: tuple[int, int, float],
        bias: Tensor | None,
    ) -> Rows:
        """shape: (batch, frames, pixels); bias fp32 [heads, frames, frames]."""
        out = self.rows(qkv.count, heads[0] * heads[1])
        self._call(
            "temporal_attention",
            qkv=qkv,
            bias=self._keep(bias),
            out=out,
            **_sizes(shape, heads),
        )
        return out

    def transformer(
        self,
        x: Rows,
        layers: TransformerLayers,
        shape: tuple[int, int, int],
        heads: tuple[int, int, float],
        *,
        time: bool,
        norm_frames: int,
    ) -> Rows:
        """A whole transformer of one block, + x (csrc/cpu/transformer.cpp).

        shape: (batch, frames, pixels); heads: (number, dimension, scale)
        norm_frames: frames whose group statistics are shared
        """
        (batch, frames, _), (number, dim, _) = shape, heads
        inner, feed_forward = layers.proj_in.columns, layers.feed_forward
        coefficients = self.rows(batch * frames, 3 * x.width, torch.float32)
        self._group_norm(
            x, layers.norm, batch * frames, norm_frames, coefficients=coefficients, silu=False
        )
        own = () if time else (self.rows(x.count, inner), self.rows(x.count, 3 * number * dim))
        out = self.rows(x.count, layers.proj_out.columns)
        self._call(
            "transformer",
            x=x,
            coefficients=coefficients,
            **dict(zip(("h", "qkv"), own, strict=False)),
            **({} if feed_forward is None else self._feed_forward(inner, *feed_forward)),
            out=out,
            **_sizes(shape, heads),
            channels=x.width,
            inner=inner,
            time=time,
            proj_in=self._linear(layers.proj_in, x.width),
            attentions=tuple(
                Struct(
                    native.TransformerAttention,
                    norm=Struct(native.LayerNormWeights, **self._norm(layer_norm)),
                    proj_in=self._linear(into, inner),
                    proj_out=self._linear(back, number * dim),
                    kv=kv or 0,
                    kv_len=0 if kv is None else kv.count // batch,
                    bias=self._keep(bias),
                )
                for layer_norm, into, back, kv, bias in layers.attentions
            ),
            proj_out=self._linear(layers.proj_out, inner),
        )
        return out

    def _feed_forward(self, inner: int, norm, gate: Weights, out: Weights | None) -> dict:
        own = {} if out is None else {"out": self._linear(out, gate.columns)}
        norm = Struct(native.LayerNormWeights, **self._norm(norm))
        gated = Struct(native.FeedForward, norm=norm, gate=self._linear(gate, inner), **own)
        return {"feed_forward": gated}

    def _linear(self, weights: Weights, depth: int) -> Struct:
        packed, bias = self._keep(weights.packed), self._keep(weights.bias)
        sizes = {"columns": weights.columns, "depth": depth}
        return Struct(native.Linear, weights=packed, bias=bias, **sizes)

    def _norm(self, norm) -> dict[str, object]:
        weight, bias = self._keep(norm.weight), self._keep(norm.bias)
        return {"weight": weight, "bias": bias, "eps": norm.eps}

    def _source(self, source: Source) -> Struct:
        x, table = source.rows, source.table
        return Struct(
            native.RowSource,
            x=x,
            stride=x.width,
            width=x.width,
            table=self._keep(table),
            taps=1 if table is None else table.shape[0],
            item_rows=source.item_rows or x.count,
        )

    def _bias(self, weights: Weights, bias: tuple[Rows, int, int] | None) -> dict[str, object]:
        """A product's bias, the rows of the result that share one, and their stride."""
        if bias is None:
            return {"bias": self._keep(weights.bias), "bias_rows": 0, "bias_stride": 0}
        rows, column, shared = bias
        return {"bias": rows.at(column), "bias_rows": shared, "bias_stride": rows.width}

    def _call(self, op: str, **fields: object) -> None:
        self._calls.append((op, Struct(native.args[op], **fields, dtype=self._number)))

    def _keep(self, tensor: Tensor | None) -> int:
        """The tensor's address, which stays good; 0: there is none."""
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return tensor.data_ptr()

    def program(self, *results: Rows, arena: Tensor | None = None) -> Program:
        """results: buffers that are read after the last call; others may be gone by then.

        arena: of a program that may share its memory
        """
        uses = [list(buffers_of(args)) for _, args in self._calls]
        last = {rows: number for number, used in enumerate(uses) for rows in used}
        last |= dict.fromkeys((*results, *(self._made.keys() - last.keys())), math.inf)
        blocks: list[Block] = []
        holders: dict[Rows, int] = {}
        for rows, first in self._made.items():
            over = self._over.get(rows)
            if over is not None and last[over] == first and uses[first].count(over) == 1:
                holders[rows] = holders[over]
                blocks[holders[over]] = replace(blocks[holders[over]], last=last[rows])
            else:
                holders[rows] = len(blocks)
                blocks.append(Block(rows.nbytes, first, last[rows]))
        offsets, size = arrange(blocks)
        places = {rows: offsets[holder] for rows, holder in holders.items()}
        return Program(self._calls, self._kept, places, size, arena)


def _sizes(shape: tuple[int, int, int], heads: tuple[int, int, float]) -> dict[str, object]:
    (batch, frames, pixels), (number, dim, scale) = shape, heads
    sizes = {"batch": batch, "frames": frames, "pixels": pixels}
    return {**sizes, "heads": number, "head_dim": dim, "scale": scale}
