"""noise_estimate: rows to noise in one launch, beside PyTorch's own ops; both are for CUDA."""

import pytest
import torch
import torch.nn.functional as F
from lib.harness import Row, Target, main
from lib.network_cases import DEVICE, DTYPES, measure_op, normal

from vfengine.ops import noise_estimate, noise_estimate_reference

SHAPES = {"16x3x64x64": (1, 16, 3, 64, 64), "16x3x256x256": (1, 16, 3, 256, 256)}  # in patches of 4
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
TARGETS = [Target(case, "noise_estimate", "speedup_over_eager", 8) for case in CASES]
BACKEND = "auto" if DEVICE == "cuda" else "reference"
GUIDANCE_SCALE = 4.0


def written(z, rows, unit, _, shrink, signal, gain):
    """The same in PyTorch's own operations."""
    m, channels, dtype = z.shape[1] // 2, z.shape[2], z.dtype
    frames = z * unit
    base = frames[:, m, None]
    images = F.pixel_shuffle(rows.permute(0, 3, 1, 2), 4).to(dtype)
    paint, weights = images.unflatten(0, (-1, *z.shape[:2])).split([channels, 3], 3)
    _, seen, painted = weights.softmax(3).split(1, dim=3)
    difference = frames - base
    change = seen * (shrink * difference) + painted * (paint - base)
    others = torch.arange(z.shape[1], device=z.device) != m
    eps = (difference - signal * change * others.view(-1, 1, 1, 1)) * gain
    return torch.lerp(eps[1], eps[0], GUIDANCE_SCALE)


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return what they wrote; the exact result; bytes."""
    (batch, frames, channels, height, width), dtype = CASES[case]
    z = normal(batch, frames, channels, height, width, dtype=dtype)
    rows = normal(2 * batch * frames, height // 4, width // 4, (channels + 3) * 16)
    coeffs = 0.5 + normal(50, frames, 5, seed=1).abs()
    step = torch.full((1,), 7, dtype=torch.int32, device=DEVICE)
    columns = [column.to(dtype).view(-1, 1, 1, 1) for column in coeffs[7].unbind(-1)]
    out, guidance = torch.empty_like(z), {"guidance_scale": GUIDANCE_SCALE}
    compiled = torch.compile(written, fullgraph=True)
    calls = {
        "noise_estimate": lambda: noise_estimate(
            z, rows, coeffs, step, **guidance, out=out, backend=BACKEND
        ),
        "eager": lambda: written(z, rows, *columns),
        "compiled": lambda: compiled(z, rows, *columns),
    }
    exact = noise_estimate_reference(z.double(), rows, coeffs, step, **guidance)
    return calls, exact, z.nbytes + rows.nbytes + out.nbytes


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    return [
        row
        for case in cases
        for row in measure_op(case, "noise_estimate", *contenders(case), seconds)
    ]


@pytest.mark.parametrize("case", CASES)
def bench_noise_estimate(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.inference_mode():
        benchmark(contenders(case)[0]["noise_estimate"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
