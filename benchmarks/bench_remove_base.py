"""remove_base: one read and one write of the clip, beside eager and compiled PyTorch."""

import pytest
import torch
from lib.clips import (
    CASES,
    DEVICE,
    LARGE_CASES,
    NOISE_LEVEL,
    Clip,
    check,
    compare_on_clip,
    make_clip,
)
from lib.harness import Row, Target, main

from vfengine.ops import remove_base, remove_base_reference

# On a GPU a step of many frames waits for memory alone.
TARGETS = [Target(case, "remove_base", "of_copy", 90) for case in LARGE_CASES if DEVICE == "cuda"]


def written(z, b, lam):
    """z' = z - √λ √(1-ᾱ) b̂, in the clip's dtype."""
    return z - lam.sqrt().view(-1, 1, 1, 1).to(z.dtype) * NOISE_LEVEL * b.unsqueeze(1)


def contenders(clip: Clip) -> dict:
    """Calls that return what they wrote, checked."""
    out, also = torch.empty_like(clip.z), torch.empty_like(clip.z)
    compiled = torch.compile(written, fullgraph=True)
    step = (clip.z, clip.b, clip.lam, clip.noise_levels, clip.quiet)
    calls = {
        "remove_base": lambda: remove_base(*step, out=out),
        "eager": lambda: written(clip.z, clip.b, clip.lam),
        "compiled": lambda: compiled(clip.z, clip.b, clip.lam),
    }
    if DEVICE == "cuda":
        calls["triton"] = lambda: remove_base(*step, out=also, backend="triton")
    exact = remove_base_reference(clip.z.float(), clip.b.float(), *step[2:])
    for name, call in calls.items():
        check(name, call(), exact)
    return calls


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 3.0, cases=tuple(CASES)) -> list[Row]:
    return [row for case in cases for row in compare_on_clip(case, contenders, 2, seconds)]


@pytest.mark.parametrize("case", CASES)
def bench_remove_base(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    clip = make_clip(case)
    tables = (clip.lam, clip.noise_levels, clip.quiet)
    benchmark(remove_base, clip.z, clip.b, *tables, out=torch.empty_like(clip.z))


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
