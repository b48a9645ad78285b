"""The one place that decides which backend runs an op, and what all ops share around it.

| backend     | tensors  | needs |
|-------------|----------|-------|
| "cpu"       | CPU      | vfengine_native |
| "cuda"      | CUDA     | vfengine_native built with nvcc |
| "triton"    | CUDA     | triton; CPU tensors too under TRITON_INTERPRET=1, for tests |
| "reference" | any      | nothing: the op's fp32 reference in PyTorch |
| "auto"      | CPU      | takes "cpu" |
|             | CUDA     | takes "cuda" where it was built, else "triton" |
"""

import os
from collections.abc import Callable

import torch

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # numbers of csrc/common/dtype.h

LIBRARY = torch.library.Library("vfengine", "FRAGMENT")


def choose_backend(op: str, backend: str, device: torch.device) -> str:
    """Resolve `backend` for tensors on `device` to "cuda", "triton", "cpu" or "reference".

    "auto" defers to VFENGINE_KERNEL_BACKEND. Raises ValueError for an unknown name, and where the
    backend asked for cannot run: it is never replaced by another.
    """
    asked = f"backend={backend!r}"
    if backend == "auto":
        backend = os.environ.get("VFENGINE_KERNEL_BACKEND") or "auto"
        asked = f"VFENGINE_KERNEL_BACKEND={backend}" if backend != "auto" else asked
    if backend not in BACKENDS:
        raise ValueError(f"{op}: {asked} is unknown, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        if device.type == "cuda":
            return "cuda" if _native().cuda_built else "triton"
        raise ValueError(f"{op}: no kernel for {device.type}; backend='reference' runs there")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"{op}: {asked} takes CPU tensors, got {device}")
    if backend == "cuda":
        if device.type != "cuda":
            raise ValueError(f"{op}: {asked} takes CUDA tensors, got {device}")
        if not _native().cuda_built:
            raise ValueError(f"{op}: {asked}, but vfengine_native was built without nvcc")
    if backend == "triton":
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            raise ValueError(f"{op}: {asked} takes CUDA tensors, got {device}")
    return backend


def register(schema: str, kernel: Callable[..., None], check: Callable[..., None]) -> None:
    """Register an op that writes into a tensor argument, for CPU and CUDA tensors.

    kernel: runs it; check: raises for arguments the kernel cannot take, without looking at memory.
    The op makes no tensor, so `check` is all there is to its fake.
    torch.library.Library costs about 2 µs a call, the custom_op decorator 8 to 13.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"vfengine::{name}", check, lib=LIBRARY)


def check_no_grad(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise ValueError where autograd would record the op: it has no derivative."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{op} has no derivative: call it under torch.no_grad()")


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise unless `tensor` is contiguous and of this shape, dtype and device."""
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    a0, b0 = a.data_ptr(), b.data_ptr()
    return a0 < b0 + b.nbytes and b0 < a0 + a.nbytes


def _native():
    from vfengine.native import vfengine_native

    return vfengine_native
