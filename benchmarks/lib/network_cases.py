"""Shared code of the benches of network ops: device, inputs, and tolerances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib.harness import Row, compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = ("cuda", "triton")  # contenders that are kernels of ours, beside the op's own name
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=random).to(DEVICE, dtype)


def backward_of(function: Callable[..., Tensor], *inputs: Tensor, grad: Tensor) -> Callable:
    """A call of PyTorch's own backward of function(*inputs), that returns the first's gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(*leaves)

    def call() -> Tensor:
        with torch.inference_mode(False):
            return torch.autograd.grad(y, leaves, grad, retain_graph=True)[0]

    return call


def measure_op(
    case: str,
    op: str,
    calls: dict[str, Callable[[], Tensor]],
    exact: Tensor,
    moved_bytes: int,
    seconds: float,
) -> list[Row]:
    """Checks every call's result, then times them beside a copy and over "eager".

    calls: `op` and "eager", which is written in PyTorch's own operations, among others
    exact: in fp64
    """
    verify(case, op, calls, exact)
    baseline = {"baseline": "eager", "device": DEVICE, "seconds": seconds}
    rows = compare(case, calls, moved_bytes, **baseline)
    if "compiled" in calls:
        time = {row.contender: row.value for row in rows if row.metric == "time"}
        ratio = time["compiled"] / time[op]
        rows.append(Row(case, op, "speedup_over_compiled", ratio, "x"))
    return rows


def verify(case: str, op: str, calls: dict[str, Callable[[], Tensor]], exact: Tensor) -> None:
    """ValueError for the first contender that is wrong (see `error_of`)."""
    eager = calls["eager"]()
    for name, call in calls.items():
        if problem := error_of(call(), exact, eager if name in (op, *OURS) else None):
            raise ValueError(f"{case}: {name} {problem}")


def error_of(out: Tensor, exact: Tensor, eager: Tensor | None) -> str | None:
    """What is wrong with a result, if anything.

    exact: in fp64
    eager: the same in PyTorch's own operations, for a kernel of ours: its error may be twice that,
           plus one rounding. None: another library's kernel, which must compute the same function
    """
    largest, eps = exact.abs().max(), torch.finfo(out.dtype).eps
    error = (out.double() - exact).abs().max()
    if eager is None:
        return None if error <= 0.05 * largest else f"is off by {error:.3g} of {largest:.3g}"
    of_eager = (eager.double() - exact).abs().max()
    if error <= 2 * of_eager + largest * eps / 2:
        return None
    return f"is off by {error:.3g}, eager PyTorch by {of_eager:.3g}"
