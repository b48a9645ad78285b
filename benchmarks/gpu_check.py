"""Everything that a machine without a GPU could only predict: `make gpu-check` on one that has it.

Runs all kernel tests on the device, the benches of the ops beside a device copy, a captured loop of
50 steps against the same loop run plainly, and the shipped model's clips captured, overlapped and
plain; writes gpu-report.json. Exit status 0: all passed, 1: something failed (the report says
what), 2: no NVIDIA GPU that torch can use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from harness import machine, table, verdicts
from torch import Tensor

from vfengine import VideoFusionPipeline
from vfengine.native import vfengine_native
from vfengine.ops import residual_step

ROOT = Path(__file__).resolve().parent.parent
BENCHES = (
    "bench_residual_step",
    "bench_decomposed_step",
    "bench_remove_base",
    "bench_decomposed_noise",
    "bench_group_norm_silu",
    "bench_temporal_attention",
    "bench_layer_norm",
    "bench_geglu",
    "bench_spatial_attention",
)
STEPS = 50


def kernel_tests() -> dict[str, object]:
    """The tests that need a GPU, and every kernel case on both backends."""
    tests = [sys.executable, "-m", "pytest", "-q", "-rs", "tests", "-k", "on_a_gpu"]
    commands = [tests]
    backends = ["triton", *(["cuda"] if vfengine_native.cuda_built else [])]
    for backend in backends:
        script = ["tests/kernel_cases.py", backend, "--device", "cuda"]
        commands.append([sys.executable, *script])
    runs = []
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        output = (done.stdout + done.stderr).splitlines()
        runs.append(
            {
                "command": " ".join(["python", *command[1:]]),
                "passed": done.returncode == 0,
                "last_lines": output[-20:],
            }
        )
    return {"passed": all(run["passed"] for run in runs), "runs": runs}


def benches() -> dict[str, object]:
    """Every bench, each beside a device copy. Their results are checked; targets are only told."""
    rows, told = [], []
    for name in BENCHES:
        module = importlib.import_module(name)
        measured = module.measure()
        rows += measured
        told += verdicts(measured, getattr(module, "TARGETS", ())).splitlines()
        print(table(measured))
    print("\n".join(told))
    return {"passed": True, "rows": [asdict(row) for row in rows], "targets": told}


class Loop:
    """One step of a residual phase on static buffers: a stand-in network, the kernel, the counter.

    The step is read on the device, so one captured step serves all of them.
    """

    def __init__(self, device: str, backend: str) -> None:
        random = torch.Generator().manual_seed(0)
        shape = (2, 16, 3, 64, 64)
        self.backend = backend
        self.noise = torch.randn(shape, generator=random).to(device)
        self.g = torch.randn(shape[0], *shape[2:], generator=random).to(device)
        self.lam = torch.linspace(0, 1, shape[1]).to(device)
        k = torch.arange(STEPS) / STEPS
        self.coeffs = torch.stack([0.9 + 0.1 * k, -0.1 * k, 0.05 * (1 - k)], 1).to(device)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.u, self.r = torch.empty_like(self.noise), torch.empty_like(self.noise)

    def reset(self) -> None:
        self.u.copy_(self.noise)
        self.step.zero_()

    def advance(self) -> None:
        torch.tanh(self.u, out=self.r)
        tables = (self.g, self.lam, self.coeffs, self.step)
        residual_step(self.u, self.r, *tables, seed=7, backend=self.backend)
        self.step.add_(1)

    def run(self, advance: Callable[[], object]) -> Tensor:
        self.reset()
        for _ in range(STEPS):
            advance()
        return self.u.clone()


def captured_loop(backend: str) -> dict[str, object]:
    """The loop from a CUDA graph of one step, bit for bit against the loop run plainly."""
    loop = Loop("cuda", backend)
    plain = loop.run(loop.advance)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop.advance()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.advance()
    captured = loop.run(graph.replay)
    on_cpu = Loop("cpu", "cpu")
    expected = on_cpu.run(on_cpu.advance)
    times = {}
    for name, advance in (("plain", loop.advance), ("captured", graph.replay)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            loop.run(advance)
        torch.cuda.synchronize()
        times[name] = (time.perf_counter() - start) / 20 / STEPS * 1e6
    # The stand-in's tanh is not the same function on a CPU: 50 steps of it differ a little.
    difference = (captured.cpu() - expected).abs().max().item()
    return {
        "backend": backend,
        "passed": torch.equal(plain, captured) and difference < 1e-3,
        "largest_difference_from_cpu": difference,
        "microseconds_per_step": times,
    }


def whole_clips(device: str, num_inference_steps: int = STEPS) -> dict[str, object]:
    """The shipped model's clip, sampled plainly, from graphs, and with overlapped phases.

    The same bits are expected of all, for two seeds (the second call replays the first's graphs).
    """
    seconds, clips = {}, {}
    for form, capture, overlap in (
        ("plain", False, False),
        ("captured", True, False),
        ("overlapped", True, True),
    ):
        pipe = VideoFusionPipeline.from_pretrained(
            device=device, dtype=torch.bfloat16, capture=capture
        )
        for seed in (3, 0):
            start = time.perf_counter()
            clips[form, seed] = pipe(
                "cartwheel",
                base_seed=seed,
                base_path="stepwise",
                overlap_phases=overlap,
                offload_base=False,
                num_inference_steps=num_inference_steps,
            ).frames
            seconds[f"{form}, seed {seed}"] = time.perf_counter() - start
    differences = {
        f"{form}, seed {seed}": float(np.abs(clip - clips["plain", seed]).max())
        for (form, seed), clip in clips.items()
    }
    passed = max(differences.values()) == 0.0
    return {"passed": passed, "largest_differences_from_plain": differences, "seconds": seconds}


def gpu() -> dict[str, object]:
    import pynvml  # of nvidia-ml-py

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    return {
        "name": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "cuda_architectures_built": vfengine_native.cuda_architectures,
    }


def guarded(section: Callable[[], dict[str, object]]) -> dict[str, object]:
    """The section's report; a crash is a failure like any other, and the rest still runs."""
    try:
        return section()
    except Exception as error:
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu-report.json"), metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no NVIDIA GPU here; nothing was run", file=sys.stderr)
        return 2
    report = {"machine": machine(), "gpu": gpu()}
    backends = ["triton", *(["cuda"] if vfengine_native.cuda_built else [])]
    sections = {
        "kernel_tests": kernel_tests,
        **{f"captured_loop_{name}": lambda name=name: captured_loop(name) for name in backends},
        "whole_clips": lambda: whole_clips("cuda"),
        "benches": benches,
    }
    for name, section in sections.items():
        print(f"gpu-check: {name} ...", flush=True)
        report[name] = guarded(section)
        print(f"gpu-check: {name} {'passed' if report[name]['passed'] else 'FAILED'}", flush=True)
    report["passed"] = all(report[name]["passed"] for name in sections)
    temporary = arguments.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, arguments.json)
    print(f"gpu-check: {'all passed' if report['passed'] else 'FAILED'}, see {arguments.json}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
