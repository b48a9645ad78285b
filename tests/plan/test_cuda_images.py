"""Decoder and encoder of an autoencoder as they are walked on CUDA (vfengine/plan/cuda.py).

As in test_cuda_unet.py: ops run as their references on CPU tensors, and launches are counted on
fake CUDA ones.
"""

import copy
from collections import Counter

import fake_cuda
import pytest
import torch
from seeded import filled, normal
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine.models import AutoencoderConfig, Decoder, Encoder, for_inference
from vfengine.plan.cuda import CudaImages
from vfengine.plan.decoder import PlannedDecoder, PlannedEncoder

SMALL = {"block_out_channels": (16, 32, 32), "norm_groups": 4, "layers_per_block": 1}
CASES = {
    "as published, narrow": {**SMALL, "block_out_channels": (32, 32, 64, 64), "norm_groups": 32},
    "no attention": {**SMALL, "mid_attention": False},
    "no quantisation": {**SMALL, "quant_conv": False, "post_quant_conv": False},
    "16 channels": {**SMALL, "latent_channels": 16},
    "one level": {**SMALL, "block_out_channels": (16,)},
}
PARTS = {"decoder": (Decoder, PlannedDecoder), "encoder": (Encoder, PlannedEncoder)}


def make(case: str, part: str, dtype=torch.float64):
    """A network and two pictures for it."""
    config = AutoencoderConfig(**CASES[case])
    size = (6, 4) if part == "decoder" else (6 * config.scale, 4 * config.scale)
    channels = config.latent_channels if part == "decoder" else config.in_channels
    network = filled(PARTS[part][0](config)).to(dtype).requires_grad_(False)
    return network, normal(2, channels, *size).to(dtype)


def distance(out, exact) -> float:
    assert out.shape == exact.shape
    return float((out.double() - exact).norm() / exact.norm())


both = pytest.mark.parametrize("part", PARTS)
all_cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def references(monkeypatch):
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")


@both
@all_cases
def test_it_computes_what_the_module_does(case, part, references):
    network, x = make(case, part)
    exact = network(x)
    out = CudaImages(network.float(), torch.float32)(x.float())
    assert out.dtype is torch.float32 and out.is_contiguous()
    assert distance(out, exact) < 1e-5


@both
def test_bf16_is_as_exact_as_the_module(part, references):
    network, x = make("as published, narrow", part)
    network, x = network.bfloat16().double(), x.bfloat16().double()
    exact = network(x)
    plain = distance(copy.deepcopy(network).bfloat16()(x.bfloat16()), exact)
    assert distance(CudaImages(network.bfloat16(), torch.bfloat16)(x), exact) <= 1.5 * plain


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


@both
@all_cases
def test_it_can_be_captured_and_launches_ops_alone(case, part, cuda_guard):
    network, pictures = make(case, part, torch.float32)
    mode = FakeTensorMode()
    fake_cuda.to_fake_cuda(network, mode)
    with mode, torch.no_grad():
        walked = for_inference(network, torch.bfloat16, "cuda", PARTS[part][1])
        assert isinstance(walked, CudaImages)
        x = torch.empty(1, *pictures.shape[1:], device="cuda")
    report = fake_cuda.audit(lambda: walked(x), {"x": x})
    assert report.clean, report
    ops = Counter(fake_cuda.launched(report.ops[0]))
    ours = {op.split(".")[1]: count for op, count in ops.items() if op.startswith("vfengine.")}
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    attentions = 3 * bool(network.config.mid_attention)  # q k v together, back; q, k, v less
    assert ours["implicit_gemm"] >= len(layers) + (2 if attentions else 0)
    assert ours["group_norm_silu"] == sum(
        isinstance(module, torch.nn.GroupNorm) for module in network.modules()
    )
    copies = sum(count for op, count in ops.items() if op.startswith("aten."))
    downsamplers = len(network.config.block_out_channels) - 1 if part == "encoder" else 0
    # the picture's cast and layout, rows of few channels, one side's zeros, the result's layout
    assert copies <= 6 + 2 * downsamplers, ops
