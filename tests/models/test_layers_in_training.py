"""Layers where autograd records, in our kernels, beside the same layers in plain PyTorch."""

from dataclasses import replace

import pytest
import torch
from test_models import CLIP, randomise

from vfengine.models import layers
from vfengine.models.layers import FeedForward, LayerNorm, Transformer


def in_training(module, *inputs, dtype=torch.float32):
    """The result and the gradients of inputs and weights."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = module(*leaves)
    random = torch.Generator().manual_seed(3)
    grad = torch.randn(y.shape, generator=random)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *module.parameters()], grad.to(y.dtype))]


def both_ways(module, *inputs, monkeypatch, dtype=torch.float32):
    """In our kernels and in plain PyTorch."""
    ours = in_training(module, *inputs, dtype=dtype)
    monkeypatch.setattr(layers, "records_gradients", lambda *tensors: False)
    return ours, in_training(module, *inputs, dtype=dtype)


def assert_close(ours, plain, allowed):
    for got, expected in zip(ours, plain, strict=True):
        assert got.dtype is expected.dtype
        error, largest = (got - expected).abs().max(), expected.abs().max()
        assert error <= allowed * largest, f"{error:.3g} of {largest:.3g}"


@pytest.fixture
def calls(monkeypatch):
    """The names of the differentiable ops that layers called."""
    made = []
    for name in ("layer_norm", "geglu", "temporal_attention"):
        op = getattr(layers, f"differentiable_{name}")

        def counted(*arguments, op=op, name=name):
            made.append(name)
            return op(*arguments)

        monkeypatch.setattr(layers, f"differentiable_{name}", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("buckets", [8, 0])
@pytest.mark.parametrize("depth", [1, 2])
def test_temporal_transformer_trains_in_our_kernels(dtype, buckets, depth, calls, monkeypatch):
    config = replace(CLIP, position_buckets=buckets, feed_forward_mult=2)
    temporal = randomise(Transformer(16, "time", config, head_dim=8, depth=depth))
    x = torch.randn(6, 16, 4, 5, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last)
    module = WithFrames(temporal, 3)
    ours, plain = both_ways(module, x, monkeypatch=monkeypatch, dtype=dtype)
    assert calls == ["temporal_attention", "geglu"] * depth
    if dtype is torch.float32:
        assert_close(ours, plain, 1e-5)
        return
    for got, peer, exact in zip(ours, plain, in_training(module, x), strict=True):
        assert got.dtype is peer.dtype
        error, of_peer = ((result - exact).norm() for result in (got, peer))
        assert error <= 2 * of_peer, f"{error:.3g}, PyTorch {of_peer:.3g}"


class WithFrames(torch.nn.Module):
    """A temporal transformer that is called with x alone."""

    def __init__(self, transformer, num_frames):
        super().__init__()
        self.transformer, self.num_frames = transformer, num_frames

    def forward(self, x):
        return self.transformer(x, self.num_frames)


def test_heads_without_kernels_train_in_plain_pytorch(calls):
    temporal = randomise(Transformer(12, "time", replace(CLIP, norm_groups=4), head_dim=6))
    in_training(WithFrames(temporal, 2), torch.randn(4, 12, 3, 3))
    assert "temporal_attention" not in calls


def test_layer_norm_trains_in_our_kernels_where_they_pay(calls, monkeypatch):
    norm, x = randomise(LayerNorm(20)), torch.randn(2, 7, 3, 20).transpose(1, 2)
    in_training(norm, x)
    assert calls == []  # on a CPU
    monkeypatch.setattr(layers, "layer_norm_pays", lambda x: True)
    assert_close(*both_ways(norm, x, monkeypatch=monkeypatch), 1e-5)
    assert calls == ["layer_norm"]
    assert LayerNorm(20).state_dict().keys() == torch.nn.LayerNorm(20).state_dict().keys()


def test_layers_stay_in_plain_pytorch_where_nothing_is_recorded(calls):
    temporal = randomise(Transformer(16, "time", CLIP, head_dim=8))
    x = torch.randn(6, 16, 4, 5)
    with torch.no_grad():
        temporal(x, 3)
        FeedForward(16, 2)(torch.randn(3, 16))
    for frozen in (temporal, FeedForward(16, 2)):
        frozen.requires_grad_(False)
    temporal(x, 3)
    assert calls == []
