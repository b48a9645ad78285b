"""Decoders and encoders on CUDA (vfengine/plan/cuda.py) against the modules they are made from.

Ops run as their references here, on CPU tensors; on fake CUDA tensors the audit shows what is
launched.
"""

import copy

import fake_cuda
import pytest
import torch
from seeded import filled, normal
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine.models import AutoencoderConfig, Decoder, Encoder, PlannedDecoder, for_inference
from vfengine.models.autoencoder import PaddedDownsample
from vfengine.models.layers import Attention, GroupNorm
from vfengine.ops._dispatch import MAX_HEAD_DIM
from vfengine.plan.cuda import CudaImages

LEVELS = AutoencoderConfig(block_out_channels=(32, 48, 64), layers_per_block=2, norm_groups=8)
CONFIGS = {
    "levels": LEVELS,
    "a head of 512": AutoencoderConfig(block_out_channels=(512,), layers_per_block=1),
    "no quantisation, no attention": AutoencoderConfig(
        block_out_channels=(8, 16),
        norm_groups=4,
        mid_attention=False,
        post_quant_conv=False,
        quant_conv=False,
    ),
    "channels": AutoencoderConfig(
        latent_channels=6, in_channels=1, out_channels=5, block_out_channels=(8,), norm_groups=4
    ),
    "patches": AutoencoderConfig(
        latent_channels=8, block_out_channels=(8, 16), norm_groups=4, patch_size=2
    ),
}
CASES = [(name, part) for name in CONFIGS for part in (Decoder, Encoder)]
all_cases = pytest.mark.parametrize(("name", "part"), CASES)


def make(name: str, part: type[nn.Module], batch: int = 1) -> tuple[nn.Module, torch.Tensor]:
    config = CONFIGS[name]
    module = filled(part(config)).requires_grad_(False)
    if part is Decoder:
        return module, normal(batch, config.latent_channels, 5, 6)
    return module, normal(batch, config.in_channels, 5 * config.scale, 6 * config.scale)


def distance(out: torch.Tensor, exact: torch.Tensor) -> float:
    assert out.shape == exact.shape and out.is_contiguous()
    return float((out.double() - exact).norm() / exact.norm())


@pytest.fixture
def references(monkeypatch):
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")


@all_cases
def test_it_computes_what_the_module_does(name, part, references):
    module, x = make(name, part, batch=2)
    exact = copy.deepcopy(module).double()(x.double())
    out = CudaImages(module, torch.float32)(x)
    assert out.dtype is torch.float32 and distance(out, exact) < 1e-5


@all_cases
def test_bf16_is_as_exact_as_the_module(name, part, references):
    module, x = make(name, part)
    module, x = module.bfloat16().double(), x.bfloat16()
    exact = module(x.double())
    plain = copy.deepcopy(module).bfloat16()(x)
    out = CudaImages(module.bfloat16(), torch.bfloat16)(x)
    assert out.dtype is torch.bfloat16
    assert distance(out, exact) <= 1.5 * distance(plain.contiguous(), exact)


def test_it_is_made_for_one_dtype(references):
    network = CudaImages(make("levels", Decoder)[0], torch.float32)
    assert network.float() is network
    with pytest.raises(RuntimeError, match=r"CudaImages: made for torch.float32 on cpu; load"):
        network.bfloat16()


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


ENDS = {"aten.constant_pad_nd.default", "aten.clone.default", "aten._to_copy.default"}
ENDS |= {"aten.pixel_shuffle.default", "aten.pixel_unshuffle.default"}  # of patches


def ops_of_layers(module: nn.Module) -> dict[str, int]:
    """How often each op of ours runs: each norm and convolution once, q, k and v together."""
    layers = list(module.modules())
    heads = [layer.head_dim for layer in layers if isinstance(layer, Attention)]
    products = sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in layers)
    counts = {
        "group_norm_silu": sum(isinstance(layer, GroupNorm) for layer in layers),
        "implicit_gemm": products - 2 * len(heads),
        "spatial_attention": sum(head_dim <= MAX_HEAD_DIM for head_dim in heads),
    }
    return {f"vfengine.{op}.default": count for op, count in counts.items() if count}


@all_cases
def test_it_can_be_captured_and_launches_ops_alone(name, part, cuda_guard):
    module, x = make(name, part)
    of_layers, mode = ops_of_layers(module), FakeTensorMode()
    downsamplers = sum(isinstance(layer, PaddedDownsample) for layer in module.modules())
    fake_cuda.to_fake_cuda(module, mode)
    with mode, torch.no_grad():
        network = for_inference(module, torch.bfloat16, "cuda", PlannedDecoder)
        assert isinstance(network, CudaImages)
        x = torch.empty(x.shape, dtype=torch.bfloat16, device="cuda")
    report = fake_cuda.audit(lambda: network(x), {"x": x})
    assert report.clean, report
    ops = fake_cuda.launched(report.ops[0])
    assert {op: ops.count(op) for op in ops if op.startswith("vfengine.")} == of_layers
    if name == "a head of 512":
        return  # the library's attention, which torch takes apart without a GPU
    others = [op for op in ops if op.startswith("aten.")]
    # the picture's cast and layout, rows of few channels, the result's layout, zeros at one side
    assert set(others) <= ENDS and len(others) <= 5 + downsamplers
