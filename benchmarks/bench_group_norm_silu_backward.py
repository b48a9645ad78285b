"""group_norm_silu_backward: three reads of x, two of ∂y, one write, beside PyTorch's autograd.

PyTorch computes it as training without the op would: in fp32, forward and back.
"""

import pytest
import torch
import torch.nn.functional as F
from lib.harness import Row, Target, main
from lib.network_cases import DTYPES, measure_op, normal

from vfengine.ops import group_norm_silu_backward, group_norm_silu_backward_reference

SHAPES = {"32x96x16x16": (32, 96, 16, 16), "32x160x4x4": (32, 160, 4, 4)}
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
TARGETS = [
    Target(case, "group_norm_silu_backward", "speedup_over_eager", 2)
    for case in CASES
    if "x16x16" in case
]


def written(grad, x, groups, weight, bias, scale, shift):
    """∂x in PyTorch's own operations."""
    with torch.enable_grad():
        given = x.detach().requires_grad_()
        y = F.group_norm(given.float(), groups, weight, bias)
        y = F.silu(y * (1 + scale[..., None, None]) + shift[..., None, None])
        return torch.autograd.grad(y.to(x.dtype), given, grad)[0]


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return ∂x; the exact result; bytes."""
    shape, dtype = CASES[case]
    x, grad = (
        normal(*shape, dtype=dtype, seed=seed).to(memory_format=torch.channels_last)
        for seed in (0, 1)
    )
    weight, bias = normal(shape[1], seed=2), normal(shape[1], seed=3)
    scale, shift = normal(shape[0], 2 * shape[1], seed=4).chunk(2, 1)
    tables = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    calls = {
        "group_norm_silu_backward": lambda: group_norm_silu_backward(grad, x, 8, **tables)[0],
        "eager": lambda: written(grad, x, 8, *tables.values()),
    }
    exact = {name: table.double() for name, table in tables.items()}
    exact_x, _ = group_norm_silu_backward_reference(grad.double(), x.double(), 8, **exact)
    return calls, exact_x, 3 * x.nbytes


@torch.no_grad()
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    op = "group_norm_silu_backward"
    return [row for case in cases for row in measure_op(case, op, *contenders(case), seconds)]


@pytest.mark.parametrize("case", CASES)
def bench_group_norm_silu_backward(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.no_grad():
        benchmark(contenders(case)[0]["group_norm_silu_backward"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
