"""The card's ceilings: copies in memory and in L2, a bf16 matrix product, a node of a graph."""

from __future__ import annotations

import torch
from lib.harness import timed_turns

from gpu_run.sections import DEVICE, DRY, emit

COPIES = {"copy 2 GiB": 2**31, "copy 24 MiB": 24 * 2**20}  # bytes read and written
SIDE = 128 if DRY else 8192


def main() -> None:
    for case, moved in COPIES.items():
        source = torch.ones(moved // (2000 if DRY else 2), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        measure(case, lambda t=target, s=source: t.copy_(s), "bandwidth", moved / 1e9, "GB/s")
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    flops = 2 * SIDE**3
    measure("matmul 8192 bf16", lambda: torch.mm(a, b, out=c), "rate", flops / 1e12, "TFLOP/s")
    one = torch.zeros(1, device=DEVICE)
    measure("graph node", lambda: one.add_(1))


def measure(case: str, call, metric: str = "", amount: float = 0.0, unit: str = "") -> None:
    times = timed_turns({"torch": call}, 0.3, DEVICE)["torch"]
    place = {"graph": not DRY, "spread": times.spread, "n": len(times.values)}
    emit(case, "torch", "time", times.median * 1e6, "us", **place)
    if metric:
        emit(case, "torch", metric, amount / times.median, unit, **place)


if __name__ == "__main__":
    main()
