"""PlannedUNet against the UNet that it replaces: values, bits, errors, memory."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from seeded import filled, normal
from test_plan_snapshots import IMAGE
from torch import Tensor, nn

from vfengine.models import PlannedUNet, UNet, for_inference, vdm_config
from vfengine.native import vfengine_native
from vfengine.plan import network as planned
from vfengine.plan.cuda import CudaUNet
from vfengine.plan.forms import ImplicitGemm, Winograd, convolution
from vfengine.plan.network import inference_dtype

VIDEO = replace(
    IMAGE,
    spatial_attention=(True, True),
    temporal_attention=(True, True),
    temporal_conv=(False, True),
    frame_embedding=True,
)
CONTEXT = {"context_dim": 12}
CASES = {  # a configuration, the shape of x, and the length of a context
    "image": (IMAGE, (2, 3, 8, 8), None),
    "image, added embedding": (replace(IMAGE, scale_shift=False), (2, 3, 8, 8), None),
    "image, patches of 2": (replace(IMAGE, patch_size=2), (2, 3, 16, 8), None),
    "image, patches of 4": (replace(IMAGE, patch_size=4, out_channels=5), (1, 3, 16, 24), None),
    "image, patches of 3": (replace(IMAGE, patch_size=3), (1, 3, 12, 6), None),
    "image, classes": (replace(IMAGE, num_classes=3), (2, 3, 8, 8), None),
    "image, context": (replace(IMAGE, **CONTEXT), (2, 3, 8, 8), 77),
    "image, one token": (replace(IMAGE, **CONTEXT), (2, 3, 8, 8), 1),
    "image, without its context": (replace(IMAGE, **CONTEXT), (2, 3, 8, 8), None),
    "image, attention at every pixel": (
        replace(IMAGE, spatial_attention=(True, True)),
        (1, 3, 18, 14),
        None,
    ),
    "image, odd size": (replace(IMAGE, any_size=True, **CONTEXT), (2, 3, 7, 5), 9),
    "image, one pixel": (replace(IMAGE, any_size=True), (1, 3, 1, 1), None),
    "image, three levels, odd size": (
        replace(
            IMAGE,
            block_out_channels=(8, 16, 16),
            layers_per_block=(1, 2, 0),
            any_size=True,
            spatial_attention=(False, True, True),
            temporal_attention=(False,) * 3,
            temporal_conv=(False,) * 3,
        ),
        (2, 3, 9, 13),
        None,
    ),
    "image, blocks of blocks": (
        replace(IMAGE, transformer_depths=(1, 3), **CONTEXT),
        (1, 3, 8, 12),
        5,
    ),
    "image, odd channels": (replace(IMAGE, in_channels=5, out_channels=1), (2, 5, 4, 4), None),
    "image, heads of 12": (
        replace(IMAGE, block_out_channels=(24, 24), head_dim=12),
        (2, 3, 8, 4),
        None,
    ),
    "image, heads of 20": (
        replace(IMAGE, block_out_channels=(20, 40), head_dim=20, norm_groups=4, **CONTEXT),
        (2, 3, 8, 4),
        3,
    ),
    "image, heads of 1": (replace(IMAGE, head_dim=1), (2, 3, 8, 4), None),
    "image, a head of 512": (
        replace(IMAGE, block_out_channels=(8, 512), head_dims=(8, 512)),
        (1, 3, 6, 4),
        None,
    ),
    "image, heads per level": (
        replace(IMAGE, spatial_attention=(True, True), head_dims=(4, 12)),
        (2, 3, 4, 8),
        None,
    ),
    "video": (VIDEO, (2, 5, 3, 8, 8), None),
    "video, added embedding": (replace(VIDEO, scale_shift=False), (2, 5, 3, 8, 8), None),
    "video, one embedding for all frames": (
        replace(VIDEO, scale_shift=False, frame_embedding=False),
        (2, 4, 3, 8, 8),
        None,
    ),
    "video, no position bias": (replace(VIDEO, position_buckets=0), (1, 6, 3, 8, 8), None),
    "video, context and classes": (replace(VIDEO, num_classes=4, **CONTEXT), (2, 3, 3, 8, 8), 77),
    "video, one frame": (VIDEO, (2, 1, 3, 8, 8), None),
    # Its coarse level has one pixel: groups of 3 channels, as elsewhere, may hold nearly equal
    # numbers, whose norm turns one rounding into 1e-5, in any implementation (test_fp32_sums.py).
    "video, 128 frames": (replace(VIDEO, norm_groups=2), (1, 128, 3, 2, 2), None),
    "video, patches of 2": (replace(VIDEO, patch_size=2), (1, 3, 3, 8, 12), None),
    "video, odd size": (replace(VIDEO, any_size=True), (2, 3, 3, 5, 7), None),
    "video, heads of 12": (
        replace(VIDEO, block_out_channels=(24, 24), head_dim=12),
        (2, 5, 3, 4, 4),
        None,
    ),
    "video, heads of 20": (
        replace(VIDEO, block_out_channels=(20, 40), head_dim=20, norm_groups=4),
        (1, 7, 3, 4, 4),
        None,
    ),
    "video, several temporal convolutions": (
        replace(VIDEO, temporal_conv=(True, True), temporal_conv_depth=4),
        (2, 4, 3, 4, 4),
        None,
    ),
    "video, two attentions in time": (
        replace(VIDEO, temporal_self_attentions=2, norm_over_frames=True, position_buckets=0),
        (2, 5, 3, 4, 4),
        None,
    ),
    "video, narrow transformer first": (  # too narrow for its last layers to be fused
        replace(VIDEO, transformer_in_heads=1),
        (2, 5, 3, 8, 8),
        None,
    ),
    "video, wide transformer first": (
        replace(VIDEO, transformer_in_heads=5),
        (2, 5, 3, 8, 8),
        None,
    ),
    "plain video model": (vdm_config(IMAGE), (2, 5, 3, 8, 8), None),
    "plain video model, no feed-forward": (
        vdm_config(replace(IMAGE, feed_forward_mult=0)),
        (2, 5, 3, 8, 8),
        None,
    ),
    "no middle": (replace(IMAGE, mid_blocks=0), (2, 3, 8, 8), None),
}
SOME = ("image, context", "video", "video, context and classes", "image, heads of 12")

all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
all_cases = pytest.mark.parametrize("case", CASES)
some_cases = pytest.mark.parametrize("case", SOME)


def network(case: str) -> UNet:
    return filled(UNet(CASES[case][0]))


def inputs(case: str, seed: int = 1) -> dict:
    config, shape, length = CASES[case]
    values = {"x": normal(*shape, seed=seed), "t": torch.tensor([7, 801])[: shape[0]]}
    if length is not None:
        values["context"] = normal(shape[0], length, config.context_dim, seed=seed + 1)
    if config.num_classes is not None:
        values["class_labels"] = torch.tensor([2, 0])[: shape[0]]
    return values


def cast(values: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}


def plan(unet: UNet, dtype: torch.dtype = torch.float32) -> PlannedUNet:
    """Of a copy. bf16 is computed in fp32 where there are no instructions for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PlannedUNet(copy.deepcopy(unet), dtype)


def distance(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def exact_result(unet: UNet, values: dict) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(unet).double()(**cast(values, torch.float64))


BF16_ISAS = [
    isa for isa in vfengine_native.cpu_isas if isa in ("amx_emulated", "avx512_bf16", "amx")
]
FORMS = {"tiled": 1, "layer by layer": 1 << 40, "as it is": planned._TILED}


@pytest.fixture(params=["tiled", "layer by layer"])
def form(request, monkeypatch):
    """How transformers run."""
    monkeypatch.setattr(planned, "_TILED", FORMS[request.param])


# -- values ----------------------------------------------------------------------------------------


@all_cases
def test_planned_unet_matches_the_module(case, form):
    unet, values = network(case), inputs(case)
    with torch.no_grad():
        expected = unet(**values)
    out = plan(unet)(**values)
    assert out.shape == expected.shape and out.dtype is torch.float32 and out.is_contiguous()
    assert distance(out, expected) < max(1e-5, distance(expected, exact_result(unet, values)))


@all_cases
@pytest.mark.parametrize("isa", BF16_ISAS)
def test_planned_unet_in_bf16_is_as_close_as_the_module(case, isa, isas, form):
    isas(isa)
    unet, values = network(case), inputs(case)
    exact = exact_result(unet, values)
    with torch.no_grad():
        peer = copy.deepcopy(unet).bfloat16()(**cast(values, torch.bfloat16))
    out = plan(unet, torch.bfloat16)(**values)
    assert out.dtype is torch.float32, "of x"
    assert distance(out, exact) <= 1.5 * distance(peer, exact)


@some_cases
@pytest.mark.parametrize("isa", vfengine_native.cpu_isas)
def test_planned_unet_matches_the_module_on_every_isa(case, isa, isas, form):
    isas(isa)
    unet, values = network(case), inputs(case)
    assert distance(plan(unet)(**values), exact_result(unet, values)) < 1e-5


@some_cases
def test_planned_unet_takes_any_memory_format_and_dtype_of_x(case):
    unet, values = plan(network(case)), inputs(case)
    expected = unet(**values)
    x = values["x"]
    for other in (x.transpose(-1, -2).contiguous().transpose(-1, -2), x[..., None].clone()[..., 0]):
        assert torch.equal(unet(**{**values, "x": other}), expected)
    double = unet(**{**values, "x": x.double()})
    assert double.dtype is torch.float64 and torch.equal(double.float(), expected)
    half = unet(**{**values, "x": x.bfloat16()})
    assert half.dtype is torch.bfloat16


def test_a_network_is_planned_once():
    unet = filled(UNet(IMAGE), seed=1)
    PlannedUNet(unet, torch.float32)
    with pytest.raises(ValueError, match="PlannedUNet: the network's weights have moved into an"):
        PlannedUNet(unet, torch.float32)


def test_planned_unet_has_no_gradient():
    unet, values = plan(network("image")), inputs("image")
    assert not any(p.requires_grad for p in unet.parameters()) and not unet.training
    out = unet(values["x"].requires_grad_(), values["t"])
    assert not out.requires_grad


# -- dtypes and instruction sets -------------------------------------------------------------------


@pytest.mark.parametrize("isa", vfengine_native.cpu_isas)
def test_bf16_runs_in_fp32_where_there_are_no_instructions(isa, isas):
    isas(isa)
    unet, values = network("image"), inputs("image")
    expected = plan(unet)(**values)
    if isa in BF16_ISAS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert PlannedUNet(unet, torch.bfloat16).dtype is torch.bfloat16
        return
    with pytest.warns(UserWarning, match=r"no bf16 instructions .* runs in float32"):
        made = PlannedUNet(unet, torch.bfloat16)
    assert made.dtype is torch.float32
    assert torch.equal(made(**values), expected)


def test_refuses_another_instruction_set_than_its_weights_were_packed_for(isas):
    isas("baseline")
    unet, values = plan(network("image")), inputs("image")
    before = unet(**values)
    for other in vfengine_native.cpu_isas[1:]:
        isas(other)
        with pytest.raises(RuntimeError, match=f"packed for baseline, not {other}"):
            unet(**values)
    isas("baseline")
    assert torch.equal(unet(**values), before)


@pytest.mark.parametrize("isa", vfengine_native.cpu_isas)
def test_a_matrix_unit_multiplies_convolutions_directly(isa, isas):
    """All others, and fp32 anywhere, take Winograd's form."""
    isas(isa)
    layer = nn.Conv2d(64, 64, 3, padding=1)
    tiles = isa in ("amx", "amx_emulated")
    assert isinstance(convolution(layer, torch.bfloat16), ImplicitGemm if tiles else Winograd)
    assert isinstance(convolution(layer, torch.float32), Winograd)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_inference_dtype_refuses_others(dtype):
    with pytest.raises(ValueError, match=f"float32 or bfloat16, got {dtype}"):
        inference_dtype(dtype)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        PlannedUNet(UNet(IMAGE), dtype)


def test_for_inference_is_for_a_cpu_or_cuda():
    assert isinstance(for_inference(UNet(IMAGE), torch.float32, "cpu"), PlannedUNet)
    assert isinstance(for_inference(UNet(IMAGE), torch.float16, "cuda"), CudaUNet)
    for dtype, device in ((torch.float16, "cpu"), (torch.float64, "cuda"), (torch.float32, "meta")):
        unet = UNet(IMAGE)
        assert for_inference(unet, dtype, device) is unet
        assert not unet.training and not any(p.requires_grad for p in unet.parameters())


# -- errors and memory -----------------------------------------------------------------------------

BAD = {
    "frames missing": ("video", {"x": normal(2, 3, 8, 8)}),
    "frames too many": ("image", {"x": normal(2, 5, 3, 8, 8)}),
    "channels": ("image", {"x": normal(2, 4, 8, 8)}),
    "height": ("image", {"x": normal(2, 3, 7, 8)}),
    "width, in patches": ("image, patches of 4", {"x": normal(1, 3, 16, 12)}),
    "t": ("image", {"t": torch.tensor([1, 2, 3])}),
    "labels for none": ("image", {"class_labels": torch.tensor([1, 2])}),
    "labels": ("image, classes", {"class_labels": torch.tensor([1])}),
    "context for none": ("image", {"context": normal(2, 5, 12)}),
    "context": ("image, context", {"context": normal(2, 5, 13)}),
}


@pytest.mark.parametrize("bad", BAD)
def test_refuses_what_the_module_refuses(bad):
    case, change = BAD[bad]
    unet, values = network(case), {**inputs(case), **change}
    with pytest.raises(ValueError, match="UNet: ") as expected:
        unet(**values)
    made = plan(unet)
    with pytest.raises(ValueError) as refused:
        made(**values)
    assert str(refused.value) == str(expected.value)
    assert not made._programs
    assert made(**inputs(case)).isfinite().all(), "and goes on"


@pytest.mark.parametrize(
    "config, missing, message",
    [
        (replace(IMAGE, needs_context=True, **CONTEXT), "context", "needs a context"),
        (replace(IMAGE, num_classes=3, class_embedding="table"), "labels", "are needed"),
    ],
)
def test_refuses_a_call_without_what_is_needed(config, missing, message):
    made = plan(UNet(config))
    with pytest.raises(ValueError, match=message):
        made(normal(2, 3, 8, 8), torch.tensor([1, 2]))


def test_refuses_a_shortcut_of_a_buffer_and_a_skip_without_a_convolution():
    """No kernel concatenates buffers: a shortcut of two without a convolution cannot be planned."""
    config = replace(IMAGE, block_out_channels=(8, 16), layers_per_block=(0, 0), mid_blocks=0)
    made = plan(UNet(config))
    with pytest.raises(ValueError, match=r"expected one buffer, got buffers of \[8, 8\] channels"):
        made(normal(2, 3, 8, 8), torch.tensor([1, 2]))


def test_refuses_to_be_moved_or_cast():
    made = plan(network("image"))
    expected = made(**inputs("image"))
    for move in (
        lambda: made.to(torch.bfloat16),
        lambda: made.double(),
        lambda: made.half(),
        lambda: made.to("meta"),
        lambda: torch.nn.ModuleList([made]).to("meta", torch.float64),
    ):
        with pytest.raises(RuntimeError, match=r"packed for torch\.float32 on the CPU"):
            move()
    assert made.to(torch.float32) is made.to("cpu") is made.float() is made
    assert torch.equal(made(**inputs("image")), expected)


@pytest.mark.parametrize("case", ["image, context", "video", "image, odd size"])
@all_dtypes
def test_weights_are_held_once(case, dtype):
    unet = network(case)
    before = sum(p.numel() for p in unet.parameters())
    parameters = dict(unet.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PlannedUNet(unet, dtype)
    kept = ("time_embedding", "class_embedding", "frame_embedding", "embedding_mixer")
    for name, parameter in parameters.items():
        embeds = name.startswith(kept)
        if embeds or "norm" in name or name.endswith("relative_attention_bias.weight"):
            assert parameter.numel() and parameter.dtype in (torch.float32, torch.float64)
        else:
            assert not parameter.numel(), name
    assert sum(p.numel() for p in unet.parameters()) < before / 2
    packed = [b for name, b in made.named_buffers() if name.startswith("packed_")]
    assert packed and all(b.dtype is torch.int32 and b.numel() for b in packed)
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == {"unet"}
    assert all(name.startswith(kept) for name, _ in made.unet.named_parameters())


def test_modules_around_see_its_embeddings():
    made = plan(network("image, classes"))
    assert made.class_embedding is made.unet.class_embedding is not None
    assert plan(network("image")).class_embedding is None
    assert made.config == CASES["image, classes"][0]
