"""The single ops that bench_unet.py times beside PyTorch's, and the ceiling of convolutions.

Shapes are those of the UNet3D of channels (64, 128, 256) on 16 frames of 32 x 32, bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.harness import Contender, Row, compare
from lib.unet_contenders import OURS, by_unit, relative_error, require_accuracy
from vfengine import ops

SDPA, TORCH = "SDPA", "PyTorch"
FRAMES, HEADS, DIM = 16, 2, 32
WIDTHS = (64, 128, 192, 256)  # of the convolutions; the best of them is the ceiling


@dataclass(frozen=True)
class Op:
    """Calls on the same bf16 tensors, and what they should return.

    exact    the baseline's formula in fp32
    moved    bytes that must be read and written
    flops    of the products, 0: not an op that counts them
    """

    calls: Mapping[str, Contender]
    exact: Tensor
    baseline: str
    moved: int
    flops: int = 0


def sdpa_temporal(qkv: Tensor, num_heads: int) -> Tensor:
    """qkv [B, N, P, 3*H*D] -> [B, N, P, H*D]: each pixel's frames attend to one another."""
    b, n, p, width = qkv.shape
    split = qkv.view(b, n, p, 3, num_heads, width // 3 // num_heads)
    q, k, v = split.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # each [B*P, H, N, D]
    out = F.scaled_dot_product_attention(q, k, v)
    return out.view(b, p, num_heads, n, -1).permute(0, 3, 1, 2, 4).reshape(b, n, p, width // 3)


def sdpa_spatial(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """q [F, Sq, H*D], k and v [F, Sk, H*D] -> [F, Sq, H*D]."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def temporal_attention(pixels: int = 1024) -> Op:
    qkv = _normal(1, FRAMES, pixels, 3 * HEADS * DIM)
    return Op(
        calls={
            OURS: lambda: ops.temporal_attention(qkv, HEADS),
            SDPA: lambda: sdpa_temporal(qkv, HEADS),
        },
        exact=sdpa_temporal(qkv.float(), HEADS),
        baseline=SDPA,
        moved=qkv.nbytes + qkv.nbytes // 3,
        flops=4 * pixels * HEADS * FRAMES * FRAMES * DIM,
    )


def spatial_attention(tokens: int = 1024) -> Op:
    q, k, v = (_normal(FRAMES, tokens, HEADS * DIM) for _ in range(3))
    return Op(
        calls={
            OURS: lambda: ops.spatial_attention(q, k, v, HEADS),
            SDPA: lambda: sdpa_spatial(q, k, v, HEADS),
        },
        exact=sdpa_spatial(q.float(), k.float(), v.float(), HEADS),
        baseline=SDPA,
        moved=4 * q.nbytes,
        flops=4 * FRAMES * HEADS * tokens * tokens * DIM,
    )


def group_norm_silu(channels: int = 128, pixels: int = 32, groups: int = 32) -> Op:
    """PyTorch's two kernels, in bf16 on channels_last as a UNet of diffusers calls them."""
    x = _normal(FRAMES, channels, pixels, pixels).to(memory_format=torch.channels_last)
    weight, bias = 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)
    half = weight.bfloat16(), bias.bfloat16()

    def exact(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x.float(), groups, weight, bias))

    return Op(
        calls={
            OURS: lambda: ops.group_norm_silu(x, num_groups=groups, weight=weight, bias=bias),
            TORCH: lambda: F.silu(F.group_norm(x, groups, *half)),
            f"{TORCH}, in fp32": lambda: exact(x).to(x.dtype),
        },
        exact=exact(x),
        baseline=TORCH,
        moved=2 * x.nbytes,
    )


OPS: dict[str, Callable[[], Op]] = {
    "temporal_attention": temporal_attention,
    "spatial_attention": spatial_attention,
    "group_norm_silu": group_norm_silu,
}
SPEEDUPS = {
    "temporal_attention": by_unit(6.0, 5.0),
    "spatial_attention": by_unit(2.0, 2.6),
    "group_norm_silu": 4.0,
}
BASELINES = {"temporal_attention": SDPA, "spatial_attention": SDPA, "group_norm_silu": TORCH}
DESCRIPTIONS = {
    "temporal_attention": "1,024 pixels x 2 heads x 16 frames x 32, bf16",
    "spatial_attention": "16 frames x 2 heads x 1,024 tokens x 32, bf16",
    "group_norm_silu": "16x128x32x32 channels_last, 32 groups, bf16",
}


def op_rows(name: str, seconds: float) -> list[Row]:
    """Checks every contender, ours within twice the baseline's error; then times them in turns."""
    torch.manual_seed(0)
    with torch.no_grad():
        op = OPS[name]()
        errors = {who: relative_error(call(), op.exact) for who, call in op.calls.items()}
        require_accuracy(name, errors, op.baseline, 2.0)
        rows = [Row(name, who, "error", 1e3 * value, "1e-3") for who, value in errors.items()]
        timed = compare(name, dict(op.calls), op.moved, baseline=op.baseline, seconds=seconds)
    rows += timed
    rows += [
        Row(name, row.contender, "arithmetic", op.flops / row.value / 1e3, "GFLOP/s")
        for row in timed
        if op.flops and row.metric == "time" and row.contender in op.calls
    ]
    return rows


def convolutions(calls: int = 5) -> dict[str, tuple[Contender, int]]:
    """3 x 3, oneDNN, channels_last, bf16, weights packed ahead: (so many calls, their FLOPs)."""
    return {f"conv 3x3, {width}": convolution(width, calls) for width in WIDTHS}


def convolution(width: int, calls: int, pixels: int = 32) -> tuple[Contender, int]:
    x = _normal(FRAMES, width, pixels, pixels).to(memory_format=torch.channels_last)
    one, shape = [1, 1], list(x.shape)
    weight = _normal(width, width, 3, 3)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, one, one, one, 1, shape)
    convolve = torch.ops.mkldnn._convolution_pointwise

    def run() -> None:
        with torch.no_grad():
            for _ in range(calls):
                convolve(x, packed, None, one, one, one, 1, "none", [], "")

    return run, calls * 2 * x.numel() * width * 9


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()
