"""temporal_attention_backward: with nothing permuted, beside PyTorch's own backward.

That is of a permutation to [B, P, H, N, D], attention ("math" of vfengine/ops/attention.py, or on
CUDA torch's SDPA) and a permutation back.
"""

import pytest
import torch
from bench_temporal_attention import SHAPES, written
from lib.harness import Row, Target, main
from lib.network_cases import DEVICE, DTYPES, backward_of, measure_op, normal

from vfengine.ops import temporal_attention_backward, temporal_attention_backward_reference

SHAPES = {
    **SHAPES,
    "16x16 pixels, 17 heads of 16": (1, 16, 16, 17, 16),
    "16x64 pixels, 2 heads of 64": (1, 16, 64, 2, 64),
}
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
TARGETS = [
    Target(case, "temporal_attention_backward", "speedup_over_eager", 1.25) for case in CASES
]


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return grad_qkv; the exact one; bytes."""
    (batch, frames, pixels, heads, head_dim), dtype = CASES[case]
    qkv = normal(batch, frames, pixels, 3 * heads * head_dim, dtype=dtype)
    grad = normal(batch, frames, pixels, heads * head_dim, dtype=dtype, seed=2)
    bias = normal(heads, frames, frames, seed=1)
    out = torch.empty_like(qkv)

    def attention(qkv, bias):
        return written(qkv, heads, bias, "sdpa" if DEVICE == "cuda" else "math").to(dtype)

    calls = {
        "temporal_attention_backward": lambda: temporal_attention_backward(
            grad, qkv, heads, bias, out=out
        )[0],
        "eager": backward_of(attention, qkv, bias, grad=grad),
    }
    exact, _ = temporal_attention_backward_reference(grad.double(), qkv.double(), heads, bias)
    return calls, exact, grad.nbytes + 2 * qkv.nbytes


def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    return [
        row
        for case in cases
        for row in measure_op(case, "temporal_attention_backward", *contenders(case), seconds)
    ]


@pytest.mark.parametrize("case", CASES)
def bench_temporal_attention_backward(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    benchmark(contenders(case)[0]["temporal_attention_backward"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
