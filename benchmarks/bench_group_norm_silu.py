"""group_norm_silu: two reads of x and one write, beside PyTorch's own ops.

With scale, shift and SiLU, on activations of a residual network (statistics over 16 frames) and of
a larger one. Bytes are 2 reads + 1 write; on a GPU 1 read + 1 write, as x is still in L2 when it is
read again.
"""

import pytest
import torch
import torch.nn.functional as F
from lib.harness import Row, Target, main
from lib.network_cases import DEVICE, DTYPES, measure_op, normal

from vfengine.ops import group_norm_silu, group_norm_silu_reference

# B, C, H, W; groups; num_frames
SHAPES = {
    "16x64x16x16": ((16, 64, 16, 16), 8, 16),
    "32x320x32x32": ((32, 320, 32, 32), 32, 16),
}
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
PASSES = {"cpu": 3, "cuda": 2}
TARGETS = {
    "cpu": [
        *(Target(case, "group_norm_silu", "speedup_over_eager", 2) for case in CASES),
        *(Target(case, "group_norm_silu", "speedup_over_compiled", 1) for case in CASES),
    ],
    # None for the small shape, whose time is that of its launches.
    "cuda": [Target(case, "group_norm_silu", "of_copy", 80) for case in CASES if "x320x" in case],
}[DEVICE]


def written(x, groups, frames, weight, bias, scale, shift):
    """The same in PyTorch's own operations, in the dtype of x."""
    clips = x.unflatten(0, (-1, frames)).transpose(1, 2)
    y = F.group_norm(clips, groups, weight.to(x.dtype), bias.to(x.dtype))
    y = y.transpose(1, 2).reshape(x.shape)
    y = y * (1 + scale.to(x.dtype)[:, :, None, None]) + shift.to(x.dtype)[:, :, None, None]
    return F.silu(y)


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return what they wrote; the exact result; bytes."""
    (shape, groups, frames), dtype = CASES[case]
    batch, channels = shape[:2]
    x = normal(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    tables = {"weight": normal(channels), "bias": normal(channels, seed=3)}
    tables |= {"scale": normal(batch, channels), "shift": normal(batch, channels, seed=4)}
    out, also = torch.empty_like(x), torch.empty_like(x)
    compiled = torch.compile(written, fullgraph=True)
    options = {**tables, "num_frames": frames}
    calls = {
        "group_norm_silu": lambda: group_norm_silu(x, groups, **options, out=out),
        "eager": lambda: written(x, groups, frames, **tables),
        "compiled": lambda: compiled(x, groups, frames, **tables),
    }
    if DEVICE == "cuda":
        calls["triton"] = lambda: group_norm_silu(x, groups, **options, out=also, backend="triton")
    exact = group_norm_silu_reference(x.double(), groups, **options)
    return calls, exact, PASSES[DEVICE] * x.nbytes


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    rows = []
    for case in cases:
        rows += measure_op(case, "group_norm_silu", *contenders(case), seconds)
    return rows


@pytest.mark.parametrize("case", CASES)
def bench_group_norm_silu(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.inference_mode():
        benchmark(contenders(case)[0]["group_norm_silu"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
