"""geglu: one read of both halves and one write of the product, beside PyTorch's own ops."""

import pytest
import torch
import torch.nn.functional as F
from lib.harness import Row, Target, main
from lib.network_cases import DTYPES, measure_op, normal

from vfengine.ops import geglu, geglu_reference

SHAPES = {"4096x2x448": (4096, 896), "16384x2x1280": (16384, 2560)}
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
TARGETS = [Target(case, "geglu", "speedup_over_eager", 1.5) for case in CASES]


def written(x):
    """The same in PyTorch's own operations, in the rows' dtype."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return what they wrote; the exact result; bytes."""
    shape, dtype = CASES[case]
    x = normal(*shape, dtype=dtype)
    out = x.new_empty(shape[0], shape[1] // 2)
    compiled = torch.compile(written, fullgraph=True)
    calls = {
        "geglu": lambda: geglu(x, out=out),
        "eager": lambda: written(x),
        "compiled": lambda: compiled(x),
    }
    return calls, geglu_reference(x.double()), x.nbytes + out.nbytes


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    return [row for case in cases for row in measure_op(case, "geglu", *contenders(case), seconds)]


@pytest.mark.parametrize("case", CASES)
def bench_geglu(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.inference_mode():
        benchmark(contenders(case)[0]["geglu"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
