"""Shared code of the tests of all kernels: shapes, memory layouts, tolerances.

As a script it runs every kernel of one backend over its cases, in whatever environment it is
started: Triton's interpreter, the CUDA source on the CPU (tests/tools/emulation), a GPU.

    python tests/ops/kernel_cases.py BACKEND [--shapes all|small|race] [--device cpu|cuda]
        [--guarded]
"""

import argparse
import importlib
from collections.abc import Callable, Iterable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from vfengine.native import vfengine_native
from vfengine.ops import Clock

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL_DTYPES = tuple(DTYPES.values())
GPU_DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {
    "model": (2, 16, 3, 64, 64),
    "odd": (3, 5, 3, 7, 11),
    "tiny": (1, 2, 1, 1, 1),
    "single_frame": (2, 1, 4, 8, 8),
    "long": (1, 19, 2, 10, 10),  # several runs of frames; whole vectors of fp32 but not of bf16
}
SMALL = {
    **{name: SHAPES[name] for name in ("odd", "tiny", "single_frame")},
    "two_blocks": (1, 3, 3, 19, 19),
}
LARGE = (2, 7, 3, 331, 277)  # beyond CPU caches in every dtype, and no part of it even
GPU = {name: SHAPES[name] for name in ("model", "odd")}  # each is a build of its own in Triton
RACE = {"whole_vectors": (1, 2, 1, 4, 4), "tail": (1, 2, 1, 3, 5)}  # few threads: each is slow
SETS = {"all": {**SHAPES, **SMALL}, "small": SMALL, "race": RACE, "gpu": GPU}
KERNELS = ("cpu", "triton", "cuda")
OPS = {  # and the kernels there are of each
    "residual_step": KERNELS,
    "decomposed_step": KERNELS,
    "remove_base": KERNELS,
    "decomposed_noise": KERNELS,
    "group_norm_silu": KERNELS,
    "temporal_attention": KERNELS,
    "layer_norm": ("cpu", "triton"),
    "geglu": ("cpu", "triton"),
    "group_norm_silu_backward": ("cpu", "triton"),
    "layer_norm_backward": ("cpu", "triton"),
    "geglu_backward": ("cpu", "triton"),
    "temporal_attention_backward": ("cpu", "triton"),
    "implicit_gemm": ("triton",),
    "spatial_attention": ("cpu", "triton"),
    "model_input": ("triton",),
    "noise_estimate": ("triton",),
}
LOOP_OPS = {  # of a sampling loop: on a CPU they are made of others
    "path_step": ("triton", "cuda"),
    "base_step": ("triton", "cuda"),
}

# Row 0 and 1 have sigma = 0, row 2 has sigma > 0.
COEFFS = ((1.0, -0.5, 0.0), (1.02, -0.11, 0.0), (0.97, 0.3, 0.4))

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

Place = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def misaligned(tensor: Tensor) -> Tensor:
    """A copy that starts one element after a multiple of 64 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


def frames_case(shape, dtype, step, guided, device="cpu") -> dict[str, object]:
    """Random arguments that residual_step and decomposed_step share; the base frame's λ is 1."""
    random = torch.Generator().manual_seed(sum(shape) + step)
    batch, frames, *image = shape
    clip = lambda *size: torch.randn(*size, generator=random).to(device, dtype)  # noqa: E731
    lam = torch.rand(frames, generator=random)
    lam[frames // 2] = 1.0
    case = {
        "clip": clip(*shape),
        "r": clip(*shape),
        "image": clip(batch, *image),
        "lam": lam.to(device),
        "coeffs": torch.tensor(COEFFS, device=device),
        "step": torch.tensor([step], dtype=torch.int32, device=device),
    }
    return {**case, "r_uncond": clip(*shape), "guidance_scale": 2.5} if guided else case


def clock_case(step: int, batch: int, device: str = "cpu") -> dict[str, Tensor]:
    """A clock of the steps of COEFFS, before this step."""
    number = lambda n: torch.tensor([n], dtype=torch.int32, device=device)  # noqa: E731
    timesteps = torch.tensor([900, 600, 2**40], device=device)
    t = torch.full((batch,), -1, device=device)
    return {"counter": number(step), "ticket": number(0), "timesteps": timesteps, "t": t}


def stepped(op: Callable[..., Tensor], case: dict, backend: str) -> dict[str, object]:
    """The case after a call of one of LOOP_OPS, which writes some of its tensors."""
    case = dict(case)
    clock = Clock(*(case[name] for name in Clock._fields))
    arguments = {name: value for name, value in case.items() if name not in Clock._fields}
    assert op(**arguments, clock=clock, backend=backend) is case["u" if "u" in case else "z"]
    return case


def placed(case: dict, place: Place) -> dict:
    """The case with all its tensors at another place in memory."""
    return {k: place(v) if isinstance(v, Tensor) else v for k, v in case.items()}


def rows_placed(tensor: Tensor, place: Place) -> Tensor:
    """[B, C, H, W] in channels_last memory, at another place in memory."""
    return place(tensor.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def doubled(case: dict) -> dict:
    """The case with all its tensors in fp64, for a reference that is exact beside fp32."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in case.items()}


def on_cpu(case: dict) -> dict:
    """The case with copies of its tensors on the CPU."""
    return {k: v.cpu().clone() if isinstance(v, Tensor) else v for k, v in case.items()}


def in_double(case: dict) -> dict:
    """The case in fp64, for a reference that is exact beside fp32."""
    clips = ("u", "z", "r", "r_uncond", "g", "b")
    return {k: v.double() if k in clips and v is not None else v for k, v in case.items()}


def assert_as_close_as_pytorch(out: Tensor, exact: Tensor, peer: Tensor) -> None:
    """Error at most twice that of PyTorch in the same dtype, plus one rounding.

    exact: the result in fp64; peer: PyTorch's result, each operation rounding to out's dtype
    """
    rounding = torch.finfo(out.dtype).eps / 2 * exact.abs().max()
    peer_error = (peer.double() - exact).abs().max()
    error = (out.double() - exact).abs().max()
    assert error <= 2 * peer_error + rounding, f"{error:.3g}, PyTorch {peer_error:.3g}"


def assert_same_bits(a: Tensor, b: Tensor, what: object = "") -> None:
    """Equal, NaN to NaN; zeros may differ in sign."""
    assert torch.equal(a.isnan(), b.isnan()), what
    assert torch.equal(a.nan_to_num(), b.nan_to_num()), what


def on_every_isa_and_thread_count(call: Callable[[], Tensor]) -> list[Tensor]:
    """call() on each instruction set of this machine, on 1, 2 and 3 threads."""
    threads, isa = torch.get_num_threads(), vfengine_native.cpu_isa()
    results = []
    try:
        for name in vfengine_native.cpu_isas:
            vfengine_native.set_cpu_isa(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(call())
    finally:
        torch.set_num_threads(threads)
        vfengine_native.set_cpu_isa(isa)
    return results


def frames_cases(shapes: dict, dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterator[tuple]:
    """(shape, dtype, step, guided) of every combination."""
    return product(shapes.values(), dtypes, (1, 2), (False, True))


def run(backend: str, shapes: str, device: str, place: Place) -> None:
    """Every op's cases on one backend; AssertionError at the first that is wrong.

    shapes: a name in SETS, of the op's test file where that has its own, else of this one
    """
    dtypes = GPU_DTYPES if shapes == "gpu" else ALL_DTYPES
    for op, kernels in (OPS | LOOP_OPS).items():
        if backend not in kernels:
            continue
        module = importlib.import_module(f"test_{op}")
        sets = getattr(module, "SETS", SETS)
        count = module.run_cases(backend, sets[shapes], device, place, dtypes)
        print(f"{op}: {count} cases on {backend}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend")
    parser.add_argument("--shapes", choices=SETS, default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--guarded", action="store_true", help="an overrun kills the process")
    arguments = parser.parse_args()
    places = [as_it_is] if arguments.shapes == "race" else [as_it_is, misaligned]
    if arguments.backend == "triton" and arguments.device == "cpu":
        from triton_tools import compute_bf16_correctly, guarded

        compute_bf16_correctly()
        if arguments.guarded:
            places = [guarded]
    for place in places:
        run(arguments.backend, arguments.shapes, arguments.device, place)


if __name__ == "__main__":
    main()
