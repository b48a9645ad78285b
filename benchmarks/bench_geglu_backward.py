"""geglu_backward: one read of grad and x and one write, beside PyTorch's own backward."""

import pytest
import torch
from bench_geglu import CASES, written
from lib.harness import Row, Target, main
from lib.network_cases import backward_of, measure_op, normal

from vfengine.ops import geglu_backward, geglu_backward_reference

TARGETS = [Target(case, "geglu_backward", "speedup_over_eager", 1.5) for case in CASES]


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return grad_x; the exact one; bytes."""
    (rows, width), dtype = CASES[case]
    grad, x = normal(rows, width // 2, dtype=dtype, seed=1), normal(rows, width, dtype=dtype)
    out = torch.empty_like(x)
    calls = {
        "geglu_backward": lambda: geglu_backward(grad, x, out=out),
        "eager": backward_of(written, x, grad=grad),
    }
    exact = geglu_backward_reference(grad.double(), x.double())
    return calls, exact, grad.nbytes + 2 * x.nbytes


def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    return [
        row
        for case in cases
        for row in measure_op(case, "geglu_backward", *contenders(case), seconds)
    ]


@pytest.mark.parametrize("case", CASES)
def bench_geglu_backward(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    benchmark(contenders(case)[0]["geglu_backward"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
