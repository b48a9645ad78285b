"""y = SiLU(((x - μ) / √(σ² + ε) weight + bias) (1 + scale) + shift)
                                                                        csrc/group_norm_silu.h

x: [B, P, C] rows of pixels, and a second [B, P, C2] or none, whose channels follow. C and C2 are
constants, so that Triton sees which rows are aligned. μ, σ² of the (C + C2) / G channels of a group
at the pixels of num_frames images, a set. One launch where a program holds all rows of a group:
slab_kernel, which moves x once. Else three, without atomics, so the order of sums depends on the
shape alone: channel_kernel gives the mean and centred squares of each channel in each chunk of a
set's rows, group_kernel merges those of a group, apply_kernel writes y. All sums in fp32. Two reads
of x, one write of y; the statistics are small beside them.
"""

import triton
import triton.language as tl
from torch import Tensor

from vfengine.ops.group_norm_silu import chunk_plan

from .launch import launch_kernel, wait_for_inputs

TILE = 4096  # elements of x that a program holds
MAX_BLOCK = 256  # channels of a tile
SLAB = 16384  # elements that a program of slab_kernel holds
ENTRIES = 1024  # chunks times channels of a group that are merged at a time
# Integers that may take any value: a variant compiled for 1, or for multiples of 16, gains nothing.
NUMBERS = ["set_rows", "chunk_rows", "chunks", "rows", "tiles", "num_frames", "table_images"]


@triton.jit
def load_rows(x_ptr, second_ptr, first_row, row, channel, here, C: tl.constexpr, C2: tl.constexpr):
    """Channels of rows first_row + row in fp32, zero where not `here`."""
    from_ptr, channels, column = x_ptr + first_row * C, C, channel
    if C2 > 0:
        in_second = channel >= C
        from_ptr = tl.where(in_second, second_ptr + first_row * C2, from_ptr)
        channels, column = tl.where(in_second, C2, C), tl.where(in_second, channel - C, channel)
    at = row * channels + column
    return tl.load(from_ptr + at, mask=here, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS[:3])
def channel_kernel(
    x_ptr,
    second_ptr,  # x_ptr where there is none
    partial_ptr,  # [set, chunk, channel, 2]
    set_rows,
    chunk_rows,
    chunks,
    C: tl.constexpr,
    C2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and centred squares of BLOCK channels in one chunk."""
    wait_for_inputs()
    set_and_chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C + C2
    first = set_and_chunk % chunks * chunk_rows
    last = tl.minimum(first + chunk_rows, set_rows)
    first_row = (set_and_chunk // chunks).to(tl.int64) * set_rows
    # Differences from the first row are small where the mean is large: their sums lose nothing.
    origin = load_rows(x_ptr, second_ptr, first_row, first.to(tl.int64), channel, inside, C, C2)
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    seen = 0
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < last)[:, None] & inside[None, :]
        row = row.to(tl.int64)[:, None]
        x = load_rows(x_ptr, second_ptr, first_row, row, channel[None, :], here, C, C2)
        x = tl.where(here, x - origin[None, :], 0.0)
        count = tl.minimum(last - start, ROWS)
        tile_mean = tl.sum(x, 0) / count
        centred = tl.where(here, x - tile_mean[None, :], 0.0)
        apart = tile_mean - mean
        total = seen + count
        share = count.to(tl.float32) / total
        mean += apart * share
        squares += tl.sum(centred * centred, 0) + apart * apart * (seen * share)
        seen = total
    entry = 2 * (set_and_chunk.to(tl.int64) * (C + C2) + channel)
    tl.store(partial_ptr + entry, origin + mean, mask=inside)
    tl.store(partial_ptr + entry + 1, squares, mask=inside)


@triton.jit(do_not_specialize=NUMBERS[:3])
def group_kernel(
    partial_ptr,
    group_ptr,  # [set, group, 2]
    set_rows,
    chunk_rows,
    chunks,
    eps,
    C: tl.constexpr,  # of both
    WIDTH: tl.constexpr,  # C / G
    ENTRIES: tl.constexpr,
):
    """Mean and 1 / √(σ² + ε) of one group of one set."""
    wait_for_inputs()
    groups: tl.constexpr = C // WIDTH
    at_set = (tl.program_id(0) // groups).to(tl.int64)
    from_ptr = partial_ptr + 2 * (at_set * chunks * C + tl.program_id(0) % groups * WIDTH)
    origin = tl.load(from_ptr)
    entries = chunks * WIDTH
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        here = entry < entries
        chunk = entry // WIDTH
        count = tl.minimum(set_rows - chunk * chunk_rows, chunk_rows).to(tl.float32)
        at = 2 * (chunk.to(tl.int64) * C + entry % WIDTH)
        mean = tl.load(from_ptr + at, mask=here, other=0.0)
        total += tl.where(here, count * (mean - origin), 0.0)
    size = set_rows.to(tl.float32) * WIDTH
    group_mean = tl.sum(total, 0) / size
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        here = entry < entries
        chunk = entry // WIDTH
        count = tl.minimum(set_rows - chunk * chunk_rows, chunk_rows).to(tl.float32)
        at = 2 * (chunk.to(tl.int64) * C + entry % WIDTH)
        mean = tl.load(from_ptr + at, mask=here, other=0.0)
        squares = tl.load(from_ptr + at + 1, mask=here, other=0.0)
        apart = (mean - origin) - group_mean
        total += tl.where(here, squares + count * apart * apart, 0.0)
    variance = tl.sum(total, 0) / size
    tl.store(group_ptr + 2 * tl.program_id(0), origin + group_mean)
    tl.store(group_ptr + 2 * tl.program_id(0) + 1, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit(do_not_specialize=NUMBERS[3:])
def apply_kernel(
    x_ptr,
    second_ptr,  # x_ptr where there is none, and likewise the next four
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    group_ptr,
    out_ptr,
    rows,
    tiles,  # of ROWS rows in an image
    num_frames,
    table_images,  # that share a row of scale and shift, and how far rows are apart
    table_stride,
    C: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,  # whether there is one, and likewise the rest
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    image = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C + C2
    group = 2 * (image // num_frames * ((C + C2) // WIDTH) + channel // WIDTH)
    mean = tl.load(group_ptr + group, mask=inside, other=0.0)
    factor = tl.load(group_ptr + group + 1, mask=inside, other=0.0)
    offset = tl.zeros([BLOCK], tl.float32)
    if WEIGHT:
        factor *= tl.load(weight_ptr + channel, mask=inside, other=0.0)
    if BIAS:
        offset = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    if SCALE:
        in_table = (image // table_images).to(tl.int64) * table_stride + channel
        more = 1.0 + tl.load(scale_ptr + in_table, mask=inside, other=0.0)
        factor *= more
        offset = offset * more + tl.load(shift_ptr + in_table, mask=inside, other=0.0)
    here = (row < rows)[:, None] & inside[None, :]
    row = (image.to(tl.int64) * rows + row)[:, None]
    x = load_rows(x_ptr, second_ptr, 0, row, channel[None, :], here, C, C2)
    y = (x - mean[None, :]) * factor[None, :] + offset[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    at = row * (C + C2) + channel[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows", "num_frames", "table_images"])
def slab_kernel(
    x_ptr,
    second_ptr,  # as in apply_kernel
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    rows,
    num_frames,
    table_images,
    table_stride,
    eps,
    C: tl.constexpr,
    C2: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,  # of a program
    ROWS: tl.constexpr,  # rows of a set and WIDTH, rounded up to powers of two
    BLOCK: tl.constexpr,
):
    """y of GROUPS groups of one set, [ROWS, GROUPS, BLOCK], whose images share a row of scale."""
    wait_for_inputs()
    programs: tl.constexpr = (C + C2) // (GROUPS * WIDTH)
    at_set = (tl.program_id(0) // programs).to(tl.int64)
    group = tl.program_id(0) % programs * GROUPS + tl.arange(0, GROUPS)
    row, in_group = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    set_rows = rows * num_frames
    channel = group[:, None] * WIDTH + in_group[None, :]
    inside = in_group[None, :] < WIDTH
    here = (row < set_rows)[:, None, None] & inside[None, :, :]
    first_row = at_set * set_rows
    row, of_group = row[:, None, None], channel[None, :, :]
    x = load_rows(x_ptr, second_ptr, first_row, row, of_group, here, C, C2)
    # Differences from the first are small where the mean is large: their sum loses nothing.
    there = group < programs * GROUPS
    origin = load_rows(x_ptr, second_ptr, first_row, 0, group * WIDTH, there, C, C2)
    apart = tl.where(here, x - origin[None, :, None], 0.0)
    size = set_rows.to(tl.float32) * WIDTH
    mean = origin + tl.sum(tl.sum(apart, 2), 0) / size
    x = tl.where(here, x - mean[None, :, None], 0.0)
    variance = tl.sum(tl.sum(x * x, 2), 0) / size
    factor = (1.0 / tl.sqrt_rn(variance + eps))[:, None] + tl.zeros([GROUPS, BLOCK], tl.float32)
    offset = tl.zeros([GROUPS, BLOCK], tl.float32)
    if WEIGHT:
        factor *= tl.load(weight_ptr + channel, mask=inside, other=0.0)
    if BIAS:
        offset = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    if SCALE:
        of_set = at_set * num_frames // table_images * table_stride + channel
        more = 1.0 + tl.load(scale_ptr + of_set, mask=inside, other=0.0)
        factor *= more
        offset = offset * more + tl.load(shift_ptr + of_set, mask=inside, other=0.0)
    y = x * factor[None, :, :] + offset[None, :, :]
    if SILU:
        y *= tl.sigmoid(y)
    at = row * (C + C2) + of_group
    tl.store(out_ptr + first_row * (C + C2) + at, y.to(out_ptr.dtype.element_ty), mask=here)


def launch(x: Tensor, *arguments) -> None:
    """Write y into out. The arguments are those of the op, checked; see `launches`."""
    for kernel, grid, values, constants in launches(x, *arguments):
        launch_kernel(kernel, grid, values, constants)


def launches(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    num_frames: int,
    silu: bool,
    out: Tensor,
    workspace: Tensor,
) -> list[tuple]:
    """(kernel, grid, arguments, constants) of each launch: one for sets that fit, else three."""
    images, channels, height, width = x.shape
    rows, sets = height * width, images // num_frames
    chunks, chunk_rows = chunk_plan(images, rows, num_frames)
    if rows * num_frames >= 2**31 - TILE:
        raise ValueError("group_norm_silu: backend='triton' takes sets of fewer than 2^31 pixels")
    given = {"WEIGHT": weight, "BIAS": bias, "SCALE": scale}
    there = {name: tensor is not None for name, tensor in given.items()}
    tensors = [x if t is None else t for t in (x, second, weight, bias, scale, shift)]
    parts = {"C": channels, "C2": 0 if second is None else second.shape[1]}
    channels = sum(parts.values())
    modulation = (1, channels) if scale is None else (images // len(scale), scale.stride(0))
    width = channels // num_groups

    together = 1  # groups that make 32 bytes of a row, a sector of memory
    while together * width * x.element_size() < 32 and num_groups % (2 * together) == 0:
        together *= 2
    whole = {"ROWS": triton.next_power_of_2(rows * num_frames)}
    whole |= {"BLOCK": triton.next_power_of_2(width)}
    held = together * whole["ROWS"] * whole["BLOCK"]
    if held <= SLAB and (scale is None or modulation[0] % num_frames == 0):
        constants = {**parts, "WIDTH": width, **there, "SILU": silu, "GROUPS": together, **whole}
        constants["num_warps"] = 4 if held <= TILE else 8
        numbers = (rows, num_frames, *modulation, eps)
        grid = (sets * num_groups // together,)
        return [(slab_kernel, grid, (*tensors, out, *numbers), constants)]

    block = min(MAX_BLOCK, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    tile_rows = min(TILE // block, triton.next_power_of_2(rows))
    tiles = triton.cdiv(rows, tile_rows)
    entries = min(ENTRIES, triton.next_power_of_2(chunks * width))
    groups = workspace[2 * sets * chunks * channels :]
    table = (rows * num_frames, chunk_rows, chunks)
    tile = {**parts, "ROWS": tile_rows, "BLOCK": block, "num_warps": 4}
    merge = {"C": channels, "WIDTH": width, "ENTRIES": entries, "num_warps": 4}
    return [
        (channel_kernel, (sets * chunks, blocks), (*tensors[:2], workspace, *table), tile),
        (group_kernel, (sets * num_groups,), (workspace, groups, *table, eps), merge),
        (
            apply_kernel,
            (images * tiles, blocks),
            (*tensors, groups, out, rows, tiles, num_frames, *modulation),
            {**tile, "WIDTH": width, **there, "SILU": silu},
        ),
    ]
