"""residual_step: two reads and one write of the clip, beside eager PyTorch and torch.compile.

A DDIM step (sigma = 0) of the default clip, and of eight of them, which leave the caches.
"""

import pytest
import torch
from harness import Row, compare, main

from vfengine.ops import residual_step, residual_step_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    f"{name} {'x'.join(map(str, shape))}": (shape, dtype)
    for shape in ((1, 16, 3, 64, 64), (8, 16, 3, 64, 64))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}


def eager(u, r, g, lam, coeffs, step):
    """The formula as one would write it, in the dtype of the clip; coeffs on the host."""
    c1, c2, _ = coeffs[step]
    shared, own = lam.sqrt().view(-1, 1, 1, 1), (1 - lam).sqrt().view(-1, 1, 1, 1)
    return c1 * u + shared.to(u.dtype) * g.unsqueeze(1) + (own * c2).to(u.dtype) * r


def contenders(shape, dtype):
    """Calls that return what they wrote, and the bytes that a call must move."""
    random = torch.Generator().manual_seed(0)
    u, r = (torch.randn(shape, generator=random).to(DEVICE, dtype) for _ in range(2))
    g, lam = r[:, 0].contiguous(), torch.full((shape[1],), 0.5, device=DEVICE)
    coeffs = torch.tensor([[0.98, -0.11, 0.0]])  # c1 < 1: repeated in place it stays bounded
    on_device = coeffs.to(DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rows = coeffs.tolist()
    compiled = torch.compile(eager, fullgraph=True)
    mine = u.clone()
    calls = {
        "vfengine": lambda: residual_step(mine, r, g, lam, *on_device),
        "eager": lambda: eager(u, r, g, lam, rows, 0),
        "torch.compile": lambda: compiled(u, r, g, lam, rows, 0),
    }
    if DEVICE == "cuda":
        also_mine = u.clone()
        calls["triton"] = lambda: residual_step(also_mine, r, g, lam, *on_device, backend="triton")
    expected = residual_step_reference(u.double(), r, g, lam, *on_device)
    scale = expected.abs().max() * torch.finfo(dtype).eps
    for name, call in calls.items():
        error = (call().double() - expected).abs().max()
        if error > 4 * scale:
            raise ValueError(f"{name} is off by {error:.3g}")
    return calls, (3 * u.numel() + g.numel()) * u.element_size()


def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    rows = []
    for case in cases:
        calls, moved = contenders(*CASES[case])
        rows += compare(case, calls, moved, baseline="eager", device=DEVICE, seconds=seconds)
    return rows


@pytest.mark.parametrize("case", CASES)
def bench_residual_step(benchmark, case):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(0.5, (case,))]
    calls, _ = contenders(*CASES[case])
    benchmark(calls["vfengine"])


if __name__ == "__main__":
    main(measure, __doc__)
