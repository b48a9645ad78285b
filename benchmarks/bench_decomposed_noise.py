"""decomposed_noise: billions of normals a second, beside torch.randn into the same memory.

Residual noise of the default clip and of eight.
"""

import pytest
import torch
from lib.clips import DEVICE
from lib.harness import Row, Target, interleave, main

from vfengine.native import vfengine_native
from vfengine.ops import decomposed_noise, decomposed_noise_reference

CASES = {
    f"{name} {'x'.join(map(str, shape))}": (shape, dtype)
    for shape in ((1, 16, 3, 64, 64), (8, 16, 3, 64, 64))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
RATE = {"cpu": 4, "cuda": 1}  # over torch.randn, which on a GPU is as parallel and as Philox
TARGETS = [Target(case, "residual noise", "rate_over_randn", RATE[DEVICE]) for case in CASES]


def contenders(shape, dtype) -> dict:
    """Calls that return what they wrote, checked bit for bit."""
    out, source, random = (torch.empty(shape, dtype=dtype, device=DEVICE) for _ in range(3))
    calls = {
        "residual noise": lambda: decomposed_noise(out, residual_seed=1),
        "torch.randn": lambda: torch.randn(shape, dtype=dtype, device=DEVICE, out=random),
        "copy": lambda: random.copy_(source),  # what writing alone takes, and a read
    }
    if DEVICE == "cuda":
        also = torch.empty_like(out)
        calls["triton"] = lambda: decomposed_noise(also, residual_seed=1, backend="triton")
    exact = decomposed_noise_reference(shape, residual_seed=1).to(dtype)
    if not torch.equal(calls["residual noise"]().cpu(), exact):
        raise ValueError("residual noise is not the reference's noise")
    return calls


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    rows = []
    for case in cases:
        shape, dtype = CASES[case]
        calls = contenders(shape, dtype)
        if DEVICE == "cpu":
            for isa in vfengine_native.cpu_isas[:-1]:  # the last is the one in use
                calls[f"residual noise, {isa}"] = with_isa(isa, calls["residual noise"])
        medians = interleave(calls, seconds=seconds, device=DEVICE)
        count = torch.Size(shape).numel()
        for name, median in medians.items():
            rows += [
                Row(case, name, "time", median * 1e6, "us"),
                Row(case, name, "rate", count / median / 1e9, "G/s"),
                Row(case, name, "rate_over_randn", medians["torch.randn"] / median, "x"),
            ]
    return rows


def with_isa(isa: str, call):
    """The call on another instruction set."""
    best = vfengine_native.cpu_isa()

    def run():
        vfengine_native.set_cpu_isa(isa)
        try:
            call()
        finally:
            vfengine_native.set_cpu_isa(best)

    return run


@pytest.mark.parametrize("case", CASES)
def bench_decomposed_noise(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    shape, dtype = CASES[case]
    benchmark(decomposed_noise, torch.empty(shape, dtype=dtype, device=DEVICE), residual_seed=1)


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
