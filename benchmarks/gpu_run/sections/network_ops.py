"""The ops of networks beside eager PyTorch, SDPA and torch.compile: the benches' own contenders.

Bytes are those that the bench of each op counts.
"""

from __future__ import annotations

import contextlib
import os

import bench_geglu
import bench_geglu_backward
import bench_group_norm_silu
import bench_implicit_gemm
import bench_layer_norm
import bench_layer_norm_backward
import bench_model_input
import bench_noise_estimate
import bench_spatial_attention
import bench_temporal_attention
import bench_temporal_attention_backward
import torch
from lib.network_cases import OURS, error_of

from gpu_run.sections import DRY, PREPARE, guarded, prepared_in_parts, timed

OPS = {  # and the backend that its own contender runs on CUDA; "auto": one that it measures
    "group_norm_silu": (bench_group_norm_silu, "cuda"),
    "temporal_attention": (bench_temporal_attention, "cuda"),
    "spatial_attention": (bench_spatial_attention, "triton"),
    "model_input": (bench_model_input, "triton"),
    "noise_estimate": (bench_noise_estimate, "triton"),
    "layer_norm": (bench_layer_norm, "triton"),
    "geglu": (bench_geglu, "triton"),
    "layer_norm_backward": (bench_layer_norm_backward, "triton"),
    "geglu_backward": (bench_geglu_backward, "triton"),
    "temporal_attention_backward": (bench_temporal_attention_backward, "triton"),
    "implicit_gemm": (bench_implicit_gemm, "auto"),
}


def main() -> None:
    if not PREPARE:
        for op in OPS:
            measure(op)
    elif op := prepared_in_parts("network_ops", tuple(OPS)):
        measure(op)


def measure(op: str) -> None:
    bench, backend = OPS[op]
    os.environ["VFENGINE_KERNEL_BACKEND"] = "auto" if DRY else backend
    for case in list(bench.CASES)[: 1 if DRY else None]:
        shape, dtype = case.rsplit(" ", 1)
        here = f"{op}, {shape}"
        with guarded(here, dtype=dtype), torch.inference_mode():
            calls, exact, moved = bench.contenders(case)
            if DRY:
                calls.pop("compiled", None)
            right, eager = {}, calls["eager"]()
            for name, call in calls.items():
                name = backend if name == op else name
                with guarded(here, contender=name, dtype=dtype):
                    ours = name in (*OURS, "auto")
                    if problem := error_of(call(), exact, eager if ours else None):
                        raise ValueError(f"{name} {problem}")
                    right[name] = call
            flops = bench.CASES[case].flops if op == "implicit_gemm" else None
            timed(here, right, moved_bytes=moved, dtype=dtype, flops=flops)
        with contextlib.suppress(AttributeError):
            torch.compiler.reset()  # other shapes are not other sizes of these


if __name__ == "__main__":
    main()
