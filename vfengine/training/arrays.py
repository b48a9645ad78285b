"""Rows of data that are made once: kept as .npy, mapped into memory, found by the next run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ..files import replacing


def gathered(chunks: Iterable[np.ndarray], count: int) -> np.ndarray:
    """The rows of all chunks, `count` together, as one array in memory."""
    return _fill(chunks, count, np.empty)


def kept(
    file: Path,
    chunks: Iterable[np.ndarray],
    count: int,
    dtype: type,
    row: tuple[int, ...] | None = None,
) -> np.ndarray:
    """The rows of a file; if it is not there yet, those of all chunks, which it then holds.

    chunks: arrays [n, ...] of this dtype with `count` rows together; not asked for if the file is
            there
    row:    the shape of a row that is expected; None: any

    A failure leaves no file. The rows are mapped privately: what is written to them stays in
    memory. Raises ValueError for a file that is cut off or holds something else, and OSError at
    once where the disk has no place for it.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished:

            def new(shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
                rows = np.lib.format.open_memmap(unfinished, "w+", dtype, shape)
                with unfinished.open("r+b") as opened:  # else a full disk ends the process: SIGBUS
                    os.posix_fallocate(opened.fileno(), 0, unfinished.stat().st_size)
                return rows

            _fill(chunks, count, new).flush()
    try:
        rows = np.load(file, mmap_mode="c")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is no complete .npy file, remove it: {error}") from error
    expected = (count, *(rows.shape[1:] if row is None else row))
    if rows.dtype != dtype or rows.shape != expected:
        name = np.dtype(dtype).name
        raise ValueError(
            f"{file} holds {rows.dtype} {rows.shape}, expected {name} {expected}: remove it"
        )
    return rows


def _fill(
    chunks: Iterable[np.ndarray],
    count: int,
    new: Callable[[tuple[int, ...], np.dtype], np.ndarray],
) -> np.ndarray:
    rows, done = None, 0
    for chunk in chunks:
        if rows is None:
            rows = new((count, *chunk.shape[1:]), chunk.dtype)
        rows[done : done + len(chunk)] = chunk
        done += len(chunk)
    return rows
