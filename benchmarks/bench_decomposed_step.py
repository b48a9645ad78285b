"""decomposed_step: combination and update of the interleaved form in two reads and one write.

Compared with eager and compiled PyTorch; also with both kinds of noise drawn in the kernel.
"""

import pytest
import torch
from lib.clips import CASES, DEVICE, LARGE_CASES, ROWS, Clip, check, compare_on_clip, make_clip
from lib.harness import Row, Target, main

from vfengine.ops import decomposed_step, decomposed_step_reference

# On a GPU a step of many frames waits for memory alone.
TARGETS = [
    Target(case, "decomposed_step", "of_copy", 90) for case in LARGE_CASES if DEVICE == "cuda"
]


def written(z, b, r, lam):
    """ε̂ = √λ b̂ + √(1-λ) r̂, then c1 z + c2 ε̂, in the clip's dtype."""
    c1, c2, _ = ROWS[0]
    shared, own = (x.sqrt().view(-1, 1, 1, 1).to(z.dtype) for x in (lam, 1 - lam))
    return c1 * z + c2 * (shared * b.unsqueeze(1) + own * r)


def contenders(clip: Clip) -> dict:
    """Calls that return what they wrote, checked."""
    plain, drawn = clip.z.clone(), clip.z.clone()
    compiled = torch.compile(written, fullgraph=True)
    step, seeds = (clip.b, clip.r, *clip.table), {"base_seed": 1, "residual_seed": 2}
    calls = {
        "decomposed_step": lambda: decomposed_step(plain, *step, clip.quiet),
        "drawn noise": lambda: decomposed_step(drawn, *step, clip.noisy, **seeds),
        "eager": lambda: written(clip.z, clip.b, clip.r, clip.lam),
        "compiled": lambda: compiled(clip.z, clip.b, clip.r, clip.lam),
    }
    if DEVICE == "cuda":
        also = clip.z.clone()
        calls["triton"] = lambda: decomposed_step(also, *step, clip.quiet, backend="triton")
    arguments = (clip.z.float(), clip.b.float(), clip.r.float(), *clip.table)
    exact = decomposed_step_reference(*arguments, clip.quiet)
    for name, call in calls.items():
        if name != "drawn noise":
            check(name, call(), exact)
    exact = decomposed_step_reference(*arguments, clip.noisy, **seeds)
    check("drawn noise", calls["drawn noise"](), exact)
    return calls


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 3.0, cases=tuple(CASES)) -> list[Row]:
    return [row for case in cases for row in compare_on_clip(case, contenders, 3, seconds)]


@pytest.mark.parametrize("case", CASES)
def bench_decomposed_step(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    clip = make_clip(case)
    benchmark(decomposed_step, clip.z.clone(), clip.b, clip.r, *clip.table, clip.quiet)


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
