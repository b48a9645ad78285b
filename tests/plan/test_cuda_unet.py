"""The walk of a network on CUDA (vfengine/plan/cuda.py) against the module that it is made from.

Its ops run as their references here, on CPU tensors; tests/gpu runs the kernels. On fake CUDA
tensors the audit shows what it launches.
"""

import copy
from dataclasses import replace

import fake_cuda
import pytest
import torch
from conftest import tiny_config
from seeded import filled, normal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine import ops
from vfengine.models import UNet, for_inference
from vfengine.ops.temporal_attention import MAX_FRAMES
from vfengine.plan.cuda import CudaUNet

RGB = {"in_channels": 3, "out_channels": 3}
IMAGE, CLIP = replace(tiny_config().base, **RGB), replace(tiny_config().residual, **RGB)
CONTEXT = {"context_dim": 20}
PUBLISHED = replace(  # what published video networks have and ours do not
    CLIP,
    temporal_conv=(True, True),
    temporal_conv_depth=2,
    temporal_self_attentions=2,
    norm_over_frames=True,
    scale_shift=False,
    frame_embedding=False,
    transformer_in_heads=3,
    transformer_depths=(1, 2),
    feed_forward_mult=4,
    **CONTEXT,
)
CASES = {  # a configuration, and frames
    "image": (IMAGE, 1),
    "image, context": (replace(IMAGE, **CONTEXT), 1),
    "image, shift alone": (replace(IMAGE, scale_shift=False), 1),
    "image, no patches": (replace(IMAGE, patch_size=1), 1),
    "image, odd size": (replace(IMAGE, any_size=True, patch_size=1), 1),
    "clip": (CLIP, 4),
    "clip, one frame": (CLIP, 1),
    "clip, frames alike": (replace(CLIP, frame_embedding=False), 4),
    "clip, no bias, no feed-forward": (replace(CLIP, position_buckets=0, feed_forward_mult=0), 4),
    "clip, heads of 12": (replace(CLIP, head_dim=12, block_out_channels=(24, 24)), 4),
    "clip, many frames": (CLIP, MAX_FRAMES + 1),
    "clip, as published": (PUBLISHED, 4),
}


def make(case: str, dtype: torch.dtype = torch.float64) -> tuple[UNet, dict[str, Tensor]]:
    """A UNet and its inputs, a batch of two."""
    config, frames = CASES[case]
    size = (11, 7) if config.any_size else (8, 8) if frames > 4 else (16, 8)
    shape = (2, frames, 3, *size) if config.is_video else (2, 3, *size)
    inputs = {"x": normal(*shape).to(dtype), "t": torch.tensor([3, 900])}
    if config.context_dim:
        inputs["context"] = normal(2, 5, 20, seed=2).to(dtype)
    if config.num_classes:
        inputs["class_labels"] = torch.tensor([1, 0])
    return filled(UNet(config), 1.4).to(dtype).eval().requires_grad_(False), inputs


def in_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}


def distance(out: Tensor, exact: Tensor) -> float:
    assert out.shape == exact.shape
    return float((out.double() - exact).norm() / exact.norm())


@pytest.fixture
def references(monkeypatch):
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_module_does(case, references):
    unet, inputs = make(case)
    exact = unet(**inputs)
    network = CudaUNet(unet.float(), torch.float32)
    assert distance(network(**in_dtype(inputs, torch.float32)), exact) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_as_exact_as_the_module(case, references):
    unet, inputs = make(case)
    inputs = in_dtype(in_dtype(inputs, torch.bfloat16), torch.float64)  # the same for all
    unet = unet.bfloat16().double()
    exact = unet(**inputs)
    half = in_dtype(inputs, torch.bfloat16)
    plain = distance(copy.deepcopy(unet).bfloat16()(**half), exact)
    out = CudaUNet(unet.bfloat16(), torch.bfloat16)(**half)
    assert out.dtype is torch.bfloat16
    assert distance(out, exact) <= 1.5 * plain


def test_the_two_halves_of_a_pass(references):
    """Several timesteps at once have the modulation that each has by itself."""
    unet, _ = make("clip")
    network = CudaUNet(unet.float(), torch.float32)
    t, labels = torch.tensor([3, 500, 900]), torch.tensor([1, 1, 0])
    together = network.modulation(t, labels, 4)
    alone = torch.cat([network.modulation(t[k : k + 1], labels[k : k + 1], 4) for k in range(3)])
    assert together.shape == (12, network.projections.weight.shape[0])
    assert torch.allclose(together, alone, rtol=1e-6, atol=1e-6)


def test_weights_stay_the_modules(references):
    """Joined weights are one memory with the layers' own: whoever writes these is followed."""
    unet, inputs = make("clip", torch.float32)
    network = CudaUNet(unet, torch.float32)
    before = network(**inputs)
    attention = unet.mid[0].temporal.attn1
    attention.to_v.weight.zero_()
    assert not torch.equal(network(**inputs), before)
    joined, _ = network.attentions[attention]
    assert joined.weight[-8:].abs().max() == 0


def test_it_is_made_for_one_dtype_and_device(references):
    network = CudaUNet(make("image", torch.float32)[0], torch.float32)
    assert network.float() is network
    with pytest.raises(RuntimeError, match=r"made for torch.float32 on cpu; load the network anew"):
        network.bfloat16()


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_captured_and_launches_ops_alone(case, cuda_guard):
    unet, inputs = make(case, torch.float32)
    mode = FakeTensorMode()
    fake_cuda.to_fake_cuda(unet, mode)
    config, frames = CASES[case]
    with mode, torch.no_grad():
        network = for_inference(unet, torch.bfloat16, "cuda")
        assert isinstance(network, CudaUNet)
        height, width = (n // config.patch_size for n in inputs["x"].shape[-2:])
        images = 2 * frames
        x = torch.empty(
            images, height, width, network.input_width, dtype=torch.bfloat16, device="cuda"
        )
        columns = network.projections.weight.shape[0]
        modulation = torch.empty(images if config.frame_embedding else 2, columns, device="cuda")
        context = None
        if "context" in inputs:
            context = torch.empty(2, 5, 20, dtype=torch.bfloat16, device="cuda")
        network.rows(x, modulation, frames, context)  # position biases are made once
    report = fake_cuda.audit(
        lambda: network.rows(x, modulation, frames, context), {"x": x, "modulation": modulation}
    )
    assert report.clean, report
    ops = fake_cuda.launched(report.ops[0])
    ours = {op.split(".")[1] for op in ops if op.startswith("vfengine.")}
    assert ours >= {"group_norm_silu", "implicit_gemm"}
    allowed = []
    if frames > 1 and context is not None:  # keys and values, for every frame of several clips
        crossed = sum(kv is not None for _, kv in network.attentions.values())
        allowed += ["aten.clone.default"] * crossed
    if case == "image, odd size":
        allowed += ["aten.upsample_nearest2d.default"]
    if case in ("clip, heads of 12", "clip, many frames"):
        return  # no kernel takes these
    assert sorted(op for op in ops if op.startswith("aten.")) == sorted(allowed)


@pytest.mark.parametrize("backend", ["math", "sdpa", "flash"])
def test_attention_asked_for_by_name_runs_or_raises(backend, references, monkeypatch):
    unet, inputs = make("image", torch.float32)
    network = CudaUNet(unet, torch.float32)
    expected = network(**inputs)
    monkeypatch.setenv("VFENGINE_ATTENTION_BACKEND", backend)
    monkeypatch.setattr(ops, "spatial_attention", None)
    if backend == "flash":
        with pytest.raises(ValueError, match="VFENGINE_ATTENTION_BACKEND=flash takes CUDA tensors"):
            network(**inputs)
    else:
        assert torch.allclose(network(**inputs), expected, atol=1e-5)
