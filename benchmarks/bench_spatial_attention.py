"""spatial_attention: pixels to pixels and pixels to context, beside math and torch's SDPA.

q, k and v are read from the rows of one projection; what it is compared with takes views of them.
Bytes are one read of q, k, v and one write.
"""

import pytest
import torch
from lib.harness import Row, Target, main
from lib.network_cases import DTYPES, measure_op, normal

from vfengine.ops import spatial_attention, spatial_attention_reference
from vfengine.ops.attention import attend

# F, Sq, Sk (0: q's own rows), H, D
SHAPES = {
    "16 frames, 64 pixels, 7 heads of 16": (16, 64, 0, 7, 16),
    "16 frames, 1024 pixels, 5 heads of 64": (16, 1024, 0, 5, 64),
    "16 frames, 1024 pixels to 77, 5 heads of 64": (16, 1024, 77, 5, 64),
}
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
TARGETS = [Target(case, "spatial_attention", "speedup_over_sdpa", 1) for case in CASES]


def written(q, k, v, heads, backend="math"):
    """Split into heads, attended, put together."""
    k, v = (t.expand(len(q), -1, -1) for t in (k, v))
    rows = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attend(*rows, backend=backend).transpose(1, 2).flatten(-2)


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return what they wrote; the exact result; bytes."""
    (frames, q_len, k_len, heads, head_dim), dtype = CASES[case]
    width = heads * head_dim
    if k_len == 0:
        q, k, v = normal(frames, q_len, 3 * width, dtype=dtype).chunk(3, -1)
    else:
        q = normal(frames, q_len, width, dtype=dtype)
        k, v = normal(1, k_len, 2 * width, dtype=dtype, seed=1).chunk(2, -1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    calls = {
        "spatial_attention": lambda: spatial_attention(q, k, v, heads, out=out),
        "eager": lambda: written(q, k, v, heads),
        "sdpa": lambda: written(q, k, v, heads, "sdpa"),
    }
    exact = spatial_attention_reference(q.double(), k.double(), v.double(), heads)
    return calls, exact, 2 * out.nbytes + k.nbytes + v.nbytes


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    rows = []
    for case in cases:
        mine = measure_op(case, "spatial_attention", *contenders(case), seconds)
        time = {row.contender: row.value for row in mine if row.metric == "time"}
        ratio = time["sdpa"] / time["spatial_attention"]
        rows += [*mine, Row(case, "spatial_attention", "speedup_over_sdpa", ratio, "x")]
    return rows


@pytest.mark.parametrize("case", CASES)
def bench_spatial_attention(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.inference_mode():
        benchmark(contenders(case)[0]["spatial_attention"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
