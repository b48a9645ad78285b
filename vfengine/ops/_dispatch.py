"""The one place that decides which backend runs an op, and what all ops share around it.

| backend     | tensors  | needs |
|-------------|----------|-------|
| "cpu"       | CPU      | vfengine_native |
| "cuda"      | CUDA     | vfengine_native built with nvcc; CPU tensors too in tests/tools |
| "triton"    | CUDA     | triton; CPU tensors too under TRITON_INTERPRET=1, for tests |
| "reference" | both     | nothing: the op's fp32 reference in PyTorch |
| "auto"      | CPU      | takes "cpu", which ops that are for CUDA alone have not |
|             | CUDA     | takes "cuda" where it was built and the op has it, else "triton"; |
|             |          | "triton" where the op prefers it |

An op without a kernel in CUDA C++ says so in `kernels`.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from vfengine.arguments import as_float, as_int

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
KERNELS = ("cuda", "triton", "cpu")
# As csrc/common/dtype.h has them.
DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_HEAD_DIM = 256  # of attention ops on any device; a plan's kernels take vfengine_native's

# Names that `unobserved` would otherwise look up at every call.
_is_compiling = torch.compiler.is_compiling
_len_torch_function_stack = torch._C._len_torch_function_stack
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
_get_tracing_state = torch._C._get_tracing_state
_profiler = torch.autograd.profiler

LIBRARY = torch.library.Library("vfengine", "FRAGMENT")


def choose_backend(
    op: str,
    backend: str,
    device: torch.device,
    kernels: tuple[str, ...] = KERNELS,
    prefer: str = "cuda",
) -> str:
    """Resolve `backend` for tensors on `device` to "cuda", "triton", "cpu" or "reference".

    kernels: those the op has, of KERNELS
    prefer:  "cuda" or "triton": what "auto" takes on CUDA where there are both

    "auto" defers to VFENGINE_KERNEL_BACKEND. Raises ValueError for an unknown name, and where the
    backend asked for cannot run: it is never replaced by another.
    """
    asked = f"backend={backend!r}"
    if backend == "auto":
        backend = asked_backend(backend)
        asked = f"VFENGINE_KERNEL_BACKEND={backend}" if backend != "auto" else asked
    if backend not in BACKENDS:
        raise ValueError(f"{op}: {asked} is unknown, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type == "cpu":
            if "cpu" not in kernels:
                raise ValueError(
                    f"{op}: there is no kernel for CPU tensors, say backend='reference'"
                )
            return "cpu"
        if device.type == "cuda":
            both = "cuda" in kernels and native().cuda_built
            return prefer if both else "triton"
        raise ValueError(f"{op}: expected CPU or CUDA tensors, got {device}")
    if backend != "reference" and backend not in kernels:
        raise ValueError(f"{op}: {asked}, but there are only kernels for {', '.join(kernels)}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"{op}: {asked} takes CPU tensors, got {device}")
    if backend == "cuda":
        emulated = device.type == "cpu" and native().cuda_emulated
        if device.type != "cuda" and not emulated:
            raise ValueError(f"{op}: {asked} takes CUDA tensors, got {device}")
        if not native().cuda_built:
            raise ValueError(f"{op}: {asked}, but vfengine_native was built without nvcc")
    if backend == "triton":
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            raise ValueError(f"{op}: {asked} takes CUDA tensors, got {device}")
    return backend


def asked_backend(backend: str) -> str:
    """`backend`, where "auto" is what VFENGINE_KERNEL_BACKEND says, if anything."""
    if backend != "auto":
        return backend
    return native().environment("VFENGINE_KERNEL_BACKEND") or "auto"


def run_native(op: str, backend: str, tensor: Tensor, **fields: object) -> None:
    """Run the op's compiled kernel for "cpu" or "cuda", where `tensor` is.

    fields: of the op's struct (csrc/<op>.h), by name; TypeError for a missing or unknown one
    """
    args = native().args[op](**fields)
    kernel = getattr(native(), f"{op}_{backend}")
    if backend == "cpu":
        kernel(args, torch.get_num_threads())
    elif tensor.is_cuda:
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        kernel(args, tensor.device.index, stream)
    else:  # tests/tools/emulation
        kernel(args, 0, 0)


def register(schema: str, kernel: Callable[..., None], check: Callable[..., None]) -> Callable:
    """Register an op that writes into a tensor argument, for CPU and CUDA tensors; returns it.

    kernel: runs it; check: raises for arguments the kernel cannot take, without looking at memory.
    The op makes no tensor, so `check` is all there is to its fake.
    torch.library.Library costs about 3 µs a call, the custom_op decorator 8 to 13.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"vfengine::{name}", check, lib=LIBRARY)
    return getattr(torch.ops.vfengine, name).default


def step_op(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    dtype: torch.dtype,
    backend: str,
) -> Callable[..., Tensor]:
    """An op of a solver's step on this backend; for float64, which no kernel takes, its reference.

    The public ops refuse float64. Samplers run it, to have something exact to be compared with.
    Raises ValueError for float64 on any backend but "auto" and "reference".
    """
    if dtype != torch.float64:
        return functools.partial(op, backend=backend)
    if backend not in ("auto", "reference"):
        raise ValueError(f"float64 clips run backend='reference', got {backend!r}")

    def run(*arguments: Tensor, out: Tensor, **options) -> Tensor:
        return out.copy_(reference(*arguments, **options))

    return run


def unobserved(tensor: Tensor) -> bool:
    """Whether a kernel may run without its op: nothing is there that would want to see the op.

    That is a plain CPU tensor, and no tracer, mode, transform or profiler.
    """
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not _is_compiling()
        and _len_torch_function_stack() == 0
        and _len_torch_dispatch_stack() == 0
        and _peek_interpreter_stack() is None
        and _get_tracing_state() is None
        and not _profiler._is_profiler_enabled
    )


def check_kinds(op: str, tensors: dict[str, Tensor], **others: object) -> tuple:
    """The others in their order, as Python's ints, floats, bools and strings.

    Raises TypeError unless the tensors are tensors, and the others what `_OTHERS` says of their
    names; ValueError for a tensor without strides, such as a sparse one, and for an int beyond an
    int64.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{op}: {name} must be strided, got {tensor.layout}")
    for name, value in others.items():
        words, plain = _OTHERS.get(name, _NUMBER)
        others[name] = plain(value)
        if others[name] is None:
            raise TypeError(f"{op}: {name} must be {words}, got {type(value).__name__}")
        for number in (value, others[name]):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"{op}: {name} must be an int64, got {number}")
    return tuple(others.values())


def _only(kind: type) -> Callable[[object], object]:
    """A value if it is of this kind, else None."""
    return lambda value: value if isinstance(value, kind) else None


_NUMBER = ("a number", as_float)
_INT = ("an int", as_int)
_COUNTS = ("num_groups", "num_heads", "num_frames", "base_frame", "stride", "upsample")
_OTHERS = {
    **dict.fromkeys(_COUNTS, _INT),
    **dict.fromkeys(("silu", "gated", "conditioned", "transposed"), ("True or False", _only(bool))),
    "backend": ("a str", _only(str)),
}


def check_no_grad(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError where autograd would record the op: it has no derivative."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{op} has no derivative: call it under torch.no_grad()")


def check_table(
    op: str, name: str, table: Tensor | None, shape: tuple[int, ...], x: Tensor
) -> None:
    """Raise unless `table` is None, or contiguous fp32 of this shape where x is."""
    if table is not None:
        check_tensor(op, name, table, shape, torch.float32, x.device)


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is of a dtype that kernels compute on."""
    if tensor.dtype not in DTYPE_NUMBERS:
        raise TypeError(f"{op}: {name} must be fp32, fp16 or bf16, got {tensor.dtype}")


def address(tensor: Tensor | None) -> int:
    """Where the tensor starts, as the compiled kernels take it; 0: there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def check_head_dim(op: str, head_dim: int) -> None:
    """Raise ValueError for heads that the attention kernels cannot take."""
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: the head dimension must be a multiple of 8, at most {MAX_HEAD_DIM}, "
            f"got {head_dim}"
        )


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise unless `tensor` is contiguous and of this shape, dtype and device."""
    if tensor.dtype is not dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def check_overlap(op: str, out: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Raise ValueError where out shares memory with an input.

    Tensors that only describe others, as while a program is exported, have no memory.
    """
    if type(out) is not Tensor:
        return
    start = out.data_ptr()
    end = start + _extent(out)
    for name, tensor in inputs.items():
        if tensor is None:
            continue
        first = tensor.data_ptr()
        if first < end and start < first + _extent(tensor):
            raise ValueError(f"{op}: out shares memory with {name}")


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last, of a tensor that is not empty."""
    if tensor.is_contiguous():
        return tensor.nbytes
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


@functools.cache
def native() -> ModuleType:
    """vfengine_native, loaded when a kernel is first asked for."""
    from vfengine.native import vfengine_native

    return vfengine_native
