"""Attention, and the one place that decides which implementation of it runs.

| backend | tensors                      | is |
|---------|------------------------------|----|
| "flash" | CUDA, fp16 or bf16, no bias, | flash-attn, a package of its own |
|         | and see `why_no_flash`       | |
| "sdpa"  | any                          | torch's scaled_dot_product_attention |
| "math"  | any                          | two batched products around a softmax in fp32 |
| "auto"  | those of "flash"             | "flash", where the package is installed |
|         | all others on CUDA           | "sdpa" |
|         | all others on a CPU          | "math" up to 64 keys, and up to 1024 where |
|         |                              | autograd records; "sdpa" beyond |

Frames and coarse pictures are short sequences in large batches: there "math" takes a fraction of
the time of torch's fused CPU kernel, whose way back takes over twice that of "math" for longer ones
too. On CUDA it is five launches where "sdpa" is one.

"flash" has only ever been tested with a stand-in for its package: it has never run on a GPU here.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = ("auto", "flash", "sdpa", "math")
_SHORT = 64  # keys, up to which "auto" takes "math"
_SHORT_IN_TRAINING = 1024  # the same where autograd records: beyond, its logits take much memory
# Not cuDNN's: in bf16 its way back may give NaN (github.com/pytorch/pytorch/issues/196678 is one
# such case), and the first training of a base network on an H200 had NaN after one step.
_WITH_A_WAY_BACK = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_MAX_BATCH = 2**16 - 1  # fused CUDA kernels, flash-attn's and torch's, count it in gridDim.y or .z


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: [..., H, L, D], in q's dtype.

    q:       [..., H, L, D] fp32, fp16 or bf16, any strides
    k, v:    [..., H, M, D], the same dtype
    bias:    [H, L, M], any of these dtypes; only "sdpa" rounds it to q's
    backend: one of BACKENDS; "auto" defers to VFENGINE_ATTENTION_BACKEND, read at every call (what
             torch.compile or a CUDA graph captured keeps the choice of that time)

    Raises ValueError for an unknown backend, and where the one asked for cannot run; ImportError
    where flash-attn is installed and cannot be imported.
    """
    backend = choose_backend(q, k, v, bias, backend)
    if backend == "flash":
        return _flash(q, k, v)
    if backend == "sdpa":
        return _sdpa(q, k, v, bias)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if not logits.requires_grad:  # bf16, whose softmax computes in fp32 too, is faster to go back
        logits = logits.float()
    return logits.softmax(-1).to(v.dtype) @ v


def choose_backend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backend: str) -> str:
    """Resolve `backend` for the arguments of `attend` to "flash", "sdpa" or "math".

    Looks at shapes, dtypes, devices and whether autograd records, never at values. Raises
    ValueError for an unknown name, and where the backend asked for cannot run: it is never replaced
    by another.
    """
    asked = f"backend={backend!r}"
    if backend == "auto":
        backend = os.environ.get("VFENGINE_ATTENTION_BACKEND") or "auto"
        asked = f"VFENGINE_ATTENTION_BACKEND={backend}" if backend != "auto" else asked
    if backend not in BACKENDS:
        raise ValueError(f"attend: {asked} is unknown, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if why_no_flash(q, k, v, bias) is None:
            return "flash"
        fused = q.is_cuda and math.prod(q.shape[:-3]) <= _MAX_BATCH
        short = _SHORT_IN_TRAINING if q.requires_grad and not q.is_cuda else _SHORT
        return "math" if k.shape[-2] <= short and not fused else "sdpa"
    if backend == "flash":
        reason = why_no_flash(q, k, v, bias)
        if reason is not None:
            raise ValueError(f"attend: {asked} {reason}")
    return backend


def why_no_flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """What flash-attn expects and does not get, as the end of a sentence; None: it can run.

    It wants its package, compute capability 8.0 and tensors as below. The package is found, not
    imported.
    """
    if q.device.type != "cuda":
        return f"takes CUDA tensors, got {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes torch.float16 or torch.bfloat16, got {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"takes q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if bias is not None:
        return f"takes no bias, got one of {list(bias.shape)}"
    head_dim = q.shape[-1]
    if head_dim % 8 or not 0 < head_dim <= 256:
        return f"takes head dimensions that are multiples of 8, at most 256, got {head_dim}"
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        shapes = ", ".join(str(list(x.shape[:-2])) for x in (q, k, v))
        return f"takes q, k, v of the same leading dimensions, got {shapes}"
    batch = math.prod(q.shape[:-3])
    if not 0 < batch <= _MAX_BATCH:
        return f"takes a batch of 1 to {_MAX_BATCH}, got {batch}"
    if not _flash_installed():
        return "needs the package flash-attn, which is not installed"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _flash_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _flash_attn_func() -> Callable[..., Tensor]:
    """flash_attn.flash_attn_func, imported when first called for: that takes seconds."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ImportError(
            f"attend: flash-attn is installed but cannot be imported ({error}); "
            "VFENGINE_ATTENTION_BACKEND=sdpa does without it"
        ) from error
    return flash_attn_func


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn takes [B, L, H, D]: the rows that `Attention` split into heads, a view of them."""
    deterministic = torch.are_deterministic_algorithms_enabled()  # as SDPA does, in backward
    rows = (_one_batch(x.transpose(-3, -2)) for x in (q, k, v))
    out = _flash_attn_func()(*rows, deterministic=deterministic)
    return out.reshape(q.transpose(-3, -2).shape).transpose(-3, -2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)
    batch = q.shape[:-3]
    fold = q.is_cuda and len(batch) > 1 and math.prod(batch) <= _MAX_BATCH
    # Torch's fused CUDA kernels take four dimensions; given five, it would write out the logits.
    fold = fold and batch == k.shape[:-3] == v.shape[:-3]
    if fold:
        q, k, v = (_one_batch(x) for x in (q, k, v))
    recorded = q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    with sdpa_kernel(_WITH_A_WAY_BACK) if recorded else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.unflatten(0, batch) if fold else out


def _one_batch(x: Tensor) -> Tensor:
    """[..., X, Y, D] -> [B, X, Y, D], a view wherever `Attention` made x."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
