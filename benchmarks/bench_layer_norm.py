"""layer_norm: one read and one write of the rows, beside PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from lib.harness import Row, Target, main
from lib.network_cases import DTYPES, measure_op, normal

from vfengine.ops import layer_norm, layer_norm_reference

SHAPES = {"4096x112": (4096, 112), "16384x320": (16384, 320)}
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
TARGETS = [Target(case, "layer_norm", "speedup_over_eager", 1) for case in CASES]


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return what they wrote; the exact result; bytes."""
    shape, dtype = CASES[case]
    x, weight, bias = normal(*shape, dtype=dtype), normal(shape[-1], seed=1), normal(shape[-1])
    own = weight.to(dtype), bias.to(dtype)
    out = torch.empty_like(x)
    compiled = torch.compile(F.layer_norm, fullgraph=True)
    calls = {
        "layer_norm": lambda: layer_norm(x, weight, bias, out=out),
        "eager": lambda: F.layer_norm(x, shape[-1:], *own),
        "compiled": lambda: compiled(x, shape[-1:], *own),
    }
    return calls, layer_norm_reference(x.double(), weight.double(), bias.double()), 2 * x.nbytes


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    return [
        row for case in cases for row in measure_op(case, "layer_norm", *contenders(case), seconds)
    ]


@pytest.mark.parametrize("case", CASES)
def bench_layer_norm(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.inference_mode():
        benchmark(contenders(case)[0]["layer_norm"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
