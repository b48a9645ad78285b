"""residual_step: two reads and one write of the clip, beside Algorithm 2 in eager and compiled.

A step of 64 frames of 512 x 512 (200 MB in fp32) and of the default clip; a guidance pair and noise
drawn in the kernel on top. Bytes are those of the plain step in every line, 2 reads + 1 write.
"""

import pytest
import torch
from lib.clips import (
    CASES,
    DEFAULT,
    DEVICE,
    LARGE_CASES,
    Clip,
    algorithm_2,
    algorithm_2_into,
    check,
    compare_on_clip,
    make_clip,
)
from lib.harness import Row, Target, main, warm_microseconds

from vfengine.ops import residual_step, residual_step_reference

# Eager moves about 17 clips where the kernel moves 3, and compiled code 4. A GPU's copy has no page
# faults to take, which on a CPU make temporary clips the slower.
FASTER = {
    "cpu": {"eager": 20, "compiled": 4, "compiled_into": 1.5},
    "cuda": {"eager": 5, "compiled": 1.3},
}
DRAWN = {"cpu": 5, "cuda": 1}  # over torch.randn and the formula
TARGETS = [
    *(Target(case, "residual_step", "of_copy", 90) for case in LARGE_CASES),
    *(
        Target(case, "residual_step", f"speedup_over_{peer}", value)
        for case in LARGE_CASES
        for peer, value in FASTER[DEVICE].items()
    ),
    *(Target(case, "guided", "time_over_plain", 4 / 3, at_most=True) for case in LARGE_CASES),
    *(
        Target(case, "drawn noise", "speedup_over_randn_eager", DRAWN[DEVICE])
        for case in LARGE_CASES
    ),
    *(
        Target(case, "residual_step", "warm_call", 15, at_most=True)
        for case, (shape, _) in CASES.items()
        if shape is DEFAULT and DEVICE == "cpu"
    ),
]


def with_randn(clip: Clip):
    """Noise from torch.randn, and the formula as one would write it."""
    c1, c2, sigma = clip.coeffs[1].tolist()
    shared, own = (x.sqrt().view(-1, 1, 1, 1).to(clip.z.dtype) for x in (clip.lam, 1 - clip.lam))

    def call():
        xi = torch.randn(clip.z.shape, dtype=clip.z.dtype, device=DEVICE)
        base = shared * clip.b.unsqueeze(1)
        return c1 * clip.z + base + own * (c2 * clip.r + sigma * xi)

    return call


def contenders(clip: Clip) -> dict:
    """Calls that return what they wrote, checked."""
    buffers = {name: clip.z.clone() for name in ("plain", "guided", "drawn")}
    removed, z_next = torch.empty_like(clip.z), torch.empty_like(clip.z)
    compiled = torch.compile(algorithm_2, fullgraph=True)
    compiled_into = torch.compile(algorithm_2_into, fullgraph=True)
    step = (clip.r, clip.b, *clip.table)
    pair = {"r_uncond": clip.r_uncond, "guidance_scale": 2.0}
    calls = {
        "residual_step": lambda: residual_step(buffers["plain"], *step, clip.quiet),
        "guided": lambda: residual_step(buffers["guided"], *step, clip.quiet, **pair),
        "drawn noise": lambda: residual_step(buffers["drawn"], *step, clip.noisy, seed=1),
        "eager": lambda: algorithm_2(clip.z, clip.r, clip.b, clip.lam)[1],
        "compiled": lambda: compiled(clip.z, clip.r, clip.b, clip.lam)[1],
        "compiled_into": lambda: compiled_into(clip.z, clip.r, clip.b, clip.lam, removed, z_next),
        "randn_eager": with_randn(clip),
    }
    if DEVICE == "cuda":
        also = clip.z.clone()
        calls["triton"] = lambda: residual_step(also, *step, clip.quiet, backend="triton")
    verify(clip, calls)
    return calls


def verify(clip: Clip, calls: dict) -> None:
    """Checks the first call of each contender against its formula in fp32."""
    arguments = (clip.z.float(), clip.r.float(), clip.b.float(), *clip.table)
    plain = residual_step_reference(*arguments, clip.quiet)
    for name in ("residual_step", *(["triton"] if "triton" in calls else [])):
        check(name, calls[name](), plain)
    pair = {"r_uncond": clip.r_uncond.float(), "guidance_scale": 2.0}
    check("guided", calls["guided"](), residual_step_reference(*arguments, clip.quiet, **pair))
    drawn = residual_step_reference(*arguments, clip.noisy, seed=1)
    check("drawn noise", calls["drawn noise"](), drawn)
    written = algorithm_2(clip.z.float(), clip.r.float(), clip.b.float(), clip.lam)[1]
    for name in ("eager", "compiled", "compiled_into"):
        check(name, calls[name](), written)


@torch.inference_mode()  # as samplers call it
def measure(seconds: float = 4.0, cases=tuple(CASES)) -> list[Row]:
    # First, before torch.compile hooks itself into Python's calls.
    small = [case for case in cases if CASES[case][0] is DEFAULT and DEVICE == "cpu"]
    rows = [row for case in small for row in warm_calls(case, rounds=5 + int(50 * seconds))]
    for case in cases:
        mine = compare_on_clip(case, contenders, 3, seconds)
        time = {row.contender: row.value for row in mine if row.metric == "time"}
        rows += mine
        for name in ("compiled", "compiled_into"):
            ratio = time[name] / time["residual_step"]
            rows.append(Row(case, "residual_step", f"speedup_over_{name}", ratio, "x"))
        ratio = time["guided"] / time["residual_step"]
        rows.append(Row(case, "guided", "time_over_plain", ratio, "x"))
        ratio = time["randn_eager"] / time["drawn noise"]
        rows.append(Row(case, "drawn noise", "speedup_over_randn_eager", ratio, "x"))
    return rows


def warm_calls(case: str, rounds: int) -> list[Row]:
    """A call alone, a copy of as many bytes, and a call on one pixel: Python's share.

    "op" is the way through torch's dispatcher: for graphs, profilers and a torch without DLPack's C
    exchange interface.
    """
    clip = make_clip(case)
    step = (clip.lam, clip.coeffs, clip.quiet)
    pixel = (clip.r[..., :1, :1].contiguous(), clip.b[..., :1, :1].contiguous(), *step)
    z, z_pixel = clip.z.clone(), clip.z[..., :1, :1].contiguous()
    source = torch.empty(3 * z.nbytes // 2, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    op = torch.ops.vfengine.residual_step_.default
    rest = (None, 1.0, None, 0, 0, "auto")
    calls = {
        "residual_step": lambda: residual_step(z, clip.r, clip.b, *step),
        "copy": lambda: target.copy_(source),
        "residual_step, one pixel": lambda: residual_step(z_pixel, *pixel),
        "op, one pixel": lambda: op(z_pixel, *pixel, *rest),
    }
    warm = warm_microseconds(calls, rounds=rounds)
    return [Row(case, name, "warm_call", value, "us") for name, value in warm.items()]


@pytest.mark.parametrize("case", CASES)
def bench_residual_step(benchmark, case, seconds):
    benchmark.extra_info["rows"] = [vars(row) for row in measure(seconds, (case,))]
    clip = make_clip(case)
    z = clip.z.clone()
    benchmark(residual_step, z, clip.r, clip.b, *clip.table, clip.quiet)


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
