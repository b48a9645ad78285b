"""A list of kernel calls over one arena of memory, and what their arguments are made of.

Activations are rows: `[B*N*H*W, C]`, which is channels_last memory, in one dtype. A program is
static: addresses, sizes and order are the same in every run. `Builder` makes it (builder.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vfengine.native import vfengine_native as native

from .memory import huge_pages


@dataclass(frozen=True, eq=False)
class Rows:
    """A buffer: `count` rows of `width` numbers. Its place is known when the program is."""

    count: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.count * self.width * self.dtype.itemsize

    def at(self, column: int) -> Place:
        """Where a column of the first row lies."""
        return Place(self, column * self.dtype.itemsize)


@dataclass(frozen=True)
class Place:
    rows: Rows
    offset: int  # in bytes, from the first row's beginning


class Struct:
    """Arguments of a kernel (csrc/<op>.h), or a part of them, before the arena has an address."""

    def __init__(self, kind: type, **fields: object) -> None:
        self.kind, self.fields = kind, fields


def buffers_of(value: object) -> Iterator[Rows]:
    """The buffers that a call's arguments name, as often as they do."""
    if isinstance(value, Rows):
        yield value
    elif isinstance(value, Place):
        yield value.rows
    elif isinstance(value, Struct):
        yield from buffers_of(tuple(value.fields.values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from buffers_of(part)


class Program:
    """Calls with their memory. Not for two threads at once: they would share the arena.

    arena: of another program, whose buffers mean nothing once this one has run; a new one if it is
           too small, or None
    """

    def __init__(
        self,
        calls: list[tuple[str, Struct]],
        kept: list[Tensor],
        places: dict[Rows, int],
        size: int,
        arena: Tensor | None = None,
    ) -> None:
        self._unbound, self._kept, self._places = calls, kept, places
        self.arena = arena if arena is not None and len(arena) >= size else huge_pages(size)
        self._native = native.Program([(op, self._bound(args)) for op, args in calls])

    def _bound(self, value: object) -> object:
        """Arguments with the arena's addresses. No closure: its cycle would keep all weights."""
        if isinstance(value, (Rows, Place)):
            return self.arena.data_ptr() + self.offset(value)
        if isinstance(value, Struct):
            fields = {name: self._bound(part) for name, part in value.fields.items()}
            return value.kind(**fields)
        return tuple(map(self._bound, value)) if isinstance(value, tuple) else value

    def offset(self, place: Rows | Place) -> int:
        """Where it begins in the arena, in bytes."""
        if isinstance(place, Place):
            return self._places[place.rows] + place.offset
        return self._places[place]

    def view(self, rows: Rows) -> Tensor:
        """[count, width], the buffer itself."""
        offset = self.offset(rows)
        part = self.arena[offset : offset + rows.nbytes]
        return part.view(rows.dtype).view(rows.count, rows.width)

    def run(self) -> None:
        self._native.run(torch.get_num_threads())
