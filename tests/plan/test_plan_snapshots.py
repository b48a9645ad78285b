"""The kernel calls of planned networks' programs are those in plan_snapshots.json.

A snapshot is a list of lines: the arena, then one line per call, whose values are
    offset:rowsxwidth:dtype      a buffer of the arena
    @offset                      a place in one
    packed_3, bias_3             weights, by the order in which they are packed
    down.0.0.resnet.norm1.bias   a tensor of the network, as its state dict names it
    int32[9,64]:1f0a…            any other tensor; a table of taps with the hash of its contents
and numbers; fields that are 0 or false are left out. None of them depends on the machine. Where
calls are meant to change:

    python tests/plan/test_plan_snapshots.py --write
"""

import functools
import hashlib
import json
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from unittest import mock

import pytest
import torch
from pixel_model import pixel_config
from torch import Tensor

from vfengine.formats.checkpoint import read_config
from vfengine.models import (
    AutoencoderConfig,
    Decoder,
    Encoder,
    PlannedDecoder,
    PlannedEncoder,
    PlannedUNet,
    UNet,
    UNetConfig,
    vdm_config,
)
from vfengine.plan import forms, program
from vfengine.plan import network as planned

FILE = Path(__file__).with_name("plan_snapshots.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int32": torch.int32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PIXELS, SHIPPED = pixel_config(), read_config()
IMAGE = UNetConfig(
    block_out_channels=(16, 24),
    layers_per_block=(1, 1),
    spatial_attention=(False, True),
    temporal_attention=(False, False),
    temporal_conv=(False, False),
    head_dim=8,
)
VAE = AutoencoderConfig(block_out_channels=(8, 32), layers_per_block=1, norm_groups=8)
PARTS = {"decoder": (Decoder, PlannedDecoder), "encoder": (Encoder, PlannedEncoder)}
ONE_LEVEL = UNetConfig(
    block_out_channels=(128,),
    layers_per_block=(1,),
    spatial_attention=(False,),
    temporal_attention=(False,),
    temporal_conv=(False,),
)
DIFFUSERS = UNetConfig(  # as `load_unet` reads a UNet3DConditionModel
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 24),
    layers_per_block=(1, 1),
    spatial_attention=(True, False),
    temporal_attention=(True, False),
    mid_spatial_attention=True,
    mid_temporal_attention=True,
    temporal_conv=(True, True),
    temporal_conv_depth=4,
    temporal_self_attentions=2,
    transformer_depths=(2, 1),
    transformer_in_heads=3,
    context_dim=12,
    position_buckets=0,
    head_dim=8,
    head_dims=(8, 12),
    feed_forward_mult=4,
    scale_shift=False,
    norm_over_frames=True,
    norm_eps=1e-6,
    transformer_norm_eps=1e-6,
    any_size=True,
)
# a configuration, its dtypes, and shapes [B, N, C, H, W] each with the length of a context; bf16
# takes the last of them alone
CASES = {
    "shipped base": (SHIPPED.base, ["fp32"], [((2, 1, 8, 16, 16), 40)]),
    "shipped residual": (SHIPPED.residual, ["fp32", "bf16"], [((2, 16, 16, 16, 16), 40)]),
    "pixels, base": (
        PIXELS.base,
        ["fp32"],
        [((1, 1, 3, 64, 64), None), ((8, 1, 3, 64, 64), None)],
    ),
    "pixels, residual": (
        PIXELS.residual,
        ["fp32", "bf16"],
        [((1, 4, 6, 64, 64), None), ((2, 16, 6, 64, 64), None)],
    ),
    "image": (IMAGE, ["fp32"], [((2, 1, 3, 8, 8), None), ((2, 1, 3, 24, 16), None)]),
    "image, context, odd sizes": (
        replace(IMAGE, context_dim=12, num_classes=3, any_size=True, scale_shift=False),
        ["fp32"],
        [((2, 1, 3, 7, 5), 77), ((1, 1, 3, 29, 31), 77), ((2, 1, 3, 7, 5), None)],
    ),
    "image, patches of 2": (
        replace(IMAGE, patch_size=2, feed_forward_mult=0),
        ["fp32"],
        [((2, 1, 3, 16, 24), None)],
    ),
    "plain video": (
        vdm_config(IMAGE),
        ["fp32"],
        [((1, 3, 3, 8, 8), None), ((2, 5, 3, 8, 8), None)],
    ),
    "diffusers video": (
        DIFFUSERS,
        ["fp32", "bf16"],
        [((1, 3, 4, 9, 7), 5), ((2, 4, 4, 8, 12), None)],
    ),
    "narrow transformer first, frame embedding": (
        replace(
            IMAGE,
            transformer_in_heads=1,
            frame_embedding=True,
            temporal_attention=(True, False),
            context_dim=12,
            spatial_attention=(True, True),
        ),
        ["fp32"],
        [((1, 2, 3, 6, 6), None), ((2, 4, 3, 6, 6), 3)],
    ),
    "one level": (ONE_LEVEL, ["fp32"], [((2, 1, 3, 5, 3), None)]),
    "one level, temporal convolutions": (
        replace(ONE_LEVEL, temporal_conv=(True,), scale_shift=False),
        ["fp32"],
        [((2, 3, 3, 4, 5), None)],
    ),
    "too many channels to be transformed": (
        replace(IMAGE, block_out_channels=(8, 648), layers_per_block=(0, 0), mid_blocks=1),
        ["fp32"],
        [((1, 1, 3, 4, 4), None)],
    ),
    "decoder": (VAE, ["fp32", "bf16"], [((2, 4, 3, 5), None)]),  # of latents [B, C, h, w]
    "encoder": (VAE, ["fp32", "bf16"], [((2, 3, 6, 10), None)]),  # of pictures [B, 3, H, W]
}
SNAPSHOTS = {
    f"{case}, {dtype}, {'x'.join(map(str, shape))}, context {length}": (case, dtype, shape, length)
    for case, (_, dtypes, shapes) in CASES.items()
    for dtype in dtypes
    for shape, length in (shapes if dtype == "fp32" else shapes[-1:])
}


@functools.lru_cache(maxsize=1)
def plan(case: str, dtype: str) -> tuple[planned.PlannedNetwork, dict[int, str]]:
    """The network, and the names of its tensors by address; bf16 as AVX512_BF16 runs it."""
    make, form = PARTS.get(case, (UNet, PlannedUNet))
    module = make(CASES[case][0])
    parameters = dict(module.named_parameters())
    with (
        mock.patch.object(planned, "inference_dtype", lambda dtype: dtype),
        mock.patch.object(forms, "in_tiles", lambda dtype: False),
    ):
        network = form(module, DTYPES[dtype])
    named = {**parameters, **dict(network.named_buffers())}
    return network, {tensor.data_ptr(): name for name, tensor in named.items() if tensor.numel()}


def snapshot(case: str, dtype: str, shape: tuple[int, ...], length: int | None) -> list[str]:
    """The lines of one program; only this function knows how programs are stored."""
    network, names = plan(case, dtype)
    context = None if length is None else (shape[0], length, network.config.context_dim)
    inputs = (shape, context) if isinstance(network, PlannedUNet) else (shape,)
    forward = network._forward(*inputs)
    kept = {tensor.data_ptr(): tensor for tensor in forward.program._kept}

    def text(value: object) -> str:
        if isinstance(value, program.Rows):
            offset = forward.program.offset(value)
            return f"{offset}:{value.count}x{value.width}:{NAMES[value.dtype]}"
        if isinstance(value, program.Place):
            return f"@{forward.program.offset(value)}"
        if isinstance(value, program.Struct):
            given = {name: part for name, part in value.fields.items() if part != 0}
            return f"({', '.join(f'{name}={text(part)}' for name, part in given.items())})"
        if isinstance(value, tuple):
            return f"({', '.join(map(text, value))})"
        if isinstance(value, float):
            return f"{value:.9g}"  # a scale's last bit is the C library's
        return names.get(value) or describe(kept[value]) if value in kept else repr(value)

    ends = {name: getattr(forward, name) for name in ("x", "embedding", "context", "out")}
    arena = f"arena of {forward.program.arena.nbytes} bytes"
    return [
        ", ".join([arena, *(f"{name} {text(rows)}" for name, rows in ends.items())]),
        *(f"{op}_cpu{text(args)}" for op, args in forward.program._unbound),
    ]


def describe(tensor: Tensor) -> str:
    """Its dtype and shape, and the contents of integers."""
    text = f"{NAMES[tensor.dtype]}[{','.join(map(str, tensor.shape))}]"
    if tensor.dtype is not torch.int32:
        return text
    return f"{text}:{hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:12]}"


@functools.cache
def recorded() -> dict[str, list[str]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_program_is_as_recorded(name):
    lines = zip_longest(recorded()[name], snapshot(*SNAPSHOTS[name]), fillvalue="nothing")
    for number, (before, now) in enumerate(lines):
        where = f"call {number}" if number else "the arena"
        assert now == before, f"{name}: {where} was\n{before}\nand is now\n{now}"


def test_record_has_these_programs_and_no_others():
    assert list(recorded()) == list(SNAPSHOTS)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_plan_snapshots.py --write")
    lines = {name: snapshot(*arguments) for name, arguments in SNAPSHOTS.items()}
    FILE.write_text(json.dumps(lines, indent=0) + "\n", encoding="utf-8")
