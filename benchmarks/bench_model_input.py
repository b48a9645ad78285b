"""model_input: a clip to rows in one launch, beside PyTorch's own ops; both are for CUDA."""

import pytest
import torch
import torch.nn.functional as F
from lib.harness import Row, Target, main
from lib.network_cases import DEVICE, DTYPES, measure_op, normal

from vfengine.ops import model_input, model_input_reference

SHAPES = {"16x3x64x64": (1, 16, 3, 64, 64), "16x3x256x256": (1, 16, 3, 256, 256)}  # in patches of 4
CASES = {
    f"{name} {dtype}": (shape, DTYPES[dtype]) for name, shape in SHAPES.items() for dtype in DTYPES
}
TARGETS = [Target(case, "model_input", "speedup_over_eager", 4) for case in CASES]
BACKEND = "auto" if DEVICE == "cuda" else "reference"


def written(z, unit, scale, dtype):
    """The same in PyTorch's own operations; guided, so that the batch is doubled."""
    frames = torch.cat([z, z]) * unit
    base = frames[:, z.shape[1] // 2, None]
    x = torch.cat([(frames - base) * scale, (base * 2).expand_as(frames)], 2)
    images = F.pixel_unshuffle(x.flatten(0, 1).to(dtype), 4)
    return images.permute(0, 2, 3, 1).contiguous()


def contenders(case: str) -> tuple[dict, torch.Tensor, int]:
    """Calls that return what they wrote; the exact result; bytes."""
    (batch, frames, channels, height, width), dtype = CASES[case]
    z = normal(batch, frames, channels, height, width)
    coeffs = 0.5 + normal(50, frames, 5, seed=1).abs()
    step = torch.full((1,), 7, dtype=torch.int32, device=DEVICE)
    size = (2 * batch * frames, height // 4, width // 4, 2 * channels * 16)
    out = torch.empty(size, dtype=dtype, device=DEVICE)
    columns = [column.view(-1, 1, 1, 1) for column in coeffs[7, :, :2].unbind(-1)]
    compiled = torch.compile(written, fullgraph=True)
    calls = {
        "model_input": lambda: model_input(z, coeffs, step, out, conditioned=True, backend=BACKEND),
        "eager": lambda: written(z, *columns, dtype),
        "compiled": lambda: compiled(z, *columns, dtype),
    }
    exact = model_input_reference(z.double(), coeffs, step, patch_size=4, conditioned=True)
    return calls, exact.repeat(2, 1, 1, 1), z.nbytes + out.nbytes


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 2.0, cases=tuple(CASES)) -> list[Row]:
    return [
        row for case in cases for row in measure_op(case, "model_input", *contenders(case), seconds)
    ]


@pytest.mark.parametrize("case", CASES)
def bench_model_input(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    with torch.inference_mode():
        benchmark(contenders(case)[0]["model_input"])


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
