"""What the benches of the ops that networks use share: device, inputs, and how close is close."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Row, compare
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=random).to(DEVICE, dtype)


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
    peer = calls["eager"]()
    for name, call in calls.items():
        verify(f"{case}: {name}", call(), exact, peer)
    baseline = {"baseline": "eager", "device": DEVICE, "seconds": seconds}
    rows = compare(case, calls, moved_bytes, **baseline)
    if "compiled" in calls:
        time = {row.contender: row.value for row in rows if row.metric == "time"}
        ratio = time["compiled"] / time[op]
        rows.append(Row(case, op, "speedup_over_compiled", ratio, "x"))
    return rows


def verify(name: str, out: Tensor, exact: Tensor, peer: Tensor) -> None:
    """ValueError where the error is over twice that of PyTorch's own ops, plus one rounding.

    exact: in fp64; peer: the same in PyTorch's own operations, in out's dtype
    """
    rounding = exact.abs().max() * torch.finfo(out.dtype).eps / 2
    error, of_peer = ((x.double() - exact).abs().max() for x in (out, peer))
    if not error <= 2 * of_peer + rounding:
        raise ValueError(f"{name} is off by {error:.3g}, eager PyTorch by {of_peer:.3g}")
