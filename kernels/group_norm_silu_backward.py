"""The gradients of SiLU(norm(x) (1 + scale) + shift)          csrc/group_norm_silu_backward.h

grad, x, grad_x: [B, P, C] rows (channels_last memory). Five launches, without atomics, so that the
order of sums depends on the shape alone: the two of kernels/group_norm_silu.py give the statistics;
sums_kernel gives Σ du and Σ du x̂ of each channel in each chunk of an image's rows; merge_kernel
adds up the chunks of each image, and what a group's gradient loses; apply_kernel writes grad_x.
All in fp32. Three reads of x, two of grad, one write of grad_x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfengine.ops.group_norm_silu import chunk_plan

from .group_norm_silu import ENTRIES, MAX_BLOCK, TILE, channel_kernel, group_kernel
from .launch import launch_kernel, wait_for_inputs

PARTS = 8  # chunks that are added up at a time


@triton.jit
def load_terms(
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    image,
    channel,
    inside,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Of u = x̂ gain + offset: gain = weight (1 + scale) and offset, of channels of an image."""
    gain = tl.where(inside, 1.0, 0.0)
    offset = tl.zeros_like(gain)
    if WEIGHT:
        gain = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    if BIAS:
        offset = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    if SCALE:
        at = image.to(tl.int64) * C + channel
        more = 1.0 + tl.load(scale_ptr + at, mask=inside, other=0.0)
        gain *= more
        offset = offset * more + tl.load(shift_ptr + at, mask=inside, other=0.0)
    return gain, offset


@triton.jit
def before_silu(grad, normalised, gain, offset, SILU: tl.constexpr):
    """du of rows of channels."""
    if SILU:
        u = normalised * gain[None, :] + offset[None, :]
        s = tl.sigmoid(u)
        grad = grad * s * (1.0 + u * (1.0 - s))
    return grad


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "num_frames"])
def sums_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,  # x_ptr where there is none, and likewise the next three
    bias_ptr,
    scale_ptr,
    shift_ptr,
    group_ptr,  # [set, group, 2]: mean and 1 / deviation
    partial_ptr,  # [image, chunk, 2, channel]
    rows,
    chunk_rows,
    chunks,
    num_frames,
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # C / G
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ du and Σ du x̂ of BLOCK channels in one chunk of an image."""
    wait_for_inputs()
    image = tl.program_id(0) // chunks
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    group = 2 * (image // num_frames * (C // WIDTH) + channel // WIDTH)
    mean = tl.load(group_ptr + group, mask=inside, other=0.0)
    inverse = tl.load(group_ptr + group + 1, mask=inside, other=0.0)
    tables = weight_ptr, bias_ptr, scale_ptr, shift_ptr
    gain, offset = load_terms(*tables, image, channel, inside, C, WEIGHT, BIAS, SCALE)
    first = tl.program_id(0) % chunks * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    first_row = image.to(tl.int64) * rows
    plain = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < last)[:, None] & inside[None, :]
        at = (first_row + row)[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32)
        normalised = tl.where(here, (x - mean[None, :]) * inverse[None, :], 0.0)
        du = before_silu(grad, normalised, gain, offset, SILU)
        plain += tl.sum(du, 0)
        moment += tl.sum(du * normalised, 0)
    entry = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * C) + channel
    tl.store(entry, plain, mask=inside)
    tl.store(entry + C, moment, mask=inside)


@triton.jit(do_not_specialize=["rows", "chunks", "images", "num_frames"])
def merge_kernel(
    weight_ptr,  # partial_ptr where there is none, and so is scale_ptr
    scale_ptr,
    partial_ptr,
    sums_ptr,  # [2, image, channel]
    mean_ptr,  # [set, group, 2]: of gain du and gain du x̂
    rows,
    chunks,
    images,
    num_frames,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH, rounded up to a power of two
):
    """The sums of the images of one set and group, and what its gradient loses."""
    wait_for_inputs()
    groups: tl.constexpr = C // WIDTH
    at_set = tl.program_id(0) // groups
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    channel = tl.program_id(0) % groups * WIDTH + column
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for frame in range(0, num_frames):
        image = (at_set * num_frames + frame).to(tl.int64)
        plain = tl.zeros([PARTS, BLOCK], tl.float32)
        moment = tl.zeros([PARTS, BLOCK], tl.float32)
        for start in range(0, chunks, PARTS):
            chunk = start + tl.arange(0, PARTS)
            here = (chunk < chunks)[:, None] & inside[None, :]
            at = (image * chunks + chunk)[:, None] * (2 * C) + channel[None, :]
            plain += tl.load(partial_ptr + at, mask=here, other=0.0)
            moment += tl.load(partial_ptr + at + C, mask=here, other=0.0)
        of_image = tl.sum(plain, 0), tl.sum(moment, 0)
        tl.store(sums_ptr + image * C + channel, of_image[0], mask=inside)
        tl.store(sums_ptr + (images + image) * C + channel, of_image[1], mask=inside)
        none = partial_ptr
        tables = weight_ptr, none, scale_ptr, scale_ptr
        gain, _ = load_terms(*tables, image, channel, inside, C, WEIGHT, False, SCALE)
        first += gain * of_image[0]
        second += gain * of_image[1]
    size = rows.to(tl.float32) * num_frames * WIDTH
    tl.store(mean_ptr + 2 * tl.program_id(0), tl.sum(first, 0) / size)
    tl.store(mean_ptr + 2 * tl.program_id(0) + 1, tl.sum(second, 0) / size)


@triton.jit(do_not_specialize=["rows", "tiles", "num_frames"])
def apply_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,  # as in sums_kernel
    bias_ptr,
    scale_ptr,
    shift_ptr,
    group_ptr,
    mean_ptr,
    out_ptr,
    rows,
    tiles,  # of ROWS rows in an image
    num_frames,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,
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
    inside = channel < C
    group = 2 * (image // num_frames * (C // WIDTH) + channel // WIDTH)
    mean = tl.load(group_ptr + group, mask=inside, other=0.0)
    inverse = tl.load(group_ptr + group + 1, mask=inside, other=0.0)
    plain = tl.load(mean_ptr + group, mask=inside, other=0.0)
    moment = tl.load(mean_ptr + group + 1, mask=inside, other=0.0)
    tables = weight_ptr, bias_ptr, scale_ptr, shift_ptr
    gain, offset = load_terms(*tables, image, channel, inside, C, WEIGHT, BIAS, SCALE)
    here = (row < rows)[:, None] & inside[None, :]
    at = (image.to(tl.int64) * rows + row)[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32)
    normalised = (x - mean[None, :]) * inverse[None, :]
    du = before_silu(grad, normalised, gain, offset, SILU)
    out = du * gain[None, :] - plain[None, :] - normalised * moment[None, :]
    tl.store(out_ptr + at, (out * inverse[None, :]).to(out_ptr.dtype.element_ty), mask=here)


def launch(grad: Tensor, *arguments) -> None:
    """Write grad_x into out, and sums. Arguments are those of the op, checked; see `launches`."""
    for kernel, grid, values, constants in launches(grad, *arguments):
        launch_kernel(kernel, grid, values, constants)


def launches(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    num_frames: int,
    silu: bool,
    out: Tensor,
    sums: Tensor,
) -> list[tuple]:
    """(kernel, grid, arguments, constants) of each of the five launches."""
    images, channels, height, width = x.shape
    rows, sets = height * width, images // num_frames
    if rows * num_frames >= 2**31 - TILE:
        raise ValueError(
            "group_norm_silu_backward: backend='triton' takes sets of fewer than 2^31 pixels"
        )
    of_sets = chunk_plan(images, rows, num_frames)  # chunks, and rows of one
    of_images = chunk_plan(images, rows, 1)
    memory = {"dtype": torch.float32, "device": x.device}
    moments = torch.empty((sets, of_sets[0], channels, 2), **memory)
    groups, means = torch.empty((2, sets, num_groups, 2), **memory).unbind(0)
    partial = torch.empty((images, of_images[0], 2, channels), **memory)

    width = channels // num_groups
    block = min(MAX_BLOCK, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    tile_rows = min(TILE // block, triton.next_power_of_2(rows))
    tiles = triton.cdiv(rows, tile_rows)
    tile = {"C": channels, "ROWS": tile_rows, "BLOCK": block, "num_warps": 4}
    there = {"WEIGHT": weight is not None, "BIAS": bias is not None, "SCALE": scale is not None}
    form = {**tile, "WIDTH": width, **there, "SILU": silu}
    tables = [x if t is None else t for t in (weight, bias, scale, shift)]

    table = (rows * num_frames, of_sets[1], of_sets[0])
    entries = min(ENTRIES, triton.next_power_of_2(of_sets[0] * width))
    merged = {name: form[name] for name in ("C", "WIDTH", "WEIGHT", "SCALE")}
    merged |= {"PARTS": PARTS, "BLOCK": triton.next_power_of_2(width), "num_warps": 4}
    return [
        (channel_kernel, (sets * of_sets[0], blocks), (x, x, moments, *table), {**tile, "C2": 0}),
        (
            group_kernel,
            (sets * num_groups,),
            (moments, groups, *table, float(eps)),
            {"C": channels, "WIDTH": width, "ENTRIES": entries, "num_warps": 4},
        ),
        (
            sums_kernel,
            (images * of_images[0], blocks),
            (grad, x, *tables, groups, partial, rows, of_images[1], of_images[0], num_frames),
            form,
        ),
        (
            merge_kernel,
            (sets * num_groups,),
            (
                *(partial if t is None else t for t in (weight, scale)),
                *(partial, sums, means, rows, of_images[0], images, num_frames),
            ),
            merged,
        ),
        (
            apply_kernel,
            (images * tiles, blocks),
            (grad, x, *tables, groups, means, out, rows, tiles, num_frames),
            form,
        ),
    ]
