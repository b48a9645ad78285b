"""implicit_gemm: convolutions and linear layers of networks, beside PyTorch's own and what follows.

The triton contender takes the tile that is likely the fastest; the op itself measures a few, and
PyTorch's own product where there is one. Shapes are those of Table 4's networks. On a CPU there is
no kernel, and the reference runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from lib.harness import Row, Target, main
from lib.network_cases import DEVICE, measure_op, normal
from torch import Tensor

from vfengine.ops import implicit_gemm, implicit_gemm_reference

HAS_KERNEL = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Product:
    """Pictures [images, side, side, channels] by [out, taps, channels], and the terms around it."""

    images: int
    side: int
    channels: int
    out: int
    taps: tuple[int, int] = (3, 3)
    normed: bool = False  # operand SiLU(a x + b), and a residual added
    gated: bool = False

    @property
    def flops(self) -> int:
        depth = self.channels * self.taps[0] * self.taps[1]
        return 2 * self.images * self.side**2 * depth * self.out * (2 if self.gated else 1)


CASES = {
    f"{name} bf16": product
    for name, product in {
        "3x3, 1x8x8, 64 to 64": Product(1, 8, 64, 64),
        "3x3, 16x16x16, 64 to 64": Product(16, 16, 64, 64),
        "3x3, 16x64x64, 128 to 128": Product(16, 64, 128, 128),
        "3x3 normed, 16x64x64, 128 to 128": Product(16, 64, 128, 128, normed=True),
        "3x3 normed, 16x16x16, 512 to 512": Product(16, 16, 512, 512, normed=True),
        "3x3, 1x16x16, 512 to 512": Product(1, 16, 512, 512),
        "linear, 16x32x32, 256 to 768": Product(16, 32, 256, 768, (1, 1)),
        "GEGLU, 16x32x32, 256 to 1024": Product(16, 32, 256, 1024, (1, 1), gated=True),
    }.items()
}
TARGETS = [
    Target(case, "implicit_gemm", "speedup_over_eager", 1) for case in CASES if DEVICE == "cuda"
]


def contenders(case: str) -> tuple[dict, Tensor, int]:
    """Calls that return what they wrote; the exact result; bytes."""
    product, dtype = CASES[case], torch.bfloat16
    size, rows = (product.images, product.side, product.side), product.out * (1 + product.gated)
    x = normal(*size, product.channels, dtype=dtype)
    scale = (product.channels * product.taps[0] * product.taps[1]) ** -0.5
    weight = normal(rows, *product.taps, product.channels, dtype=dtype, seed=1) * scale
    bias = normal(rows, seed=2)
    terms = {"padding": (product.taps[0] // 2, product.taps[1] // 2), "gated": product.gated}
    if product.normed:
        terms["coefficients"] = normal(1, product.channels, 2, seed=3)
        terms["residual"] = normal(*size, product.out, dtype=dtype, seed=4)
        terms["silu"] = True
    out = torch.empty(*size, product.out, dtype=dtype, device=DEVICE)
    backend = "auto" if DEVICE == "cuda" else "reference"
    calls = {
        "implicit_gemm": lambda: implicit_gemm(x, weight, bias, **terms, out=out, backend=backend),
        "eager": eager(x, weight, bias.to(dtype), terms),
    }
    if HAS_KERNEL:
        calls["triton"] = lambda: implicit_gemm(x, weight, bias, **terms, out=out, backend="triton")
    kept = {key: value.double() for key, value in terms.items() if isinstance(value, Tensor)}
    exact = implicit_gemm_reference(x.double(), weight.double(), bias.double(), **terms | kept)
    moved = [x, weight, out, *([terms["residual"]] if product.normed else [])]
    return calls, exact, sum(tensor.nbytes for tensor in moved)


def eager(x: Tensor, weight: Tensor, bias: Tensor, terms: dict) -> Callable[[], Tensor]:
    """The same in PyTorch's operations on channels_last pictures."""
    pictures, kernels = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    coefficients, residual = terms.get("coefficients"), terms.get("residual")
    if coefficients is not None:
        a, b = (part[..., None, None].to(x.dtype) for part in coefficients.unbind(-1))

    def call() -> Tensor:
        v = pictures if coefficients is None else F.silu(torch.addcmul(b, a, pictures))
        y = F.conv2d(v, kernels, bias, padding=terms["padding"]).permute(0, 2, 3, 1)
        if terms["gated"]:
            value, gate = y.chunk(2, -1)
            y = value * F.gelu(gate)
        return y if residual is None else y + residual

    return call


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    rows = []
    for case in cases:
        found = measure_op(case, "implicit_gemm", *contenders(case), seconds)
        times = [row for row in found if row.metric == "time" and row.contender != "copy"]
        rates = ((row.contender, CASES[case].flops / row.value / 1e6) for row in times)
        rows += [*found, *(Row(case, name, "rate", rate, "TFLOP/s") for name, rate in rates)]
    return rows


@pytest.mark.parametrize("case", CASES)
def bench_implicit_gemm(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.inference_mode():
        benchmark(contenders(case)[0]["implicit_gemm"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
