"""`attend` on a GPU, by every backend that is there, against the formula in fp64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_attention import SHAPES, VARIABLE, check_accuracy, forget, inputs

from vfengine.ops.attention import _MAX_BATCH, attend

all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
BEYOND = (5, _MAX_BATCH // 5 + 1, 1, 2, 8)  # more than fused kernels count


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
@all_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_matches_formula(shape, dtype, biased, backend, device):
    arguments = inputs(*SHAPES[shape], dtype, biased=biased, device=device)
    peer = sdpa(*arguments) if backend == "sdpa" else None
    check_accuracy(attend(*arguments, backend=backend), arguments, peer)


def sdpa(q, k, v, bias):
    """Torch's own, an outermost batch at a time; in fp32 its kernels err twice as the formula."""
    if q.ndim <= 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return torch.stack([sdpa(*parts, bias) for parts in zip(q, k, v, strict=True)])


@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
@all_dtypes
def test_batches_beyond_what_fused_kernels_count(dtype, biased, device):
    arguments = inputs(BEYOND, 2, dtype, biased=biased, device=device)
    check_accuracy(attend(*arguments, backend="sdpa"), arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_flash_matches_formula(shape, device, monkeypatch):
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    forget()
    pytest.importorskip("flash_attn", reason="the extra flash is missing")
    arguments = inputs(*SHAPES[shape], torch.bfloat16, device=device)
    check_accuracy(attend(*arguments, backend="flash"), arguments)
