"""y = Σ over taps and channels of x̃ w: a convolution or linear layer as one matrix product

x: [B, H, W, C], w: [N, kh, kw, C + C2], y: [B, Ho, Wo, N]; rows of the product are the B Ho Wo
output pixels, K = kh kw (C + C2) runs over taps, then channels. A program owns a tile of BLOCK_M
pixels and BLOCK_N channels and walks along K, BLOCK_K channels of one tap at a time: it gathers the
pixels that the tap sees (none beyond the border: zeros), so that no im2col, upsampled picture or
concatenation is ever in memory. Both operands lie contiguous along K, come by 16-byte asynchronous
copies, and meet on tensor cores; sums are in fp32 and in the order of K.

Where few tiles would leave multiprocessors idle, K is cut into `splits` runs, each a program that
writes its sums. The last of a tile to arrive, by a ticket, adds them in the order of the runs: one
launch, and the same bits at every call.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfengine.devices import matmul_in_tf32
from vfengine.ops.implicit_gemm import Product

from .launch import launch_kernel, wait_for_inputs

GROUP = tl.constexpr(8)  # tiles of pixels that share the weights in cache
_RUN_TIME = [
    "rows",
    "height",
    "width",
    "out_height",
    "out_width",
    "taps_x",
    "stride",
    "pad_y",
    "pad_x",
    "up",
    "steps",
    "splits",
    "sets_of_row",
    "sets_of_pair",
    "shift_stride",
    "with_bias",
    "with_shift",
    "with_residual",
]


@triton.jit(do_not_specialize=_RUN_TIME)
def implicit_gemm_kernel(
    x_ptr,
    second_ptr,
    weight_ptr,
    coefficient_ptr,
    bias_ptr,
    shift_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    ticket_ptr,
    C,  # of x, C2 of second: specialised, so that Triton sees which rows are aligned
    C2,
    N,
    rows,  # output pixels of a set: of one row of shift and of coefficients; no tile crosses sets
    height,
    width,
    out_height,
    out_width,
    taps_x,
    stride,
    pad_y,
    pad_x,
    up,  # 1: pixels are doubled before the convolution
    steps,  # of BLOCK_K channels of one tap
    splits,
    sets_of_row,  # of shift, then of coefficients
    sets_of_pair,
    shift_stride,
    with_bias,
    with_shift,
    with_residual,
    NORM: tl.constexpr,  # 0, 1: a x + b, 2: SiLU of it
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # whether there may be several runs
):
    wait_for_inputs()
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    row_tile, column_tile, one_set = _place(row_tiles, column_tiles)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_here, n_here = m < rows, n < N
    m += one_set * rows
    image = m // (out_height * out_width)
    pixel = m % (out_height * out_width)
    y0 = pixel // out_width * stride - pad_y
    x0 = pixel % out_width * stride - pad_x
    first_row = image * height * width

    # The first step of this run: of which tap, and of which channels.
    run = tl.program_id(1)
    start = (steps * run) // splits
    blocks = tl.cdiv(C, BLOCK_K)
    blocks_of_tap = blocks + tl.cdiv(C2, BLOCK_K)
    block = start % blocks_of_tap
    tap_x = start // blocks_of_tap % taps_x
    tap_y = start // blocks_of_tap // taps_x
    tap_start = start // blocks_of_tap * (C + C2)
    weights_of_n = weight_ptr + n.to(tl.int64)[None, :] * ((steps // blocks_of_tap) * (C + C2))
    gate_distance = N.to(tl.int64) * ((steps // blocks_of_tap) * (C + C2))

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(start, (steps * (run + 1)) // splits):
        in_second = block >= blocks
        source = tl.where(in_second, second_ptr, x_ptr)
        channels = tl.where(in_second, C2, C)
        column = tl.where(in_second, block - blocks, block) * BLOCK_K + k
        k_here = column < channels
        y, x = y0 + tap_y, x0 + tap_x
        inside = m_here & (y >= 0) & (y < height << up) & (x >= 0) & (x < width << up)
        row = first_row + (y >> up) * width + (x >> up)
        a_at = row.to(tl.int64)[:, None] * channels + column[None, :]
        a = tl.load(source + a_at, mask=inside[:, None] & k_here[None, :], other=0.0)
        of_tap = tl.where(in_second, C, 0) + column
        weights = weights_of_n + (tap_start + of_tap)[:, None]
        w_here = k_here[:, None] & n_here[None, :]
        w = tl.load(weights, mask=w_here, other=0.0)
        if NORM > 0:
            pair = coefficient_ptr + (one_set // sets_of_pair * (C + C2) + of_tap) * 2
            scale = tl.load(pair, mask=k_here, other=0.0)[None, :]
            offset = tl.load(pair + 1, mask=k_here, other=0.0)[None, :]
            v = scale * a.to(tl.float32) + offset
            if NORM > 1:
                v = v / (1.0 + tl.exp(-v))
            a = tl.where(inside[:, None], v, 0.0).to(a.dtype)  # the border is zero, not the offset
        sums = tl.dot(a, w, sums, input_precision=PRECISION)
        if GATED:
            w = tl.load(weights + gate_distance, mask=w_here, other=0.0)
            gates = tl.dot(a, w, gates, input_precision=PRECISION)
        block += 1
        next_tap = block == blocks_of_tap
        block = tl.where(next_tap, 0, block)
        tap_start += tl.where(next_tap, C + C2, 0)
        tap_x += tl.where(next_tap, 1, 0)
        next_line = tap_x == taps_x
        tap_x = tl.where(next_line, 0, tap_x)
        tap_y += tl.where(next_line, 1, 0)

    last = run >= 0
    if SPLIT and splits > 1:
        tile, tiles = tl.program_id(0), tl.num_programs(0)
        part = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts = partial_ptr + tile * (BLOCK_M * BLOCK_N) + part
        distance = tiles * (BLOCK_M * BLOCK_N)
        tl.store(parts + run * distance, sums)
        if GATED:
            tl.store(parts + (splits + run) * distance, gates)
        tl.debug_barrier()  # all of the program's sums are written before its ticket is taken
        last = tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel") == splits - 1
        tl.debug_barrier()
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for other in range(0, tl.where(last, splits, 0)):
            sums += tl.load(parts + other * distance)
            if GATED:
                gates += tl.load(parts + (splits + other) * distance)
        tl.store(ticket_ptr + tile, 0, mask=last)  # for the next launch

    m_here &= last  # the others are done
    shift_ptr += (one_set // sets_of_row).to(tl.int64) * shift_stride
    here = m, m_here
    there = bias_ptr, shift_ptr, residual_ptr, out_ptr
    given = with_bias != 0, with_shift != 0, with_residual != 0
    first = column_tile * BLOCK_N
    if (1 + GATED) * BLOCK_M * BLOCK_N > 16384:  # in two halves, for want of registers
        left, right = _halves(sums)
        left_gates, right_gates = _halves(gates)
        _finish(left, left_gates, here, first, N, there, given, GATED)
        _finish(right, right_gates, here, first + BLOCK_N // 2, N, there, given, GATED)
    else:
        _finish(sums, gates, here, first, N, there, given, GATED)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    pairs = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def _finish(sums, gates, here, first, N, there, given, GATED: tl.constexpr):
    """Adds bias, shift and residual, where they are given, and writes these columns."""
    m, m_here = here
    bias_ptr, shift_ptr, residual_ptr, out_ptr = there
    with_bias, with_shift, with_residual = given
    n = first + tl.arange(0, sums.shape[1])
    n_here = n < N
    columns = tl.load(bias_ptr + n, mask=n_here & with_bias, other=0.0)
    shift = tl.load(shift_ptr + n, mask=n_here & with_shift, other=0.0)
    if GATED:
        sums += columns[None, :]
        gates += tl.load(bias_ptr + N + n, mask=n_here & with_bias, other=0.0)[None, :]
        sums *= 0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476))
        columns = shift
    else:
        columns += shift
    both = m_here[:, None] & n_here[None, :]
    out_at = m.to(tl.int64)[:, None] * N + n[None, :]
    residual = tl.load(residual_ptr + out_at, mask=both & with_residual, other=0.0)
    sums += columns[None, :] + residual.to(tl.float32)
    tl.store(out_ptr + out_at, sums.to(out_ptr.dtype.element_ty), mask=both)


@triton.jit
def _place(row_tiles, column_tiles):
    """This program's tile of rows, its tile of columns, and its set of rows.

    Programs that run at a time own tiles near each other, GROUP of them in a column.
    """
    tiles = row_tiles * column_tiles
    tile = tl.program_id(0) % tiles
    group = tile // (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile - group * (GROUP * column_tiles)
    row_tile = group * GROUP + within % group_rows
    return row_tile, within // group_rows, tl.program_id(0) // tiles


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
        return f"{self.m}x{self.n}x{self.k}"

    def shared(self, itemsize: int, gated: bool) -> int:
        """Bytes of shared memory that the operands of all stages take."""
        return (self.m + self.n * (1 + gated)) * self.k * self.stages * itemsize


# From large to small. Of 16 bits: wgmma from 64 rows on, which two warp groups share in the first.
TILES = (
    Tile(128, 256, 64, 8, 3, split=False),
    Tile(128, 128, 64, 8, 3, split=False),
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
LEAST_STEPS = 4  # of a run, below which sums cost more than they save
MOST_SPLITS = 16
MOST_TICKETS = FILLED
CANDIDATES = 6
SHARED = 227 << 10  # bytes that a program can have on sm_90


def splits_of(tile: Tile, product: Product) -> int:
    """How many runs K is cut into, by shape and tile alone."""
    if not tile.split:
        return 1
    programs, steps = tile_count(tile, product), step_count(tile, product)
    return max(1, min(FILLED // programs, steps // LEAST_STEPS, MOST_SPLITS))


def tile_count(tile: Tile, product: Product) -> int:
    """How many tiles the output has."""
    of_set = triton.cdiv(product.rows // product.sets, tile.m)
    return product.sets * of_set * triton.cdiv(product.columns, tile.n)


def step_count(tile: Tile, product: Product) -> int:
    """How many steps along K a tile takes."""
    blocks = sum(triton.cdiv(channels, tile.k) for channels in product.channels)
    return product.taps * blocks


def tiles_for(product: Product, shared: int = SHARED) -> list[Tile]:
    """Tiles that suit the shape, the likely fastest first.

    shared: bytes of shared memory that a program can have
    """
    tiles = FP32_TILES if product.x.dtype == torch.float32 else TILES
    tiles = GATED_TILES if product.gated and tiles is TILES else tiles
    fitting = [t for t in tiles if t.shared(product.x.itemsize, product.gated) <= shared]
    return sorted(fitting, key=lambda tile: likely_time(tile, product))[:CANDIDATES]


def likely_time(tile: Tile, product: Product) -> float:
    """A guess, in clocks of a multiprocessor of an H100; only the order of tiles matters.

    Programs of a wave share its multiprocessors. A step costs its products and the bytes that it
    brings from cache, and never less than a latency.
    """
    splits = splits_of(tile, product)
    waves = triton.cdiv(tile_count(tile, product) * splits, FILLED)
    columns = tile.n * (1 + product.gated)
    products = tile.m * columns * tile.k / (2048 if tile.m >= 64 else 1024)
    fetched = (tile.m + columns) * tile.k * 2 / 64
    step = max(products, fetched, 150)
    sums = 1500 + splits * tile.m * columns / 64 if splits > 1 else 0
    return waves * (triton.cdiv(step_count(tile, product), splits) * step + 1000) + sums


def launch(product: Product, tile: Tile) -> None:
    """Write y into product.out."""
    grid, arguments, constants = launch_arguments(product, tile, *workspace(product, tile))
    launch_kernel(implicit_gemm_kernel, grid, arguments, constants)


def workspace(product: Product, tile: Tile) -> tuple[Tensor, Tensor]:
    """Partial sums, and tickets that are zero before a launch and after it."""
    splits, tickets = splits_of(tile, product), _tickets(product.x.device)
    if splits == 1:
        return tickets.view(torch.float32), tickets
    size = splits * tile_count(tile, product) * tile.m * tile.n * (1 + product.gated)
    return product.x.new_empty(size, dtype=torch.float32), tickets


_kept: dict[tuple[torch.device, int], Tensor] = {}


def _tickets(device: torch.device) -> Tensor:
    """Zeros of this device and stream: launches of one stream, or one graph's, do not overlap.

    A capture on a stream that was not warmed up zeroes its own, at every replay.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    tickets = _kept.get((device, stream))
    if tickets is None:
        tickets = torch.zeros(MOST_TICKETS, dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _kept[device, stream] = tickets
    return tickets


def launch_arguments(
    product: Product, tile: Tile, partial: Tensor, tickets: Tensor
) -> tuple[tuple[int, int], tuple, dict[str, object]]:
    """The grid, arguments and constants of implicit_gemm_kernel."""
    x, out = product.x, product.out
    shift, coefficients = product.shift, product.coefficients
    nothing = tickets.view(torch.float32)  # of the dtype that tables have: one build serves both
    tensors = (
        x,
        x if product.second is None else product.second,
        product.weight,
        nothing if coefficients is None else coefficients,
        nothing if product.bias is None else product.bias,
        nothing if shift is None else shift,
        x if product.residual is None else product.residual,
        out,
        partial,
        tickets,
    )
    splits = splits_of(tile, product)
    numbers = (
        *product.channels,
        product.columns,
        product.rows // product.sets,
        *x.shape[1:3],
        *out.shape[1:3],
        product.weight.shape[2],
        product.stride,
        *product.padding,
        product.upsample - 1,
        step_count(tile, product),
        splits,
        product.sets // (1 if shift is None else len(shift)),
        product.sets // (1 if coefficients is None else len(coefficients)),
        0 if shift is None else shift.stride(0),
        int(product.bias is not None),
        int(shift is not None),
        int(product.residual is not None),
    )
    constants = {
        "NORM": 0 if coefficients is None else 1 + product.silu,
        "GATED": product.gated,
        "PRECISION": "tf32" if matmul_in_tf32() else "ieee",
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "SPLIT": tile.split,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return (tile_count(tile, product), splits), (*tensors, *numbers), constants
