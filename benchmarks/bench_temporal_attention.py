"""temporal_attention: one read of qkv and one write, beside what the networks did before.

That is a permutation to [B, P, H, N, D], attention ("math" of vfengine/ops/attention.py, or
torch's SDPA) and a permutation back. Frames of 16 x 16 and 32 x 32 pixels, with a bias.
"""

import functools

import pytest
import torch
from lib.harness import Row, Target, main
from lib.network_cases import DEVICE, DTYPES, measure_op, normal

from vfengine.ops import temporal_attention, temporal_attention_reference
from vfengine.ops.attention import attend

# B, N, P, H, D
SHAPES = {
    "16x256 pixels, 7 heads of 16": (1, 16, 256, 7, 16),
    "16x1024 pixels, 5 heads of 64": (2, 16, 1024, 5, 64),
    "64x256 pixels, 2 heads of 64": (1, 64, 256, 2, 64),
}
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
TARGETS = {
    "cpu": [
        *(Target(case, "temporal_attention", "speedup_over_eager", 2) for case in CASES),
        *(Target(case, "temporal_attention", "speedup_over_sdpa", 2) for case in CASES),
    ],
    # None for the small shape, whose time is that of its launch.
    "cuda": [
        Target(case, "temporal_attention", "of_copy", 75) for case in CASES if "heads of 64" in case
    ],
}[DEVICE]


def written(qkv, heads, bias, backend="math"):
    """Permuted, attended, permuted back."""
    rows = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 2, 4, 1, 5)  # [3, B, P, H, N, D]
    y = attend(*rows.unbind(0), bias, backend=backend)
    return y.permute(0, 3, 1, 2, 4).flatten(-2)


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return what they wrote; the exact result; bytes."""
    (batch, frames, pixels, heads, head_dim), dtype = CASES[case]
    qkv = normal(batch, frames, pixels, 3 * heads * head_dim, dtype=dtype)
    bias = normal(heads, frames, frames, seed=1)
    out = qkv.new_empty(*qkv.shape[:-1], heads * head_dim)
    also = torch.empty_like(out)
    compiled = torch.compile(written, fullgraph=True)
    calls = {
        "temporal_attention": lambda: temporal_attention(qkv, heads, bias, out=out),
        "eager": lambda: written(qkv, heads, bias),
        "sdpa": lambda: written(qkv, heads, bias, "sdpa"),
        "compiled": lambda: compiled(qkv, heads, bias),
    }
    if DEVICE == "cuda":
        for backend in ("cuda", "triton"):
            calls[backend] = functools.partial(
                temporal_attention, qkv, heads, bias, out=also, backend=backend
            )
    exact = temporal_attention_reference(qkv.double(), heads, bias)
    return calls, exact, qkv.nbytes + out.nbytes


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    rows = []
    for case in cases:
        mine = measure_op(case, "temporal_attention", *contenders(case), seconds)
        time = {row.contender: row.value for row in mine if row.metric == "time"}
        ratio = time["sdpa"] / time["temporal_attention"]
        rows += [*mine, Row(case, "temporal_attention", "speedup_over_sdpa", ratio, "x")]
    return rows


@pytest.mark.parametrize("case", CASES)
def bench_temporal_attention(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.inference_mode():
        benchmark(contenders(case)[0]["temporal_attention"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
