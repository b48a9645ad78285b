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

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfengine.devices import matmul_in_tf32
from vfengine.ops.implicit_gemm import Product

from .gemm_tiles import MOST_TICKETS, Tile, splits_of, step_count, tile_count
from .launch import launch_kernel, wait_for_inputs

GROUP = tl.constexpr(8)  # tiles of pixels that share the weights in cache
_RUN_TIME = [
    "rows",
    "height",
    "width",
    "out_height",
    "out_width",
    "taps",
    "taps_x",
    "stride",
    "pad_y",
    "pad_x",
    "up",
    "run_steps",
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
    taps,
    taps_x,
    stride,
    pad_y,
    pad_x,
    up,  # 1: pixels are doubled before the convolution
    run_steps,  # of a run, of BLOCK_K channels of one tap each
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
    HALVES: tl.constexpr,  # whether what follows the product takes half of the columns at a time
):
    wait_for_inputs()
    run, one_set = tl.program_id(1), tl.program_id(2)
    row_tile, column_tile = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), not SPLIT)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_here, n_here = m < rows, n < N
    m += one_set * rows
    first_line = (one_set * rows + row_tile * BLOCK_M) // out_width
    first_image = first_line // out_height
    line, x0 = _carried(m - first_line * out_width, out_width)
    image, y0 = _carried(first_line - first_image * out_height + line, out_height)
    y0 = y0 * stride - pad_y
    x0 = x0 * stride - pad_x
    first_row = (first_image + image) * height * width

    # The first step of this run: of which tap, and of which channels.
    start = run * run_steps
    blocks = tl.cdiv(C, BLOCK_K)
    blocks_of_tap = blocks + tl.cdiv(C2, BLOCK_K)
    tap = start // blocks_of_tap
    block = start - tap * blocks_of_tap
    tap_start = tap * (C + C2)
    tap_y = tap // taps_x
    tap_x = tap - tap_y * taps_x
    weights_of_n = weight_ptr + n.to(tl.int64)[None, :] * (taps * (C + C2))
    weights_of_gates = weight_ptr + (N + n).to(tl.int64)[None, :] * (taps * (C + C2))

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(start, tl.minimum(start + run_steps, taps * blocks_of_tap)):
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
            weights = weights_of_gates + (tap_start + of_tap)[:, None]
            w = tl.load(weights, mask=w_here, other=0.0)
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
        tiles = tl.num_programs(0) * tl.num_programs(2)
        tile = one_set * tl.num_programs(0) + tl.program_id(0)
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
        in_flight: tl.constexpr = 4 if (1 + GATED) * BLOCK_M * BLOCK_N <= 4096 else 1
        for others in range(0, tl.where(last, splits, 0), in_flight):
            for i in tl.static_range(in_flight):  # of the runs whose sums are fetched at a time
                other = others + i
                sums += tl.load(parts + other * distance, mask=other < splits, other=0.0)
                if GATED:
                    gate_part = parts + (splits + other) * distance
                    gates += tl.load(gate_part, mask=other < splits, other=0.0)
        tl.store(ticket_ptr + tile, 0, mask=last)  # for the next launch

    m_here &= last  # the others are done
    shift_ptr += (one_set // sets_of_row).to(tl.int64) * shift_stride
    here = m, m_here
    there = bias_ptr, shift_ptr, residual_ptr, out_ptr
    given = with_bias != 0, with_shift != 0, with_residual != 0
    first = column_tile * BLOCK_N
    if HALVES:
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
def _place(row_tiles, column_tiles, GROUPED: tl.constexpr):
    """This program's tile of rows, and of columns.

    GROUPED: programs that run at a time own tiles near each other, GROUP of them in a column
    """
    tile = tl.program_id(0)
    if not GROUPED:
        return tile % row_tiles, tile // row_tiles
    group = tile // (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile - group * (GROUP * column_tiles)
    return group * GROUP + within % group_rows, within // group_rows


@triton.jit
def _carried(places, size):
    """places // size and places % size, for quotients that are small: a tile is not far across.

    Integer division takes four times as many instructions, ahead of a program's first load.
    """
    quotient = (places.to(tl.float32) * (1.0 / size)).to(tl.int32)
    remainder = places - quotient * size
    quotient += (remainder >= size).to(tl.int32) - (remainder < 0).to(tl.int32)
    return quotient, places - quotient * size


def launch(product: Product, tile: Tile) -> None:
    """Write y into product.out."""
    grid, arguments, constants = launch_arguments(product, tile, *workspace(product, tile))
    launch_kernel(implicit_gemm_kernel, grid, arguments, constants)


def workspace(product: Product, tile: Tile) -> tuple[Tensor, Tensor]:
    """Partial sums, and tickets that are zero before a launch and after it."""
    splits, tickets = splits_of(tile, product.size), _tickets(product.x.device)
    if splits == 1:
        return tickets.view(torch.float32), tickets
    size = splits * tile_count(tile, product.size) * tile.m * tile.n * (1 + product.gated)
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
) -> tuple[tuple[int, int, int], tuple, dict[str, object]]:
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
    splits = splits_of(tile, product.size)
    numbers = (
        *product.channels,
        product.columns,
        product.rows // product.sets,
        *x.shape[1:3],
        *out.shape[1:3],
        product.taps,
        product.weight.shape[2],
        product.stride,
        *product.padding,
        product.upsample - 1,
        -(-step_count(tile, product.size) // splits),
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
        "HALVES": tile.sums_of_thread(product.gated) >= 128,  # of 255 registers
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    sets = product.sets
    return (tile_count(tile, product.size) // sets, splits, sets), (*tensors, *numbers), constants
