"""A network's forward for one shape as a list of kernel calls over one arena of memory.

Activations are rows: `[B*N*H*W, C]`, which is channels_last memory, in one dtype. A `Builder` is
told the calls in the order in which they will run. Which calls name a buffer says how long it is
needed: two buffers share a place wherever no call needs both. What it builds is static: addresses,
sizes and order are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vfengine.native import vfengine_native
from vfengine.ops._dispatch import DTYPES

from .memory import Block, arrange, huge_pages
from .packing import Weights

_EPILOGUES = {None: 0, "geglu": 1}
_THREADS = object()  # stands in a call's arguments for the number of threads


@dataclass(frozen=True, eq=False)
class Rows:
    """A buffer: `count` rows of `width` numbers. Its place is known when the program is."""

    count: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.count * self.width * self.dtype.itemsize

    def at(self, column: int) -> _Place:
        """Where a column of the first row lies."""
        return _Place(self, column * self.dtype.itemsize)


@dataclass(frozen=True)
class _Place:
    rows: Rows
    offset: int  # in bytes, from the first row's beginning


@dataclass(frozen=True)
class Source:
    """What a product reads: rows, and for convolutions which row each tap takes.

    table:     int32 [taps, rows of an item of the result], -1 for padding; None: row by row
    item_rows: rows of an item in `rows`
    """

    rows: Rows
    table: Tensor | None = None
    item_rows: int = 0


class Builder:
    """Takes kernel calls in order; `program` makes them runnable."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._number = DTYPES[dtype]
        self._calls: list[tuple[Callable[..., None], tuple]] = []
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
        rows: int | None = None,
        item_rows: int | None = None,
        bias: tuple[Rows, int, int] | None = None,
        residual: Rows | None = None,
        out: Rows | None = None,
        out_dtype: torch.dtype | None = None,
        scatter: tuple[Tensor, int] | None = None,
    ) -> Rows:
        """epilogue(sources x weights + bias) + residual.

        rows, item_rows: of the result, and of one item of it; both as in the only source by default
        bias: (fp32 rows, first column, rows of the result that share one) in place of the weights'
        out: where to write, possibly the residual itself; by default new rows, or the residual's
            where nothing else reads it
        scatter: (int32 [item_rows], rows of an item of `out`): the row of its item in `out` that
            each row becomes
        """
        if isinstance(sources, Rows):
            sources = [Source(sources)]
        rows = rows or sources[0].rows.count
        item_rows = item_rows or rows
        out = out or self.rows(rows, weights.columns, out_dtype, over=residual)
        read = []
        for source in sources:
            taps = 1 if source.table is None else source.table.shape[0]
            table = 0 if source.table is None else self._keep(source.table)
            x = source.rows
            read.append((x, x.width, x.width, table, taps, source.item_rows or x.count))
        shared = self._bias(weights, bias)
        self._call(
            vfengine_native.row_matmul_cpu,
            tuple(read),
            self._keep(weights.packed),
            *shared,
            *((0, 0) if residual is None else (residual, residual.width)),
            *(out, out.width, rows, item_rows, weights.columns),
            *(_EPILOGUES[weights.epilogue], self._number, out.dtype is not self.dtype),
            *((0, 0) if scatter is None else (self._keep(scatter[0]), scatter[1])),
            _THREADS,
        )
        return out

    def winograd(
        self,
        x: Rows,
        weights: Weights,
        shape: tuple[int, int, int],
        *,
        flat: bool = False,
        bias: tuple[Rows, int, int] | None = None,
        residual: Rows | None = None,
        out: Rows | None = None,
    ) -> Rows:
        """A convolution of `pack_winograd`; shape: (items, height, width).

        flat: 3 taps along height; bias, residual, out: as in `matmul`
        """
        out = out or self.rows(x.count, weights.columns, over=residual)
        shared = self._bias(weights, bias)
        self._call(
            vfengine_native.winograd_cpu,
            *(x, self._keep(weights.packed), *shared, residual or 0, out, *shape),
            *(x.width, weights.columns, flat, self._number, _THREADS),
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
        width = sum(source.width for source in sources)
        out = self.rows(x.count, width)
        scale, shift, stride = 0, 0, 0
        if modulation is not None:
            table, scale, shift = modulation
            scale, shift, stride = table.at(scale), table.at(shift), table.width
        self._call(
            vfengine_native.group_norm_silu_cpu,
            *(x, self._keep(norm.weight), self._keep(norm.bias), scale, shift, 0, out),
            *(images, x.count // images, x.width, norm.num_groups, num_frames),
            *(norm.eps, silu, self._number, _THREADS),
            *((0, 0) if second is None else (second, second.width)),
            stride,
            0,
        )
        return out

    def layer_norm(self, x: Rows, norm) -> Rows:
        out = self.rows(x.count, x.width)
        weight, bias = self._keep(norm.weight), self._keep(norm.bias)
        self._call(
            vfengine_native.layer_norm_cpu,
            *(x, weight, bias, out, x.count, x.width, norm.eps, self._number, _THREADS),
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
            vfengine_native.spatial_attention_cpu,
            *(q, kv.at(first), kv.at(first + inner), out),
            *(frames, q.count // frames, kv.count // kv_frames, number, dim),
            *(q.width, kv.width, kv_frames, self._number, _THREADS, scale),
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
        number, dim, scale = heads
        out = self.rows(qkv.count, number * dim)
        self._call(
            vfengine_native.temporal_attention_cpu,
            *(qkv, 0 if bias is None else self._keep(bias), out, *shape),
            *(number, dim, self._number, _THREADS, scale),
        )
        return out

    def transformer(
        self,
        x: Rows,
        norm,
        shape: tuple[int, int, int],
        *,
        time: bool,
        norm_frames: int,
        heads: tuple[int, int, float],
        proj_in: Weights,
        attentions: Sequence[tuple[object, Weights, Weights, Rows | None, Tensor | None]],
        feed_forward: tuple[object, Weights, Weights | None] | None,
        proj_out: Weights,
    ) -> Rows:
        """A whole transformer of one block, + x (csrc/cpu/transformer.cpp).

        shape: (batch, frames, pixels); norm_frames: frames whose group statistics are shared
        attentions: (layer norm, q k v or q, out, rows of a context's k and v, position bias)
        feed_forward: (layer norm, gate, out); out None: multiplied into proj_out
        """
        number, dim, scale = heads
        batch, frames, pixels = shape
        inner = proj_in.columns
        coefficients = self.rows(batch * frames, 3 * x.width, torch.float32)
        self._call(
            vfengine_native.group_norm_silu_cpu,
            *(x, self._keep(norm.weight), self._keep(norm.bias), 0, 0, 0, 0),
            *(batch * frames, pixels, x.width, norm.num_groups, norm_frames),
            *(norm.eps, False, self._number, _THREADS, 0, 0, 0, coefficients),
        )
        own = () if time else (self.rows(x.count, inner), self.rows(x.count, 3 * number * dim))
        out = self.rows(x.count, proj_out.columns)
        attended = tuple(
            (
                self._norm(layer_norm),
                self._linear(into, inner),
                self._linear(back, number * dim),
                *((0, 0) if kv is None else (kv, kv.count // batch)),
                0 if bias is None else self._keep(bias),
            )
            for layer_norm, into, back, kv, bias in attentions
        )
        gated = ()
        if feed_forward is not None:
            layer_norm, gate, back = feed_forward
            last = (0, 0, 0, 0) if back is None else self._linear(back, gate.columns)
            gated = ((self._norm(layer_norm), self._linear(gate, inner), last),)
        self._call(
            vfengine_native.transformer_cpu,
            (*shape, x.width, inner, number, dim),
            *(time, scale, x, coefficients, *(own or (0, 0)), out),
            *(self._linear(proj_in, x.width), attended, gated, self._linear(proj_out, inner)),
            *(self._number, _THREADS),
        )
        return out

    def _linear(self, weights: Weights, depth: int) -> tuple[int, int, int, int]:
        bias = 0 if weights.bias is None else self._keep(weights.bias)
        return self._keep(weights.packed), bias, weights.columns, depth

    def _norm(self, norm) -> tuple[int, int, float]:
        return self._keep(norm.weight), self._keep(norm.bias), norm.eps

    def _bias(self, weights: Weights, bias: tuple[Rows, int, int] | None) -> tuple:
        """Address, rows of the result that share one, and stride, as products take them."""
        if bias is not None:
            return bias[0].at(bias[1]), bias[2], bias[0].width
        return (0 if weights.bias is None else self._keep(weights.bias)), 0, 0

    def _call(self, kernel: Callable[..., None], *args: object) -> None:
        self._calls.append((kernel, args))

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def program(self, *results: Rows) -> Program:
        """results: buffers that are read after the last call; others may be gone by then."""
        uses = [list(_buffers(args)) for _, args in self._calls]
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
        return Program(self._calls, self._kept, places, size)


class Program:
    """Calls with their memory. Not for two threads at once: they would share the arena."""

    def __init__(
        self,
        calls: list[tuple[Callable[..., None], tuple]],
        kept: list[Tensor],
        places: dict[Rows, int],
        size: int,
    ) -> None:
        self._unbound, self._kept, self._places = calls, kept, places
        self.arena = huge_pages(size)
        self._bound: dict[int, list[tuple[Callable[..., None], tuple]]] = {}

    def offset(self, place: Rows | _Place) -> int:
        """Where it begins in the arena, in bytes."""
        if isinstance(place, _Place):
            return self._places[place.rows] + place.offset
        return self._places[place]

    def view(self, rows: Rows) -> Tensor:
        """[count, width], the buffer itself."""
        offset = self.offset(rows)
        part = self.arena[offset : offset + rows.nbytes]
        return part.view(rows.dtype).view(rows.count, rows.width)

    def calls(self, threads: int) -> list[tuple[Callable[..., None], tuple]]:
        """The kernel calls, ready to be made in order."""
        if threads not in self._bound:
            base = self.arena.data_ptr()

            def bound(value):
                if isinstance(value, (Rows, _Place)):
                    return base + self.offset(value)
                if isinstance(value, tuple):
                    return tuple(bound(part) for part in value)
                return threads if value is _THREADS else value

            self._bound = {threads: [(kernel, bound(args)) for kernel, args in self._unbound]}
        return self._bound[threads]

    def run(self) -> None:
        for kernel, args in self.calls(torch.get_num_threads()):
            kernel(*args)


def _buffers(value: object) -> Iterator[Rows]:
    """The buffers that a call's arguments name, as often as they do."""
    if isinstance(value, Rows):
        yield value
    elif isinstance(value, _Place):
        yield value.rows
    elif isinstance(value, tuple):
        for part in value:
            yield from _buffers(part)
