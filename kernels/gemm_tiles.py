"""The tiles of kernels/implicit_gemm.py: what there is, what suits a shape, how K is cut."""

import functools
from dataclasses import dataclass

import torch

from vfengine.ops.implicit_gemm import Size


@dataclass(frozen=True)
class Tile:
    """What a program owns, and how it walks along K."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: bool = True

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}, {self.warps} warps"

    def sums_of_thread(self, gated: bool) -> int:
        """Registers that a thread needs for sums."""
        return self.m * self.n * (1 + gated) // (32 * self.warps)

    def shared(self, itemsize: int, gated: bool) -> int:
        """Bytes of shared memory at most: operands of all stages, and 4 KiB for the rest."""
        return (self.m + self.n * (1 + gated)) * self.k * self.stages * itemsize + 4096


# From large to small. wgmma takes 64 rows at least. A multiprocessor has room for one program of
# the first tile, and for two of the second: one multiplies while the other begins or ends.
TILES = (
    Tile(128, 256, 64, 8, 3, split=False),
    Tile(128, 128, 64, 4, 3, split=False),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 32, 128, 4, 3),
    Tile(32, 64, 128, 4, 3),
    Tile(16, 64, 128, 4, 3),
)
GATED_TILES = (
    Tile(128, 128, 64, 8, 3, split=False),
    Tile(64, 64, 64, 4, 3),
    Tile(32, 32, 128, 4, 3),
)
FP32_TILES = (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2), Tile(16, 32, 32, 2, 2))
FILLED = 128  # programs that keep a large card busy
LEAST_STEPS = 4  # of a run of K
MOST_SPLITS = 16
MOST_TICKETS = FILLED
CANDIDATES = 6
SHARED = 227 << 10  # bytes that a program can have on sm_90


@functools.cache
def tiles_for(size: Size) -> tuple[Tile, ...]:
    """Tiles that suit the shape and the card, the likely fastest first."""
    tiles = GATED_TILES if size.gated else TILES
    tiles = FP32_TILES if size.dtype == torch.float32 else tiles
    fitting = [t for t in tiles if fits(t, size)]
    times = {t: likely_time(t, size, splits_of(t, size)) for t in fitting}
    return tuple(sorted(fitting, key=times.__getitem__)[:CANDIDATES])


def fits(tile: Tile, size: Size) -> bool:
    """Whether operands fit shared memory; and normalising them, registers beside all the sums."""
    crowded = tile.warps == 4 and tile.sums_of_thread(size.gated) >= 128
    shared = tile.shared(size.dtype.itemsize, size.gated)
    return shared <= _shared_memory(size.device) and not (size.normed and crowded)


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def splits_of(tile: Tile, size: Size) -> int:
    """How many runs K is cut into, none of them empty, by shape and tile alone."""
    if not tile.split:
        return 1
    programs, steps = tile_count(tile, size), step_count(tile, size)
    most = min(FILLED // programs, steps // LEAST_STEPS, MOST_SPLITS)
    splits = min(range(1, max(1, most) + 1), key=lambda n: likely_time(tile, size, n))
    return _ceil_div(steps, _ceil_div(steps, splits))


def _ceil_div(a: int, b: int) -> int:
    """`triton.cdiv` costs microseconds, as a function that kernels can call as well."""
    return -(-a // b)


def tile_count(tile: Tile, size: Size) -> int:
    """How many tiles the output has."""
    of_set = _ceil_div(size.rows // size.sets, tile.m)
    return size.sets * of_set * _ceil_div(size.columns, tile.n)


def step_count(tile: Tile, size: Size) -> int:
    """How many steps along K a tile takes."""
    blocks = sum(_ceil_div(channels, tile.k) for channels in size.channels)
    return size.taps * blocks


def likely_time(tile: Tile, size: Size, splits: int) -> float:
    """A guess, in clocks of a multiprocessor of an H100; only the order of tiles matters.

    A step costs its products or the bytes that it brings from cache, and never less than a latency.
    The sums of runs cost tickets and barriers, a latency for every four runs, and their bytes.
    """
    columns = tile.n * (1 + size.gated)
    waves = _ceil_div(tile_count(tile, size) * splits, FILLED)
    products = tile.m * columns * tile.k / (2048 if tile.m >= 64 else 1024)
    fetched = (tile.m + columns) * tile.k * 2 / 64
    steps = _ceil_div(step_count(tile, size), splits) * max(products, fetched, 150)
    sums = 1500 + 175 * splits + splits * tile.m * columns / 16 if splits > 1 else 0
    return waves * (steps + 1000) + sums
