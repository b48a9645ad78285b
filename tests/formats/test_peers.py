"""Published networks, loaded into our UNet family and compared with diffusers' own."""

import pytest
import torch
from seeded import filled, normal
from torch import nn

from vfengine.models import PlannedUNet, UNet, load_unet, read_unet
from vfengine.plan.cuda import CudaUNet

SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
}
SHAPE_2D = {
    **SMALL,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SHAPE_3D = {
    **SMALL,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
PLAIN = {
    "down_block_types": ("DownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 2,
}
THREE = {
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
CASES = {  # changes to a shape, and the shape of x: [B, C, H, W] or [B, N, C, H, W]
    "plain": (PLAIN, (2, 4, 8, 8)),
    "cross": ({}, (2, 4, 8, 8)),
    "one level": (
        {
            "block_out_channels": (16,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        },
        (2, 4, 5, 8),
    ),
    "no middle": ({"mid_block_type": None}, (1, 4, 8, 8)),
    "no context": (
        {**PLAIN, "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": (None, None)},
        (2, 4, 8, 8),
    ),
    "linear": ({"use_linear_projection": True, "upcast_attention": True}, (2, 4, 8, 8)),
    "depth": ({**THREE, "transformer_layers_per_block": (1, 3, 2)}, (1, 4, 12, 8)),
    "heads": (
        {**THREE, "attention_head_dim": (2, 3, 8), "layers_per_block": (1, 2, 1)},
        (1, 4, 8, 8),
    ),
    "odd size": (THREE, (2, 4, 11, 7)),
    "classes": ({"num_class_embeds": 5, "class_embed_type": None}, (2, 4, 8, 8)),
    "timestep class": ({"class_embed_type": "timestep"}, (2, 4, 8, 8)),
    "projected class": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 7},
        (2, 4, 8, 8),
    ),
    "embedding": ({"flip_sin_to_cos": False, "freq_shift": 1}, (2, 4, 8, 8)),
    "wide": ({"block_out_channels": (40, 40), "attention_head_dim": 8}, (1, 4, 8, 8)),
    "scale shift": ({"resnet_time_scale_shift": "scale_shift", "norm_eps": 1e-6}, (2, 4, 8, 8)),
    "channels": ({"in_channels": 9, "out_channels": 3, "center_input_sample": False}, (1, 9, 8, 8)),
    "video": ({}, (2, 3, 4, 8, 8)),
    "video, one frame": ({}, (2, 1, 4, 8, 8)),
    "video, odd size": ({"layers_per_block": 2, "norm_eps": 1e-6}, (1, 4, 4, 9, 7)),
    "video, many heads": ({"attention_head_dim": 4}, (1, 5, 4, 8, 8)),
    "video, plain": (
        {"down_block_types": ("DownBlock3D",) * 2, "up_block_types": ("UpBlock3D",) * 2},
        (1, 3, 4, 8, 8),
    ),
}


def peer_of(case: str, gain: float = 1.0) -> nn.Module:
    from diffusers import UNet2DConditionModel, UNet3DConditionModel

    changes, shape = CASES[case]
    kind, base = (
        (UNet2DConditionModel, SHAPE_2D) if len(shape) == 4 else (UNet3DConditionModel, SHAPE_3D)
    )
    return filled(kind(**{**base, **changes}), gain)


def inputs(case: str) -> dict:
    changes, shape = CASES[case]
    batch = shape[0]
    values = {"x": normal(*shape), "t": torch.tensor([7, 801])[:batch], "context": None}
    if "cross_attention_dim" not in changes:
        values["context"] = normal(batch, 5, 12, seed=2)
    if case in ("classes", "timestep class"):
        values["class_labels"] = torch.tensor([4, 2])[:batch]
    if case == "projected class":
        values["class_labels"] = normal(batch, 7, seed=3)
    return values


@torch.no_grad()
def run_peer(peer: nn.Module, x, t, context, class_labels=None, dtype=torch.float32):
    x, context = x.to(dtype), None if context is None else context.to(dtype)
    if class_labels is not None and class_labels.is_floating_point():
        class_labels = class_labels.to(dtype)
    video = x.dim() == 5
    out = peer(
        x.transpose(1, 2) if video else x,
        t,
        encoder_hidden_states=context,
        class_labels=class_labels,
    ).sample
    return out.transpose(1, 2) if video else out


def run_ours(unet: UNet, x, t, context, class_labels=None):
    if context is not None and unet.config.context_dim is None:
        context = None  # the peer takes one and leaves it
    return unet(x, t, context, class_labels=class_labels)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    assert out.shape == expected.shape
    out, expected = out.double(), expected.double()
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("gain", [1.0, 1.6], ids=["unit", "large"])
@pytest.mark.parametrize("case", CASES)
def test_matches_diffusers(case, gain, tmp_path):
    """The module, and the planned network that `load_unet` makes of it on a CPU."""
    peer = peer_of(case, gain)
    peer.save_pretrained(tmp_path)
    given = inputs(case)
    expected = run_peer(peer, **given)
    for load, kind in ((read_unet, UNet), (load_unet, PlannedUNet)):
        unet = load(tmp_path, torch.float32)
        assert type(unet) is kind
        assert not unet.training
        assert not any(p.requires_grad for p in unet.parameters())
        assert error(run_ours(unet, **given), expected) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_walk_on_cuda_matches_diffusers(case, tmp_path, monkeypatch):
    """With the references of its ops."""
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")
    peer, given = peer_of(case, 1.6), inputs(case)
    peer.save_pretrained(tmp_path)
    unet = CudaUNet(read_unet(tmp_path, torch.float32), torch.float32)
    assert error(run_ours(unet, **given), run_peer(peer, **given)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_exact_as_diffusers(case, tmp_path):
    peer, given = peer_of(case), inputs(case)
    peer.save_pretrained(tmp_path)
    out = run_ours(load_unet(tmp_path), **given)
    assert out.dtype == given["x"].dtype
    expected = run_peer(peer.double(), **given, dtype=torch.float64)
    theirs = run_peer(peer.bfloat16(), **given, dtype=torch.bfloat16)
    assert error(out, expected) < 1.5 * error(theirs, expected)
