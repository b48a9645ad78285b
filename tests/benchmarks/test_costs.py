"""lib/costs.py against counts by hand, torch's own counters, and a real network's memory."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import benchmark_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from vfengine import ops
from vfengine.models import UNet, UNetConfig, vdm_config

costs, paper_scale = map(benchmark_file, ("lib.costs", "bench_paper_scale"))
N = 1000  # floats in a vector; 4 N bytes


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    """The rest of the test makes real tensors, or fake ones."""
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield


def only(counted):
    (op,) = counted.ops
    return op


# -- counted by hand -------------------------------------------------------------------------------


def test_linear(tensors):
    layer, x = nn.Linear(7, 5), torch.ones(3, 7)
    counted = costs.trace(lambda: layer(x), live=(layer, x))
    assert only(counted) == costs.Op("aten.addmm", 2 * 3 * 7 * 5, 4 * (3 * 7 + 7 * 5 + 5 + 3 * 5))
    assert counted.live_bytes == 4 * (3 * 7 + 7 * 5 + 5)
    assert counted.peak_bytes == counted.live_bytes + 4 * 3 * 5


def test_convolution(tensors):
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.ones(2, 4, 8, 10)
    with torch.no_grad():
        counted = costs.trace(lambda: layer(x), live=(layer, x))
    out = 2 * 6 * 4 * 5
    assert only(counted).flops == 2 * out * 4 * 9
    assert only(counted).bytes == 4 * (x.numel() + 6 * 4 * 9 + 6 + out)
    assert counted.peak_bytes - counted.live_bytes == counted.allocated_bytes == 4 * out


def test_views_cost_nothing(tensors):
    x = torch.ones(4, N)
    counted = costs.trace(lambda: x.view(N, 4).t()[:2].expand(3, 2, N).unflatten(-1, (10, -1)), [x])
    assert not counted.ops
    assert counted.peak_bytes == counted.live_bytes == 16 * N


def test_writing_in_place_allocates_nothing(tensors):
    x, y = torch.ones(N), torch.ones(N)
    counted = costs.trace(lambda: x.add_(y), live=(x, y))
    assert only(counted) == costs.Op("aten.add_", 0, 3 * 4 * N)
    assert counted.peak_bytes == counted.live_bytes == 2 * 4 * N
    assert only(costs.trace(lambda: x.mul_(x))).bytes == 2 * 4 * N  # read once, written once
    assert only(costs.trace(lambda: x.copy_(y))).bytes == 2 * 4 * N  # x is not read
    assert only(costs.trace(x.zero_)).bytes == 4 * N


def test_an_allocation_is_no_launch(tensors):
    counted = costs.trace(lambda: torch.empty(N))
    assert not counted.ops
    assert counted.peak_bytes == counted.allocated_bytes == 4 * N
    assert only(costs.trace(lambda: torch.zeros(N))).bytes == 4 * N


def test_reads_what_is_there(tensors):
    x, table = torch.ones(N), torch.ones(50, 8)
    rows = torch.tensor([1, 2, 3])
    assert only(costs.trace(lambda: x.expand(7, N).clone())).bytes == 4 * (N + 7 * N)
    looked_up = only(costs.trace(lambda: F.embedding(rows, table)))
    assert looked_up.bytes == 3 * 8 + 2 * 4 * 3 * 8  # three rows read, three written


def test_temporaries_are_freed(tensors):
    x = torch.ones(N)

    def chain():
        y = x * 2
        for _ in range(5):
            y = y * 2
        return y.view(10, -1)

    counted = costs.trace(chain, [x])
    assert counted.launches == 6
    assert counted.peak_bytes == 3 * 4 * N  # x, an input and an output
    assert counted.allocated_bytes == 6 * 4 * N


def test_a_storage_lives_as_long_as_a_view(tensors):
    x = torch.ones(N)

    def keeps_a_view():
        kept = (x * 2)[:1]
        return kept, x * 3

    assert costs.trace(keeps_a_view, [x]).peak_bytes == 3 * 4 * N


def test_what_autograd_saves_lives_until_backward(tensors):
    x = torch.ones(N, requires_grad=True)
    counted = costs.trace(lambda: x.exp().exp().sum().backward(), [x])
    # x, both exp (saved) and the gradient of the second; the sum and its gradient, 4 bytes each
    assert counted.peak_bytes == 4 * 4 * N + 8
    x.grad = None
    assert costs.trace(lambda: x.sin().sin().sum(), [x]).peak_bytes == 3 * 4 * N + 4


def test_checkpointing_trades_memory_for_arithmetic(tensors):
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(6)]
    x = torch.ones(512, 64, requires_grad=True)

    def run(block):
        h = x
        for part in blocks:
            h = block(part, h)
        h.sum().backward()

    plain = costs.trace(lambda: run(lambda part, h: part(h)), (x, blocks))
    for block in blocks:
        block.zero_grad()
    x.grad = None
    lean = costs.trace(
        lambda: run(lambda part, h: checkpoint(part, h, use_reentrant=False)), (x, blocks)
    )
    assert lean.live_bytes == plain.live_bytes
    assert lean.peak_bytes < 0.75 * plain.peak_bytes
    # The last product of a block saves nothing that backward needs: it is not done again.
    assert 1 < lean.flops / plain.flops <= 4 / 3


def test_attention_writes_no_logits(tensors):
    length, shape = 256, (2, 4, 256, 32)
    q, k, v = (torch.ones(shape, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        forward = costs.trace(lambda: F.scaled_dot_product_attention(q, k, v), (q, k, v))
    assert only(forward).flops == 2 * 2 * 8 * length * length * 32
    logsumexp = 8 * length
    assert forward.peak_bytes - forward.live_bytes == 4 * (q.numel() + logsumexp)
    both = costs.trace(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward(), (q, k, v))
    assert both.flops == only(forward).flops + sdpa_backward_flop_count(shape, shape, shape, shape)
    assert both.peak_bytes - both.live_bytes < 4 * 8 * length * length


def test_live_counts_each_storage_once(tensors):
    layer = nn.Linear(7, 5)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 7)).sum().backward()
    optimizer.step()
    weights = 4 * (7 * 5 + 5)
    assert costs.bytes_of([layer]) == 2 * weights  # with its gradients
    assert costs.bytes_of([layer, {"again": [layer.weight[:1]]}]) == 2 * weights
    assert costs.bytes_of([layer, optimizer]) == 4 * weights + 2 * 4  # a step count each


def test_an_op_of_the_project(tensors):
    """residual_step: two reads and one write of the clip."""
    u, r, g = torch.ones(2, 4, 3, 8, 8), torch.ones(2, 4, 3, 8, 8), torch.ones(2, 3, 8, 8)
    small = {"lam": torch.ones(4), "coeffs": torch.zeros(5, 3)}
    small["step"] = torch.zeros(1, dtype=torch.int32)
    counted = costs.trace(lambda: ops.residual_step(u, r, g, **small), (u, r, g, small))
    extra = sum(x.nbytes for x in small.values())
    assert only(counted).bytes == 3 * u.nbytes + g.nbytes + extra
    assert counted.peak_bytes == counted.live_bytes
    out = torch.empty_like(u)
    assert only(costs.trace(lambda: ops.residual_step(u, r, g, **small, out=out))).bytes == (
        3 * u.nbytes + g.nbytes + extra
    )


def test_roofline():
    device = costs.Device("toy", flops=100.0, bandwidth=10.0)
    first = costs.Costs((costs.Op("a", 300, 10), costs.Op("b", 0, 5)), 7, 9, 2)
    assert first.seconds(device) == 3 + 0.5
    assert first.by_op == {"a": (1, 300, 10), "b": (1, 0, 5)}
    both = first.beside(100).then(first)
    assert (both.flops, both.bytes, both.launches) == (600, 30, 4)
    assert (both.live_bytes, both.peak_bytes, both.allocated_bytes) == (107, 109, 4)


# -- a small network -------------------------------------------------------------------------------

SMALL = vdm_config(
    UNetConfig(
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=(1, 1),
        spatial_attention=(True, True),
        temporal_attention=(False, False),
        temporal_conv=(False, False),
        num_classes=3,
        head_dim=8,
    )
)


@pytest.fixture
def one_thread():
    """On a busy machine threads wait for each other at every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_call(net: UNet, training: bool):
    """(what to call, what is alive before): one call or one training step of the network."""
    x, t = torch.zeros(1, 2, 3, 16, 16), torch.zeros(1, dtype=torch.int64)
    if not training:
        return torch.no_grad()(lambda: net(x, t)), (net, x, t)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def step():
        net(x, t).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's moments
    return step, (net, x, t, optimizer)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_fake_network_costs_what_the_real_one_does(one_thread, training):
    real = costs.trace(*small_call(UNet(SMALL), training))
    with torch.device("meta"):
        net = UNet(SMALL)
    with FakeTensorMode():
        fake = costs.trace(*small_call(costs.to_fake(net), training))
    assert fake == real


def sdpa(q, k, v, *rest, out_shape=None, **options):
    return sdpa_flop_count(q, k, v)


def sdpa_backward(grad, q, k, v, *rest, out_shape=None, **options):
    return sdpa_backward_flop_count(grad, q, k, v)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_flops_are_those_of_torchs_counter(one_thread, training):
    call, live = small_call(UNet(SMALL), training)
    aten = torch.ops.aten
    missing = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        call()
    assert costs.trace(call, live).flops == counter.get_total_flops()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_peak_is_the_allocators(one_thread, training):
    """torch.profiler sees every allocation, what kernels allocate for themselves included."""
    call, live = small_call(UNet(SMALL), training)
    counted = costs.trace(call, live)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.97 * peak < counted.peak_bytes - counted.live_bytes <= peak


# -- the paper's scale -----------------------------------------------------------------------------


def test_networks_have_the_papers_size():
    networks = paper_scale.build(torch.bfloat16, FakeTensorMode(allow_non_fake_inputs=True))
    base, residual, vdm = (
        {name: p.numel() for name, p in net.named_parameters()} for net in vars(networks).values()
    )
    assert sum(base.values()) == pytest.approx(2e9, rel=0.05)
    assert sum(residual.values()) == pytest.approx(0.5e9, rel=0.05)
    assert base.items() <= vdm.items()  # the base UNet unchanged, and temporal layers
    assert all(".temporal." in name for name in vdm.keys() - base.keys())


def test_two_phases_hold_one_network(monkeypatch):
    small = {"block_out_channels": (32, 32), "layers_per_block": (1, 1), "head_dim": 16}
    small |= {"spatial_attention": (False, True), "temporal_conv": (False, False)}
    base = replace(paper_scale.BASE, **small, temporal_attention=(False, False))
    small |= {"block_out_channels": (16, 16), "norm_groups": 8}
    residual = replace(paper_scale.RESIDUAL, **small, temporal_attention=(False, True))
    monkeypatch.setattr(paper_scale, "SIZE", 8)
    monkeypatch.setattr(paper_scale, "BASE", base)
    monkeypatch.setattr(paper_scale, "RESIDUAL", residual)
    monkeypatch.setattr(paper_scale, "VDM", vdm_config(base))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    networks = paper_scale.build(torch.float32, mode)
    with mode:
        steps = paper_scale.denoising(networks, 1)
        plain, joint = (paper_scale.training(networks, 1, decomposed) for decomposed in (0, 1))
    ways = [steps[way] for way in (paper_scale.TWO_PHASE, paper_scale.BASE_KEPT)]
    interleaved = steps[paper_scale.INTERLEAVED]
    assert ways[0].peak_bytes < ways[1].peak_bytes
    assert ways[0].flops == ways[1].flops == interleaved.flops < steps["VDM*"].flops
    # weights, two moments and a gradient each, in fp32
    for step, nets in ((plain, [networks.vdm]), (joint, [networks.base, networks.residual])):
        weights = 4 * sum(p.numel() for net in nets for p in net.parameters())
        assert step.live_bytes == pytest.approx(3 * weights, rel=0.02)
        assert step.peak_bytes > 3 * weights
