"""When an op's differentiable form runs: where autograd records what happens to a tensor.

A layer's `forward` takes our kernels there. Elsewhere it stays in plain PyTorch, which plans for
inference are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfengine.ops._dispatch import DTYPE_NUMBERS


def records_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on these tensors, the first of which our kernels can take.

    They take fp32, fp16 and bf16, on a CPU or on CUDA.
    """
    first = tensors[0]
    return (
        torch.is_grad_enabled()
        and first.dtype in DTYPE_NUMBERS
        and first.device.type in ("cpu", "cuda")
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )
