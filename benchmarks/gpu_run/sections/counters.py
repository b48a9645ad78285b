"""Hardware counters of a few kernels, through Nsight Compute (ncu), clocks left as they are.

As `counters` it starts ncu on itself and reads its table; as `counters --launch` it launches the
kernels, each once, warm, between the marks that ncu looks at.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable

from gpu_run.sections import BACKENDS, DEVICE, DRY, PREPARE, emit, guarded, verdict
from gpu_run.sections.profile import short

METRICS = {  # ncu's name -> ours, unit
    "gpu__time_duration.sum": ("time", "us"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("dram", "%"),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("issue", "%"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy", "%"),
    "lts__t_sector_hit_rate.pct": ("l2 hit", "%"),
    "launch__registers_per_thread": ("registers", ""),
}
TO_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
TO_MICROSECONDS |= {"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6}


def launches() -> list[Callable[[], object]]:
    """The kernels that are looked at: of the step and of noise at large, of networks at work."""
    import torch
    from lib.clips import clip_of
    from lib.network_cases import normal

    from vfengine import ops

    native, triton = BACKENDS
    clip = clip_of((1, 4, 3, 8, 8) if DRY else (1, 64, 3, 512, 512), torch.bfloat16)
    step = (clip.r, clip.b, *clip.table)
    out = torch.empty_like(clip.z)
    side = 4 if DRY else 32
    x = normal(32, 320, side, side, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = normal(320), normal(320, seed=1)
    qkv = normal(2, 16, side * side, 3 * 320, dtype=torch.bfloat16)
    return [
        lambda: ops.residual_step(clip.z, *step, clip.quiet, backend=native),
        lambda: ops.residual_step(clip.z, *step, clip.quiet, backend=triton),
        lambda: ops.residual_step(clip.z, *step, clip.noisy, seed=1, backend=native),
        lambda: ops.decomposed_noise(out, residual_seed=1, backend=native),
        lambda: ops.group_norm_silu(x, 32, weight, bias, num_frames=16, backend=native),
        lambda: ops.temporal_attention(qkv, 5, backend=native),
        lambda: ops.temporal_attention(qkv, 5, backend=triton),
    ]


def launch() -> None:
    import torch

    with torch.inference_mode():
        calls = launches()
        for call in calls:
            call()
        if DRY:
            return
        torch.cuda.synchronize()
        for call in calls:
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def main() -> None:
    if shutil.which("ncu") is None:
        emit("ncu", status="unavailable", note="ncu is not on PATH")
        return
    command = [
        *("ncu", "--clock-control", "none", "--profile-from-start", "off"),
        *("--csv", "--page", "raw", "--metrics", ",".join(METRICS)),
        *(sys.executable, "-m", "gpu_run.sections.counters", "--launch"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr[-4000:], file=sys.stderr)
    lines = done.stdout.splitlines()
    table = [line for line in lines if line.startswith('"')]
    if done.returncode or len(table) < 3:
        said = " ".join(line for line in lines if line.startswith("==ERROR=="))
        verdict("ncu", False, f"exit status {done.returncode} {said}"[:500])
        return
    with guarded("ncu"):
        report(list(csv.reader(table)))


def report(table: list[list[str]]) -> None:
    """ncu's raw page: names of columns, their units, then a row a launch."""
    names, units, *rows = table
    seen: dict[str, int] = {}
    for row in rows:
        kernel = short(row[names.index("Kernel Name")])
        seen[kernel] = seen.get(kernel, 0) + 1
        case = kernel if seen[kernel] == 1 else f"{kernel} ({seen[kernel]})"
        for column, (metric, unit) in METRICS.items():
            if column not in names:
                continue
            at = names.index(column)
            value = float(row[at].replace(",", ""))
            scale = TO_MICROSECONDS[units[at]] if metric == "time" else 1.0
            emit(case, DEVICE, metric, value * scale, unit, dtype="bf16")


if __name__ == "__main__" and not PREPARE:
    launch() if "--launch" in sys.argv else main()
