"""layer_norm_backward: the gradients of a layer norm, beside PyTorch's own backward."""

import pytest
import torch
import torch.nn.functional as F
from bench_layer_norm import CASES
from lib.harness import Row, Target, main
from lib.network_cases import DEVICE, backward_of, measure_op, normal

from vfengine.ops import layer_norm_backward, layer_norm_backward_reference

# None on a CPU: PyTorch's is faster, and what networks in training take there (`layer_norm_pays`).
TARGETS = [
    Target(case, "layer_norm_backward", "speedup_over_eager", 1)
    for case in CASES
    if DEVICE != "cpu"
]


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return grad_x; the exact one; bytes."""
    shape, dtype = CASES[case]
    grad, x = normal(*shape, dtype=dtype, seed=2), normal(*shape, dtype=dtype)
    weight = normal(shape[-1], seed=1)
    out = torch.empty_like(x)
    own = weight.to(dtype)

    def norm(x, weight, bias):
        return F.layer_norm(x, shape[-1:], weight, bias)

    calls = {
        "layer_norm_backward": lambda: layer_norm_backward(grad, x, weight, out=out)[0],
        "eager": backward_of(norm, x, own, own, grad=grad),
    }
    exact, *_ = layer_norm_backward_reference(grad.double(), x.double(), weight.double())
    return calls, exact, 3 * x.nbytes


def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    return [
        row
        for case in cases
        for row in measure_op(case, "layer_norm_backward", *contenders(case), seconds)
    ]


@pytest.mark.parametrize("case", CASES)
def bench_layer_norm_backward(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    benchmark(contenders(case)[0]["layer_norm_backward"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
